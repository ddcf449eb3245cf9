"""Folders that one run holds and one command owns, so that two runs never mix their files.

`hold` lets no other run use a folder at the same time. `owned_folder` also keeps the files that are there: before the
first byte is written it compares the options of the command with those that wrote them.
"""

import contextlib
import fnmatch
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from mvar_jax.errors import InputError, RunError, describe_file_error, shorten, show
from mvar_jax.fields import flatten
from mvar_jax.files.atomic import remove_leftovers, write_json
from mvar_jax.files.directories import naming_errors
from mvar_jax.files.json_files import read_json
from mvar_jax.files.locks import acquire, release_now
from mvar_jax.processes import group
from mvar_jax.processes.shared import check_shared


class Output(NamedTuple):
    """What a command writes into its folder.

    noun: what a user calls it.
    identity: the file that holds the options, or by which the whole output is known.
    names: patterns of the names of all other files and folders but figures.
    figures: patterns of the names of image files that are no single images: grids, images side by side, charts.
    kept: what a failed run leaves, as the end of a sentence.
    unfinished: a folder by which an unfinished output is known, if it holds the options itself.
    """

    noun: str
    identity: str
    names: tuple[str, ...]
    figures: tuple[str, ...] = ()
    kept: str = "run the command again"
    unfinished: str = ""


_NUMBER = "[0-9]" * 6
UNFINISHED = "unfinished"  # of `evaluate` and `sweep`
OUTPUTS = {
    "sample": Output(
        "samples",
        "samples.json",
        (f"{_NUMBER}.png", "samples.npz", "tokens.npz", "unfinished"),
        ("grid.png",),
        "the finished batches are kept: run the command again",
    ),
    "edit": Output("edits", "edits.json", (f"{_NUMBER}.png",), ("grid.png",)),
    "reconstruct": Output(
        "reconstructions",
        "reconstructions.json",
        ("reconstructions.npz", "psnr.md", "tokens.npz", "unfinished"),
        (f"{_NUMBER}_*.png", "reconstructions.png"),
        "the finished batches are kept: run the command again",
    ),
    "evaluate": Output(
        "evaluation",
        "evaluation_options.json",
        ("evaluation.json", "evaluation.txt", "curves.csv", UNFINISHED),
        ("curves.png",),
        "the finished features are kept: run the command again",
    ),
    "sweep": Output(
        "sweep",
        "sweep.json",
        ("sweep.csv", UNFINISHED),
        ("sweep.png",),
        "the finished points are kept: run the command again",
    ),
    "data": Output("survey", "data.json", (), ("train.png", "val.png")),
    "cache_tokens": Output(
        "token cache",
        "cache.json",
        ("*.array_record", "tokenizer"),
        kept="the finished shards are kept: run the command again",
        unfinished="unfinished",
    ),
}


@contextlib.contextmanager
def hold(
    field: str,
    folder: Path,
    has_lock: bool = True,
    *,
    claim: Callable[[], None] = lambda: None,
    kept: str = "run the command again",
) -> Iterator[None]:
    """Hold a folder for this run, and remove what killed writers left in it.

    Args:
      field: name of the option that gave the folder, for the error.
      folder: made if it is missing.
      has_lock: if False, nothing is held, which is said.
      claim: called by the first process as soon as it holds the folder; an InputError of it counts for all.
      kept: what is left if a file of the folder cannot be written, as the end of a sentence.

    Raises:
      InputError: in every process, if another run holds the folder or if it cannot be written.
      RunError: the block raised an error of a file or its disk: a full disk, a folder that is gone.
    """
    here, lock, refusal = group.current(), None, None
    if not has_lock and here.index == 0:
        print(f"{field} {folder} is not locked: no other run may use it meanwhile", file=sys.stderr, flush=True)
    try:
        if has_lock:
            if here.index == 0:
                try:
                    lock = acquire(folder, field)
                    group.at_leave(lambda: release_now(lock))
                    remove_leftovers(folder)
                    claim()
                except InputError as error:
                    refusal = error
                except OSError as error:
                    refusal = _unwritable(field, folder, error)
            words = here.gather(f"the lock of {field}", refusal and str(refusal))[0]
            if words:
                expected = "a directory that no other run uses"
                raise refusal or InputError(words, field=field, given=str(folder), expected=expected)
        with naming_errors(field, folder, kept):
            yield
    finally:
        if lock:
            lock.release()


@contextlib.contextmanager
def owned_folder(field: str, folder: Path, command: str, identity: dict[str, Any] | None) -> Iterator[Path]:
    """Hold a folder, claim it for the files of one command with these options, and yield it.

    The options are in the folder from before its first file on. A run that fails before its first file leaves no
    trace. Files with names that the command does not write may be there.

    Args:
      field: name of the option that gave the folder, for the error.
      folder: made if it is missing; all processes of the run must share it.
      command: a key of OUTPUTS.
      identity: JSON values by option on which the files depend, the same in all processes. None if the command keeps
        them in its own files, and calls `check_options` itself before it writes.

    Raises:
      InputError: another run holds the folder, the folder cannot be written, or it holds files of another command,
        of other options, or of unknown origin that the command would replace.
      RunError: see `hold`; or somebody else removed or moved the folder meanwhile.
    """
    here, output = group.current(), OUTPUTS[command]
    if identity is not None:
        identity = json.loads(json.dumps(identity))
        here.check_same(field, "options", identity)
    try:
        is_new = not folder.exists()
    except OSError as error:
        raise _unwritable(field, folder, error) from error
    check_shared(field, folder)
    try:
        with hold(field, folder, claim=lambda: _claim(field, folder, command, identity), kept=output.kept):
            try:
                yield folder
                if here.index == 0 and not (folder / output.identity).exists():
                    raise RunError(f"{field} {folder} was moved or emptied meanwhile; run the command again")
            except BaseException:
                if identity is not None and here.count == 1 and not _own_names(folder, output):  # others may write
                    with contextlib.suppress(OSError):
                        (folder / output.identity).unlink(missing_ok=True)
                raise
    finally:
        if is_new and here.index == 0:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if it is empty


def _claim(field: str, folder: Path, command: str, identity: dict[str, Any] | None) -> None:
    """Write the options into a folder that this run holds, unless they are there. Raises InputError if others are."""
    output = OUTPUTS[command]
    for other, theirs in OUTPUTS.items():
        if other != command and (folder / theirs.identity).exists():
            raise _refuse(field, folder, f"holds the {theirs.noun} of `{other}`")
    own, path = _own_names(folder, output), folder / output.identity
    is_known = path.exists() or (output.unfinished and (folder / output.unfinished).exists())
    if own and not is_known:
        raise _refuse(field, folder, f"holds {own[0]}, which `{command}` would replace")
    if identity is None:
        return
    try:
        stored = read_json(path, dict[str, Any]) if path.exists() else {}
    except (OSError, ValueError) as error:
        reason = f"holds a damaged {output.identity} ({shorten(error)})"
        raise _refuse(field, folder, reason) from None
    if own:
        check_options(field, f"the {output.noun} in {folder}", stored, identity)
    elif stored and not stored.keys() & identity.keys():  # somebody else's
        raise _refuse(field, folder, f"holds {output.identity}, which `{command}` would replace")
    else:
        write_json(path, identity)


def check_options(field: str, what: str, stored: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise InputError for the first of these options that differs from the stored ones.

    what: the files that the stored options were used for, such as "the samples in out".
    """
    there = dict(flatten(stored))
    for name, value in flatten(identity):
        if there.get(name) != value:
            words = f"{_describe_difference(what, name, there.get(name), value)}; choose another --{field}"
            raise InputError(words, field=name, given=value, expected=show(there.get(name)))


def _describe_difference(what: str, name: str, before: Any, now: Any) -> str:
    if name == "refiner":
        # `edit` keeps "off" or None, which means on; `sample` keeps the weights or None, which means off
        off = "off" if "off" in (before, now) else None
        if (before == off) != (now == off):
            drawn, asked = ("without", "one") if before == off else ("with", "none")
            return f"{what} were drawn {drawn} a refiner, but you asked for {asked}"
    return f"{name}={show(now)} differs from {show(before)}, used for {what}"


def _own_names(folder: Path, output: Output) -> list[str]:
    """Return the names in a folder that the command writes."""
    with contextlib.suppress(FileNotFoundError):  # of a store, where an empty folder does not exist
        names = [path.name for path in folder.iterdir()]
        return sorted(name for name in names if _matches(name, (*output.names, *output.figures)))
    return []


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def find_figures(names: Iterable[str]) -> set[str]:
    """Return which of the files are figures of our commands, which are no images of a set.

    names: of all files below a folder, relative to it. A folder is a command's if it holds the file of its options.
    """
    by_folder = defaultdict(set)
    for path in map(PurePath, names):
        by_folder[path.parent].add(path.name)
    return {
        str(folder / name)
        for folder, own in by_folder.items()
        for output in OUTPUTS.values()
        if output.identity in own
        for name in own
        if _matches(name, output.figures)
    }


def _unwritable(field: str, folder: Path, error: OSError) -> InputError:
    words = f"{field} {folder} cannot be written: {describe_file_error(error)}"
    return InputError(words, field=field, given=str(folder), expected="a writable directory")


def _refuse(field: str, folder: Path, reason: str) -> InputError:
    words = f"{field}={folder} {reason}; choose another --{field}"
    return InputError(words, field=field, given=str(folder), expected="a new folder, or one of the same options")
