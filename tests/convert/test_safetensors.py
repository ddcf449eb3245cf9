import json
import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mvar_jax.checkpoints.model_directory import load_model
from mvar_jax.convert import safetensors_files
from mvar_jax.convert.reader import open_weights
from mvar_jax.convert.to_torch import to_safetensors, to_torch
from mvar_jax.convert.weights import convert
from mvar_jax.errors import InputError, RunError

TINY = Path(__file__).parent.parent / "golden" / "tiny"


def read_back(path):
    with open_weights("transformer", path) as file:
        return {name: file.read(tensor) for name, tensor in file.content.items()}


def refusal_of(path):
    with pytest.raises(InputError) as caught:
        read_back(path)
    message = str(caught.value)
    assert str(path.parent) in message and "is not a readable file of weights: " in message and "\n" not in message
    return message


def assert_same_trees(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Directory of the tiny tokenizer and transformer."""
    out = tmp_path_factory.mktemp("converted") / "model"
    convert(TINY / "vae.pth", TINY / "mvar.pth", out)
    return out


@pytest.mark.parametrize("shard_mib", [None, 1])
def test_a_model_goes_to_safetensors_and_back_bit_for_bit(tmp_path, model, shard_mib):
    files = to_safetensors(model, tmp_path / "there", shard_mib)
    assert sorted(file.name for file in files) == sorted(path.name for path in (tmp_path / "there").iterdir())
    first = [file for file in files if "-of-" not in file.name]
    suffix = ".index.json" if shard_mib else ""
    assert [file.name for file in first] == [f"vae.safetensors{suffix}", f"mvar.safetensors{suffix}"]
    assert len(files) > 4 if shard_mib else len(files) == 2
    convert(*first, tmp_path / "back")
    (modules, params), (expected_modules, expected) = load_model(tmp_path / "back"), load_model(model)
    assert modules == expected_modules
    assert_same_trees(params, expected)


def test_names_and_values_are_those_of_the_published_files(tmp_path, model):
    vae, mvar = to_safetensors(model, tmp_path / "safe")
    _, torch = to_torch(model, tmp_path / "torch")
    with open_weights("transformer", torch) as file:
        published = {name: file.read(tensor) for name, tensor in file.content["mvar_wo_ddp"].items()}
    found = safetensors.numpy.load_file(mvar)
    assert found.keys() == published.keys()
    for name, value in published.items():
        np.testing.assert_array_equal(found[name], value, strict=True)
    assert safetensors.numpy.load_file(vae).keys() == dict(np.load(TINY / "vae.npz")).keys()


def test_the_bytes_decide_not_the_name(tmp_path, model):
    vae, mvar = to_safetensors(model, tmp_path / "safe")
    convert(vae.rename(tmp_path / "vae.pth"), mvar.rename(tmp_path / "mvar.bin"), tmp_path / "model")
    assert_same_trees(load_model(tmp_path / "model")[1], load_model(model)[1])


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64", "uint8", "bool"])
def test_reads_every_dtype(tmp_path, dtype):
    expected = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    safetensors.numpy.save_file({"x": expected, "none": np.zeros((0, 2), expected.dtype)}, tmp_path / "x")
    found = read_back(tmp_path / "x")
    np.testing.assert_array_equal(found["x"], expected, strict=True)
    assert found["none"].shape == (0, 2)


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


NAMED_TWICE = b'{"a":' + json.dumps(tensor()).encode() + b',"a":' + json.dumps(tensor(shape=(1, 2))).encode() + b"}"
LIES = {
    "range past the end": ({"a": tensor(offsets=(0, 16))}, 8, None),
    "file too short": ({"a": tensor()}, 7, None),
    "file too long": ({"a": tensor()}, 9, None),
    "hole before": ({"a": tensor(offsets=(8, 16))}, 16, None),
    "hole between": ({"a": tensor(), "b": tensor(offsets=(12, 20))}, 20, None),
    "overlap": ({"a": tensor(), "b": tensor(offsets=(4, 12))}, 12, None),
    "same range": ({"a": tensor(), "b": tensor()}, 8, None),
    "range backwards": ({"a": tensor(offsets=(8, 0))}, 8, None),
    "shape too large": ({"a": tensor(shape=(3,))}, 8, None),
    "shape overflows": ({"a": tensor(shape=(2**62, 4))}, 8, None),
    "shape negative": ({"a": tensor(shape=(-2,))}, 8, None),
    "shape no numbers": ({"a": tensor(shape=("2",))}, 8, None),
    "too many axes": ({"a": tensor(shape=(1,) * 99 + (2,))}, 8, None),
    "other dtype": ({"a": tensor("F64")}, 8, None),
    "unknown dtype": ({"a": tensor("F31")}, 8, None),
    "unread dtype": ({"a": tensor("F8_E4M3", (8,))}, 8, None),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, None),
    "no tensor": ({"a": 1}, 0, None),
    "named twice": (NAMED_TWICE, 8, None),
    "no JSON": (b"{nonsense}", 0, None),
    "deep JSON": (b'{"a":' * 100_000, 0, None),
    "no text": (b'{"\xff": 1}', 0, None),
    "header past the end": ({"a": tensor()}, 8, 1000),
    "header of the whole address space": ({"a": tensor()}, 8, 2**64 - 1),
    "header cut": ({"a": tensor()}, 8, 5),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": tensor()}, 8, None),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_refused(tmp_path, lie):
    header, num_bytes, num_claimed = LIES[lie]
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    num_claimed = len(header) if num_claimed is None else num_claimed
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", num_claimed) + header + bytes(num_bytes))
    assert refusal_of(tmp_path / "x.safetensors")


@pytest.mark.parametrize("magic", [b"\x80\2", b"PK", b"\x1f\x8b", b"{\0", b"<h"])
def test_lengths_that_look_like_another_format_are_lengths(tmp_path, magic):
    header = json.dumps({"a": tensor()}).encode()
    header = header.ljust(int.from_bytes(magic, "little"))
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert read_back(tmp_path / "x")["a"].tolist() == [0, 0]


def test_a_cut_download_says_how_much_is_missing(tmp_path):
    safetensors.numpy.save_file({"x": np.zeros(1000, np.float32)}, tmp_path / "x")
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole[:-100])
    assert f"ends after {len(whole) - 100} of {len(whole)} bytes; download it again" in refusal_of(tmp_path / "x")


def test_long_headers_are_refused_before_they_are_read(tmp_path, monkeypatch):
    safetensors.numpy.save_file({"x" * 2000: np.zeros(1)}, tmp_path / "x")
    monkeypatch.setattr(safetensors_files, "MAX_HEADER_BYTES", 1000)
    assert "at most 1000 are read" in refusal_of(tmp_path / "x")


@pytest.fixture
def sharded(tmp_path):
    """Folder of two shards with their index; returns (path of the index, its content)."""
    for i, names in enumerate((("a", "b"), ("c",))):
        shard = {name: np.full(3, ord(name), np.float32) for name in names}
        safetensors.numpy.save_file(shard, tmp_path / f"x-{i + 1:05}-of-00002.safetensors")
    one, two = "x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"
    index = {"metadata": {}, "weight_map": {"a": one, "b": one, "c": two}}
    path = tmp_path / "x.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path, index


def test_shards_are_read_through_their_index(sharded):
    found = read_back(sharded[0])
    assert {name: value.tolist() for name, value in found.items()} == {name: [ord(name)] * 3 for name in "abc"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_map": {"a": "x-00001-of-00002.safetensors"}}, "holds 'b'"),
        ({"weight_map": {"z": "x-00002-of-00002.safetensors"}}, "unlike its weight_map says"),
        ({"weight_map": {"a": "missing.safetensors"}}, "missing.safetensors is not a readable file of weights: No"),
        ({"weight_map": {"a": "../x-00001-of-00002.safetensors"}}, "must name files beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "must name files beside it"),
        ({"weight_map": {"a": ""}}, "a directory"),
        ({"weight_map": {"a": ".."}}, "a directory"),
        ({"weight_map": {"a": "x.safetensors.index.json"}}, "begins with"),  # itself
        ({"weight_map": {"a": 3}}, "must name files beside it"),
        ({"weight_map": {}}, "without the weight_map"),
        ({"weight_map": ["a"]}, "without the weight_map"),
        ([1], "begins with"),
    ],
)
def test_an_index_that_lies_is_refused(sharded, change, words):
    sharded[0].write_text(json.dumps(change if isinstance(change, list) else sharded[1] | change))
    assert words in refusal_of(sharded[0])


def test_a_shard_alone_names_the_index(sharded):
    path = sharded[0].with_name("x-00001-of-00002.safetensors")
    assert "one of 2 shards; give x.safetensors.index.json" in refusal_of(path)


def test_files_have_the_mode_of_every_other_file(tmp_path, model):
    (tmp_path / "other").touch()
    for path in to_safetensors(model, tmp_path / "safe"):
        assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_full_disk_leaves_nothing(tmp_path, model, monkeypatch):
    def fail(*_, **__):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(RunError, match="No space left on device"):
        to_safetensors(model, tmp_path / "safe")
    assert not (tmp_path / "safe").exists()


@pytest.mark.parametrize("shard_mib", [0, -1, 1.5, True])
def test_shards_of_no_size_are_refused(tmp_path, model, shard_mib):
    with pytest.raises(InputError) as caught:
        to_safetensors(model, tmp_path / "out", shard_mib)
    assert caught.value.field == "shard_mib" and not (tmp_path / "out").exists()
