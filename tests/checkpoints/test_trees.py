"""A tree that is replaced: a kill at any moment leaves a readable one."""

import os

import numpy as np
import pytest

from mvar_jax.checkpoints.trees import load_tree, save_tree
from mvar_jax.files.atomic import remove_leftovers


class _Killed(BaseException):
    pass


@pytest.fixture(params=[0, 1, 2])
def killed(request, tmp_path, monkeypatch):
    """(a tree whose writer was killed after n renames, the value that it held)."""
    path = tmp_path / "tokenizer"
    save_tree(path, {"a": np.ones(3)})
    left = [request.param]

    def replace(old, new, replace=os.replace):
        if path not in (old, new):
            return replace(old, new)
        if not left[0]:
            raise _Killed
        left[0] -= 1
        replace(old, new)
        if not left[0]:
            raise _Killed
        return None

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(_Killed):
        save_tree(path, {"a": np.full(3, 2.0)})
    monkeypatch.undo()
    return path, 2.0 if request.param == 2 else 1.0


def test_a_kill_between_renames_leaves_a_readable_tree(killed):
    path, value = killed
    assert load_tree(path)["a"].tolist() == [value] * 3


def test_the_next_owner_of_the_folder_puts_the_tree_back_in_its_place(killed):
    path, value = killed
    remove_leftovers(path.parent)
    assert load_tree(path)["a"].tolist() == [value] * 3
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_next_writer_may_be_killed_too(killed, monkeypatch):
    path, value = killed
    monkeypatch.setattr("mvar_jax.checkpoints.trees._write_tree", lambda *_: (_ for _ in ()).throw(_Killed()))
    with pytest.raises(_Killed):
        save_tree(path, {"a": np.full(3, 3.0)})
    assert load_tree(path)["a"].tolist() == [value] * 3


def test_the_next_writer_replaces_the_tree_and_leaves_nothing_else(killed):
    path, _ = killed
    save_tree(path, {"a": np.full(3, 3.0)})
    assert load_tree(path)["a"].tolist() == [3.0] * 3
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
