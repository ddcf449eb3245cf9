"""One folder, one run: what others left is neither mixed with nor replaced, and the same options go on."""

import errno
import json
import threading

import pytest

from mvar_jax.errors import InputError, RunError
from mvar_jax.files.atomic import temporary_path
from mvar_jax.processes.holding import OUTPUTS, owned_folder

OPTIONS = {"label": [1, 2], "seed": 0}
DEADLINE_S = 60


def write_edits(folder, content="edit", options=OPTIONS, command="edit"):
    with owned_folder("out", folder, command, options) as out:
        (out / "000000.png").write_text(content)
        (out / "grid.png").write_text(content)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_options_are_in_the_folder_before_the_first_file_and_the_same_ones_write_again(tmp_path):
    with owned_folder("out", tmp_path / "a", "edit", OPTIONS) as out:
        assert json.loads((out / "edits.json").read_text()) == OPTIONS
    write_edits(tmp_path / "a")
    write_edits(tmp_path / "a", "again")
    assert contents(out).keys() == {"000000.png", "grid.png", "edits.json"} and contents(out)["grid.png"] == "again"


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("edit", {**OPTIONS, "seed": 1}, "seed=1 differs from 0, used for the edits in {}; choose another --out"),
        ("edit", {**OPTIONS, "new": 1}, "new=1 differs from None, used for the edits in {}; choose another --out"),
        (
            "edit",
            {**OPTIONS, "refiner": "off"},
            "the edits in {} were drawn with a refiner, but you asked for none; choose another --out",
        ),
        ("sample", OPTIONS, "out={} holds the edits of `edit`; choose another --out"),
        ("reconstruct", OPTIONS, "out={} holds the edits of `edit`; choose another --out"),
    ],
)
def test_other_options_and_other_commands_are_refused_and_change_nothing(tmp_path, command, options, words):
    write_edits(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError) as caught:
        write_edits(tmp_path, "other", options, command)
    assert str(caught.value) == words.format(tmp_path) and contents(tmp_path) == before


def test_options_file_of_somebody_else_is_kept(tmp_path):
    (tmp_path / "edits.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="holds edits.json, which `edit` would replace; choose another --out"):
        write_edits(tmp_path)
    assert contents(tmp_path) == {"edits.json": '{"mine": 1}'}


@pytest.mark.parametrize("command", OUTPUTS)
def test_files_of_unknown_origin_are_refused_only_if_they_would_be_replaced(tmp_path, command):
    (tmp_path / "notes.txt").write_text("mine")
    with owned_folder("out", tmp_path, command, OPTIONS):
        pass
    (tmp_path / OUTPUTS[command].identity).unlink()
    name = (*OUTPUTS[command].names, *OUTPUTS[command].figures)[-1]
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds {name}, which `{command}` would replace; choose another --out"):
        write_edits(tmp_path, command=command)
    assert contents(tmp_path) == {"notes.txt": "mine", name: "mine"}


def test_of_two_at_the_same_moment_one_is_refused(tmp_path):
    """Both wait at the door; the first stays inside until the other has its answer."""
    barrier, is_refused, answers = threading.Barrier(2), threading.Event(), []

    def run(seed):
        barrier.wait(DEADLINE_S)
        try:
            with owned_folder("out", tmp_path / "a", "edit", {"seed": seed}) as out:
                (out / "000000.png").write_text(str(seed))
                assert is_refused.wait(DEADLINE_S)
                answers.append(seed)
        except InputError as error:
            answers.append(str(error))
            is_refused.set()

    threads = [threading.Thread(target=run, args=[seed]) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    refusal, winner = answers
    assert "is in use by another run" in refusal
    assert contents(tmp_path / "a")["000000.png"] == str(winner)
    assert json.loads(contents(tmp_path / "a")["edits.json"]) == {"seed": winner}


def test_run_that_fails_before_its_first_file_leaves_no_trace(tmp_path):
    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises(MemoryError), owned_folder("out", folder, "sample", OPTIONS):
            raise MemoryError
        assert list(tmp_path.iterdir()) == []


def test_killed_before_its_first_file_it_binds_nobody(tmp_path):
    (tmp_path / "edits.json").write_text('{"seed": 1}')
    temporary_path(tmp_path / "000000.png").write_text("half")
    write_edits(tmp_path)
    assert json.loads(contents(tmp_path)["edits.json"]) == OPTIONS and len(contents(tmp_path)) == 3


def test_damaged_options_of_files_that_are_there_are_refused(tmp_path):
    write_edits(tmp_path)
    (tmp_path / "edits.json").write_text('{"seed')
    with pytest.raises(InputError, match=r"holds a damaged edits.json \(.*\); choose another --out"):
        write_edits(tmp_path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "out {0} cannot be written (No space left on device)"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "out {0} cannot be written (Disk quota exceeded)"),
        (FileNotFoundError(errno.ENOENT, "Gone", "{0}/a.png"), "out {0} cannot be written (a.png: Gone)"),
        (PermissionError(errno.EACCES, "Denied", "{0}put/a.png"), "{0}put/a.png: Denied"),
        (PermissionError(errno.EACCES, "Denied", "/data/x.jpg"), "/data/x.jpg: Denied"),
    ],
)
def test_full_or_lost_disk_is_one_sentence_that_says_what_is_left(tmp_path, error, words):
    if error.filename:
        error.filename = error.filename.format(tmp_path)
    with pytest.raises(RunError) as caught, owned_folder("out", tmp_path, "sample", OPTIONS):
        raise error
    left = "; the finished batches are kept: run the command again"
    assert str(caught.value) == words.format(tmp_path) + left


def test_error_that_is_of_no_file_keeps_its_traceback(tmp_path):
    with pytest.raises(ConnectionResetError), owned_folder("out", tmp_path, "sample", OPTIONS):
        raise ConnectionResetError("peer")


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file/a", tmp_path / "file", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=f"out {folder} cannot be written: "):
            write_edits(folder)
