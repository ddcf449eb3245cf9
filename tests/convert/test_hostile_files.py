"""Files that are made to harm: each ends in one sentence, within the deadline of a test."""

import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch_files

from mvar_jax.convert import files, pickles
from mvar_jax.convert.pickles import PickleError, load_pickle
from mvar_jax.convert.reader import open_weights
from mvar_jax.convert.state_dicts import find_state_dict
from mvar_jax.convert.weights import convert
from mvar_jax.errors import InputError


def refuse(tmp_path, path=None) -> str:
    """Return the sentence with which a conversion is refused; it leaves nothing behind."""
    path = path or tmp_path / "x.pth"
    with pytest.raises(InputError) as caught:
        convert(None, path, tmp_path / "model")
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 600
    assert not (tmp_path / "model").exists()
    return message


def save_pickle(tmp_path, pickled):
    torch_files.save_members(tmp_path / "x.pth", b"\x80\x04" + pickled + b".")


def put(number):
    return b"r" + struct.pack("<I", number)


def get(number):
    return b"j" + struct.pack("<I", number)


DEPTH = 60


def doubling(make_two):
    """Opcodes of containers that each hold the one before twice: 2^DEPTH leaves."""
    pickled = b"N" + put(0) + b"0"
    for i in range(DEPTH):
        pickled += make_two(get(i)) + put(i + 1) + b"0"
    return pickled + get(DEPTH)


LAUGHS = {
    "tuples": doubling(lambda one: b"(" + one + one + b"t"),
    "lists": doubling(lambda one: b"(" + one + one + b"l"),
    "frozensets": doubling(lambda one: b"(" + one + one + b"\x91"),
    "dicts": doubling(lambda one: b"}K\1" + one + b"sK\2" + one + b"s"),
    "keys": doubling(lambda one: b"}" + one + one + b"s"),
}
LONG = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
LONG_INTEGER = b"\x8b" + struct.pack("<i", 1 << 20) + b"\1" * (1 << 20)
MANY = 200_000


@pytest.mark.parametrize("kind", LAUGHS)
def test_nested_containers_as_keys_and_values_take_no_time(tmp_path, kind):
    save_pickle(tmp_path, b"}" + LAUGHS[kind] + b"K\1s")  # as a key
    assert "state dict" in refuse(tmp_path)
    save_pickle(tmp_path, b"}K\1" + LAUGHS[kind] + b"s")
    assert "state dict" in refuse(tmp_path)


@pytest.mark.parametrize(
    "pickled",
    [
        b"(" * MANY + b"t" * MANY,
        b"N" + b"\x85" * MANY,
        b"]" * MANY + b"a" * (MANY - 1),
        b"}" * MANY,
        b"}" + put(0) + b"K\1" + get(0) + b"s",
        b"]" + put(0) + get(0) + b"a",
        b"]" + put(0) + b"(" + get(0) * MANY + b"e",
        b"}" + LONG + put(1) + b"K\1s" + LONG + put(2) + b"K\1s" + (get(2) + b"K\1s") * (MANY // 2),
        b"}" + LONG_INTEGER + put(1) + b"K\1s" + (get(1) + b"K\1s") * (MANY // 2),
    ],
    ids=["marks", "tuples", "lists", "stack", "own_value", "own_item", "own_items", "long_text", "long_integer"],
)
def test_depth_and_repetition_take_no_time(tmp_path, pickled):
    save_pickle(tmp_path, pickled)
    assert "state dict" in refuse(tmp_path)


def test_work_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_WORK", 1000)
    save_pickle(tmp_path, b"N0" * 600 + b"}")
    assert "more than 1000 steps" in refuse(tmp_path)
    # a dictionary of 100 pairs, made again and again from one list
    pairs = b"(" + b"K\1K\2\x86" * 100 + b"l" + put(0) + b"\x85" + put(1)
    save_pickle(tmp_path, pairs + b"ccollections\nOrderedDict\n" + put(2) + (get(2) + get(1) + b"R0") * 10 + b"}")
    assert "more than 1000 steps" in refuse(tmp_path)


def test_arguments_of_a_tensor_are_bounded(tmp_path):
    """A tuple of 200,000 entries as arguments, shape or strides costs no more than a short one."""
    arguments = b"(" + b"K\1" * MANY + b"t" + put(0)
    rebuild = b"ctorch._utils\n_rebuild_parameter\n" + put(1)
    save_pickle(tmp_path, arguments + b"0}" + rebuild + b"0" + get(1) + get(0) + b"R")
    assert "parameter has no tensor" in refuse(tmp_path)
    storage = b"((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nK\1tQ"
    save_pickle(
        tmp_path, b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + b"K\0" + b"(" + b"K\1" * 99 + b"t" + b"2tR"
    )
    assert "no valid storage, shape or strides" in refuse(tmp_path)


@pytest.mark.parametrize("opcode", [b"B", b"X", b"\x8b", b"T", *(c + bytes(4) for c in (b"\x8d", b"\x8e", b"\x95"))])
def test_claims_of_much_data_allocate_nothing(tmp_path, opcode):
    save_pickle(tmp_path, opcode + b"\xff\xff\xff\x7f" + b"abc")
    assert "damaged" in refuse(tmp_path)


def test_claims_of_large_memos_allocate_nothing():
    content, _ = load_pickle(io.BytesIO(b"\x80\x02}r\xff\xff\xff\x7fp99999999999\n."))
    assert content == {}


@pytest.mark.parametrize(
    "pickled", [b"\x82\1", b"\x83\1\1", b"Pname\n", b"\x97", b"N\x98", b"Nb", b"0", b"1", b"K\1\x93"]
)
def test_what_lies_outside_the_file_or_has_no_meaning_is_refused(pickled):
    with pytest.raises(PickleError):
        load_pickle(io.BytesIO(b"\x80\x05" + pickled + b"."))


def transformer_with(name, view):
    storage = torch_files.Storage(np.zeros(8, np.float32))
    return {"pos_1LC": torch_files.View(storage, 0, (1, 1, 8), (8, 8, 1)), name: view}


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 1 << 40), "would unpack to"),
        ((1 << 62, 1 << 62), "would unpack to"),
        ((1 << 31,), "would unpack to"),
    ],
)
def test_expanded_tensors_take_no_more_memory_than_the_file_may(tmp_path, shape, words):
    view = torch_files.View(torch_files.Storage(np.zeros(1, np.int64)), 0, shape, (0,) * len(shape))
    torch_files.save(tmp_path / "x.pth", transformer_with("lvl_1L", view))
    assert words in refuse(tmp_path)


def test_many_tensors_of_one_storage_take_no_more_memory_than_the_file_may(tmp_path):
    storage = torch_files.Storage(np.zeros(1 << 20, np.float32))
    view = torch_files.View(storage, 0, (1 << 20,), (1,))
    torch_files.save(tmp_path / "x.pth", transformer_with("pos_start", view) | {f"x{i}": view for i in range(500)})
    assert "would unpack to" in refuse(tmp_path)


def test_number_of_tensors_is_bounded(tmp_path):
    view = torch_files.View(torch_files.Storage(np.zeros(1, np.float32)), 0, (1,), (1,))
    names = [f"encoder.down.0.block.{i}.conv1.weight" for i in range(10_001)]
    torch_files.save(tmp_path / "x.pth", transformer_with("x", view) | dict.fromkeys(names, view))
    assert "more than 10000" in refuse(tmp_path)


def test_storage_of_a_huge_claim_is_refused_before_it_is_read(tmp_path):
    view = torch_files.View(torch_files.Storage(np.zeros(4, np.float32), 1 << 40), 0, (1, 4), (4, 1))
    for save in (torch_files.save, torch_files.save_legacy):
        save(tmp_path / "x.pth", transformer_with("lvl_1L", view))
        with pytest.raises(InputError), open_weights("transformer", tmp_path / "x.pth") as file:
            find_state_dict("transformer", file)["lvl_1L"]


def test_storages_that_alternate_are_not_read_again_and_again(tmp_path, monkeypatch):
    """Small tensors of two large storages: each read unpacks a whole storage."""
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 8 << 20)
    storages = [torch_files.Storage(np.zeros(1 << 18, np.float32)) for _ in range(2)]
    content = {f"x{i}": torch_files.View(storages[i % 2], 0, (1,), (1,)) for i in range(20)}
    torch_files.save(tmp_path / "x.pth", content, zipfile.ZIP_DEFLATED)
    with open_weights("transformer", tmp_path / "x.pth") as file, pytest.raises(InputError, match="would unpack to"):
        for tensor in file.content.values():
            file.read(tensor)


@pytest.mark.parametrize("place", range(5))
def test_nested_containers_in_files_of_the_older_format_take_no_time(tmp_path, place):
    pickled = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}, {}, [])]
    pickled[place] = b"\x80\x02]" + LAUGHS["tuples"] + b"a."
    (tmp_path / "x.pth").write_bytes(b"".join(pickled))
    assert refuse(tmp_path)


def test_zip_bombs_and_overlapping_or_repeated_members_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("name/data.pkl", bytes(9 << 20))
    assert "more than the 8388608 expected" in refuse(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("name/data.pkl", b"\x80\x02}.")
        archive.writestr("name/data/0", bytes(8))
        archive.infolist()[1].header_offset = 0  # both members begin at the first
    assert "data.pkl" in refuse_read(path) or "Overlapped" in refuse_read(path)
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            archive.writestr("name/data.pkl", b"\x80\x02}.")
    assert "several members of one name" in refuse(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("name/data.pkl", b"\x80\x02}.")
        for i in range(100):  # 100 GiB claimed
            archive.writestr(f"name/data/{i}", b"")
            archive.infolist()[-1].file_size = 1 << 30
    assert "would unpack to" in refuse(tmp_path)


def refuse_read(path) -> str:
    with pytest.raises(InputError) as caught, open_weights("transformer", path) as file:
        file._read_member("name/data/0", 8)
    return str(caught.value)


def test_only_regular_files_are_opened(tmp_path):
    """A pipe blocks whoever opens it; a device may never end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "pipe", "a pipe"),
        (tmp_path / "link", "a pipe"),
        ("/dev/zero", "a device"),
        (tmp_path, "a directory"),
        (tmp_path / "nothing", "No such file"),
    ):
        assert words in refuse(tmp_path, path)
    index = {"weight_map": {"pos_1LC": "pipe"}}
    (tmp_path / "x.pth").write_text(json.dumps(index))
    with pytest.raises(InputError, match="a pipe"):
        convert(None, tmp_path / "x.pth", tmp_path / "model")


def test_a_pickle_of_random_damage_never_raises_anything_else(tmp_path):
    torch_files.save(tmp_path / "x.pth", {"x": np.ones(3, np.float32), "args": {"a": (1, [2.5, None])}})
    whole = zipfile.ZipFile(tmp_path / "x.pth").read("name/data.pkl")
    rng = np.random.default_rng(0)
    for _ in range(2000):
        damaged = bytearray(whole)
        for at in rng.integers(len(whole), size=rng.integers(1, 6)):
            damaged[at] = rng.integers(256)
        try:
            load_pickle(io.BytesIO(bytes(damaged)))
        except PickleError as error:
            assert "\n" not in str(error)


def test_example_that_never_returned(tmp_path):
    """Hashing nested tuples takes 2^depth steps; Python's own pickle writes this one in a few hundred bytes."""
    key = ()
    for _ in range(60):
        key = (key, key)
    pickled = pickle.dumps(key, protocol=2)
    assert len(pickled) < 1000
    torch_files.save_members(tmp_path / "x.pth", b"\x80\x02}" + pickled[2:-1] + b"Ns.")
    refuse(tmp_path)
