"""Stand-ins for Slurm: sbatch, srun and scontrol with their documented effects, for one node of this machine.

`Slurm.submit` is sbatch and slurmctld: it reads the #SBATCH lines, runs the script, delivers signals as Slurm does,
and runs the script again after `scontrol requeue`. srun starts the tasks with the variables of a step, and like the
real one it kills its tasks when SIGTERM reaches it. Options that these commands do not have are refused.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from stand_ins import ROOT, make_program

JOB = str(os.getpid())  # the port of the processes follows from it: one of its own for each run of the tests

SRUN = """#!{python}
import argparse, os, signal, subprocess, sys, time
from pathlib import Path

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--cpus-per-task", type=int)
parser.add_argument("--kill-on-bad-exit", type=int, choices=[0, 1], default=0)
parser.add_argument("--wait", type=int, default=0)
parser.add_argument("command", nargs=argparse.REMAINDER)
options = parser.parse_args()
num_tasks = int(os.environ["SLURM_NTASKS"])
num_cards = int(os.environ.get("SLURM_GPUS_PER_NODE", 0))

def environment_of(task):
    step = dict(SLURM_STEP_NODELIST="localhost", SLURM_STEP_NUM_NODES="1", SLURM_STEP_TASKS_PER_NODE=str(num_tasks))
    step |= dict(SLURM_PROCID=str(task), SLURM_LOCALID=str(task), SLURM_NODEID="0")
    if num_cards:
        step |= dict(SLURM_GPUS_ON_NODE=str(num_cards), CUDA_VISIBLE_DEVICES=",".join(map(str, range(num_cards))))
    return dict(os.environ, NUM_CPUS=str(options.cpus_per_task or 1), **step)

tasks = [subprocess.Popen(options.command, env=environment_of(i), start_new_session=True) for i in range(num_tasks)]
Path(os.environ["STEP"]).write_text(" ".join(str(task.pid) for task in tasks))

def kill(*_):
    for task in tasks:
        task.kill()

signal.signal(signal.SIGTERM, kill)
first_s = None
while any(task.poll() is None for task in tasks):
    ended = [task.returncode for task in tasks if task.poll() is not None]
    first_s = first_s or (time.monotonic() if ended else None)
    is_late = options.wait and first_s and time.monotonic() > first_s + options.wait
    if is_late or options.kill_on_bad_exit and any(ended):
        kill()
    time.sleep(0.02)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
"""

SCONTROL = """#!{python}
import os, sys
assert sys.argv[1:] == ["requeue", os.environ["SLURM_JOB_ID"]], sys.argv
if os.environ["CAN_REQUEUE"] == "0":
    sys.exit("slurm_requeue error: Requested operation is presently disabled")
open(os.environ["REQUEUED"], "a").write("x")
"""


def parse_directives(script: Path, options: list[str]) -> argparse.Namespace:
    """Return the options of the #SBATCH lines, overridden by those of the command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--job-name", "--time", "--output"):
        parser.add_argument(name)
    for name in ("--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task"):
        parser.add_argument(name, type=int)
    parser.add_argument("--signal", default="")
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("--open-mode", choices=["append", "truncate"], default="truncate")
    lines = [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    return parser.parse_args([*lines, *options])


class Slurm:
    """One node on which the script runs in a copy of the launch folder.

    Its `.venv/bin/python` is the program that a test gives with `set_program`.
    """

    def __init__(self, folder: Path):
        self.folder, self.copy, self._bin = folder, folder / "copy", folder / "bin"
        shutil.copytree(ROOT / "launch", self.copy / "launch")
        make_program(self._bin / "srun", SRUN.format(python=sys.executable))
        make_program(self._bin / "scontrol", SCONTROL.format(python=sys.executable))
        self._requeued, self._step = folder / "requeued", folder / "step"
        self.log = self.copy / f"slurm-{JOB}.out"

    def set_program(self, text: str) -> None:
        make_program(self.copy / ".venv/bin/python", f"#!{sys.executable}\n{text}")

    @property
    def num_requeues(self) -> int:
        return len(self._requeued.read_text()) if self._requeued.exists() else 0

    def submit(self, *arguments: str, options=(), on_start=None, can_requeue: bool = True, **environment: str) -> int:
        """Run the job until it is not queued again; return the script's last exit status.

        Args:
          arguments: those of the script.
          options: options of sbatch.
          on_start: called with this object and the number of the attempt once the script runs.
          can_requeue: whether `scontrol requeue` is allowed.
        """
        script = self.copy / "launch/slurm.sbatch"
        self._directives = parse_directives(script, list(options))
        assert self._directives.output == "slurm-%j.out" and self._directives.nodes == 1
        for attempt in range(20):
            before = self.num_requeues
            self._step.unlink(missing_ok=True)
            with self.log.open("a" if self._directives.open_mode == "append" else "w") as log:
                self._script = subprocess.Popen(
                    ["bash", str(script), *arguments],
                    cwd=self.copy,
                    env=self._environment(attempt, can_requeue) | environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                try:
                    if on_start:
                        on_start(self, attempt)
                    status = self._script.wait(200)
                finally:
                    self._clean_up()
            if self.num_requeues == before:
                return status
            assert self._directives.requeue
        raise AssertionError("queued again without end")

    def warn_of_time_limit(self) -> None:
        """Do what --signal asks for: without B: the processes of the steps get it, with B: the script alone."""
        who, _, when = self._directives.signal.rpartition(":")
        name, _, seconds = when.partition("@")
        assert int(seconds) >= 120, "too little to save a large checkpoint"
        number = getattr(signal, f"SIG{name}")
        if who == "B":
            self._script.send_signal(number)
        else:
            self._signal_tasks(number)

    def cancel(self) -> None:
        """Do what scancel and the end of the time do: SIGTERM to the processes, the script and srun."""
        self._signal_tasks(signal.SIGTERM)
        os.killpg(self._script.pid, signal.SIGTERM)

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + 200
        while not path.exists():
            assert time.monotonic() < deadline and self._script.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def _tasks(self) -> list[int]:
        return [int(word) for word in self._step.read_text().split()] if self._step.exists() else []

    def _signal_tasks(self, number: int) -> None:
        for pid in self._tasks():
            os.killpg(pid, number)

    def _clean_up(self) -> None:
        for pid in [*self._tasks(), self._script.pid]:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._script.wait(60)

    def _environment(self, attempt: int, can_requeue: bool) -> dict[str, str]:
        given = self._directives
        own = {
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SLURM_JOB_ID": JOB,
            "SLURM_SUBMIT_DIR": str(self.copy),
            "SLURM_NTASKS": str(given.nodes * given.ntasks_per_node),
            "SLURM_RESTART_COUNT": str(attempt),
            "SLURM_CPUS_PER_TASK": str(given.cpus_per_task),
            "SLURM_GPUS_PER_NODE": str(given.gpus_per_node),
            "REQUEUED": str(self._requeued),
            "STEP": str(self._step),
            "CAN_REQUEUE": str(int(can_requeue)),
        }
        return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | own


def plan(*attempts: list) -> str:
    """A program that does in attempt i of task j what attempts[i][j] says, and notes that it ran.

    A number is an exit status. "slow" saves for a while and exits with 75. "train" works until SIGTERM, saves and
    exits with 75.
    """
    return f"""
import json, os, signal, sys, time
from pathlib import Path

attempt, task = int(os.environ["SLURM_RESTART_COUNT"]), os.environ["SLURM_PROCID"]
todo = json.loads({json.dumps(json.dumps(attempts))})[attempt][int(task)]

def note(words):
    open("notes", "a").write(f"{{attempt}} {{task}} {{words}}\\n")

def save(*_):
    time.sleep(0.5)
    note("saved")
    sys.exit(75)

print(f"attempt {{attempt}} at work", flush=True)
note("ran")
if todo == "slow":
    save()
if todo == "train":
    signal.signal(signal.SIGTERM, save)
    Path(f"training-{{attempt}}-{{task}}").touch()
    time.sleep(60)
sys.exit(todo)
"""
