"""Dataclasses from dicts of their fields, as configs and `model.json` hold them, checked by their annotations."""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any

from mvar_jax.errors import InputError

# metadata of a field that does not change what is learned, so a run may resume with another value
FREE = {"is_free": True}


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that an annotation allows: `least` to `most`, or without an end itself; infinity never."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def allows(self, value: float) -> bool:
        """Return whether a number is inside."""
        return self.least <= value <= self.most and self.above < value < self.below

    def describe(self) -> str:
        """Return the range in words that follow "a number"."""
        begin = f"above {self.above}" if self.above > -math.inf else f"of at least {self.least}"
        if self.below < math.inf:
            end = f"below {self.below}"
        elif self.most < math.inf:
            end = f"{self.most}" if self.above == -math.inf else f"up to {self.most}"
        else:
            return begin
        if self.above > -math.inf:
            return f"{begin} and {end}"
        return f"from {self.least} to {end}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The texts that an annotation allows."""

    texts: tuple[str, ...]

    def allows(self, value: str) -> bool:
        """Return whether a text is one of them."""
        return value in self.texts


Natural = Annotated[int, Range(least=0)]
Count = Annotated[int, Range(least=1)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]
NotNegative = Annotated[float, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(least=0, most=1)]
Decay = Annotated[float, Range(least=0, below=1)]


def from_dict(cls: type, values: dict, where: str, hidden: Collection[str] = ()) -> Any:
    """Return a dataclass with these fields; lists become tuples.

    Args:
      cls: the dataclass.
      values: field name -> value; a field that is absent keeps its default.
      where: what a user calls `values`, such as "config.data".
      hidden: fields of the class that may not be given.

    Raises InputError for an unknown key, with the nearest known one, or a missing one, and whatever `cls` raises.
    """
    known = {field.name: field for field in dataclasses.fields(cls) if field.name not in hidden}
    check_keys(values, known, where)
    for name, field in known.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise InputError(f"{where}.{name} is missing and has no default", field=f"{where}.{name}")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def check_keys(values: dict, known: Collection[str], where: str) -> None:
    """Raise InputError for the first unknown key, with the nearest known one."""
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f". Did you mean {near[0]}?" if near else f"; known keys are {', '.join(sorted(known))}"
            raise InputError(f"unknown key {where}.{name}{hint}", field=f"{where}.{name}", given=values[name])


def check_fields(options: Any, where: str, hidden: Collection[str] = ()) -> None:
    """Raise InputError unless each field of a dataclass is what its annotation says; see `check_values`.

    hidden: fields that are left alone.
    """
    names = [field.name for field in dataclasses.fields(options) if field.name not in hidden]
    check_values(type(options), {name: getattr(options, name) for name in names}, where)


def check_values(annotated: type | Callable, values: dict, where: str) -> None:
    """Raise InputError unless each value is what the annotation of its name says.

    Args:
      annotated: the class or the function with the annotations; other names than its own are left alone.
      values: name -> value.
      where: what a user calls `values`, such as "config.data"; "" if they are no part of anything.
    """
    hints = _hints_of(annotated)
    for name, value in values.items():
        if name in hints and not _is_allowed(value, hints[name]):
            expected, field = describe(hints[name]), f"{where}.{name}" if where else name
            raise InputError(
                f"{field} must be {expected}, got {value!r}", field=field, given=value, expected=expected
            )


@functools.cache
def _hints_of(annotated: type | Callable) -> dict[str, Any]:
    return typing.get_type_hints(annotated, include_extras=True)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _is_allowed(value: Any, annotation: Any) -> bool:
    if annotation is Any:
        return True
    if len(several := _alternatives(annotation)) > 1:
        return any(_is_allowed(value, one) for one in several)
    if typing.get_origin(annotation) is Annotated:
        kind, rule = typing.get_args(annotation)
        return _is_allowed(value, kind) and rule.allows(value)
    if typing.get_origin(annotation) is tuple:
        element = typing.get_args(annotation)[0]
        return isinstance(value, tuple | list) and all(_is_allowed(one, element) for one in value)
    if isinstance(value, bool) and annotation is not bool:
        return False
    if annotation is float:
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, annotation)


def describe(annotation: Any) -> str:
    """Return in words what an annotation allows, such as "a whole number of at least 1 or None"."""
    if len(several := _alternatives(annotation)) > 1:
        return " or ".join(describe(one) for one in several)
    if typing.get_origin(annotation) is Annotated:
        kind, rule = typing.get_args(annotation)
        return f"{describe(kind)} {rule.describe()}" if isinstance(rule, Range) else _list(rule.texts)
    if typing.get_origin(annotation) is tuple:
        return (
            f"a tuple of {describe(typing.get_args(annotation)[0]).removeprefix('a ').replace('number', 'numbers')}"
        )
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text", types.NoneType: "None"}
    return words.get(annotation) or getattr(annotation, "__name__", str(annotation))


def _list(texts: Collection[str]) -> str:
    *most, last = texts
    return f"{', '.join(most)} or {last}"


def put_below(error: InputError, where: str) -> InputError:
    """Return the error of a field as the error of `where`.field, in the message too."""
    message = f"{where}.{error}" if str(error).startswith(error.field) else f"{where}: {error}"
    return InputError(message, field=f"{where}.{error.field}", given=error.given, expected=error.expected)


def flatten(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of nested dicts in order; keys of inner dicts follow those of outer ones after a dot."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
