"""Whether a value of a config or of a JSON file is of a type, and if not, what the type allows, in words."""

import numbers
import types
import typing
from typing import Any

from mvar_jax.errors import InputError, show

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
    expected, given = words_of(kind), show(value)
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
