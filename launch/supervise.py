"""Run a command apart from the terminal, and again whenever it stopped early (75) or lost a process (76, 134).

    python launch/supervise.py start FOLDER -- COMMAND ...   start it and return; FOLDER/log gets its output
    python launch/supervise.py run FOLDER -- COMMAND ...     the same, but wait for its end and return its status
    python launch/supervise.py status FOLDER                 say in one line what became of it
    python launch/supervise.py log FOLDER [--follow]         print the end of the log
    python launch/supervise.py stop FOLDER                   SIGTERM: it saves and ends, and is not run again

Any other status ends the supervision: a failure is not repeated. Nor is the loss of a process if it comes four times
in a row within ten minutes of the start. Only one command runs in a FOLDER at a time; a lock that ends with the
supervisor decides, so a FOLDER survives a reboot. Use a local FOLDER, one for each machine. Needs no package.
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STOPPED_EARLY = 75
LOST = (76, 134)  # another process of the run was lost, as this one noticed itself or as JAX did, which aborts
MAX_LOST, LONG_S = 3, 600  # a loss soon after every start is a fault that a person should look at
OUTCOMES = {0: "complete", 1: "failed", 2: "refused", STOPPED_EARLY: "stopped", 130: "interrupted"}
PAUSE_S = 10  # for the other processes of the run to end too


def fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse(arguments: list[str]) -> argparse.Namespace:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("verb", choices=["start", "run", "status", "log", "stop"])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--follow", action="store_true", help="of log: wait for more")
    parser.add_argument("--pause", type=float, default=PAUSE_S, metavar="SECONDS", help="before a command runs again")
    options = parser.parse_args(arguments[:split])
    options.command = arguments[split + 1 :]
    if bool(options.command) != (options.verb in ("start", "run")):
        parser.error("start and run need a command after --, the other verbs have none")
    return options


class State:
    """What FOLDER knows of its command: a JSON file and a lock that the supervisor holds."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "log"
        self._path, self._lock = folder / "state.json", None

    def acquire(self) -> bool:
        """Return whether nobody else supervises a command in this folder; from then on this process does."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("a")
        except OSError as error:
            fail(f"FOLDER {self.folder} cannot be used: {error.strerror}")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def read(self) -> dict:
        """Return what was written last, or {} if there is nothing or it is damaged."""
        try:
            entries = json.loads(self._path.read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}
        except OSError as error:
            fail(f"FOLDER {self.folder} cannot be used: {error.strerror}")
        return entries if isinstance(entries, dict) else {}

    def write(self, **entries) -> None:
        temporary = self._path.with_name(self._path.name + ".tmp")
        with temporary.open("w") as file:
            file.write(json.dumps(entries) + "\n")
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave an empty file under the final name
        os.replace(temporary, self._path)


class Supervisor:
    """Runs a command until it is complete or failed (see `_is_repeated`), or SIGTERM says to stop."""

    def __init__(self, state: State, command: list[str], pause_s: float):
        self._state, self._command, self._pause_s = state, command, pause_s
        self._child: subprocess.Popen | None = None
        self._is_stopping = False
        self._num_lost = 0  # attempts in a row that ended so, all but the first of them soon

    def run(self, on_ready=lambda: None) -> int:
        """Return the command's last status. `on_ready` is called once `stop` finds this process and its handler."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        self._state.write(attempt=1, pid=os.getpid())
        on_ready()
        attempt = 1
        while True:
            started_s = time.monotonic()
            status = self._run_once(attempt)
            self._say(f"ended with status {status} ({OUTCOMES.get(status, 'failed')})")
            if not self._is_repeated(status, time.monotonic() - started_s) or self._is_stopping:
                break
            attempt += 1
            why = "it stopped early and saved" if status == STOPPED_EARLY else "another process was lost"
            self._say(f"{why}: attempt {attempt} starts in {self._pause_s:g} s")
            end_s = time.monotonic() + self._pause_s
            while time.monotonic() < end_s and not self._is_stopping:
                time.sleep(0.05)
            if self._is_stopping:
                break
        self._state.write(attempt=attempt, status=status)
        return status

    def _is_repeated(self, status: int, lasted_s: float) -> bool:
        is_lost = status in LOST
        self._num_lost = is_lost + (self._num_lost if is_lost and lasted_s < LONG_S else 0)
        return status == STOPPED_EARLY or 0 < self._num_lost <= MAX_LOST

    def _run_once(self, attempt: int) -> int:
        """Return the command's exit status; death by signal n is 128 + n."""
        with self._state.log.open("ab") as log:
            try:
                self._child = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            except OSError as error:
                self._say(f"{self._command[0]}: {error.strerror}")
                return 127 if isinstance(error, FileNotFoundError) else 126
        self._state.write(attempt=attempt, pid=os.getpid(), child=self._child.pid)
        if self._is_stopping:  # the signal came before there was a child
            self._child.terminate()
        status = self._child.wait()
        return status if status >= 0 else 128 - status

    def _stop(self, number, frame) -> None:
        self._is_stopping = True
        if self._child and number == signal.SIGTERM:  # Ctrl-C reaches the child by itself
            self._child.terminate()

    def _say(self, words: str) -> None:
        with self._state.log.open("a") as log:
            log.write(f"supervise: {time.strftime('%Y-%m-%d %H:%M:%S')} {words}\n")


def detach(log: Path) -> int | None:
    """Return in a child process without terminal and session: the descriptor to close once it is ready.

    Return None in the caller, after that.
    """
    ready, is_ready = os.pipe()
    if os.fork():
        os.close(is_ready)
        os.read(ready, 1)
        return None
    os.setsid()
    with log.open("ab") as file, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return is_ready


def start(state: State, options: argparse.Namespace) -> int:
    if not state.acquire():
        fail(f"a command already runs in {state.folder}; stop it first: {sys.argv[0]} stop {state.folder}")
    supervisor = Supervisor(state, options.command, options.pause)
    if options.verb == "run":
        return supervisor.run()
    is_ready = detach(state.log)
    if is_ready is None:
        print(f"started; its output goes to {state.log}")
        return 0
    return supervisor.run(lambda: os.close(is_ready))


def describe(entries: dict, is_running: bool) -> str:
    if not entries:
        return "none: nothing was started here"
    if is_running and "pid" in entries:  # the supervisor holds the lock a moment longer
        return f"running: attempt {entries['attempt']}, process {entries.get('child', entries['pid'])}"
    if "status" not in entries:
        return f"lost: the machine or the supervisor ended during attempt {entries['attempt']}; start it again"
    status = entries["status"]
    return f"{OUTCOMES.get(status, 'failed')}: ended with status {status} in attempt {entries['attempt']}"


def stop(state: State) -> None:
    """Send SIGTERM if the command runs, and wait for its end."""
    signalled = None
    while not state.acquire():
        # there is no pid just before the supervisor's end, and that of an earlier one just after its start
        with contextlib.suppress(KeyError, ProcessLookupError):
            pid = state.read()["pid"]
            if pid != signalled:  # a second SIGTERM could cut the saving short
                os.kill(pid, signal.SIGTERM)
                signalled = pid
        time.sleep(0.1)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    state = State(options.folder)
    if options.verb in ("start", "run"):
        return start(state, options)
    if options.verb == "log":
        os.execvp("tail", ["tail", "-n", "50", *(["-F"] if options.follow else []), str(state.log)])
    entries = state.read()
    if entries and options.verb == "stop":
        stop(state)
    is_running = bool(entries) and options.verb == "status" and not state.acquire()
    print(describe(state.read(), is_running))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
