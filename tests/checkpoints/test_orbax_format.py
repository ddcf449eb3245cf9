"""Checkpoints of version 0.1, which Orbax wrote, are read and their damage is found."""

import logging
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from test_manager import assert_equal_trees, damage_array, flip

from mvar_jax.checkpoints.manager import restore_weights
from mvar_jax.checkpoints.trees import load_tree
from mvar_jax.errors import InputError

ARCHIVE = Path(__file__).parents[1] / "golden" / "version_0_1.zip"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def workdir(archive, tmp_path):
    return Path(shutil.copytree(archive / "transformer", tmp_path / "transformer"))


def test_every_file_of_the_weights_is_checked(workdir):
    folder = workdir / "checkpoints/4"
    for path in [path for path in (folder / "params").rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        flip(path)
        with pytest.raises(InputError, match=f"{path.name} is damaged"):
            restore_weights(workdir, prefer_ema=False)
        path.unlink()
        with pytest.raises(InputError, match=f"{path.name} is missing"):
            restore_weights(workdir, prefer_ema=False)
        path.write_bytes(whole)


def test_lost_checksums_are_damage(workdir):
    (workdir / "checkpoints/4/checksums.json").unlink()
    with pytest.raises(InputError, match="checkpoint.*4 cannot be read"):
        restore_weights(workdir)


def test_weights_beside_a_damaged_item_are_read(workdir):
    expected = jax.tree.map(np.asarray, restore_weights(workdir))
    damage_array(workdir / "checkpoints/4")
    assert_equal_trees(jax.tree.map(np.asarray, restore_weights(workdir)), expected)


def test_tree_on_its_own_is_read_and_checked(workdir):
    assert jax.tree.leaves(load_tree(workdir / "tokenizer"))
    flip(workdir / "tokenizer/_METADATA")
    with pytest.raises(InputError, match="_METADATA is damaged"):
        load_tree(workdir / "tokenizer")


def test_orbax_is_quiet_and_the_logger_is_as_before(workdir, monkeypatch):
    records, logger = [], logging.getLogger("absl")
    handler = logging.Handler(logging.DEBUG)
    handler.emit = records.append
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    logger.manager._clear_cache()  # of what is enabled
    before = list(logger.filters)
    restore_weights(workdir)
    assert not [record.getMessage() for record in records]
    assert logger.filters == before
