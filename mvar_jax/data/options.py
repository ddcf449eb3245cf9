"""Options of the images: the `data` section of a config, and those of loading batches."""

import dataclasses
from typing import Annotated

from mvar_jax.data.protocols import ImageSource, Transform
from mvar_jax.errors import InputError
from mvar_jax.fields import FREE, check_fields
from mvar_jax.schema import Count, Decay, Natural, NotNegative, Range, Share, Views

Workers = Annotated[int, Range(least=0, most=1024)]


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """Options of the loading of batches.

    Attributes:
      num_threads: threads that prepare batches in the background; 0 prepares a batch when it is asked for.
      num_workers: processes that do it instead, each with `num_threads` threads; 0 for none.
      max_bad_share: largest share of a split's images that may be unusable.

    Raises:
      InputError: a value is out of range.
    """

    num_threads: Workers = 1
    num_workers: Workers = 0
    max_bad_share: Share = 0.01

    def __post_init__(self):
        check_fields(self, "config.data")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Options of the images: which, how they are augmented, and how they are loaded.

    A field that has no meaning for the source must keep its default.

    Attributes:
      source: data set: digits, photos, synthetic, folder, tfds or tars.
      image_size: side in pixels of the square images that the tokenizer sees.
      split_seed: seed of the held-out split, or of the generated images (synthetic); not of photos.
      val_fraction: share held out for validation if the data set has no split of its own (all but synthetic); of
        files by class and name, of photos the right part. 0 holds out none: training then has no evaluation.
      size: number of images of each split to keep; 0 keeps all. synthetic needs 1 or more.
      flip: mirror each image with probability 1/2; a token cache then holds both (all but digits).
      degrees: largest rotation in degrees, either way (digits).
      shift_px: largest shift in pixels of the 8x8 original, along each axis (digits).
      scale: largest relative change of size (digits).
      shear: largest horizontal shear (digits).
      path: folder of the images (folder, tars) or of the prepared data (tfds; "" for TFDS's default).
      val_labels: labels of a flat folder val, a file of lines FILE LABEL or LABEL; "" for PATH/val.txt (folder).
      class_order: names of the classes in the order of their labels; () sorts them, by number if all are numbers
        (folder).
      name: name of the TFDS data set, such as imagenet2012 (tfds).
      crop: centre (as ADM, arXiv 2105.05233), random (ADM's random crop) or resized (random share of the area).
      min_crop: smallest share of the side (random) or of the area (resized) that a crop keeps.
      upright: obey the camera's orientation tag. False gives the pixels of the published programs.
      num_views: views of each training image in a token cache: with crop=centre 1, or 2 with flip.
      cache: token cache that a transformer trains from; "" for none.
      cache_memory_mib: hold a split of the cache in memory if it is no larger than this; 0 reads from files.
      cache_disk_mib: copy shards of a cache in an object store to this machine's disk, up to this size in all; more
        records are read from the store one by one. Copies are kept for the next run.
      cache_folder: folder of these copies, shared by the processes of a machine; "" for one in the temporary folder.
      tokenizer: model directory that encodes images inside the training step. Beside a cache, the tokenizer that made
        it; "" takes the cache's own.
      num_threads: threads that prepare batches, in each worker process if there are any.
      num_workers: worker processes that prepare batches; 0 for threads alone. Batches do not use /dev/shm, so its
        size does not matter; a token cache in memory is held once for all of them.
      max_bad_share: share of a split's images that may be unreadable before the run stops.

    Raises:
      InputError: a value is out of range or has no meaning for the source.
    """

    source: str
    image_size: Count
    split_seed: int = 0
    val_fraction: float = 0.2
    size: Natural = 0
    flip: bool = False
    degrees: NotNegative = 0.0
    shift_px: NotNegative = 0.0
    scale: Decay = 0.0
    shear: NotNegative = 0.0
    path: str = dataclasses.field(default="", metadata=FREE)
    val_labels: str = dataclasses.field(default="", metadata=FREE)
    class_order: tuple[str, ...] = dataclasses.field(default=(), metadata=FREE)
    name: str = ""
    crop: str = "centre"
    min_crop: float = 0.8
    upright: bool = True
    num_views: Views = 1
    cache: str = dataclasses.field(default="", metadata=FREE)
    cache_memory_mib: Natural = dataclasses.field(default=256, metadata=FREE)
    cache_disk_mib: Natural = dataclasses.field(default=8192, metadata=FREE)
    cache_folder: str = dataclasses.field(default="", metadata=FREE)
    tokenizer: str = dataclasses.field(default="", metadata=FREE)
    num_threads: Workers = dataclasses.field(default=1, metadata=FREE)
    num_workers: Workers = dataclasses.field(default=0, metadata=FREE)
    max_bad_share: Share = dataclasses.field(default=0.01, metadata=FREE)

    def __post_init__(self):
        check_fields(self, "config.data")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in self.idle_fields():
            given, default = getattr(self, name), defaults[name]
            if given != default:
                field = f"config.data.{name}"
                message = (
                    f"{field} has no meaning for data.source={self.source}; leave it at {default!r}, got {given!r}"
                )
                raise InputError(message, field=field, given=given, expected=repr(default))

    def loading(self) -> LoadOptions:
        """Return the options of the loading of batches."""
        return LoadOptions(self.num_threads, self.num_workers, self.max_bad_share)

    def describe(self) -> dict:
        """Return the fields that decide on the pixels, which are stored with a cache of their tokens."""
        left_out = {"num_views", "cache", "cache_memory_mib", "cache_disk_mib", "cache_folder", "tokenizer"}
        left_out |= {"num_threads", "num_workers", "max_bad_share", "class_order", "val_labels"}
        left_out |= set(self.idle_fields()) - {"flip"}  # caches of digits have always listed it
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}

    def idle_fields(self) -> tuple[str, ...]:
        """Return the fields that have no meaning for the source."""
        if self.source == "digits":
            return ("path", "class_order", "val_labels", "name", "flip", "crop", "min_crop", "upright")
        of_digits = ("degrees", "shift_px", "scale", "shear")
        others = {"synthetic": ("path", "name"), "folder": ("name",), "tars": ("name",)}
        others["photos"] = ("path", "name", "split_seed", "crop", "min_crop", "upright")
        of_folder = () if self.source == "folder" else ("class_order", "val_labels")
        return of_digits + of_folder + others.get(self.source, ())

    def transform(self, channels: int = 3) -> Transform:
        """Return the transform of the source's images. channels: 1 (grey), 3 (RGB) or 4 (RGBA)."""
        from mvar_jax.data.transforms import DigitTransform, PhotoTransform

        if self.source == "digits":
            return DigitTransform(self.image_size, self.degrees, self.shift_px, self.scale, self.shear, channels)
        return PhotoTransform(self.image_size, self.flip, self.crop, self.min_crop, self.upright, channels)

    def open(self, split: str) -> ImageSource:
        """Return the source of a split. Raises InputError if it cannot be opened."""
        from mvar_jax.data.sources import open_source

        return open_source(
            self.source,
            split,
            path=self.path,
            tfds_name=self.name,
            split_seed=self.split_seed,
            val_fraction=self.val_fraction,
            size=self.size,
            class_order=self.class_order,
            val_labels=self.val_labels,
            image_size=self.image_size,
        )

    def open_all(self) -> dict[str, ImageSource]:
        """Return the source of every split that the data have; there may be no "val". Raises InputError as `open`."""
        from mvar_jax.data.sources import splits_of

        splits = splits_of(self.source, path=self.path, tfds_name=self.name, val_fraction=self.val_fraction)
        return {split: self.open(split) for split in splits}
