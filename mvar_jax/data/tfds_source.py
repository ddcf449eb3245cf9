"""Any image-classification set of TensorFlow Datasets that was prepared as ArrayRecord; no TensorFlow is run."""

from typing import Any

import numpy as np

from mvar_jax.data.protocols import ImageSource, digest
from mvar_jax.errors import InputError, shorten
from mvar_jax.files.paths import local_path

_VALIDATION_NAMES = ("validation", "val", "test")


def _refuse(name: str, reason: str, expected: str) -> InputError:
    return InputError(
        f"data.name must be {expected}, got {name!r}{reason}", field="data.name", given=name, expected=expected
    )


def _find_builder(name: str, data_dir: str):
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.registered import DatasetNotFoundError
    except ImportError as error:
        message = f"config.data.source='tfds' needs TensorFlow Datasets ({error}); pip install 'mvar_jax[tfds]'"
        raise InputError(message, field="data.source", given="tfds") from None
    expected = "the name of a TFDS data set, such as imagenet2012"
    if not name:
        raise _refuse(name, "; set it with --config.data.name=NAME", expected)
    try:
        folder = str(local_path(data_dir, "data.path", "ArrayRecord files are read in place")) if data_dir else None
        builder = tfds.builder(name, data_dir=folder, try_gcs=False)
    except InputError:
        raise
    except DatasetNotFoundError:
        raise _refuse(name, "", expected) from None
    except Exception as error:  # raised by the set's own code
        raise _refuse(name, f" ({shorten(error)})", "a TFDS data set that can be opened") from None
    if not builder.info.splits:
        prepare = f", which is not in {builder.data_dir}; prepare it (see launch/prepare_imagenet.sh)"
        raise _refuse(name, prepare, "a data set prepared as ArrayRecord")
    return builder


def _only_feature(builder, kind: type) -> str:
    found = [key for key, feature in builder.info.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        expected = f"a data set whose examples have one {kind.__name__}"
        raise _refuse(builder.name, f", whose examples have {len(found)}", expected)
    return found[0]


def val_split(name: str, data_dir: str) -> str | None:
    """Return the set's name of its validation split: "validation", "val" or else "test", None if it has none.

    Raises InputError if the set is unknown, not prepared or has no split "train".
    """
    splits = _find_builder(name, data_dir).info.splits
    if "train" not in splits:
        expected = "a data set with a split train"
        raise _refuse(name, f", which has {', '.join(map(str, splits))}", expected)
    return next((known for known in _VALIDATION_NAMES if known in splits), None)


class TfdsSource(ImageSource):
    """One split by its TFDS name; items hold the bytes of an image file as they were stored.

    Args:
      name: name of the data set.
      data_dir: where the set was prepared; "" for TFDS's own default. Nothing is downloaded.
      split: the split by its TFDS name.

    Raises:
      InputError: the set is unknown, was not prepared as ArrayRecord, or does not have exactly one image and one
        label.
    """

    def __init__(self, name: str, data_dir: str, split: str):
        builder = _find_builder(name, data_dir)
        import tensorflow_datasets as tfds

        self._image = _only_feature(builder, tfds.features.Image)
        self._label = _only_feature(builder, tfds.features.ClassLabel)
        self._name = f"{name} {split}"
        info = builder.info.splits[split]
        self._made = (builder.info.full_name, split, info.num_examples, info.num_bytes, info.shard_lengths)
        self.label_names = tuple(builder.info.features[self._label].names)
        decoders = {self._image: tfds.decode.SkipDecoding()}
        try:
            self._data = builder.as_data_source(split, decoders=decoders)
        except (NotImplementedError, ValueError):
            reason = f", which has another format in {builder.data_dir}"
            raise _refuse(name, reason, "a data set prepared with file_format=array_record") from None

    def __len__(self) -> int:
        return len(self._data)

    def name_of(self, index: int) -> str:
        """Return the item's number in the split, followed by its file name if the set keeps it."""
        file_name = self._data[index].get("file_name", b"")
        file_name = file_name.decode() if isinstance(file_name, bytes) else str(file_name)
        return f"{self._name} {index} {file_name}".rstrip()

    def files_digest(self, numbers: np.ndarray, *, with_sizes: bool) -> str:
        """Return a digest of version and sizes of the set, which stand for its files; "" without sizes."""
        return digest(map(str, self._made)) if with_sizes else ""

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._data[range(len(self))[index]]
        return {"image": bytes(example[self._image]), "label": int(example[self._label])}
