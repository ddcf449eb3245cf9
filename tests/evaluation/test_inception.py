import os
import re

import eval_case
import flax.traverse_util
import jax
import numpy as np
import pytest
import torch_files
from graph_files import constant, node

from mvar_jax.errors import InputError
from mvar_jax.evaluation import inception_features, scorers
from mvar_jax.evaluation.class_score import inception_score
from mvar_jax.evaluation.features import FeatureExtractor, compute_features
from mvar_jax.evaluation.inception_weights import graph_scopes, load_inception, shapes, units
from mvar_jax.evaluation.reference import Gaussian, Reference

SIZES = ("64x64", "256x256")


def worst_of(ours, golden) -> float:
    """The largest difference, relative to the largest value."""
    golden = golden.reshape(len(golden), -1)
    return float(np.abs(ours - golden).max() / np.abs(golden).max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("prefix", ["", "tf_"])
def test_features_are_those_of_the_published_programs(golden_features, size, prefix):
    """torch-fidelity's ("") and the TensorFlow graph's ("tf_"): resizing, padding, pools and the last layer."""
    golden, ours = eval_case.load("inception.npz"), golden_features[size]
    for name in ours._fields:
        assert worst_of(getattr(ours, name), golden[f"{size}/{prefix}{name}"]) < 5e-6


def test_features_are_not_those_of_pytorch_fid(golden_features):
    """Its resizing and normalisation differ, so that its references must not be mixed with ours."""
    golden = eval_case.load("inception.npz")["256x256/pytorch_fid_pool"]
    assert worst_of(golden_features["256x256"].pool, golden) > 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_an_image_has_the_same_features_in_a_batch_that_is_filled_up(golden_features, size):
    for alone, both in zip(golden_features[f"{size} alone"], golden_features[size], strict=True):
        assert len(alone) == 1
        np.testing.assert_array_equal(alone[0], both[0])


def test_samples_of_a_training_run_are_scored_by_this_network(inception_npz, golden_features, monkeypatch):
    """More images at once than the network takes; without the root of a covariance, which would take seconds."""
    squared = lambda mean_a, _, mean_b, __: ((mean_a - mean_b) ** 2).sum()
    monkeypatch.setattr(scorers, "frechet_distance_of_moments", squared)
    golden = golden_features["64x64"]
    reference = Reference(Gaussian(golden.pool[0], np.eye(2048)), None, None, {})
    scorer = scorers.SampleScorer(FeatureExtractor(load_inception(inception_npz), 2), reference, 3)
    images = eval_case.images("image/64x64", 2, 64, 64)[[0, 1, 0]]
    expected = {
        "fid_3": (((golden.pool[1] - golden.pool[0]) / 3) ** 2).sum(),
        "inception_score_3": inception_score(golden.probabilities[[0, 1, 0]]),
    }
    assert scorer.score([(images, np.arange(3))]) == pytest.approx(expected, rel=1e-4)


def write_graph(path, state) -> None:
    """The tensors of the PyTorch file as the TensorFlow graph has them."""
    names = {"bn.weight": "gamma", "bn.bias": "beta", "bn.running_mean": "moving_mean"}
    names["bn.running_var"] = "moving_variance"
    with path.open("wb") as file:
        for unit, scope in graph_scopes().items():
            kernel = state[f"{unit}.conv.weight"].transpose(2, 3, 1, 0)
            file.write(constant(f"{scope}/conv2d_params", kernel))
            for theirs, name in names.items():
                file.write(constant(f"{scope}/batchnorm/{name}", state[f"{unit}.{theirs}"]))
        file.write(constant("softmax/weights", state["fc.weight"].T))
        file.write(node("softmax", b"", op="Softmax"))


def test_every_form_of_the_weights_gives_the_same_parameters(tmp_path, inception_pth, inception_npz):
    write_graph(tmp_path / "graph.pb", eval_case.inception_state())
    forms = [load_inception(path) for path in (inception_pth, inception_npz, tmp_path / "graph.pb")]
    flat = [flax.traverse_util.flatten_dict(weights.params) for weights in forms]
    for name, value in flat[0].items():
        np.testing.assert_array_equal(flat[1][name], value)
        np.testing.assert_array_equal(flat[2][name], value)
    assert forms[0].sources == forms[1].sources and list(forms[0].sources) == ["inception.pth"]
    assert [weights.is_published for weights in forms] == [False, False, None]
    assert load_inception(forms[0]) is forms[0]


@pytest.mark.parametrize(
    ("unit", "scope"),
    [
        ("Conv2d_1a_3x3", "conv"),
        ("Conv2d_4a_3x3", "conv_4"),
        ("Mixed_5b.branch1x1", "mixed/conv"),
        ("Mixed_5b.branch5x5_2", "mixed/tower/conv_1"),
        ("Mixed_5d.branch3x3dbl_3", "mixed_2/tower_1/conv_2"),
        ("Mixed_5d.branch_pool", "mixed_2/tower_2/conv"),
        ("Mixed_6a.branch3x3", "mixed_3/conv"),
        ("Mixed_6a.branch3x3dbl_3", "mixed_3/tower/conv_2"),
        ("Mixed_6d.branch1x1", "mixed_6/conv"),
        ("Mixed_6e.branch7x7dbl_5", "mixed_7/tower_1/conv_4"),
        ("Mixed_7a.branch3x3_1", "mixed_8/tower/conv"),
        ("Mixed_7a.branch7x7x3_4", "mixed_8/tower_1/conv_3"),
        ("Mixed_7b.branch3x3_2b", "mixed_9/tower/mixed/conv_1"),
        ("Mixed_7c.branch3x3dbl_3a", "mixed_10/tower_1/mixed/conv"),
        ("Mixed_7c.branch_pool", "mixed_10/tower_2/conv"),
    ],
)
def test_scopes_of_the_graph(unit, scope):
    assert graph_scopes()[unit] == scope


def test_units_are_those_of_the_public_file():
    shapes = eval_case.load("shapes.json")
    kernels = {name.removesuffix(".conv.weight"): s for name, s in shapes.items() if name.endswith("conv.weight")}
    assert {name: [shape[3], shape[2], *shape[:2]] for name, shape in units().items()} == kernels


def refusal_of(path) -> str:
    with pytest.raises(InputError) as caught:
        load_inception(path)
    assert caught.value.field == "inception" and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_is_named_with_its_checksum_and_the_command(tmp_path):
    text = refusal_of(tmp_path / "inception.npz")
    assert "pt_inception-2015-12-05-6726825d.pth (SHA-256 6726825d...)" in text
    assert "https://" in text and "`mvar convert --inception " in text


def test_a_file_of_another_checksum_than_its_name_promises_is_refused(tmp_path):
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"half")
    assert re.search("a SHA-256 that begins with 6726825d, got [0-9a-f]{64}: the download is", refusal_of(path))


def test_a_folder_or_a_pipe_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    assert "must be a regular file" in refusal_of(tmp_path / "pipe.pth")
    assert "must be a regular file" in refusal_of(tmp_path)


def change(state: dict, name: str, value) -> dict:
    return {key: x for key, x in (state | {name: value}).items() if x is not None}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("Mixed_6b.branch1x1.bn.bias", None, r"Mixed_6b.branch1x1.bn.bias \[192\] is missing"),
        ("fc.weight", np.zeros((1000, 2048), np.float32), r"fc.weight \[1008, 2048\] has shape \[1000, 2048\]"),
        ("fc.weight", np.zeros((1008, 2048), np.int32), "fc.weight is int32"),
        ("Mixed_5b.branch1x1.bn.bias", np.full(64, np.nan, np.float32), "not finite in Mixed_5b/branch1x1/bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, name, value, expected):
    torch_files.save(tmp_path / "x.pth", change(eval_case.inception_state(), name, value))
    assert re.search(expected, refusal_of(tmp_path / "x.pth"))


def test_a_graph_without_the_constants_is_refused(tmp_path):
    (tmp_path / "x.pb").write_bytes(constant("softmax/weights", np.zeros((2048, 1000))))
    assert "471 do not fit" in refusal_of(tmp_path / "x.pb")


def test_a_damaged_or_foreign_npz_is_refused(tmp_path, inception_npz):
    about = '{"format": 1, "network": "vgg", "sources": {}, "is_published": false}'
    np.savez(tmp_path / "x.npz", about=np.array([about]))
    assert "holds 'vgg'" in refusal_of(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", about=np.array(["{"]))
    assert "is not a usable .npz file: " in refusal_of(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(inception_npz.read_bytes()[:1_000_000])
    assert "not a usable .npz file" in refusal_of(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "images",
    [
        np.full((2, 8, 8, 3), np.nan, np.float32),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
    ],
)
def test_what_is_no_uint8_image_is_refused_before_any_work(images):
    with pytest.raises(InputError, match=r"^images must be uint8 \[N, Y, X, 3\] with at least one image, got "):
        inception_features(images, "missing.npz")


def test_other_options_are_refused(inception_npz):
    pixels, weights = np.zeros((1, 8, 8, 3), np.uint8), load_inception(inception_npz)
    with pytest.raises(InputError, match="^dtype must be float32 or bfloat16, got 'float16'$"):
        inception_features(pixels, weights, dtype="float16")
    with pytest.raises(InputError, match="^batch_size must be 1 or more, got 0$"):
        inception_features(pixels, weights, batch_size=0)


def test_every_product_and_convolution_is_true_float32():
    """A CPU computes so anyway; a GPU would take TF32 and a TPU bfloat16 without `Precision.HIGHEST`."""
    pixels = jax.ShapeDtypeStruct((1, 64, 64, 3), np.uint8)
    lines = compute_features.lower(shapes(), pixels).as_text().splitlines()
    products = [line for line in lines if "stablehlo.convolution" in line or "stablehlo.dot_general" in line]
    assert len(products) == 94 + 2 + 1
    assert all(line.count("HIGHEST") == 2 for line in products)
