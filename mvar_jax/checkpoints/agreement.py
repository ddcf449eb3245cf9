"""Agreement of a run's processes in any thread, through the key-value store of JAX's coordination service.

A collective of the devices would not do: a save ends in the background, while training runs collectives of its own.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax._src import distributed  # JAX has no public name for the client of its coordination service

from mvar_jax.checkpoints.index import DamagedError
from mvar_jax.errors import InputError, shorten

# a process that is lost ends the run long before; this bounds a wait that nobody watches
TIMEOUT_S = 3600
_rounds: defaultdict[str, itertools.count] = defaultdict(itertools.count)
_KINDS = {"damaged": DamagedError, "input": InputError}

Value = TypeVar("Value")


def gather(name: str, value: Any) -> list[Any]:
    """Return the JSON values of all processes, by process.

    Every process must call this equally often with a name, and from one thread at a time.
    """
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return [value]
    client: Any = distributed.global_state.client
    number, deadline_ms = next(_rounds[name]), TIMEOUT_S * 1000
    key_of = lambda number, end: f"mvar_jax/{name}/{number}/{end}"
    client.key_value_set(key_of(number, index), json.dumps(value))
    if index == 0:
        texts = [client.blocking_key_value_get(key_of(number, i), deadline_ms) for i in range(count)]
        client.key_value_set(key_of(number, "all"), f"[{','.join(texts)}]")
    values = json.loads(client.blocking_key_value_get(key_of(number, "all"), deadline_ms))
    if number:  # every process has come to this round, so none still reads the last one
        client.key_value_delete(key_of(number - 1, index))
        if index == 0:
            client.key_value_delete(key_of(number - 1, "all"))
    return values


def by_first(name: str, function: Callable[[], Value]) -> Value:
    """Call a function in the first process; return its JSON value, or raise its error, in every process."""
    value, error = _call(function) if jax.process_index() == 0 else (None, None)
    value_of_first, words = gather(name, [value, _describe(error)])[0]
    _raise(error, [words])
    return value if jax.process_index() == 0 else value_of_first  # type: ignore[return-value]


def by_all(name: str, function: Callable[[], Value]) -> Value:
    """Call a function in every process; if it raises in some, raise an error in every process."""
    value, error = _call(function)
    _raise(error, gather(name, _describe(error)))
    return value  # type: ignore[return-value]


def _call(function: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def _describe(error: Exception | None) -> list | None:
    if error is None:
        return None
    if isinstance(error, InputError):
        return ["damaged" if isinstance(error, DamagedError) else "input", str(error), error.field, error.expected]
    return ["other", shorten(error)]


def _raise(own: Exception | None, errors: list[list | None]) -> None:
    """Raise this process's own error, or else the first of the others'. An undamaged reason goes before damage."""
    others = sorted((error for error in errors if error), key=lambda error: error[0] == "damaged")
    if not others:
        return
    kind, message, *rest = others[0]
    if own is not None and (kind == "damaged") == isinstance(own, DamagedError):
        raise own
    if kind == "other":
        raise RuntimeError(message)
    field, expected = rest
    raise _KINDS[kind](message, field=field, expected=expected)
