"""Pictures are drawn by all devices together, each with its share of the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def report():
    """See picture_case.py. Unless asked to save memory, XLA on a CPU gathers as early as it can."""
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }
    command = [sys.executable, str(TESTS / "training" / "picture_case.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    assert report.pop("devices") == 8
    return report


@pytest.mark.parametrize("work", ["drawing", "evaluation"])
@pytest.mark.parametrize("name", ["samples", "reconstructions"])
def test_no_device_holds_the_whole_weights(report, name, work):
    """Arguments and temporaries of one device, as XLA allocates them, are far less than the weights."""
    weights, sizes = report[name]["weights"], report[name][work]
    assert sizes["arguments"] < 0.2 * weights, "an eighth, and what is too small to be sharded"
    assert sizes["arguments"] + sizes["temporaries"] < 0.4 * weights


@pytest.mark.parametrize("name", ["samples", "reconstructions"])
def test_pictures_of_eight_devices_are_those_of_one(report, name):
    assert report[name]["same_shape"] and report[name]["worst"] <= 1 and report[name]["spread"] > 10


def test_samples_that_eight_devices_draw_for_their_scores_are_those_of_one(report):
    assert report["samples"]["scored_worst"] <= 1
