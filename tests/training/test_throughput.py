import pytest

from mvar_jax.hardware.machines import peak_flops
from mvar_jax.ops.cost import forward_macs, phase_macs
from mvar_jax.scales import Pyramid
from mvar_jax.training import throughput
from mvar_jax.training.throughput import Throughput


@pytest.mark.parametrize(
    "kind, flops",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v4", 275e12),
        ("cpu", None),
    ],
)
def test_peak_is_found_by_what_the_device_calls_itself(kind, flops):
    assert peak_flops(kind) == flops


@pytest.fixture
def clock(monkeypatch):
    """The clock of the module, moved by hand."""

    class Clock:
        now_s = 0.0

    monkeypatch.setattr(throughput.time, "perf_counter", lambda: Clock.now_s)
    return Clock


def test_rates_leave_out_pauses(clock):
    rates = Throughput(8, peak_flops=100.0)
    for _ in range(3):
        clock.now_s += 2
        rates.count_step(flops=50.0)
    with rates.pause():
        clock.now_s += 100
        with rates.pause():
            clock.now_s += 100
    assert rates.take() == {"images_per_s": 4.0, "mfu": 0.25}
    clock.now_s += 1
    rates.count_step()
    assert rates.take() == {"images_per_s": 8.0}


def waiting_batches(clock, wait_s):
    while True:
        clock.now_s += wait_s
        yield {}


@pytest.mark.parametrize("wait_s, num_warnings", [(3.0, 1), (0.5, 0)])
def test_waits_for_batches_that_dominate_are_reported_once_and_not_for_the_first_window(
    clock, capfd, wait_s, num_warnings
):
    rates, batches = Throughput(8), waiting_batches(clock, wait_s)
    output = []
    for _ in range(3):
        for _ in range(4):
            rates.wait_for(batches)
            clock.now_s += 1
            rates.count_step()
        rates.take()
        output.append(capfd.readouterr().err)
    assert not output[0] and not output[2]
    assert output[1].count("waiting for batches") == num_warnings
    if num_warnings:
        assert "75%" in output[1] and output[1].count("\n") == 1


def test_phases_together_cost_what_the_model_costs():
    pyramid, sizes = Pyramid((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 8, 7), (16, 1024, 4096, 32)
    an_image = (6 * 16 + 2) * 1024**2
    for conditioning in ("markov", "full"):
        phases = pyramid.phases(conditioning)
        total = sum(phase_macs(pyramid, phase, *sizes) for phase in phases)
        again = (len(phases) - 1) * an_image  # each pass computes its adaptive vectors
        assert total == forward_macs(pyramid, *sizes, conditioning) + again
