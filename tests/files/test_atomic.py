import errno
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


@pytest.mark.parametrize("name", [b"a" * 251 + b".png", "ä".encode() * 125, b"caf\xe9.png", b"\xff" * 255, b"a.png"])
def test_file_of_any_name_is_written_under_a_temporary_name_that_fits_and_is_utf_8(tmp_path, name):
    path, other = tmp_path / os.fsdecode(name), tmp_path / os.fsdecode(name[:-1] + b"x")
    assert temporary_path(path) != temporary_path(other)
    assert len(str(temporary_path(path).name).encode()) <= 255
    write_atomically(path, "x")
    assert [entry.name for entry in os.scandir(os.fsencode(tmp_path))] == [name]


def test_text_may_name_files_whose_names_are_not_utf_8(tmp_path):
    write_atomically(tmp_path / "a", os.fsdecode(b"caf\xe9.png"))
    assert (tmp_path / "a").read_text() == r"caf\udce9.png"


def test_file_and_folder_are_synced_before_and_after_the_file_takes_its_place(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    monkeypatch.setattr(os, "replace", lambda a, b, replace=os.replace: (synced.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "a", "x")
    assert synced == [str(temporary_path(tmp_path / "a")), "replace", str(tmp_path)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_an_error_that_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, number):
    def fail(_):
        raise OSError(number, os.strerror(number))

    write_atomically(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "a", "new")
    assert caught.value.filename == str(tmp_path / "a") and caught.value.errno == number
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


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
    kept = {"tree", ".b.tmp", "c.7.tmp", ".hidden", ".tree.x-y.tmp"}
    own = temporary_path(tmp_path / "d").name
    for name in (*kept, ".a.png.123.tmp", ".tree.7.tmp", ".tree.old.host-7.tmp", own):
        (tmp_path / name).mkdir() if "tree" in name else (tmp_path / name).write_text("half")
    remove_leftovers(tmp_path, "tree.*")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, ".a.png.123.tmp", own}
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
