"""Dataclasses from dicts of their fields, as configs and `model.json` hold them, checked by their annotations."""

import dataclasses
import difflib
import typing
from collections.abc import Callable, Collection, Iterator
from typing import Any

from mvar_jax.errors import InputError
from mvar_jax.schema import conform

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


def check_keys(values: dict, known: Collection[str], where: str) -> None:
    """Raise InputError for the first unknown key, with the nearest known one."""
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f". Did you mean {near[0]}?" if near else f"; known keys are {', '.join(sorted(known))}"
            raise InputError(f"unknown key {where}.{name}{hint}", field=f"{where}.{name}", given=values[name])


def check_fields(options: Any, where: str, hidden: Collection[str] = ()) -> None:
    """Raise InputError unless each field of a dataclass is what its annotation says, see `schema.conform`.

    Args:
      options: the dataclass.
      where: what a user calls it, such as "config.data"; "" if its fields have no prefix.
      hidden: fields that are left alone.
    """
    for field in dataclasses.fields(options):
        if field.name not in hidden:
            conform(getattr(options, field.name), field.type, f"{where}.{field.name}" if where else field.name)


def check_values(annotated: type | Callable, values: dict, where: str) -> None:
    """Raise InputError unless each value is what the annotation of its name says.

    Args:
      annotated: the class or the function with the annotations; other names than its own are left alone.
      values: name -> value.
      where: what a user calls `values`, such as "config.mesh".
    """
    hints = typing.get_type_hints(annotated, include_extras=True)
    for name in hints.keys() & values.keys():
        conform(values[name], hints[name], f"{where}.{name}")


def put_below(error: InputError, where: str, joint: str = ".") -> InputError:
    """Return the error of a field as the error of `where`.field, in the message too. joint: what is between both."""
    message = f"{where}{joint if str(error).startswith(error.field) else ': '}{error}"
    return InputError(message, field=f"{where}{joint}{error.field}", given=error.given, expected=error.expected)


def flatten(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of nested dicts in order; keys of inner dicts follow those of outer ones after a dot."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
