"""The folder of a run's checkpoints: which steps there are, how one appears and disappears.

On a file system a checkpoint appears by a rename. An object store has none: there it is complete once it has its
index, which is written last and removed first.
"""

import os
import re
import shutil
from pathlib import Path

from mvar_jax.checkpoints.index import INDEX_FILE
from mvar_jax.files.paths import as_path, scheme_of

CHECKPOINT_FOLDER = "checkpoints"
_UNFINISHED = ".unfinished"
# what a killed save of version 0.1 left; Orbax wrote its metadata first
_ORBAX_UNFINISHED = re.compile(r"\d+\.orbax-checkpoint-tmp.*")
_DAMAGED = ".damaged"


class Steps:
    """The checkpoints `folder/STEP`. Only one process may change them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._has_rename = scheme_of(folder) is None

    def __getitem__(self, step: int) -> Path:
        return self.folder / str(step)

    def all(self) -> list[int]:
        """Return the steps of all complete checkpoints in order."""
        steps = sorted(int(path.name) for path in self._list() if path.name.isdigit())
        return steps if self._has_rename else [step for step in steps if (self[step] / INDEX_FILE).exists()]

    def clean(self) -> None:
        """Make the folder and remove what killed saves left in it. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self._list():
            name = path.name
            is_half = not self._has_rename and name.isdigit() and not self._is_kept(path)
            if is_half or name.endswith(_UNFINISHED) or _ORBAX_UNFINISHED.fullmatch(name):
                remove_folder(path)

    def unfinished(self, step: int) -> Path:
        """Return where a step is written to until `commit`."""
        return self.folder / f"{step}{_UNFINISHED}" if self._has_rename else self[step]

    def begin(self, step: int) -> None:
        """Make room for a step: remove an earlier attempt, or a damaged one in an object store."""
        if self.unfinished(step).is_dir():
            remove_folder(self.unfinished(step))

    def commit(self, step: int) -> None:
        """Make a step that is complete, index included, visible."""
        if self._has_rename:
            os.replace(self.unfinished(step), self[step])

    def remove(self, step: int) -> None:
        """Remove a checkpoint; killed in between, what is left of it counts as unfinished."""
        if self._has_rename:
            os.replace(self[step], self.unfinished(step))
            remove_folder(self.unfinished(step))
        else:
            (self[step] / INDEX_FILE).unlink(missing_ok=True)
            remove_folder(self[step])

    def set_aside(self, step: int) -> str:
        """Take a damaged checkpoint out of the steps, arrays and all; return in words where it is now."""
        if not self._has_rename:
            index = self[step] / INDEX_FILE
            index.with_name(f"{INDEX_FILE}{_DAMAGED}").write_bytes(index.read_bytes())
            index.unlink()
            return f"{self[step]} is kept until step {step} is saved again"
        aside = self.folder / f"{step}{_DAMAGED}"
        number = 1
        while aside.exists():
            number += 1
            aside = self.folder / f"{step}{_DAMAGED}{number}"
        os.replace(self[step], aside)
        return f"it is now {aside}"

    def _list(self) -> list[Path]:
        try:
            return list(self.folder.iterdir())
        except FileNotFoundError:  # no run has saved here; in a store an empty folder does not exist
            return []

    def _is_kept(self, path: Path) -> bool:
        return any((path / f"{INDEX_FILE}{end}").exists() for end in ("", _DAMAGED))


def steps_of(workdir: str | os.PathLike) -> Steps:
    """Return the checkpoints of a run. Raises InputError if the workdir's storage cannot be reached."""
    path = as_path(workdir, "workdir")
    return Steps((path if scheme_of(path) else path.absolute()) / CHECKPOINT_FOLDER)


def remove_folder(path: Path) -> None:
    """Remove a folder of a file system or an object store."""
    if scheme_of(path):
        path.rmtree()  # type: ignore[attr-defined]  # of an object store
    else:
        shutil.rmtree(path)
