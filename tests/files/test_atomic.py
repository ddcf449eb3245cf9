import os
import re
import socket

import pytest

from mvar_jax.files.atomic import remove_leftovers, replacing, temporary_path, write_atomically, write_json


def test_temporary_name_is_hidden_in_the_same_folder_and_belongs_to_host_and_process(tmp_path, monkeypatch):
    path = temporary_path(tmp_path / "a.json")
    assert path.parent == tmp_path and re.fullmatch(rf"\.a\.json\.[\w-]+-{os.getpid()}\.tmp", path.name)
    monkeypatch.setattr(socket, "gethostname", lambda: "node.7")
    assert temporary_path(tmp_path / "a.json").name == f".a.json.node-7-{os.getpid()}.tmp" != path.name


def test_file_takes_its_place_only_after_the_block(tmp_path):
    path = tmp_path / "folder/a.txt"
    write_atomically(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_block_that_raises_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, b"old")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_json_is_indented_and_ends_with_a_newline(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1]})
    assert (tmp_path / "a.json").read_text() == '{\n "a": [\n  1\n ]\n}\n'


def test_json_that_cannot_be_written_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {1, 2})
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    kept = {".b.tmp", "c.7.tmp", ".hidden", ".tree.x-y.tmp"}
    own = temporary_path(tmp_path / "d").name
    for name in (*kept, ".a.png.123.tmp", ".tree.7.tmp", ".tree.old.host-7.tmp", own):
        (tmp_path / name).mkdir() if "tree" in name else (tmp_path / name).write_text("half")
    remove_leftovers(tmp_path, "tree.*")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, ".a.png.123.tmp", own}
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
