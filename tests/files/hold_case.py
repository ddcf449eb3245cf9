"""A process that holds a folder until its standard input ends: python hold_case.py FOLDER [noflock] [leave]."""

import errno
import fcntl
import sys

from mvar_jax.errors import InputError
from mvar_jax.files.paths import as_path
from mvar_jax.processes import group
from mvar_jax.processes.holding import hold


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


if "noflock" in sys.argv:
    fcntl.flock = no_locks
try:
    with hold("out", as_path(sys.argv[1], "out")):
        print("held", flush=True)
        sys.stdin.read()
        if "leave" in sys.argv:
            group.leave(3)
    print("released", flush=True)
except InputError as error:
    print(error, flush=True)
    sys.exit(2)
