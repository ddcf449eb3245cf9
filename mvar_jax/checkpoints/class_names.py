"""Classes by name: those that a model keeps, and ImageNet's 1,000, which ship with the project."""

import difflib
import functools
import importlib.resources
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from mvar_jax.checkpoints.model_directory import CLASSES_FILE, MODEL_FILE
from mvar_jax.errors import InputError

NUM_IMAGENET_CLASSES = 1000


class ClassNames:
    """The names of classes 0, 1, ...: one or more spellings of each, the first of which is shown to people."""

    def __init__(self, spellings: Sequence[Sequence[str]] = ()):
        self.names = tuple(first for first, *_ in spellings)
        # from the strictest way of reading a name to the loosest
        self._ways: list[tuple[Callable[[str], str], dict[str, list[int]]]] = [
            (str, _number_by_name((name, i) for i, (name, *_) in enumerate(spellings))),
            (_simplify, _number_by_name((_simplify(name), i) for i, (name, *_) in enumerate(spellings))),
            (_simplify, _number_by_name((_simplify(name), i) for i, every in enumerate(spellings) for name in every)),
        ]

    def find(self, text: str) -> int:
        """The number of the class that `text` names; case and underscores do not matter where they need not.

        Raises InputError for an unknown name, with the nearest known one, or for one that several classes share.
        """
        for simplify, numbers in self._ways:
            found = numbers.get(simplify(text), ())
            if len(found) == 1:
                return found[0]
            if found:
                several = " or ".join(f"{number} ({self.names[number]})" for number in found)
                raise InputError("labels", text, f"a name of one class, or its number: {several}")
        near = difflib.get_close_matches(_simplify(text), self._ways[-1][1], n=1)
        if near:
            number = self._ways[-1][1][near[0]][0]
            raise InputError("labels", text, f"a known class; {near[0]!r}, perhaps, which is {number}")
        names = "names of classes or numbers" if self.names else "numbers"
        raise InputError("labels", text, f"{names} with commas between them, as 207,360, or a range, as 0-9")


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
    """Of each of ImageNet's classes in the order of their numbers: name, other names, WordNet number."""
    text = importlib.resources.files("mvar_jax.checkpoints").joinpath("imagenet_classes.txt").read_text()
    lines = (line.split(" ", 1) for line in text.splitlines())
    return tuple((*names.split(", "), wordnet) for wordnet, names in lines)


def class_names_of(directory: Path) -> ClassNames:
    """Those that training kept in the directory; ImageNet's for 1,000 classes without names or by WordNet number.

    A directory that is no model has none: `mvar_jax.load` says what is wrong with it. Raises InputError for
    a list of names that cannot be read.
    """
    path = directory / CLASSES_FILE
    try:
        own = tuple(json.loads(path.read_text())) if path.exists() else ()
    except (OSError, ValueError, TypeError) as error:
        readable = f"a directory with a readable {CLASSES_FILE} ({error})"
        raise InputError("checkpoint", str(directory), readable) from None
    try:
        num_classes = json.loads((directory / MODEL_FILE).read_text())["transformer"]["num_classes"]
    except (OSError, ValueError, KeyError, TypeError):
        num_classes = None
    imagenet = imagenet_spellings() if num_classes == NUM_IMAGENET_CLASSES else ()
    if not own or own == tuple(wordnet for *_, wordnet in imagenet):
        return ClassNames(imagenet)
    return ClassNames([(name,) for name in own])
