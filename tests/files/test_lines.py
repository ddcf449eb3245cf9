"""Files of lines, on a disk and in object stores."""

import json
import threading

import pytest

from mvar_jax.files import lines as lines_module
from mvar_jax.files.lines import open_lines, read_lines
from mvar_jax.files.paths import as_path

ALL = lambda line: True
DEADLINE_S = 60


@pytest.fixture(params=["disk", "s3", "gcs"])
def path(request, tmp_path):
    if request.param == "disk":
        return tmp_path / "metrics.jsonl"
    return as_path(request.getfixturevalue(request.param).url) / tmp_path.name / "metrics.jsonl"


def numbers(path):
    return [line["n"] for line in read_lines(path)]


def test_lines_are_readable_after_a_flush_and_whole_after_closing(path):
    assert read_lines(path) == []
    lines = open_lines(path, ALL)
    for n in range(3):
        lines.write({"n": n})
        lines.flush()
        assert numbers(path) == list(range(n + 1))
    lines.write({"n": 3})
    lines.close()
    assert path.read_text() == "".join(json.dumps({"n": n}) + "\n" for n in range(4))
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_reopened_file_drops_what_is_denied_and_grows(path):
    for kept, new in ((100, range(5)), (3, range(3, 6))):
        lines = open_lines(path, lambda line, kept=kept: line["n"] < kept)
        for n in new:
            lines.write({"n": n, "kept": kept})
        lines.close()
    assert [(line["n"], line["kept"]) for line in read_lines(path)] == [
        *((n, 100) for n in range(3)),
        *((n, 3) for n in range(3, 6)),
    ]


@pytest.mark.parametrize("cut", ['{"n": 1}', '{"n": 0}\n{"n": 1'])
def test_file_cut_by_a_kill_goes_on_with_whole_lines(tmp_path, cut):
    path = tmp_path / "a.jsonl"
    path.write_text(cut)
    lines = open_lines(path, ALL)
    lines.write({"n": 2})
    lines.close()
    assert numbers(path)[-1] == 2 and len(path.read_text().splitlines()) == 2


def test_long_file_in_a_store_is_in_pieces_until_it_is_closed(store, tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "PIECE_BYTES", 40)
    path = as_path(store.url) / tmp_path.name / "m.jsonl"
    lines = open_lines(path, ALL)
    for n in range(12):
        lines.write({"n": n})
        lines.flush()
    names = sorted(piece.name for piece in path.parent.iterdir())
    assert names == ["m-0001.jsonl", "m-0002.jsonl", "m.jsonl"] and numbers(path) == list(range(12))
    lines.close()
    assert path.parent.find() == ["m.jsonl"] and numbers(path) == list(range(12))


def test_pieces_of_a_killed_writer_are_read_once_and_joined(s3, tmp_path):
    """A kill after the join wrote all lines, and before it removed the pieces."""
    path = as_path(s3.url) / tmp_path.name / "m.jsonl"
    text = "".join(f'{{"n": {n}}}\n' for n in range(4))
    path.write_text(text)
    path.with_name("m-0001.jsonl").write_text('{"n": 2}\n{"n": 3}\n')
    path.with_name("m-0002.jsonl").write_text('{"n": 4}\n')
    assert numbers(path) == list(range(5))
    lines = open_lines(path, lambda line: line["n"] < 4)
    assert path.parent.find() == ["m.jsonl"] and path.read_text() == text
    lines.close()


def test_lines_reach_the_store_without_a_flush(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "UPLOAD_S", 0.05)
    path = as_path(s3.url) / tmp_path.name / "m.jsonl"
    lines = open_lines(path, ALL)
    lines.write({"n": 0})
    wait = threading.Event()
    for _ in range(DEADLINE_S * 10):
        if numbers(path):
            break
        wait.wait(0.1)
    assert numbers(path) == [0]
    lines.close()


def test_store_that_fails_is_said_once_and_loses_no_line(s3, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(lines_module, "UPLOAD_S", 0.02)
    path = as_path(s3.url) / tmp_path.name / "m.jsonl"
    lines = open_lines(path, ALL)
    tries = threading.Semaphore(0)

    def fail(*_):
        tries.release()
        raise OSError(5, "no answer")

    with monkeypatch.context() as patch:
        patch.setattr(lines_module, "write_atomically", fail)
        lines.write({"n": 0})
        assert all(tries.acquire(timeout=DEADLINE_S) for _ in range(3))
        with pytest.raises(OSError, match="no answer"):
            lines.flush()
    lines.write({"n": 1})
    lines.close()
    assert numbers(path) == [0, 1]
    assert capfd.readouterr().err.count(f"{path} cannot be written at the moment: no answer") == 1


def test_line_on_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    lines = open_lines(path, lambda _: True)
    for attempt in (lambda: lines.write({"step": 1}), lines.flush):
        with pytest.raises(OSError, match="No space left on device") as caught:
            attempt()
        assert caught.value.filename == str(path)
    with pytest.raises(OSError):
        lines.close()
