"""Processes of a benchmark: each with what it starts in a session of its own, which ends with the benchmark."""

import functools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

POLL_S = 0.5


def run(command: list[str], show: Callable[[str], None], limit_s: float | None = None, environment=None) -> int:
    """Run a command and return its exit status, -SIGKILL if it was stopped. Whatever ends this call ends the command.

    Args:
      show: called with each line of what it prints.
      limit_s: it is stopped after that; None: never.
      environment: its variables; None: those of this process.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    command = [*command, "--parent", str(os.getpid())]
    # a session of its own, so that the processes that it starts can be stopped with it
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        stop = functools.partial(os.killpg, process.pid, signal.SIGKILL)
        timer = None if limit_s is None else threading.Timer(limit_s, stop)
        try:
            if timer is not None:
                timer.start()
            for line in process.stdout:
                show(line)
        except BaseException:  # this process is told to stop
            stop()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        return process.wait()


def end_with(parent: int) -> None:
    """Kill this process and its children as soon as its parent has ended, even if the parent was killed.

    Args:
      parent: number of the process that called `run`, as --parent gives it.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
