"""What becomes of a command that is run apart from the terminal: how often it runs, its log, its end."""

import fcntl
import importlib.util
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from mvar_jax.stopping import LOST_STATUS, STOPPED_STATUS

SUPERVISE = Path(__file__).parents[2] / "launch" / "supervise.py"

# saves and stops early on SIGTERM; "step" says that it is at work
TRAINING = """
trap 'sleep 0.3; echo checkpoint; exit 75' TERM
echo step $$
touch step
while :; do sleep 0.05; done
"""


class Supervised:
    """A folder, and the verbs on it. Commands are shell lines that work in `home`."""

    def __init__(self, home: Path):
        self.home, self.folder = home, home / "worker"

    def arguments(self, verb: str, line: str | None = None, *options: str) -> list[str]:
        command = ["--", "sh", "-c", line] if line else []
        return [sys.executable, str(SUPERVISE), verb, str(self.folder), *options, *command]

    def call(self, verb: str, line: str | None = None, *options: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.arguments(verb, line, *options), cwd=self.home, capture_output=True, text=True, timeout=60
        )

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def state(self) -> str:
        path = self.folder / "state.json"
        return path.read_text() if path.exists() else ""

    @property
    def status(self) -> str:
        return self.call("status").stdout.strip()

    def wait_for(self, found, what: str) -> None:
        deadline = time.monotonic() + 60
        while not found():
            assert time.monotonic() < deadline, f"{what} did not come: {self.log}"
            time.sleep(0.05)


@pytest.fixture
def supervised(tmp_path):
    supervised = Supervised(tmp_path)
    yield supervised
    supervised.call("stop")


def count(line: str = "") -> str:
    """A command that notes that it runs, and ends with the next of the statuses in the file `statuses`."""
    return f'echo run >> runs; {line} set -- $(cat statuses); s=$1; shift; echo "$@" > statuses; exit $s'


@pytest.mark.parametrize(
    ("statuses", "num_runs"),
    [("0", 1), ("1", 1), ("2", 1), ("130", 1), ("137", 1), ("75 75 0", 3), ("75 1 0", 2), ("75 2 0", 2)]
    + [("76 0", 2), ("134 76 75 0", 4), ("76 134 76 76 0", 4), ("76 76 76 75 76 76 76 0", 8)],
)
def test_command_runs_again_only_if_it_stops_early_or_loses_a_process(supervised, statuses, num_runs):
    (supervised.home / "statuses").write_text(statuses)
    result = supervised.call("run", count("echo output;"), "--pause", "0.1")
    last = int(statuses.split()[num_runs - 1])
    assert result.returncode == last
    assert (supervised.home / "runs").read_text().count("run") == num_runs
    assert supervised.log.count("output") == num_runs, "the log keeps what earlier attempts wrote"
    words = {0: "complete", 2: "refused", 130: "interrupted"}.get(last, "failed")
    assert supervised.status == f"{words}: ended with status {last} in attempt {num_runs}"


def test_command_that_loses_a_process_after_long_work_runs_again_however_often(supervised):
    text = SUPERVISE.read_text().replace("MAX_LOST, LONG_S = 3, 600", "MAX_LOST, LONG_S = 3, 0.2")
    (supervised.home / "supervise.py").write_text(text)
    (supervised.home / "statuses").write_text("76 " * 6 + "0")
    words = supervised.arguments("run", count("sleep 0.3;"), "--pause", "0")
    words[1] = "supervise.py"
    assert subprocess.run(words, cwd=supervised.home, timeout=60).returncode == 0
    assert "complete: ended with status 0 in attempt 7" in supervised.status


def test_statuses_that_a_supervisor_starts_again_are_those_of_the_commands():
    """Its file and the sbatch script import nothing of the package."""
    spec = importlib.util.spec_from_file_location("supervise", SUPERVISE)
    supervise = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(supervise)
    assert supervise.STOPPED_EARLY == STOPPED_STATUS and supervise.LOST == (LOST_STATUS, 128 + signal.SIGABRT)


def test_start_returns_while_the_command_goes_on_without_a_terminal(supervised):
    """Started from a terminal that is then closed: SIGHUP must not reach the command."""

    def take_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    master, slave = pty.openpty()
    starting = subprocess.Popen(
        supervised.arguments("start", TRAINING),
        cwd=supervised.home,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        preexec_fn=take_terminal,
    )
    assert starting.wait(60) == 0
    os.close(slave)
    os.close(master)  # hangs up
    supervised.wait_for((supervised.home / "step").exists, "a step")
    time.sleep(0.3)
    assert supervised.status.startswith("running: attempt 1, process ")
    assert "step" in supervised.call("log").stdout


def test_stop_lets_the_command_save_and_does_not_run_it_again(supervised):
    assert supervised.call("start", TRAINING, "--pause", "0").returncode == 0
    supervised.wait_for((supervised.home / "step").exists, "a step")
    result = supervised.call("stop")
    assert result.stdout == "stopped: ended with status 75 in attempt 1\n"
    assert supervised.log.count("checkpoint") == 1 and supervised.log.count("step") == 1


def test_stop_during_the_pause_ends_it(supervised):
    assert supervised.call("start", "echo run >> runs; exit 75", "--pause", "600").returncode == 0
    supervised.wait_for(lambda: "attempt 2 starts in 600 s" in supervised.log, "the pause")
    assert supervised.call("stop").stdout == "stopped: ended with status 75 in attempt 2\n"
    assert (supervised.home / "runs").read_text() == "run\n"


def test_stop_right_after_start_reaches_the_command(supervised):
    assert supervised.call("start", "sleep 600").returncode == 0
    assert supervised.call("stop").stdout == "failed: ended with status 143 in attempt 1\n"


def test_notice_to_the_command_alone_stops_it_and_it_runs_again(supervised):
    """A maintenance notice or `kill` ends the training process; the supervisor resumes it."""
    assert supervised.call("start", TRAINING, "--pause", "0").returncode == 0
    supervised.wait_for((supervised.home / "step").exists, "a step")
    os.kill(int(supervised.status.split()[-1]), signal.SIGTERM)
    supervised.wait_for(lambda: supervised.log.count("step") == 2, "the second attempt")
    assert supervised.log.count("checkpoint") == 1
    assert supervised.status.startswith("running: attempt 2, process ")


def test_second_command_in_a_folder_is_refused(supervised):
    assert supervised.call("start", TRAINING).returncode == 0
    second = supervised.call("start", "touch second")
    assert second.returncode == 2 and "already runs" in second.stderr and second.stderr.count("\n") == 1
    assert not (supervised.home / "second").exists()


def test_folder_of_a_killed_supervisor_says_so_and_can_be_used_again(supervised):
    process = subprocess.Popen(supervised.arguments("run", "exec sleep 600"), cwd=supervised.home)
    supervised.wait_for(lambda: '"child"' in supervised.state, "a child")
    child = int(supervised.status.split()[-1])
    process.kill()
    process.wait(60)
    os.kill(child, signal.SIGKILL)
    assert supervised.status == "lost: the machine or the supervisor ended during attempt 1; start it again"
    assert supervised.call("run", "exit 0").returncode == 0


def test_folder_without_a_command_says_so(supervised):
    assert supervised.status == "none: nothing was started here"
    assert not supervised.folder.exists()
    assert supervised.call("stop").stdout == "none: nothing was started here\n"


def test_unknown_program_ends_with_127_and_says_why_in_the_log(supervised):
    arguments = [*supervised.arguments("run"), "--", "no-such-program"]
    assert subprocess.run(arguments, cwd=supervised.home, timeout=60).returncode == 127
    assert "no-such-program: No such file or directory" in supervised.log


def test_supervisor_that_is_about_to_end_has_its_status_and_stop_waits_for_it(supervised):
    """The last write of a supervisor has no pid, and the lock ends only with the process."""
    supervised.call("run", "exit 0")
    with (supervised.folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert supervised.status == "complete: ended with status 0 in attempt 1"
        stopping = subprocess.Popen(
            supervised.arguments("stop"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(0.5)
        assert stopping.poll() is None, stopping.stderr.read()
    assert stopping.communicate(timeout=60) == ("complete: ended with status 0 in attempt 1\n", "")


def test_stop_outlives_a_pid_that_is_gone(supervised):
    gone = subprocess.Popen(["true"])
    gone.wait(60)
    supervised.folder.mkdir()
    (supervised.folder / "state.json").write_text(f'{{"attempt": 1, "pid": {gone.pid}}}')
    with (supervised.folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stopping = subprocess.Popen(
            supervised.arguments("stop"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(0.5)
        assert stopping.poll() is None, stopping.stderr.read()
    out, err = stopping.communicate(timeout=60)
    assert out.startswith("lost: ") and not err and stopping.returncode == 0


@pytest.mark.parametrize("text", ["", "{ half", "[]", "\0" * 40])
def test_damaged_state_is_as_none(supervised, text):
    supervised.folder.mkdir()
    (supervised.folder / "state.json").write_text(text)
    for verb in ("status", "stop"):
        result = supervised.call(verb)
        assert result.returncode == 0 and result.stdout == "none: nothing was started here\n", result.stderr
    assert supervised.call("run", "exit 0").returncode == 0
    assert supervised.status == "complete: ended with status 0 in attempt 1"


def test_state_is_on_the_disk_before_it_replaces_the_one_before(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("supervise", SUPERVISE)
    supervise = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(supervise)
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(f"fsync of {os.fstat(file).st_size > 0}"))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    state = supervise.State(tmp_path)
    state.write(attempt=1, pid=2)
    assert calls == ["fsync of True", "replace"] and state.read() == {"attempt": 1, "pid": 2}


@pytest.mark.parametrize("name", ["file", "file/below"])
@pytest.mark.parametrize("verb", ["start", "run"])
def test_folder_that_cannot_be_used_is_one_line_and_status_2(supervised, verb, name):
    (supervised.home / "file").touch()
    supervised.folder = supervised.home / name
    result = supervised.call(verb, "true")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: FOLDER {supervised.folder} cannot be used: ")
