"""Stand-ins for machines that ssh and gcloud reach: each is a folder that is its home, with a checkout in it.

The remote command runs here, in that home, so that a test sees what it does. gcloud also keeps a queued resource: its
state and the metadata `training` in files, and a startup script that it runs as the slice boots. Each call warns, and
fails as without a network once for each line of the file `failures` that is its verb. Options that these programs do
not have are refused.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from stand_ins import ROOT, make_program

# real programs, except the training: it notes its words, and ends with the next of ~/statuses or trains until SIGTERM
PYTHON = """#!{python}
import json, os, signal, sys, time
from pathlib import Path

if sys.argv[1] != "-m":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
home = Path(os.environ["WORKER_HOME"])
name = os.environ["WORKER_NAME"]

def save(*_):
    print("saved", flush=True)
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
with open(home / f"trained-{{name}}", "a") as file:
    file.write(json.dumps([".venv/bin/python", *sys.argv[1:]]) + "\\n")
print("at work", flush=True)
statuses = home / "statuses"
todo = statuses.read_text().split() if statuses.exists() else []
if todo:
    statuses.write_text(" ".join(todo[1:]))
    sys.exit(int(todo[0]))
time.sleep(100)
"""

# run by ssh and gcloud: a command as the shell of a worker runs it
REMOTE = """
import os, subprocess, sys

def run_on(name, command, **options):
    home = os.path.join({folder!r}, name)
    if os.path.islink(home):
        home = os.path.realpath(home)
    environment = {{"HOME": home, "WORKER_HOME": home, "WORKER_NAME": name, "PATH": {path!r}}}
    return subprocess.Popen(["bash", "-c", command], cwd=home, env=environment, **options)
"""

SSH = """#!{python}
import argparse
{remote}
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("-n", action="store_true", required=True)
parser.add_argument("-o", action="append")
parser.add_argument("host")
parser.add_argument("command")
options = parser.parse_args()
name = options.host.split("@")[-1]
if not os.path.exists(os.path.join({folder!r}, name)):
    sys.exit(f"ssh: Could not resolve hostname {{name}}") or 255
sys.exit(run_on(name, options.command).wait(60))
"""

GCLOUD = """#!{python}
import argparse, json
from pathlib import Path
{remote}
request = Path({folder!r}) / "request.json"
workers = sorted(path.name for path in Path({folder!r}).glob("worker*"))
words = sys.argv[1:]
print("WARNING: This command is using service account impersonation.", file=sys.stderr)
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("name")
parser.add_argument("--zone", required=True)
if words[:4] == ["compute", "tpus", "tpu-vm", "ssh"]:
    parser.add_argument("--worker", required=True)
    parser.add_argument("--command", required=True)
    options = parser.parse_args(words[4:])
    chosen = workers if options.worker == "all" else [workers[int(options.worker)]]
    sys.exit(max([process.wait(60) for process in [run_on(name, options.command) for name in chosen]]))
assert words[:3] == ["compute", "tpus", "queued-resources"], words
verb = words[3]
if verb == "create":
    for option in ("--node-id", "--accelerator-type", "--runtime-version", "--metadata-from-file"):
        parser.add_argument(option, required=True)
    parser.add_argument("--spot", action="store_true")
elif verb == "delete":
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--quiet", action="store_true", required=True)
else:
    parser.add_argument("--format")
options = parser.parse_args(words[4:])
note = open(Path({folder!r}) / "requests", "a")
metadata = Path({folder!r}) / "metadata"
failures = Path({folder!r}) / "failures"
todo = failures.read_text().split() if failures.exists() else []
if verb in todo:
    todo.remove(verb)
    failures.write_text("\\n".join(todo))
    sys.exit(f"ERROR: gcloud crashed in {{verb}} (ConnectionError): no network")
if verb != "create" and not request.exists():
    sys.exit(f"ERROR: (gcloud.compute.tpus.queued-resources.{{verb}}) NOT_FOUND")
if verb == "describe":
    formats = {{
        "value(state.state)": request.read_text(),
        "value(tpu.nodeSpec[0].node.metadata.training)": metadata.read_text() if metadata.exists() else "",
        None: "state:\\n  state: " + request.read_text(),
    }}
    print(formats[options.format])
elif verb == "delete":
    request.unlink()
    metadata.unlink()
    note.write("delete\\n")
elif request.exists():
    sys.exit("ERROR: ALREADY_EXISTS")
else:
    tier = "spot" if options.spot else "other"
    note.write(f"create {{options.accelerator_type}} {{options.runtime_version}} {{tier}}\\n")
    request.write_text("ACTIVE")
    paths = dict(pair.split("=") for pair in options.metadata_from_file.split(","))
    script = Path(paths.pop("startup-script")).read_text()
    metadata.write_text(Path(paths.pop("training")).read_text())
    assert not paths, paths
    for name in workers:
        log = open(Path({folder!r}) / name / "boot", "a")
        run_on(name, script, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
"""


def make_checkout(folder: Path) -> None:
    """The scripts, with an environment whose Python trains in appearance only."""
    shutil.copytree(ROOT / "launch", folder / "launch")
    supervise = folder / "launch/supervise.py"
    supervise.write_text(supervise.read_text().replace("PAUSE_S = 10", "PAUSE_S = 0.1"))
    make_program(folder / ".venv/bin/python", PYTHON.format(python=sys.executable))


class Workers:
    """Machines named as the test wishes, and programs of one's own machine that reach them."""

    def __init__(self, folder: Path, *names: str):
        self.folder, self.own = folder, folder / "own"
        shutil.copytree(ROOT / "launch", self.own / "launch")
        remote_bin = folder / "remote-bin"
        make_program(remote_bin / "hostname", "#!/bin/sh\necho $WORKER_NAME\n")
        make_program(remote_bin / "sudo", '#!/bin/sh\nexec "$@"\n')
        for name in ("add-apt-repository", "apt-get"):
            make_program(remote_bin / name, f'#!/bin/sh\necho {name} "$@" >> $WORKER_HOME/installed\n')
        path = f"{remote_bin}:{os.environ['PATH']}"
        remote = REMOTE.format(folder=str(folder), path=path)
        for name, text in (("ssh", SSH), ("gcloud", GCLOUD)):
            make_program(
                self.own / "bin" / name, text.format(python=sys.executable, remote=remote, folder=str(folder))
            )
        for name in names:
            make_checkout(folder / name / "mvar_jax")
        self.names = names
        self._started: list[subprocess.Popen] = []

    def call(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
        """Run a script of launch/ on one's own machine."""
        with self.start(script, *words, **environment) as process:
            out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def start(self, script: str, *words: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            ["bash", str(self.own / "launch" / script), *words],
            cwd=self.own,
            env={"PATH": f"{self.own / 'bin'}:{os.environ['PATH']}", "HOME": str(self.own)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def end(self) -> None:
        """End all that runs, here and on the workers."""
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for path in self.folder.iterdir():
            self.kill(path.name)

    def trained(self, name: str) -> list[list[str]]:
        """The command lines of the trainings that a worker started."""
        path = self.folder / name / f"trained-{name}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self, name: str) -> str:
        paths = (self.folder / name).glob(f"*/runs/workers/{name}/log")
        return "".join(path.read_text() for path in paths)

    def wait_for(self, found, what: str) -> None:
        deadline = time.monotonic() + 60
        while not found():
            said = {path: path.read_text() for path in self.folder.glob("*/boot")}
            assert time.monotonic() < deadline, f"{what} did not come: {said}"
            time.sleep(0.05)

    def kill(self, name: str) -> None:
        """End the supervisor and the training of a worker at once, as a loss of power does."""
        for path in (self.folder / name).glob("*/runs/workers/*/state.json"):
            state = json.loads(path.read_text())
            for pid in (state.get("pid"), state.get("child")):
                if pid and "status" not in state:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
