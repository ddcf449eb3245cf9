import pytest

from mvar_jax.errors import InputError
from mvar_jax.files.directories import make_directory, new_directory


def test_directory_appears_when_the_block_succeeds(tmp_path):
    path = tmp_path / "a"
    with new_directory("out", path) as temporary:
        (temporary / "file").write_text("x")
        assert not path.exists()
    assert (path / "file").read_text() == "x" and list(tmp_path.iterdir()) == [path]


def test_block_that_raises_leaves_no_directory(tmp_path):
    with pytest.raises(KeyError), new_directory("out", tmp_path / "a") as temporary:
        (temporary / "file").write_text("x")
        raise KeyError
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(InputError, match="--out must be a writable directory.*file/a"):
        make_directory(tmp_path / "file/a")
