"""A storage that fails says nothing about an image: it is asked again, and then the run ends."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from image_files import write_tar, write_tree

from mvar_jax.data.decoding import BadImage
from mvar_jax.data.image_files import ImageFiles
from mvar_jax.data.sources import open_source
from mvar_jax.errors import RunError
from mvar_jax.files import retries

PASSING = [errno.ESTALE, errno.EIO, errno.EMFILE, errno.ENOMEM, errno.ETIMEDOUT]
OWN = [errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG]


@pytest.fixture(params=["folder", "files", "tars"])
def source(request, tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "PAUSES_S", (0.0, 0.0, 0.0))
    tree = write_tree(tmp_path / "tree")
    if request.param == "folder":
        return open_source("folder", "val", path=str(tree))
    if request.param == "files":
        return ImageFiles(tree / "val", tmp_path / "out")
    write_tar(tmp_path / "val.tar", [("0.jpg", b"image"), ("0.cls", b"0")])
    write_tar(tmp_path / "train.tar", [("0.jpg", b"image"), ("0.cls", b"0")])
    return open_source("tars", "val", path=str(tmp_path))


@pytest.fixture
def fail(monkeypatch):
    """Let the next reads of files raise an error of this number."""

    def fail(number, times):
        left = [times]

        def failing(function):
            def call(*arguments, **options):
                if left[0]:
                    left[0] -= 1
                    raise OSError(number, os.strerror(number))
                return function(*arguments, **options)

            return call

        monkeypatch.setattr(Path, "read_bytes", failing(Path.read_bytes))
        monkeypatch.setattr(os, "pread", failing(os.pread))

    return fail


@pytest.mark.parametrize("number", PASSING)
def test_an_image_is_read_again_after_an_error_that_passes(source, fail, number):
    wanted = source[0]["image"]
    fail(number, times=3)
    assert source[0]["image"] == wanted


@pytest.mark.parametrize("number", PASSING)
def test_a_storage_that_keeps_failing_ends_the_run_with_the_file_and_the_reason(source, fail, number):
    fail(number, times=99)
    with pytest.raises(RunError, match=rf"(jpg|tar) cannot be read: {os.strerror(number)} \(4 tries\); run the comm"):
        source[0]


@pytest.mark.parametrize("number", OWN)
def test_an_error_of_the_file_itself_is_a_bad_image_at_once(source, fail, number):
    fail(number, times=1)
    with pytest.raises(BadImage, match=f"cannot be read: {os.strerror(number)}"):
        source[0]


@pytest.mark.parametrize("source", ["tars"], indirect=True)
def test_a_stale_tar_is_opened_anew(source, monkeypatch):
    wanted, stale = source[0]["image"], source._files[0]

    def pread(file, *rest, read=os.pread):
        if file == stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(file, *rest)

    monkeypatch.setattr(os, "pread", pread)
    assert source[0]["image"] == wanted


@pytest.mark.parametrize("source", ["folder", "files"], indirect=True)
def test_the_size_of_a_file_is_asked_for_again(source, monkeypatch):
    left = [1]
    digest = lambda: source.files_digest(np.arange(len(source)), with_sizes=True)
    wanted = digest()

    def stat(path, *rest, stat=os.stat, **options):
        if str(path).endswith("0.jpg") and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return stat(path, *rest, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert digest() == wanted and left == [0]
