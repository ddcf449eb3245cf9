"""A process that joins others: python join_case.py OPTION."""

import sys
import time

from mvar_jax.processes.together import run_together
from mvar_jax.stopping import raise_on_signals


def work() -> int:
    print("joined", flush=True)
    time.sleep(60)
    return 0


if __name__ == "__main__":
    raise_on_signals()
    print("joining", flush=True)
    sys.exit(run_together(work, sys.argv[1]))
