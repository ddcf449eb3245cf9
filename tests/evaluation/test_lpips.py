import shutil

import eval_case
import jax
import numpy as np
import pytest
import torch_files

from mvar_jax.errors import InputError
from mvar_jax.evaluation import lpips as lpips_module
from mvar_jax.evaluation import lpips_distance, network_files
from mvar_jax.evaluation.lpips import compute_lpips, convert_lpips, load_lpips, shapes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(torchvision's file, the heads' file) with values by the formula."""
    folder = tmp_path_factory.mktemp("lpips")
    torch_files.save(folder / "vgg16.pth", eval_case.vgg_state())
    torch_files.save(folder / "heads.pth", eval_case.heads_state())
    return folder / "vgg16.pth", folder / "heads.pth"


@pytest.fixture(scope="module")
def weights(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips.npz"
    assert convert_lpips(*files, path).is_published is False
    return load_lpips(path)


def test_files_of_one_name_in_two_folders_are_both_in_the_fingerprint(files, tmp_path, monkeypatch):
    same = [tmp_path / folder / "vgg.pth" for folder in ("backbone", "heads")]
    for file, path in zip(files, same, strict=True):
        path.parent.mkdir()
        shutil.copy(file, path)
    hashes = [network_files.sha256_of(path) for path in same]
    monkeypatch.setattr(lpips_module, "BACKBONE", lpips_module.BACKBONE._replace(sha256=hashes[0]))
    monkeypatch.setattr(lpips_module, "HEADS", lpips_module.HEADS._replace(sha256=hashes[1]))
    found = convert_lpips(*same, tmp_path / "same.npz")
    assert found.sources == {"vgg16-397923af.pth": hashes[0], "vgg.pth": hashes[1]} and found.is_published
    found = convert_lpips(*files, tmp_path / "others.npz")
    assert found.sources == {"vgg16.pth": hashes[0], "heads.pth": hashes[1]} and found.is_published


@pytest.mark.parametrize("size", ["64x64", "40x56"])
def test_distances_are_those_of_the_published_program(weights, size):
    x = eval_case.images(f"lpips/{size}", 4, *eval_case.sizes_of(size)) / 127.5 - 1
    a = x[[1, 3]]
    b = (a + x[[2, 2]]) / 2
    golden = eval_case.load("lpips.npz")[f"formula/{size}/total"]
    np.testing.assert_allclose(lpips_distance(a, b, weights), golden, rtol=1e-5)


def test_bytes_floats_and_batches_give_the_same_distances(weights):
    pixels = eval_case.images("lpips/16x16", 4, 16, 16)
    a, b = pixels[:3], pixels[1:]
    whole = lpips_distance(a / 127.5 - 1, b / 127.5 - 1, weights, batch_size=2)
    np.testing.assert_allclose(lpips_distance(a, b, weights, batch_size=2), whole, rtol=1e-5)
    assert lpips_distance(a[:2], a[:2], weights).max() == 0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 16, 16, 3)), np.zeros((2, 16, 16, 3)), "^images must have equal shapes, got "),
        (np.zeros((1, 15, 16, 3)), np.zeros((1, 15, 16, 3)), "at least one image of 16 x 16 pixels"),
        (np.full((1, 16, 16, 3), np.nan), np.zeros((1, 16, 16, 3)), r"floats in \[-1, 1\], got float64 from nan"),
        (np.zeros((1, 16, 16, 3)), np.full((1, 16, 16, 3), 200.0), "got float64 from 200 to 200"),
        (np.zeros((1, 16, 16, 3), int), np.zeros((1, 16, 16, 3), int), r"be uint8 or floats in \[-1, 1\], got int64"),
    ],
)
def test_images_that_do_not_fit_are_refused(weights, a, b, message):
    with pytest.raises(InputError, match=message):
        lpips_distance(a, b, weights)


def test_missing_and_swapped_files_are_refused(files, tmp_path):
    with pytest.raises(InputError, match=r"vgg16-397923af.pth \(SHA-256 397923af...\) .* and vgg.pth .*`mvar"):
        load_lpips(tmp_path / "lpips.npz")
    with pytest.raises(InputError, match="missing: download vgg.pth"):
        convert_lpips(files[0], tmp_path / "no.pth", tmp_path / "lpips.npz")
    with pytest.raises(InputError, match="26 do not fit: "):
        convert_lpips(*files[::-1], tmp_path / "lpips.npz")
    assert not (tmp_path / "lpips.npz").exists()


def test_every_convolution_is_true_float32():
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
    lines = compute_lpips.lower(shapes(), images, images).as_text().splitlines()
    convolutions = [line for line in lines if "stablehlo.convolution" in line]
    assert len(convolutions) == 26 and all(line.count("HIGHEST") == 2 for line in convolutions)
