import pytest

from mvar_jax.errors import InputError, RunError
from mvar_jax.files.directories import new_directory


def test_directory_appears_when_the_block_succeeds(tmp_path):
    path = tmp_path / "a"
    with new_directory("out", path) as temporary:
        (temporary / "file").write_text("x")
        assert [entry.name for entry in path.iterdir()] == [".lock"]
    assert (path / "file").read_text() == "x" and list(tmp_path.iterdir()) == [path]


def test_block_that_raises_leaves_no_directory(tmp_path):
    with pytest.raises(KeyError), new_directory("out", tmp_path / "a") as temporary:
        (temporary / "file").write_text("x")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_of_two_writers_at_the_same_moment_one_is_refused_and_what_a_killed_one_left_is_removed(tmp_path):
    (tmp_path / ".a.unfinished").mkdir()
    (tmp_path / ".a.unfinished/half").write_text("x")
    with new_directory("out", tmp_path / "a") as temporary:
        (temporary / "file").write_text("x")
        rival = new_directory("out", tmp_path / "a")
        with pytest.raises(InputError, match="out .*/a is in use by another run"), rival:
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]


def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    words = f"out {tmp_path}/a cannot be written (No space left on device); nothing was written; run the command "
    with pytest.raises(RunError) as caught, new_directory("out", tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert str(caught.value) == words + "again" and not list(tmp_path.iterdir())


def test_directory_that_is_taken_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(InputError, match="--out must be a new or an empty directory") as caught,
        new_directory("out", tmp_path),
    ):
        pass
    assert caught.value.field == "out" and caught.value.given == str(tmp_path)


def test_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    new = new_directory("out", tmp_path / "file/a")
    with pytest.raises(InputError, match="out .*file/a cannot be written: "), new:
        pass
