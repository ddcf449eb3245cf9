"""Commands on a full disk: one sentence that names the folder and what is left, status 1, nothing half-written."""

import errno
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from image_files import noise
from PIL import Image

import mvar_jax.api
from mvar_jax.__main__ import main

WEIGHTS = Path(__file__).parent.parent / "golden" / "tiny" / "mvar.pth"


@pytest.fixture
def full_disk(monkeypatch):
    """Let every PNG, and what is larger than 100,000 bytes, be too much for the disk."""

    def fsync(number):
        if ".png" in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    monkeypatch.setattr(os, "fsync", fsync)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def refuse(capfd, arguments: list, words: str) -> None:
    capfd.readouterr()
    assert main(list(map(str, arguments))) == 1
    assert capfd.readouterr().err.splitlines() == [f"error: {words}"]


def test_edits_on_a_full_disk_leave_nothing(full_disk, tiny_model, tmp_path, capfd, monkeypatch):
    Image.fromarray(noise(8, 6)).save(tmp_path / "a.png")
    results = np.zeros((4, 6, 6, 3), np.float32)
    monkeypatch.setattr(mvar_jax.api.Model, "edit_squares", lambda *_: (results, None))
    command = ["edit", "--checkpoint", tiny_model, "--image", tmp_path / "a.png", "--expand=2", "--label=0"]
    words = f"out {tmp_path}/out cannot be written (000000.png: Disk quota exceeded); run the command again"
    refuse(capfd, [*command, f"--out={tmp_path}/out"], words)
    assert os.listdir(tmp_path) == ["a.png"]


def test_converted_weights_on_a_full_disk_leave_nothing(full_disk, tmp_path, capfd):
    words = f"{tmp_path}/.out.unfinished/transformer: File too large; nothing was written; run the command again"
    refuse(capfd, ["convert", "--transformer", WEIGHTS, f"--out={tmp_path}/out"], words)
    assert not os.listdir(tmp_path)
