"""Class names and labels: the names kept with a model, ImageNet's 1,000, and what a user may call a class."""

import difflib
import functools
import importlib.resources
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvar_jax.checkpoints.model_directory import CLASSES_FILE, MODEL_FILE, read_model_file
from mvar_jax.errors import InputError, shorten, show
from mvar_jax.files.json_files import read_json
from mvar_jax.values import as_array

NUM_IMAGENET_CLASSES = 1000
NAME, NUMBER = "name:", "#"  # before a label: it is a name, or a number or a range of numbers
_COMMA = re.compile(r"(?<!\\),")  # between labels; the comma of a name is written \,
_RANGE = re.compile(r"(-?\d{1,18})(?:-(\d{1,18}))?")
MOST_CLASSES = 2**20  # of a model whose number of classes is not known


class ClassNames:
    """The names of classes 0, 1, ...: one or more spellings of each, the first for display.

    Args:
      spellings: of each class; empty if the classes have no names.
      num_classes: number of classes, by default as many as have names; None if it is not known.
    """

    def __init__(self, spellings: Sequence[Sequence[str]] = (), num_classes: int | None = None):
        self.names = tuple(first for first, *_ in spellings)
        self.num_classes = len(spellings) or num_classes
        # (simplify, class numbers by simplified name), from the strictest comparison to the loosest
        self._tables: list[tuple[Callable[[str], str], dict[str, list[int]]]] = [
            (str, _number_by_name((name, i) for i, (name, *_) in enumerate(spellings))),
            (_simplify, _number_by_name((_simplify(name), i) for i, (name, *_) in enumerate(spellings))),
            (_simplify, _number_by_name((_simplify(name), i) for i, every in enumerate(spellings) for name in every)),
        ]
        names = ((int(name), i) for i, name in enumerate(self.names) if re.fullmatch(r"\d{1,18}", name))
        self._misnumbered = {number: i for number, i in names if number != i}  # classes called by another number

    def numbers_of(self, labels: Any) -> np.ndarray:
        """Return the class numbers that labels mean, `[B] int32`; the same in Python and on the command line.

        labels: text such as "207,golden retriever,0-9", or a sequence of numbers and of such texts, each one label;
        see `parse`. Raises InputError for a label that is not a class, or if there are no labels.
        """
        if isinstance(labels, str):
            labels = [part.replace("\\,", ",") for part in _COMMA.split(labels)]
        elif isinstance(labels, np.ndarray) and labels.dtype.kind in "UO":
            labels = labels.tolist()
        if isinstance(labels, list | tuple):
            parts = [self.parse(label) if isinstance(label, str) else (label,) for label in labels]
            labels = [label for part in parts for label in part]
        return check_labels(labels, self.num_classes)

    def parse(self, text: str) -> Sequence[int]:
        """Return the numbers of the classes that one label means: a name, a number, or a range such as 0-9.

        "name:" before it makes it a name, "#" a number or a range. Raises InputError for an unknown class, a range
        that decreases, or a number that is also the name of another class.
        """
        text = text.strip()
        if text.startswith(NAME):
            return (self.find(text.removeprefix(NAME).strip()),)
        plain = text.removeprefix(NUMBER)
        match, named = _RANGE.fullmatch(plain), self.numbers_named(text)
        if match is None:
            return (self.find(text),)
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1)
        if named and not (numbers and numbers[0] >= 0 and numbers[-1] < len(self.names)):
            return (self.find(text),)
        if not numbers:
            words = f"labels: a range must increase, such as 0-9, got {text}"
            raise InputError(words, field="labels", given=text, expected="an increasing range")
        check_labels([numbers[0], numbers[-1]], self.num_classes)
        if named and named != [*numbers]:
            self._refuse_both(text, text, named[0])
        if plain == text:  # the number or range may mean classes that are called 0, 1, 10, 2
            candidates = min(numbers, self._misnumbered, key=len)
            for number in (n for n in candidates if n in numbers and n in self._misnumbered):
                self._refuse_both(text, self.names[self._misnumbered[number]], self._misnumbered[number])
        return numbers

    def find(self, text: str) -> int:
        """Return the number of the class that `text` names; case and underscores matter only if needed.

        Raises InputError for an unknown name, with the nearest known one, or for one that several classes share.
        """
        found = self.numbers_named(text)
        if len(found) == 1:
            return found[0]
        if found:
            several = " or ".join(f"{number} ({self.names[number]})" for number in found)
            words = f"labels: several classes are called {text!r}; give a number: {several}"
            raise InputError(words, field="labels", given=text, expected=several)
        loosest = self._tables[-1][1]
        near = difflib.get_close_matches(_simplify(text), loosest, n=1)
        if near:
            words = f"labels: unknown class {show(text)}. Did you mean {near[0]} ({loosest[near[0]][0]})?"
            raise InputError(words, field="labels", given=text, expected=near[0])
        expected = "class names or numbers" if self.names else "class numbers"
        words = f"labels must be {expected} separated by commas, such as 207,360 or 0-9, got {show(text)}"
        if self.names:
            first = ", ".join(f"{number} {name}" for number, name in enumerate(self.names[:5]))
            words += f"; the classes are {first}" if len(self.names) <= 5 else f"; the first classes are {first}, ..."
        if any("," in name for name in self.names):
            words += "; a comma inside a name is written \\,"
        raise InputError(words, field="labels", given=text, expected=expected)

    def numbers_named(self, text: str) -> list[int]:
        """Return the classes of this name by the strictest comparison that finds one."""
        return next((found for simplify, numbers in self._tables if (found := numbers.get(simplify(text)))), [])

    def _refuse_both(self, text: str, name: str, number: int) -> None:
        other = f"the number of class {self.names[int(name)]!r}" if name.isdecimal() else "a range of numbers"
        expected = f"{NAME}{name} for the name, {NUMBER}{text.removeprefix(NUMBER)} for the number"
        meanings = f"{name!r} is the name of class {number} and {other}"
        words = f"labels: {text!r} has two meanings, since {meanings}; write {expected}"
        raise InputError(words, field="labels", given=text, expected=expected)


def check_labels(labels_B: Any, num_classes: int | None) -> np.ndarray:
    """Return class numbers as `[B] int32`.

    num_classes: None if it is not known. Raises InputError if there are no labels, or for the first label outside
    0 .. num_classes - 1.
    """
    expected = "a list of class numbers or class names"
    labels = as_array(labels_B, "labels", expected)
    if labels.ndim != 1 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
        words = f"labels must be {expected}, got {show(labels.tolist())}"
        raise InputError(words, field="labels", given=labels.tolist(), expected=expected)
    highest = (num_classes or MOST_CLASSES) - 1
    bad = labels[(labels < 0) | (labels > highest)]
    if len(bad):
        given, expected = int(bad[0]), f"0 to {highest}"
        words = f"labels must be class numbers from {expected}, got {given}"
        raise InputError(words, field="labels", given=given, expected=expected)
    return labels.astype(np.int32)


def _simplify(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _number_by_name(pairs) -> dict[str, list[int]]:
    numbers: defaultdict[str, list[int]] = defaultdict(list)
    for name, number in pairs:
        if number not in numbers[name]:
            numbers[name].append(number)
    return dict(numbers)


@functools.cache
def imagenet_spellings() -> tuple[tuple[str, ...], ...]:
    """Return name, other names and WordNet number of each ImageNet class, in the order of their numbers."""
    text = importlib.resources.files("mvar_jax.checkpoints").joinpath("imagenet_classes.txt").read_text()
    lines = (line.split(" ", 1) for line in text.splitlines())
    return tuple((*names.split(", "), wordnet) for wordnet, names in lines)


def class_names_of(directory: Path) -> ClassNames:
    """Load the class names kept in a model directory.

    ImageNet's names stand in for 1,000 classes without names or with WordNet numbers. Raises InputError if the
    directory is no model, or its list of names cannot be read or does not fit the model.
    """
    num_classes = read_model_file(directory).get("transformer", {}).get("num_classes")
    own = read_classes(directory)
    if own and num_classes not in (None, len(own)):
        words = f"checkpoint {directory} must have a {CLASSES_FILE} of {num_classes} names, one for each class of "
        words += f"{MODEL_FILE}, got {len(own)}"
        raise InputError(words, field="checkpoint", given=str(directory), expected=f"{num_classes} names")
    imagenet = imagenet_spellings() if num_classes == NUM_IMAGENET_CLASSES else ()
    if not own or own == tuple(wordnet for *_, wordnet in imagenet):
        return ClassNames(imagenet, num_classes)
    return ClassNames([(name,) for name in own])


def read_classes(directory: Path, field: str = "checkpoint") -> tuple[str, ...]:
    """Return the class names kept in a model directory or workdir, in the order of the labels; () if it has none.

    field: what an error calls the directory. Raises InputError if the list cannot be read.
    """
    path = directory / CLASSES_FILE
    try:
        return read_json(path, tuple[str, ...]) if path.exists() else ()
    except (OSError, ValueError) as error:
        words = f"{field} {directory} has no readable {CLASSES_FILE}: {shorten(error)}"
        expected = f"a directory with a readable {CLASSES_FILE}"
        raise InputError(words, field=field, given=str(directory), expected=expected) from None
