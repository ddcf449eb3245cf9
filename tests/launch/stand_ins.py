"""A machine of stand-ins: the scripts see the programs that a test puts on the PATH, and nothing else."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then echo {version}; fi
"""


def make_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A copy of the scripts, and a PATH that holds the stand-in interpreters alone."""

    def __init__(self, folder: Path):
        self.folder, self.copy, self.bin = folder, folder / "copy", folder / "bin"
        for name in ("launch", ".ci"):
            shutil.copytree(ROOT / name, self.copy / name)
        for name in ("requirements.txt", "pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, self.copy)
        self.bin.mkdir()
        for tool in ("bash", "env", "dirname", "cat", "cut", "cksum", "mkdir", "realpath"):
            (self.bin / tool).symlink_to(shutil.which(tool))

    def add_python(self, name: str, version: str) -> None:
        """An interpreter on the PATH, or at a path below the home folder if the name has slashes."""
        where = self.folder / "home" if "/" in name else self.bin
        make_program(where / name, PYTHON.format(version=version))

    def run(self, *command, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        """Run a command in the copy or in `cwd`; nothing of the test's own environment reaches it."""
        own = {"PATH": str(self.bin), "HOME": str(self.folder / "home")}
        return subprocess.run(
            command, cwd=cwd or self.copy, env=own | environment, capture_output=True, text=True, timeout=60
        )
