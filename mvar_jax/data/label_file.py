"""Label files of a flat folder of images, such as ImageNet's validation images.

A line is `FILE LABEL` (separated by a space, a tab or a comma; more columns are ignored), or a label alone: then the
lines follow the file names in order. A label is the name of a class, such as n01440764 or golden retriever, or its
number from 0. Several lines of one file must agree. The ILSVRC2012 devkit's list has numbers of an order of its own,
which the `meta.mat` beside it explains.
"""

import io
from collections.abc import Sequence, Set
from pathlib import Path, PurePosixPath

import numpy as np

from mvar_jax.errors import InputError, shorten

DEVKIT_LIST = "ILSVRC2012_validation_ground_truth.txt"
DEVKIT_META = "meta.mat"


def _refuse(file: Path, reason: str, expected: str) -> InputError:
    message = f"label file {file} must hold {expected}: {reason}"
    return InputError(message, field="data.val_labels", given=str(file), expected=expected)


def read_labels(file: Path, images: Sequence[str], classes: Sequence[str]) -> tuple[np.ndarray, int]:
    """Read the labels of images.

    Args:
      file: the label file.
      images: names of the images, relative to their folder, in order.
      classes: names of the classes in the order of their labels.

    Returns:
      (labels int32, one of each image; number of lines that name no image).

    Raises:
      InputError: the file is unreadable, an image has no label or two, or a label is no class.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise _refuse(file, f"it cannot be read ({shorten(error)})", "a label for each validation image") from None
    names = set(classes)
    if all(_is_number(line) or line in names for line in lines):
        if len(lines) != len(images):
            reason = f"it has {len(lines):,} lines, but there are {len(images):,} images"
            raise _refuse(file, reason, "as many labels as there are images")
        texts, unused = _explain_devkit(file, lines, len(classes)), 0
    else:
        known = {name for image in images for name in _names_of(image)}
        label_of: dict[str, str] = {}
        unused = 0
        for line in lines:
            name, text = _split(line, known)
            label = _plain(text, names)
            unused += name not in known
            if name in known and label_of.setdefault(name, label) != label:
                reason = f"it has both {label_of[name]!r} and {label!r} for {name}"
                raise _refuse(file, reason, "one label for each validation image")
        texts = [_look_up(label_of, image) for image in images]
        missing = [image for image, text in zip(images, texts, strict=True) if text is None]
        if missing:
            raise _refuse(file, f"it has none for {missing[0]}", "a label for each validation image")
    return _numbers_of(file, texts, classes), unused


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _split(line: str, known: Set[str]) -> tuple[str, str]:
    """Return (name of the image, label and further columns) of a line. known: names of the images."""
    for separator in ("\t", ","):
        if separator in line:
            name, label = line.split(separator)[:2]
            return name.strip(), label.strip()
    name, _, label = line.rpartition(" ")
    while " " in name and name not in known:  # a name of a file, and one of a class, may hold spaces
        name = name.rpartition(" ")[0]
    if name not in known:
        name = line.partition(" ")[0]
    return name, line.removeprefix(name).strip()


def _names_of(image: str) -> tuple[str, str, str]:
    """Return the names by which a line may mean an image: with its folders, without them, without its suffix too."""
    path = PurePosixPath(image)
    return image, path.name, path.stem


def _look_up(label_of: dict[str, str], image: str) -> str | None:
    return next((label_of[name] for name in _names_of(image) if name in label_of), None)


def _plain(text: str, classes: Set[str]) -> str:
    """Return a label without further columns: Kaggle's list of ImageNet has boxes after the class."""
    return text if text in classes or not text else text.split()[0]


def _numbers_of(file: Path, texts: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    number_of = {name: number for number, name in enumerate(classes)}
    if all(text in number_of for text in texts):
        return np.array([number_of[text] for text in texts], np.int32)
    is_in_range = lambda text: _is_number(text) and int(text) < len(classes)
    if all(map(is_in_range, texts)):
        return np.array(list(map(int, texts)), np.int32)
    others = [text for text in texts if text not in number_of]
    wrong = next((text for text in others if not is_in_range(text)), others[0])  # or names and numbers are mixed
    if _is_number(wrong) and int(wrong) == len(classes):
        raise _needs_meta(file, len(classes))
    raise _refuse(file, f"{wrong!r} is neither", f"names of classes, or numbers from 0 to {len(classes) - 1}")


def _explain_devkit(file: Path, texts: list[str], num_classes: int) -> list[str]:
    """Return the names of classes for the devkit's own numbers; other lists are returned as they are."""
    if not all(map(_is_number, texts)):
        return texts
    meta = file.with_name(DEVKIT_META)
    if not meta.is_file():
        if file.name == DEVKIT_LIST:
            raise _needs_meta(file, num_classes)
        return texts
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta.read_bytes()), squeeze_me=True)["synsets"]
        name_of = {str(int(synset["ILSVRC2012_ID"])): str(synset["WNID"]) for synset in synsets}
        return [name_of[str(int(text))] for text in texts]
    except Exception as error:  # scipy raises anything at all on damaged bytes
        reason = f"{meta} does not explain its numbers ({type(error).__name__}: {shorten(error)})"
        raise _refuse(file, reason, "numbers of the ILSVRC2012 devkit") from None


def _needs_meta(file: Path, num_classes: int) -> InputError:
    reason = "its numbers begin at 1, in an order that is not that of the class folders; put the devkit's "
    reason += f"{DEVKIT_META} beside it, or write lines FILE CLASS"
    return _refuse(file, reason, f"names of classes, or numbers from 0 to {num_classes - 1}")
