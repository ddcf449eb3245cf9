import argparse
import builtins
import bz2
import collections
import datetime
import gzip
import inspect
import lzma
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch_files
from torch_files import Parameter, Storage, View

from mvar_jax.convert import files
from mvar_jax.convert import torch_files as formats
from mvar_jax.convert.reader import open_weights
from mvar_jax.convert.tensors import Tensor
from mvar_jax.errors import InputError

TINY = Path(__file__).parent.parent / "golden" / "tiny"


def read_back(path):
    """Every tensor of a flat dict."""
    with open_weights("transformer", path) as file:
        return {name: file.read(tensor) for name, tensor in file.content.items()}


def assert_same_bits(found, expected):
    assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def refusal_of(path):
    with pytest.raises(InputError) as caught, open_weights("transformer", path) as file:
        for tensor in file.content.values():
            file.read(tensor)
    message = str(caught.value)
    assert caught.value.field == "transformer" and caught.value.given == str(path)
    assert message.startswith(f"transformer={path} is not a readable file of weights: ") and "\n" not in message
    return message


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.parts = function, args

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("name", ["vae", "mvar"])
def test_reads_every_bit_of_published_file(name):
    expected = np.load(TINY / f"{name}.npz")
    with open_weights("tokenizer", TINY / f"{name}.pth") as file:
        tensors = file.content if name == "vae" else file.content["mvar_wo_ddp"]
        assert set(tensors) == set(expected.files)
        for key in expected.files:
            assert_same_bits(file.read(tensors[key]), expected[key])


@pytest.mark.parametrize("byteorder", ["little", "big"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_reads_every_dtype_in_either_byte_order(tmp_path, compression, byteorder):
    values = np.arange(24).reshape(2, 3, 4) - 5
    dtypes = [
        *(np.dtype(d) for d in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")),
        np.dtype(ml_dtypes.bfloat16),
    ]
    content = {dtype.name: values.astype(dtype) for dtype in dtypes} | {"scalar": np.array(1.5, np.float32)}
    path = tmp_path / "x.pth"
    torch_files.save(path, content, compression, byteorder)
    found = read_back(path)
    assert found.keys() == content.keys()
    for name, expected in content.items():
        assert_same_bits(found[name], expected)


@pytest.mark.parametrize("save", [torch_files.save, torch_files.save_legacy])
def test_honours_strides_and_offsets_of_shared_storage(tmp_path, save):
    data = np.arange(100, dtype=np.float32)
    shared = Storage(data)
    content = {
        "transposed": View(shared, 10, (4, 3), (1, 4)),
        "every_third": View(shared, 1, (5,), (3,)),
        "to_the_end": View(shared, 90, (2, 5), (5, 1)),
        "empty": View(shared, 0, (0, 3), (3, 1)),
        "expanded": View(shared, 7, (300, 2), (0, 1)),
        "parameter": Parameter(View(shared, 3, (2,), (1,))),
    }
    save(tmp_path / "x.pth", content)
    found = read_back(tmp_path / "x.pth")
    np.testing.assert_array_equal(found["transposed"], data[10:22].reshape(3, 4).T)
    np.testing.assert_array_equal(found["every_third"], data[1:16:3])
    np.testing.assert_array_equal(found["to_the_end"], data[90:].reshape(2, 5))
    np.testing.assert_array_equal(found["parameter"], data[3:5])
    assert found["empty"].shape == (0, 3)
    np.testing.assert_array_equal(found["expanded"], np.tile(data[7:9], (300, 1)))


@pytest.mark.parametrize(
    "view",
    [
        (1, (100,), (1,)),
        (0, (2, 50), (51, 1)),
        (101, (1,), (1,)),
        (-1, (1,), (1,)),
        (0, (-2,), (1,)),
        (5, (2,), (-1,)),
        (0, (2,), (1, 1)),
        (0, [2], (1,)),
        (0, (2.0,), (1,)),
    ],
)
def test_refuses_tensor_outside_its_storage(tmp_path, view):
    torch_files.save(tmp_path / "x.pth", {"x": View(Storage(np.zeros(100, np.float32)), *view)})
    assert refusal_of(tmp_path / "x.pth")


@pytest.mark.parametrize("num_claimed", [99, 101, 2**62])
def test_refuses_storage_of_other_size_than_claimed(tmp_path, num_claimed):
    storage = Storage(np.zeros(100, np.float32), num_claimed)
    torch_files.save(tmp_path / "x.pth", {"x": View(storage, 0, (2,), (1,))})
    assert "400 bytes" in refusal_of(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("function", "make_args"),
    [
        (os.system, lambda path: (f"touch {path}",)),
        (os.mkdir, lambda path: (str(path),)),
        (subprocess.Popen, lambda path: (["touch", str(path)],)),
        (builtins.exec, lambda path: (f"open({str(path)!r}, 'w')",)),
        (builtins.open, lambda path: (str(path), "w")),
    ],
)
def test_refuses_what_runs_programs_by_name_without_running_it(tmp_path, function, make_args):
    trace = tmp_path / "trace"
    for protocol in (0, 2, 4):
        content = {"x": Call(function, *make_args(trace))}
        torch_files.save_members(tmp_path / "x.pth", pickle.dumps(content, protocol))
        message = refusal_of(tmp_path / "x.pth")
        assert f".{function.__name__}'" in message and not trace.exists()


class Mapping(dict):
    """A dictionary of a class that the reader does not know."""


FOREIGN = {
    "namespace": argparse.Namespace(lr=1e-4, layers=[1, 2]),
    "numpy_scalar": np.float64(1.5),
    "numpy_array": np.arange(5),  # torch_files makes tensors of arrays at the top only
    "numpy_dtype": np.dtype("f4"),
    "path": Path("/data/imagenet"),
    "time": datetime.datetime(2024, 5, 1),
    "ordered": collections.OrderedDict(a=1),
    "default": collections.defaultdict(list, {"a": [1]}),
    "mapping": Mapping(a=1),
    "set": {1, 2},
    "frozen": frozenset({(1, 2)}),
    "complex": 1 + 2j,
    "slice": slice(1, 2),
    "enum": inspect.Parameter.POSITIONAL_ONLY,
    "own_class": View(None, 0, (), ()),
    "class": dict,
    "function": np.zeros,
    "called": Call(np.zeros, 3),
    "bytes": b"123",
    "tuple_key": {(1, 2): 3},
    "huge": 1 << 200,
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_foreign_objects_beside_weights_are_inert(tmp_path, protocol):
    """Each is read alone, so that a failure names it; nothing of it is imported or called."""
    for name, value in FOREIGN.items():
        pickled = pickle.dumps({"foreign": value, "after": 1}, protocol)
        torch_files.save_members(tmp_path / "x.pth", pickled)
        with open_weights("transformer", tmp_path / "x.pth") as file:
            assert file.content.keys() == {"foreign", "after"}, name
            assert file.content["after"] == 1, name


def test_items_and_attributes_of_foreign_objects_are_kept(tmp_path):
    content = {"args": argparse.Namespace(kernel_size=5), "mapping": Mapping(a=1), "ordered": FOREIGN["ordered"]}
    for protocol in (2, 4):
        torch_files.save_members(tmp_path / "x.pth", pickle.dumps(content, protocol))
        with open_weights("transformer", tmp_path / "x.pth") as file:
            assert file.content["args"].class_name == "argparse.Namespace"
            assert file.content["args"].attributes == {"kernel_size": 5}
            assert dict(file.content["mapping"]) == file.content["ordered"] == {"a": 1}


def test_tensors_of_dtypes_that_numpy_lacks_are_inert(tmp_path):
    torch_files.save(tmp_path / "x.pth", {"x": np.ones(3, np.float32)})
    pickled = zipfile.ZipFile(tmp_path / "x.pth").read("name/data.pkl").replace(b"FloatStorage", b"QInt8Storage")
    torch_files.save_members(tmp_path / "x.pth", pickled)
    with open_weights("transformer", tmp_path / "x.pth") as file:
        assert file.content["x"].class_name == "torch.QInt8Storage"


def test_drops_attributes_of_pickled_dicts(tmp_path):
    torch_files.save(tmp_path / "x.pth", torch_files.ModuleState(x=np.ones(3, np.float32)))
    with open_weights("transformer", tmp_path / "x.pth") as file:
        assert list(file.content) == ["x"] and not hasattr(file.content, "_metadata")


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02}",
        b"\x80\x02u.",
        b"\x80\x02h\x05.",  # a memo's empty place
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",  # attributes of a function
        b"\x80\x02K\x01)R.",  # a call of a number
        b"\x80\x02X\x01\x00\x00\x00aQ.",  # a storage named by a string
        b"\x80\x02(X\x07\x00\x00\x00storage]X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
    ],
)
def test_refuses_damaged_pickle(tmp_path, pickled):
    torch_files.save_members(tmp_path / "x.pth", pickled)
    assert refusal_of(tmp_path / "x.pth")


def test_refuses_file_that_would_unpack_to_far_more(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 1 << 20)
    torch_files.save(tmp_path / "x.pth", {"x": np.zeros(1 << 20, np.float32)}, zipfile.ZIP_DEFLATED)
    assert "would unpack to 41" in refusal_of(tmp_path / "x.pth")


def test_refuses_huge_pickle_before_reading_it(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_PICKLE_BYTES", 1000)
    torch_files.save_members(tmp_path / "x.pth", b"\x80\x02}." + bytes(2000))
    assert "more than the 1000 expected" in refusal_of(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"no zip at all", "begins with b'no zip a'"),
        (b"<!DOCTYPE html><html>Sign in</html>", "HTML page"),
        (b"\n <html><body>404", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (gzip.compress(b"weights", mtime=0), "gunzip"),
        (lzma.compress(b"weights"), "unxz"),
        (bz2.compress(b"weights"), "bunzip2"),
        (b"x.pth".ljust(257, b"\0") + b"ustar\x0000".ljust(300, b"\0"), "tar archive"),
        (b"\x93NUMPY\x01\x00", "numpy"),
        (bytes(1000), "cut short"),
        (pickle.dumps({"x": 1}), "pickle that torch.save has not written"),
        (b"PK\x03\x04" + bytes(100), "cut short: download it again"),
        (b'{"model_type": "llama"}', "weight_map"),
        (b"{nonsense", "JSON"),
    ],
)
def test_other_files_are_told_for_what_they_are(tmp_path, content, words):
    (tmp_path / "x.pth").write_bytes(content)
    assert words in refusal_of(tmp_path / "x.pth")


def test_other_zip_files_are_told(tmp_path):
    path = tmp_path / "x.pth"
    for name, words in (("deep/er/data.pkl", "without data.pkl"), ("mvar.pth", "unpack it and give 'mvar.pth'")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"\x80\x02}.")
        assert words in refusal_of(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("name/data.pkl", b"\x80\x02}.")
    assert "neither stored nor deflated" in refusal_of(path)


def test_refuses_damaged_or_cut_file(tmp_path):
    path = tmp_path / "x.pth"
    torch_files.save(path, {"x": np.arange(1000, dtype=np.float32)})
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:-1000])
    refusal_of(path)
    at = whole.index(np.float32(500).tobytes() + np.float32(501).tobytes())
    whole[at] ^= 1
    path.write_bytes(whole)
    assert "data/0" in refusal_of(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda whole: whole[:-1], "ends after"),
        (lambda whole: whole[:-5000], "ends after"),
        (lambda whole: whole[:60], "damaged"),
        (lambda whole: whole.replace(b"\xe8\x03" + bytes(6), b"\xe9\x03" + bytes(6)), "has 1001 elements, not 1000"),
        (lambda whole: whole.replace(b"FloatStorage", b"OtherStorage"), "size is not known"),
    ],
)
def test_refuses_damaged_or_cut_file_of_the_older_format(tmp_path, change, words):
    path = tmp_path / "x.pth"
    torch_files.save_legacy(path, {"x": np.arange(1000, dtype=np.float32), "y": np.zeros(1000, np.float32)})
    path.write_bytes(change(path.read_bytes()))
    assert words in refusal_of(path)


def test_reads_every_dtype_of_the_older_format(tmp_path):
    content = {dtype.name: np.arange(-2, 4).astype(dtype) for dtype in torch_files.STORAGE_NAMES}
    torch_files.save_legacy(tmp_path / "x.pth", content)
    for name, found in read_back(tmp_path / "x.pth").items():
        assert_same_bits(found, content[name])


def test_reads_only_the_tensors_asked_for(tmp_path):
    path = tmp_path / "x.pth"
    torch_files.save(path, {"model": {"x": np.ones(3, np.float32)}, "optimizer": {"y": np.full(999, 7, np.float32)}})
    whole = bytearray(path.read_bytes())
    whole[whole.index(np.float32(7).tobytes() * 2)] ^= 1
    path.write_bytes(whole)
    with open_weights("transformer", path) as file:
        assert isinstance(file.content["optimizer"]["y"], Tensor)
        np.testing.assert_array_equal(file.read(file.content["model"]["x"]), np.ones(3))
