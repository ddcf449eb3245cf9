"""How many files a process may have open."""

import contextlib
import os

from mvar_jax.errors import InputError

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

SPARE_FILES = 256  # of libraries, checkpoints and connections


def allow_open_files(num_files: int, what: str) -> None:
    """Raise the soft limit of open files, if need be, so that this process can open `num_files` more.

    Processes that it starts later inherit the limit. what: the files in words for the error, such as "512 tars".

    Raises InputError if the hard limit is too low.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = num_files + SPARE_FILES + _num_open()
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        words = f"{what} need a limit of {needed} open files, this process may have {hard}: raise `ulimit -Hn`"
        raise InputError(words, field="open files", given=hard, expected=f"{needed} or more")
    with contextlib.suppress(ValueError, OSError):  # some systems have a lower limit of their own
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _num_open() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 64
