"""The networks that score images, with weights by a formula; what compiles slowly is computed once."""

import eval_case
import pytest
import torch_files

from mvar_jax.evaluation.features import FeatureExtractor
from mvar_jax.evaluation.inception_weights import convert_inception, load_inception


@pytest.fixture(scope="session")
def inception_pth(tmp_path_factory):
    """A file as the public PyTorch one."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch_files.save(path, eval_case.inception_state())
    return path


@pytest.fixture(scope="session")
def inception_npz(inception_pth):
    """What `convert --inception` makes of it."""
    path = inception_pth.with_suffix(".npz")
    convert_inception(inception_pth, path)
    return path


@pytest.fixture(scope="session")
def golden_features(inception_npz):
    """Image size -> features of the golden images, and of the first one beside another in a batch of its own."""
    found = {}
    extractor = FeatureExtractor(load_inception(inception_npz), batch_size=2)
    for size in ("64x64", "256x256"):
        images = eval_case.images(f"image/{size}", 2, *eval_case.sizes_of(size))
        found[size], found[f"{size} alone"] = extractor.stream([images, images[:1]])
    return found
