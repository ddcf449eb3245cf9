"""A member of a group without JAX: python plain_group.py INDEX COUNT ADDRESS_FILE SCENARIO [FOLDER]."""

import os
import signal
import sys
import time
from pathlib import Path

from mvar_jax.errors import InputError
from mvar_jax.processes import group
from mvar_jax.processes.hub import Hub
from mvar_jax.processes.shared import check_shared
from mvar_jax.processes.together import run_together
from mvar_jax.stopping import Stopped

INDEX, COUNT = int(sys.argv[1]), int(sys.argv[2])


def meet(file: Path) -> group.Group:
    if INDEX == 0:
        hub = Hub(COUNT)
        file.with_suffix(".new").write_text(f"{hub.port} {hub.token}")
        file.with_suffix(".new").rename(file)
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    port, token = file.read_text().split()
    return group.JoinedGroup(INDEX, COUNT, ("localhost", int(port)), token)


def act(scenario: str, folder: str = "") -> int:
    here = group.current()
    if scenario == "gather":
        print(here.gather("squares", INDEX**2), here.gather("again", INDEX), flush=True)
        return 0
    here.wait_for_all("start")
    print("started", flush=True)
    if scenario == "differ":
        here.check_same("data", "train data", {"samples": 10 + INDEX // 2, "classes": 3})
    if scenario == "slow" and INDEX == 2:
        soon, exists = time.monotonic() + 2, Path.exists
        Path.exists = lambda path: time.monotonic() > soon and exists(path)
    if scenario in ("shared", "slow"):
        check_shared("workdir", Path(folder))
        return 0
    if scenario == "crossed":
        here.wait_for_all(f"door {INDEX % 2}")
    if scenario == "refuse" and INDEX == 2:
        raise InputError("workdir w cannot be written: no space", field="workdir")
    if scenario == "stop" and INDEX == 3:
        raise Stopped(signal.SIGTERM)
    if scenario == "crash" and INDEX == 1:
        raise ZeroDivisionError("by zero")
    if scenario == "both" and INDEX:
        time.sleep(0.2 * (COUNT - INDEX))  # the highest is first
        raise InputError(f"reason of {INDEX}", field="workdir")
    time.sleep(60)
    return 0


if __name__ == "__main__":
    group.set_current(meet(Path(sys.argv[3])))
    group.at_leave(lambda: os.write(1, b"left\n"))
    sys.exit(run_together(lambda: act(*sys.argv[4:])))
