"""The golden numbers with the compiler's default flags and no patched internals, in a process of its own.

tests/conftest.py turns optimisation off, and other tests replace slow programs by quicker ones: a fault of fused or
reordered arithmetic would not show there.
"""

import os
import subprocess
import sys
from pathlib import Path

import eval_case
import numpy as np
import pytest
from golden_case import LOGITS, MVAR, assert_close, assert_images_close, load

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("default_flags")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(TESTS.parent)
    command = [sys.executable, str(TESTS / "golden_user.py"), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    with np.load(out / "results.npz") as arrays:
        return dict(arrays)


def test_encoding_gives_the_published_ids(results):
    np.testing.assert_array_equal(results["ids"], load("tokenizer")["ids"])


@pytest.mark.parametrize("number", range(3))
def test_teacher_forced_logits_are_the_published_ones(results, number):
    golden, phase = load("train"), MVAR.phases()[number]
    logits = results["logits"][:, phase.begin : phase.end]
    assert_close("logits", logits[:, golden[f"p{number}_pos"]], golden[f"p{number}_logits"], **LOGITS)


def test_greedy_sample_with_guidance_is_the_published_one(results):
    golden = load("sample_cfg2.7")
    np.testing.assert_array_equal(results["sampled"], golden["ids"])
    assert_images_close("sample", results["samples"], golden, "img", 8)


@pytest.mark.parametrize("name", ["pool", "spatial", "probabilities"])
def test_features_of_the_evaluation_are_the_published_ones(results, name):
    golden = eval_case.load("inception.npz")[f"64x64/tf_{name}"]
    np.testing.assert_allclose(results[name], golden, rtol=0, atol=5e-6 * np.abs(golden).max())
