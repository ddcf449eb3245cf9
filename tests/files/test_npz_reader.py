import os
import struct
import zipfile

import numpy as np
import pytest

from mvar_jax.errors import InputError
from mvar_jax.files.npz_reader import NpzFile


@pytest.fixture(params=[np.savez, np.savez_compressed])
def stored(request, tmp_path):
    arrays = {"x": np.arange(60, dtype=np.uint8).reshape(10, 2, 3), "y": np.linspace(0, 1, 7, dtype=np.float32)}
    arrays["z"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    request.param(tmp_path / "x.npz", **arrays)
    return tmp_path / "x.npz", arrays


def refusal_of(path, use=lambda file: None) -> str:
    with pytest.raises(InputError) as caught, NpzFile("samples", path) as file:
        use(file)
    assert caught.value.field == "samples" and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_reads_whole_arrays(stored):
    path, arrays = stored
    with NpzFile("samples", path) as file:
        assert list(file.headers) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.read(name, array.shape, "fu"), array)


@pytest.mark.parametrize("numbers", [[(0, 4), (4, 8), (8, 10)], [(3, 7), (9, 10)], [(5, 6), (0, 10), (2, 2)]])
def test_reads_rows_by_their_numbers_in_any_order(stored, numbers):
    path, arrays = stored
    with NpzFile("samples", path) as file:
        read = file.row_reader("x")
        for first, end in numbers:
            np.testing.assert_array_equal(read(range(first, end)), arrays["x"][first:end])


def test_the_checksum_of_an_array_tells_others_from_it(stored):
    path, arrays = stored
    with NpzFile("samples", path) as file:
        before = {name: file.checksum(name) for name in arrays}
    arrays["x"][9, 1, 2] += 1
    np.savez(path, **arrays)
    with NpzFile("samples", path) as file:
        assert [name for name in arrays if file.checksum(name) != before[name]] == ["x"]


@pytest.mark.parametrize(
    ("name", "shape", "kinds", "expected"),
    [
        ("w", (1,), "f", "it has no array w"),
        ("y", (8,), "f", r"y must have shape \[8\], got float32 \[7\]"),
        ("y", (7, None), "f", r"y must have shape \[7, any\], got float32 \[7\]"),
        ("x", (10, 2, 3), "f", r"x must be an array of floats, got uint8 \[10, 2, 3\]"),
    ],
)
def test_an_array_that_is_missing_or_of_another_form_is_refused(stored, name, shape, kinds, expected):
    with pytest.raises(InputError, match=expected), NpzFile("samples", stored[0]) as file:
        file.read(name, shape, kinds)


def test_a_cut_or_damaged_file_is_refused(stored):
    path, _ = stored
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert "not a usable .npz file" in refusal_of(path)
    damaged = bytearray(whole)
    at = whole.index(b"}") + 90  # within the first array's values
    damaged[at : at + 10] = bytes(255 - byte for byte in damaged[at : at + 10])
    path.write_bytes(damaged)
    assert "x" in refusal_of(path, lambda file: [file.row_reader("x")(rows) for rows in (range(5), range(5, 10))])


def with_header(path, header: str, num_bytes: int) -> None:
    """Write an array whose header says anything."""
    text = header.ljust(117) + "\n"
    with zipfile.ZipFile(path, "w") as archive:
        start = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
        archive.writestr("x.npy", start + text.encode() + bytes(num_bytes))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,)}", "claims 1000000000000 bytes"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (7,)}", "claims 7 bytes and has 8"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", "holds Python objects"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (-8,)}", "x.npy"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -4)}", "x.npy has the impossible shape [-2, -4]"),
        (
            "{'descr': '<U0', 'fortran_order': False, 'shape': (4,)}",
            "impossible shape [4] or dtype <U0",
        ),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (8,), 'a", "x.npy: "),
        ("__import__('os').system('true')", "x.npy"),
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_read(tmp_path, header, expected):
    with_header(tmp_path / "x.npz", header, 8)
    assert expected in refusal_of(tmp_path / "x.npz")


def with_flag(path, flag: int) -> None:
    """Set a bit of the flags of the only member, in its own header and in the file's directory."""
    data = bytearray(path.read_bytes())
    for start in (6, data.index(b"PK\x01\x02") + 8):
        struct.pack_into("<H", data, start, flag)
    path.write_bytes(data)


def test_members_that_numpy_does_not_write_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "x.npz"
    refused = "x.npy must be stored or deflated, and not encrypted"
    np.savez(path, x=np.arange(9))
    with_flag(path, 1)
    assert refused in refusal_of(path)
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("x.npy", bytes(200))
        assert refused in refusal_of(path)


def test_members_of_odd_names_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, xy=np.arange(9))
    path.write_bytes(path.read_bytes().replace(b"xy.npy", b"\xff\xfe.npy"))
    with_flag(path, 0x800)  # the name claims to be UTF-8
    assert "a member's name is not UTF-8" in refusal_of(path)
    np.savez(path, **{"x\ny": np.arange(9)})
    assert "it holds a member named 'x\\ny.npy'" in refusal_of(path)


def test_what_is_no_file_is_refused(tmp_path):
    assert "No such file" in refusal_of(tmp_path / "missing.npz")
    assert "not a regular file" in refusal_of(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # reading it would block
    assert "not a regular file" in refusal_of(tmp_path / "pipe")
    (tmp_path / "text.npz").write_text("no zip at all")
    assert "not a zip file" in refusal_of(tmp_path / "text.npz")
