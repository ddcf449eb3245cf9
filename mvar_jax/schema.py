"""Whether a value of a config or of a JSON file is of a type, and if not, what the type allows, in words."""

import dataclasses
import math
import numbers
import types
import typing
from typing import Annotated, Any

from mvar_jax.errors import InputError, show

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "None"}
_NUMBERS = {int: numbers.Integral, float: numbers.Real}


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that an annotation allows: `least` to `most`, or without an end itself; infinity never.

    limit: a size that nobody means, beyond which arrays and loops cannot be made; named to those alone who exceed it.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    limit: float = math.inf

    def allows(self, value: float) -> bool:
        """Return whether a number is inside."""
        return self.least <= value <= min(self.most, self.limit) and self.above < value < self.below

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

    def describe(self) -> str:
        """Return all of them."""
        return f"{', '.join(self.texts[:-1])} or {self.texts[-1]}"


MOST_INT, MOST_LAYERS, MOST_FLOAT = 2**31 - 1, 4096, 1e30
Natural = Annotated[int, Range(least=0, limit=MOST_INT)]
Count = Annotated[int, Range(least=1, limit=MOST_INT)]
Layers = Annotated[int, Range(least=1, limit=MOST_LAYERS)]
Views = Annotated[int, Range(least=1, limit=2**16)]  # beyond that, a view would be that of another seed
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]
NotNegative = Annotated[float, Range(least=0, limit=MOST_FLOAT)]
Positive = Annotated[float, Range(above=0, limit=MOST_FLOAT)]
Share = Annotated[float, Range(least=0, most=1)]
Decay = Annotated[float, Range(least=0, below=1)]


def conform(value: Any, kind: Any, where: str) -> Any:
    """Return a value of a config or a JSON file, with lists as tuples if `kind` says so.

    Args:
      value: plain values, lists, tuples and dicts.
      kind: a type: bool, int, float (which takes whole numbers too), str, None, Any, X | Y, Literal, list[X],
        tuple[X, ...], dict[str, X], a TypedDict, which may have further keys, a class, or Annotated[X, rule] with a
        Range or a Choice.
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
    elif origin is Annotated:
        if _is_of(value, kind) and args[1].allows(value):
            return conform(value, args[0], where)
    elif _is_of(value, kind):
        if typing.is_typeddict(kind):
            return value | _conform_keys(value, kind, where)
        if origin is dict:
            return {key: conform(part, args[1], f"{where}.{key}") for key, part in value.items()}
        if origin in (list, tuple):
            return origin(conform(part, args[0], f"{where}[{i}]") for i, part in enumerate(value))
        return value
    expected, given = words_of(kind), show(value)
    if origin is Annotated and _is_of(value, kind) and isinstance(args[1], Range) and value > args[1].limit:
        expected = f"at most {args[1].limit:.10g}"
    raise InputError(f"{where} must be {expected}, got {given}", field=where, given=value, expected=expected)


def _is_of(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type, without its parts."""
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        return any(value == one and type(value) is type(one) for one in typing.get_args(kind))
    if typing.is_typeddict(kind):
        return isinstance(value, dict)
    if isinstance(value, bool):
        return origin is bool
    if origin is float and isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, list | tuple if origin in (list, tuple) else _NUMBERS.get(origin, origin))


def _conform_keys(values: dict, kind: Any, where: str) -> dict:
    for key in sorted(kind.__required_keys__ - values.keys()):
        raise InputError(f"{where}.{key} is missing", field=f"{where}.{key}")
    hints = typing.get_type_hints(kind)
    return {key: conform(values[key], hints[key], f"{where}.{key}") for key in hints.keys() & values.keys()}


def words_of(kind: Any) -> str:
    """Return what a type allows, in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return args[1].describe() if isinstance(args[1], Choice) else f"{words_of(args[0])} {args[1].describe()}"
    if origin in (types.UnionType, typing.Union, typing.Literal):
        return " or ".join(repr(one) if origin is typing.Literal else words_of(one) for one in args)
    if origin in (list, tuple):
        return f"a list, each part {words_of(args[0])}"
    return "a group of keys" if origin is dict or typing.is_typeddict(kind) else _WORDS.get(kind, kind.__name__)
