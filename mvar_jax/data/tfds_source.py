"""Any image-classification set of TensorFlow Datasets that was prepared as ArrayRecord; no TensorFlow is run."""

from typing import Any

from mvar_jax.errors import InputError

_VALIDATION_NAMES = ("validation", "val", "test")


def _find_builder(name: str, data_dir: str):
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.registered import DatasetNotFoundError
    except ImportError as error:
        message = f"config.data.source='tfds' needs TensorFlow Datasets ({error}); pip install 'mvar_jax[tfds]'"
        raise InputError(message, field="data.source", given="tfds") from None
    if not name:
        raise InputError("data.name", name, "the name of a TFDS data set, as imagenet2012")
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, try_gcs=False)
    except DatasetNotFoundError:
        raise InputError("data.name", name, "the name of a TFDS data set, as imagenet2012") from None
    except Exception as error:  # of the set's own code
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError("data.name", name, f"a TFDS data set that can be opened ({reason[0]})") from None
    if not builder.info.splits:
        where = f"a data set prepared as ArrayRecord in {builder.data_dir} (see launch/prepare_imagenet.sh)"
        raise InputError("data.name", name, where)
    return builder


def _only_feature(builder, kind: type) -> str:
    found = [key for key, feature in builder.info.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        wanted = f"a data set whose examples have one {kind.__name__}, not {len(found)}"
        raise InputError("data.name", builder.name, wanted)
    return found[0]


def tfds_split(name: str, data_dir: str, split: str) -> str | None:
    """What the set calls "train" or "val" ("validation", "val" or else "test"); None where it has no such split.

    Raises InputError for an unknown or unprepared set.
    """
    splits = _find_builder(name, data_dir).info.splits
    wanted = ("train",) if split == "train" else _VALIDATION_NAMES
    return next((known for known in wanted if known in splits), None)


class TfdsSource:
    """One split by its TFDS name; items hold the bytes as they were stored.

    data_dir: where the set was prepared, "" for TFDS's own default. Nothing is downloaded.

    Raises:
      InputError: an unknown set, one that was not prepared as ArrayRecord, or one without exactly one image and
        one label.
    """

    def __init__(self, name: str, data_dir: str, split: str):
        builder = _find_builder(name, data_dir)
        import tensorflow_datasets as tfds

        self._image = _only_feature(builder, tfds.features.Image)
        self._label = _only_feature(builder, tfds.features.ClassLabel)
        self._name = f"{name} {split}"
        self.label_names = tuple(builder.info.features[self._label].names)
        decoders = {self._image: tfds.decode.SkipDecoding()}
        try:
            self._data = builder.as_data_source(split, decoders=decoders)
        except (NotImplementedError, ValueError):
            wanted = f"a data set prepared with file_format=array_record in {builder.data_dir}"
            raise InputError("data.name", name, wanted) from None

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    def __len__(self) -> int:
        return len(self._data)

    def name_of(self, index: int) -> str:
        """The file's name where the set keeps it, with its number in the split."""
        file_name = self._data[index].get("file_name", b"")
        file_name = file_name.decode() if isinstance(file_name, bytes) else str(file_name)
        return f"{self._name} {index} {file_name}".rstrip()

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._data[range(len(self))[index]]
        return {"image": bytes(example[self._image]), "label": int(example[self._label])}
