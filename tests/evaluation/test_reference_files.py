import numpy as np
import pytest

from mvar_jax.errors import InputError
from mvar_jax.evaluation.inception import POOL_WIDTH, SPATIAL_WIDTH
from mvar_jax.evaluation.moments import Moments
from mvar_jax.evaluation.reference import Gaussian, ImageFile, read_reference, save_reference
from mvar_jax.files.npz import whole

IMAGES = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3)


def gaussian(width: int) -> Gaussian:
    return Gaussian(np.linspace(0, 1, width), np.diag(np.linspace(1, 2, width)))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Arrays of a reference as the published ones have them, in their dtypes."""
    pool, spatial = gaussian(POOL_WIDTH), gaussian(SPATIAL_WIDTH)
    arrays = {"arr_0": IMAGES, "mu": pool.mean_D.astype(np.float32), "sigma": pool.covariance_DD}
    return arrays | {"mu_s": spatial.mean_D.astype(np.float32), "sigma_s": spatial.covariance_DD}


def refusal_of(tmp_path, **arrays) -> str:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError) as caught:
        read_reference(tmp_path / "x.npz")
    assert caught.value.field == "reference"
    return str(caught.value)


def test_a_published_reference_is_read(tmp_path, published):
    np.savez(tmp_path / "x.npz", **published)
    found = read_reference(tmp_path / "x.npz")
    np.testing.assert_array_equal(found.pool.mean_D, published["mu"])
    np.testing.assert_array_equal(found.spatial.covariance_DD, published["sigma_s"])
    assert found.images.shape == IMAGES.shape and len(found.images) == 5 and found.network == {}


def test_a_written_reference_has_the_published_form_and_is_read_back(tmp_path):
    pool = Gaussian.of(Moments.of(np.random.default_rng(0).normal(size=(3, POOL_WIDTH))))
    save_reference(tmp_path / "x.npz", pool, gaussian(SPATIAL_WIDTH), whole(IMAGES), {"x.pth": "12ab"})
    with np.load(tmp_path / "x.npz") as stored:
        assert set(stored) >= {"mu", "sigma", "mu_s", "sigma_s", "arr_0"}
        np.testing.assert_array_equal(stored["arr_0"], IMAGES)
    found = read_reference(tmp_path / "x.npz")
    np.testing.assert_array_equal(found.pool.covariance_DD, pool.covariance_DD)
    assert found.network == {"x.pth": "12ab"}


def test_images_are_read_by_their_numbers(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=IMAGES, arr_1=np.arange(5))
    images = ImageFile.open("samples", tmp_path / "x.npz")
    with images.reading() as read:
        np.testing.assert_array_equal(read(range(3, 5)), IMAGES[3:])
    assert [len(piece) for piece in images.pieces(2)] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(list(images.pieces(2))), IMAGES)


def test_what_a_reference_lacks_is_none(tmp_path, published):
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    found = read_reference(tmp_path / "images.npz")
    assert found.pool is None and found.spatial is None and found.images is not None
    np.savez(tmp_path / "pool.npz", mu=published["mu"], sigma=published["sigma"])
    found = read_reference(tmp_path / "pool.npz")
    assert found.pool is not None and found.spatial is None and found.images is None


def test_statistics_that_are_none_of_this_network_are_refused(tmp_path, published):
    refuse = lambda **changed: refusal_of(tmp_path, **{**published, **changed})
    assert "mu must have shape [2048], got float64 [64]" in refuse(mu=np.zeros(64), sigma=np.eye(64))
    assert "sigma must have shape [2048, 2048], got" in refuse(sigma=np.eye(64))
    asymmetric = published["sigma"].copy()
    asymmetric[0, 5] = 1
    assert "sigma must be symmetric" in refuse(sigma=asymmetric)
    assert "mu_s or sigma_s is not finite" in refuse(mu_s=np.full(SPATIAL_WIDTH, np.nan))
    assert "it has no array sigma" in refusal_of(tmp_path, mu=published["mu"])
    assert "neither statistics (mu, sigma) nor images (arr_0)" in refusal_of(tmp_path, x=np.zeros(3))
    assert "is not a usable .npz file: " in refuse(network=np.array(["["]))


@pytest.mark.parametrize("images", [IMAGES.astype(np.float32), IMAGES[0], IMAGES[:0], IMAGES.astype(np.uint16)])
def test_images_of_another_form_are_refused(tmp_path, images):
    assert "arr_0 must " in refusal_of(tmp_path, arr_0=images)
