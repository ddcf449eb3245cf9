import numpy as np
import pytest

from mvar_jax.errors import InputError
from mvar_jax.evaluation import feature_folder
from mvar_jax.evaluation.feature_folder import FeatureFolder
from mvar_jax.evaluation.inception import Features

PIXELS = np.random.default_rng(0).integers(0, 256, (23, 2, 2, 3)).astype(np.uint8)


class Extractor:
    """A stand-in for the network: features are sums of pixels; it counts the images that it sees."""

    batch_size = 3

    def __init__(self):
        self.num_seen = 0

    def stream(self, batches, reads_ahead=True):
        for pixels in batches:
            self.num_seen += len(pixels)
            mean_N1 = pixels.mean((1, 2, 3), dtype=np.float32)[:, None]
            yield Features(*(mean_N1 * np.linspace(0, 1, width, dtype=np.float32) for width in feature_folder.WIDTHS))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_folder, "PART_IMAGES", 8)
    return FeatureFolder(tmp_path, len(PIXELS))


def fill(folder, first: int = 0, step: int = 1) -> tuple[list[int], int]:
    """Compute what is missing; return the parts that were written, and the number of images that the network saw."""
    extractor, missing = Extractor(), folder.find_missing(range(first, folder.num_parts, step))
    folder.fill(extractor, lambda rows: PIXELS[rows.start : rows.stop], missing)
    return missing, extractor.num_seen


def test_features_of_all_images_come_back_in_their_order(folder):
    assert fill(folder) == ([0, 1, 2], 23)
    expected = PIXELS.mean((1, 2, 3), dtype=np.float32)
    np.testing.assert_array_equal(folder.array("probabilities")[:, -1], expected)
    numbers = np.array([1, 7, 8, 22])
    np.testing.assert_array_equal(folder.array("probabilities", numbers)[:, -1], expected[numbers])
    moments = folder.moments("spatial")
    assert moments.count == 23
    assert moments.mean_D[-1] == pytest.approx(expected.mean(), rel=1e-6)


def test_processes_share_the_parts_and_give_the_same_features(folder, tmp_path):
    fill(folder)
    whole = folder.moments("pool")
    for file in tmp_path.glob("*.npz"):
        file.unlink()
    assert [fill(folder, i, 2)[0] for i in (1, 0)] == [[1], [0, 2]]
    for ours, theirs in zip(folder.moments("pool"), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_only_parts_that_are_missing_or_cut_are_computed_again(folder, tmp_path):
    fill(folder)
    part = tmp_path / "000001.npz"
    part.write_bytes(part.read_bytes()[:1000])
    (tmp_path / "000002.npz").unlink()
    with pytest.raises(InputError, match="000001.npz is not a usable"):
        folder.array("pool")
    assert fill(folder) == ([1, 2], 15)
    assert fill(folder) == ([], 0)


def test_a_part_with_a_damaged_byte_is_computed_again(folder, tmp_path):
    fill(folder)
    whole, part = folder.array("pool"), tmp_path / "000001.npz"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 255
    part.write_bytes(bytes(data))
    assert fill(folder) == ([1], 8)
    np.testing.assert_array_equal(folder.array("pool"), whole)
