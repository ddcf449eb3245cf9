"""Values of configs and JSON files: whether they are of the type that a field has, and dataclasses of them."""

import dataclasses
import difflib
import numbers
import types
import typing
from collections.abc import Collection, Iterator
from typing import Any

from mvar_jax.errors import InputError

# metadata of a field that does not change what is learned, so a run may resume with another value
FREE = {"is_free": True}


def from_dict(cls: type, values: dict, where: str, hidden: Collection[str] = ()) -> Any:
    """Return a dataclass with these fields; lists become tuples.

    Args:
      cls: the dataclass.
      values: field name -> value; a field that is absent keeps its default.
      where: what a user calls `values`, such as "config.data".
      hidden: fields of the class that may not be given.

    Raises InputError for an unknown key, with the nearest known one, a missing one, or a value of another type than
    the field's, and whatever `cls` raises.
    """
    known = {field.name: field for field in dataclasses.fields(cls) if field.name not in hidden}
    check_keys(values, known, where)
    for name, field in known.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise InputError(f"{where}.{name} is missing and has no default", field=f"{where}.{name}")
    return cls(**{name: conform(value, known[name].type, f"{where}.{name}") for name, value in values.items()})


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "None"}
_NUMBERS = {int: numbers.Integral, float: numbers.Real}


def conform(value: Any, kind: Any, where: str) -> Any:
    """Return a value of a config or a JSON file, with lists as tuples if `kind` says so.

    Args:
      value: plain values, lists, tuples and dicts.
      kind: a type: bool, int, float (which takes whole numbers too), str, None, Any, X | Y, Literal, list[X],
        tuple[X, ...], dict[str, X] or a TypedDict, which may have further keys.
      where: what a user calls the value, such as "config.data.size".

    Raises InputError for the first value of another type, or a missing key.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        for one in args:
            if _is_of(value, one):
                return conform(value, one, where)
    elif _is_of(value, kind):
        if typing.is_typeddict(kind):
            return value | _conform_keys(value, kind, where)
        if origin is dict:
            return {key: conform(part, args[1], f"{where}.{key}") for key, part in value.items()}
        if origin in (list, tuple):
            return origin(conform(part, args[0], f"{where}[{i}]") for i, part in enumerate(value))
        return value
    expected, given = words_of(kind), describe(value)
    raise InputError(f"{where} must be {expected}, got {given}", field=where, given=value, expected=expected)


def _is_of(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type, without its parts."""
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        return any(value == one and type(value) is type(one) for one in typing.get_args(kind))
    if typing.is_typeddict(kind):
        return isinstance(value, dict)
    if isinstance(value, bool):
        return origin is bool
    return isinstance(value, list | tuple if origin in (list, tuple) else _NUMBERS.get(origin, origin))


def _conform_keys(values: dict, kind: Any, where: str) -> dict:
    for key in sorted(kind.__required_keys__ - values.keys()):
        raise InputError(f"{where}.{key} is missing", field=f"{where}.{key}")
    hints = typing.get_type_hints(kind)
    return {key: conform(values[key], hints[key], f"{where}.{key}") for key in hints.keys() & values.keys()}


def words_of(kind: Any) -> str:
    """Return what a type allows, in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union, typing.Literal):
        return " or ".join(repr(one) if origin is typing.Literal else words_of(one) for one in args)
    if origin in (list, tuple):
        return f"a list, each part {words_of(args[0])}"
    return "a group of keys" if origin is dict or typing.is_typeddict(kind) else _WORDS.get(kind, kind.__name__)


def describe(value: Any) -> str:
    """Return a value for a message, on one line of at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def check_keys(values: dict, known: Collection[str], where: str) -> None:
    """Raise InputError for the first unknown key, with the nearest known one."""
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f". Did you mean {near[0]}?" if near else f"; known keys are {', '.join(sorted(known))}"
            raise InputError(f"unknown key {where}.{name}{hint}", field=f"{where}.{name}", given=values[name])


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
