import builtins
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch_files
from torch_files import Parameter, Storage, View

from mvar_jax.convert import reader
from mvar_jax.convert.reader import Tensor, TorchFile
from mvar_jax.errors import InputError

TINY = Path(__file__).parent.parent / "golden" / "tiny"


def read_back(path):
    """Every tensor of a flat dict."""
    with TorchFile("transformer", path) as file:
        return {name: file.read(tensor) for name, tensor in file.content.items()}


def assert_same_bits(found, expected):
    assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def refusal_of(path):
    with pytest.raises(InputError) as caught, TorchFile("transformer", path) as file:
        for tensor in file.content.values():
            file.read(tensor)
    message = str(caught.value)
    assert caught.value.field == "transformer" and caught.value.given == str(path)
    assert message.startswith(f"transformer={path} is not a readable file of torch.save: ") and "\n" not in message
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
    with TorchFile("tokenizer", TINY / f"{name}.pth") as file:
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


def test_honours_strides_and_offsets_of_shared_storage(tmp_path):
    data = np.arange(100, dtype=np.float32)
    shared = Storage(data)
    content = {
        "transposed": View(shared, 10, (4, 3), (1, 4)),
        "every_third": View(shared, 1, (5,), (3,)),
        "to_the_end": View(shared, 90, (2, 5), (5, 1)),
        "empty": View(shared, 0, (0, 3), (3, 1)),
        "parameter": Parameter(View(shared, 3, (2,), (1,))),
    }
    torch_files.save(tmp_path / "x.pth", content)
    found = read_back(tmp_path / "x.pth")
    np.testing.assert_array_equal(found["transposed"], data[10:22].reshape(3, 4).T)
    np.testing.assert_array_equal(found["every_third"], data[1:16:3])
    np.testing.assert_array_equal(found["to_the_end"], data[90:].reshape(2, 5))
    np.testing.assert_array_equal(found["parameter"], data[3:5])
    assert found["empty"].shape == (0, 3)


@pytest.mark.parametrize(
    "view",
    [
        (1, (100,), (1,)),
        (0, (2, 50), (51, 1)),
        (101, (1,), (1,)),
        (-1, (1,), (1,)),
        (0, (-2,), (1,)),
        (5, (2,), (-1,)),
        (0, (1000,), (0,)),
        (0, (2,), (1, 1)),
        (0, [2], (1,)),
        (0, (2.0,), (1,)),
    ],
)
def test_refuses_tensor_outside_its_storage(tmp_path, view):
    torch_files.save(tmp_path / "x.pth", {"x": View(Storage(np.zeros(100, np.float32)), *view)})
    refusal_of(tmp_path / "x.pth")


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
        (builtins.exec, lambda path: (f"open({str(path)!r}, 'w')",)),
        (builtins.getattr, lambda path: (str(path), "upper")),
        (np.zeros, lambda path: (3,)),
    ],
)
def test_refuses_pickled_call_by_name_without_running_it(tmp_path, function, make_args):
    trace = tmp_path / "trace"
    for protocol in (0, 2, 4):
        content = {"x": Call(function, *make_args(trace))}
        torch_files.save_members(tmp_path / "x.pth", pickle.dumps(content, protocol))
        message = refusal_of(tmp_path / "x.pth")
        assert f".{function.__name__}'" in message and not trace.exists()


def test_refuses_other_names_of_admitted_modules(tmp_path):
    names = ["torch load", "torch._utils _rebuild_tensor", "collections defaultdict", "torch FloatStorage.mro"]
    for name in names:
        pickled = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n."
        torch_files.save_members(tmp_path / "x.pth", pickled)
        assert name.replace(" ", ".") in refusal_of(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "name", [b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_parameter", b"collections\nOrderedDict"]
)
def test_pickled_state_changes_nothing_of_the_reader(tmp_path, name):
    state = pickle.dumps((None, {"__call__": 1, "__init__": 1, "__doc__": "changed"}), 2)[2:-1]
    pickled = b"\x80\x02c" + name + b"\n" + state + b"b."
    torch_files.save_members(tmp_path / "x.pth", pickled)
    refusal_of(tmp_path / "x.pth")
    for cls in (reader.RebuildTensor, reader.RebuildParameter, reader.OrderedDict):
        assert cls.__doc__.startswith("A substitute for ") and callable(cls)


def test_drops_attributes_of_pickled_dicts(tmp_path):
    torch_files.save(tmp_path / "x.pth", torch_files.ModuleState(x=np.ones(3, np.float32)))
    with TorchFile("transformer", tmp_path / "x.pth") as file:
        assert list(file.content) == ["x"] and not hasattr(file.content, "_metadata")


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02}",
        b"\x80\x02u.",
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo of 2^31 places
        b"\x80\x02X\x01\x00\x00\x00aQ.",  # a storage named by a string
        b"\x80\x02(X\x07\x00\x00\x00storage]X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
    ],
)
def test_refuses_damaged_pickle(tmp_path, pickled):
    torch_files.save_members(tmp_path / "x.pth", pickled)
    refusal_of(tmp_path / "x.pth")


def test_refuses_file_that_would_unpack_to_far_more(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_UNPACKED_BYTES", 1 << 20)
    torch_files.save(tmp_path / "x.pth", {"x": np.zeros(1 << 20, np.float32)}, zipfile.ZIP_DEFLATED)
    assert "would unpack to 41" in refusal_of(tmp_path / "x.pth")


def test_refuses_huge_pickle_before_reading_it(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_PICKLE_BYTES", 1000)
    torch_files.save_members(tmp_path / "x.pth", b"\x80\x02}." + bytes(2000))
    assert "more than the 1000 expected" in refusal_of(tmp_path / "x.pth")


def test_refuses_what_is_no_file_of_torch_save(tmp_path):
    path = tmp_path / "x.pth"
    assert "No such file" in refusal_of(path)
    path.write_bytes(b"no zip at all")
    refusal_of(path)
    path.write_bytes(reader.LEGACY_MAGIC + bytes(100))
    assert "old format" in refusal_of(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("deep/er/data.pkl", b"\x80\x02}.")
    assert "data.pkl" in refusal_of(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("name/data.pkl", b"\x80\x02}.")
    assert "neither stored nor deflated" in refusal_of(path)
    assert "directory" in refusal_of(tmp_path)


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


def test_reads_only_the_tensors_asked_for(tmp_path):
    path = tmp_path / "x.pth"
    torch_files.save(path, {"model": {"x": np.ones(3, np.float32)}, "optimizer": {"y": np.full(999, 7, np.float32)}})
    whole = bytearray(path.read_bytes())
    whole[whole.index(np.float32(7).tobytes() * 2)] ^= 1
    path.write_bytes(whole)
    with TorchFile("transformer", path) as file:
        assert isinstance(file.content["optimizer"]["y"], Tensor)
        np.testing.assert_array_equal(file.read(file.content["model"]["x"]), np.ones(3))
