"""A folder held for all processes of a run by the first one."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from mvar_jax.errors import InputError
from mvar_jax.files.atomic import remove_leftovers
from mvar_jax.files.locks import acquire, release_now
from mvar_jax.processes import group


@contextlib.contextmanager
def hold(field: str, folder: Path, has_lock: bool = True) -> Iterator[None]:
    """Hold a folder for this run, and remove what killed writers left in it.

    Args:
      field: name of the option that gave the folder, for the error.
      folder: made if it is missing.
      has_lock: if False, nothing is held, which is said.

    Raises InputError in every process if another run holds the folder or if it cannot be written.
    """
    here, lock, refusal = group.current(), None, None
    if not has_lock:
        if here.index == 0:
            print(f"{field} {folder} is not locked: no other run may use it meanwhile", file=sys.stderr, flush=True)
        yield
        return
    if here.index == 0:
        try:
            lock = acquire(folder, field)
            group.at_leave(lambda: release_now(lock))
            remove_leftovers(folder)
        except InputError as error:
            refusal = error
    words = here.gather(f"the lock of {field}", refusal and str(refusal))[0]
    if words:
        expected = "a directory that no other run uses"
        raise refusal or InputError(words, field=field, given=str(folder), expected=expected)
    try:
        yield
    finally:
        if lock:
            lock.release()
