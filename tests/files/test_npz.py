import numpy as np
import pytest

from mvar_jax.files.npz import Pieces, is_whole_npz, save_npz

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 4, 4, 3), np.uint8)
LABELS, LATENTS = np.arange(7, dtype=np.int32), RNG.normal(size=(7, 2, 2, 5)).astype(np.float32)


def in_pieces(array: np.ndarray) -> Pieces:
    return Pieces(array.shape, array.dtype, (array[i : i + 3] for i in range(0, len(array), 3)))


def test_pieces_give_the_bytes_of_numpy(tmp_path):
    np.savez(tmp_path / "numpy.npz", arr_0=IMAGES, arr_1=LABELS, f_hat=LATENTS)
    save_npz(tmp_path / "ours.npz", arr_0=in_pieces(IMAGES), arr_1=LABELS, f_hat=in_pieces(LATENTS))
    assert (tmp_path / "ours.npz").read_bytes() == (tmp_path / "numpy.npz").read_bytes()


@pytest.mark.parametrize(
    "parts",
    [(IMAGES[:3],), (IMAGES, IMAGES[:1]), (IMAGES.astype(np.int16),), (IMAGES[:, :2],)],
    ids=["few", "many", "dtype", "shape"],
)
def test_pieces_that_do_not_add_up_leave_no_file(tmp_path, parts):
    with pytest.raises(ValueError, match="^a: "):
        save_npz(tmp_path / "a.npz", a=Pieces(IMAGES.shape, IMAGES.dtype, parts))
    assert not list(tmp_path.iterdir())


def test_damaged_file_is_recognised(tmp_path):
    path = tmp_path / "a.npz"
    assert not is_whole_npz(path, ["a"])
    save_npz(path, a=IMAGES)
    data = path.read_bytes()
    assert is_whole_npz(path, ["a"]) and not is_whole_npz(path, ["a", "b"]) and not is_whole_npz(path, ["b"])
    for size in range(len(data)):
        path.write_bytes(data[:size])
        assert not is_whole_npz(path, ["a"], reads_all=False)
    begin = data.find(IMAGES.tobytes())
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
        is_whole = is_whole_npz(path, ["a"])
        assert not (is_whole and begin <= place < begin + IMAGES.nbytes)
