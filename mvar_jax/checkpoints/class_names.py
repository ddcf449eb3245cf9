"""Class names: those kept with a model, and ImageNet's 1,000, which ship with the project."""

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
    """The names of classes 0, 1, ...: one or more spellings of each, the first for display."""

    def __init__(self, spellings: Sequence[Sequence[str]] = ()):
        self.names = tuple(first for first, *_ in spellings)
        # (simplify, class numbers by simplified name), from the strictest comparison to the loosest
        self._tables: list[tuple[Callable[[str], str], dict[str, list[int]]]] = [
            (str, _number_by_name((name, i) for i, (name, *_) in enumerate(spellings))),
            (_simplify, _number_by_name((_simplify(name), i) for i, (name, *_) in enumerate(spellings))),
            (_simplify, _number_by_name((_simplify(name), i) for i, every in enumerate(spellings) for name in every)),
        ]

    def find(self, text: str) -> int:
        """Return the number of the class that `text` names; case and underscores matter only if needed.

        Raises InputError for an unknown name, with the nearest known one, or for one that several classes share.
        """
        for simplify, numbers in self._tables:
            found = numbers.get(simplify(text), ())
            if len(found) == 1:
                return found[0]
            if found:
                several = " or ".join(f"{number} ({self.names[number]})" for number in found)
                words = f"labels: several classes are called {text!r}; give a number: {several}"
                raise InputError(words, field="labels", given=text, expected=several)
        loosest = self._tables[-1][1]
        near = difflib.get_close_matches(_simplify(text), loosest, n=1)
        if near:
            words = f"labels: unknown class {text!r}. Did you mean {near[0]} ({loosest[near[0]][0]})?"
            raise InputError(words, field="labels", given=text, expected=near[0])
        expected = "class names or numbers" if self.names else "class numbers"
        words = f"labels must be {expected} separated by commas, such as 207,360 or 0-9, got {text!r}"
        raise InputError(words, field="labels", given=text, expected=expected)


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

    ImageNet's names stand in for 1,000 classes without names or with WordNet numbers. A directory that is no model
    has no names; loading it reports what is wrong. Raises InputError if the list of names cannot be read.
    """
    path = directory / CLASSES_FILE
    try:
        own = tuple(json.loads(path.read_text())) if path.exists() else ()
    except (OSError, ValueError, TypeError) as error:
        words = f"checkpoint {directory} has no readable {CLASSES_FILE}: {error}"
        expected = f"a directory with a readable {CLASSES_FILE}"
        raise InputError(words, field="checkpoint", given=str(directory), expected=expected) from None
    try:
        num_classes = json.loads((directory / MODEL_FILE).read_text())["transformer"]["num_classes"]
    except (OSError, ValueError, KeyError, TypeError):
        num_classes = None
    imagenet = imagenet_spellings() if num_classes == NUM_IMAGENET_CLASSES else ()
    if not own or own == tuple(wordnet for *_, wordnet in imagenet):
        return ClassNames(imagenet)
    return ClassNames([(name,) for name in own])
