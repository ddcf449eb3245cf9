import numpy as np
import pytest
from golden_case import load

from mvar_jax.errors import InputError
from mvar_jax.sharding import make_mesh
from mvar_jax.training.optimizer import OptimizerOptions
from mvar_jax.training.schedules import check_schedule, learning_rate_factor, weight_decay_at
from mvar_jax.training.task import RunOptions

GOLDEN = load("optim")
NAMES = [name for name in GOLDEN if name.startswith("sched/")]


@pytest.mark.parametrize("name", NAMES)
def test_schedules_equal_golden(name):
    _, schedule, final_factor, final_decay, warmup = name.split("/")
    options = OptimizerOptions(
        base_learning_rate=1.75e-4,
        schedule=schedule,
        warmup_steps=int(warmup.removeprefix("wp")),
        warmup_factor=0.005,
        final_factor=float(final_factor.removeprefix("wpe")),
        weight_decay=0.05,
        final_weight_decay=float(final_decay.removeprefix("twde")),
    )
    for iteration, row in zip(GOLDEN["sched_its"].tolist(), GOLDEN[name], strict=True):
        learning_rate, weight_decay = options.at(iteration, 1000, batch_size=256)
        np.testing.assert_allclose([learning_rate] * 2 + [weight_decay] * 2, row, rtol=1e-9, err_msg=str(iteration))


def test_golden_covers_every_kind_of_schedule():
    assert {name.split("/")[1] for name in NAMES} == {"lin0", "lin", "lin00", "lin0.3", "cos", "exp"}


def test_learning_rate_grows_with_the_batch():
    options = OptimizerOptions(base_learning_rate=1e-4, schedule="cos", final_factor=0.1)
    assert options.at(0, 10, 448) == pytest.approx((1e-4 * 448 / 256, 0.05))
    assert options.at(9, 10, 448)[0] == pytest.approx(1e-5 * 448 / 256)


@pytest.mark.parametrize("schedule", ["lin0", "lin", "lin00", "lin.5", "cos", "exp"])
def test_schedule_runs_from_the_peak_to_its_end(schedule):
    check_schedule(schedule)
    factors = [learning_rate_factor(schedule, i, 100, 0, 0.005, 0.1) for i in range(100)]
    assert (factors[0], factors[-1]) == pytest.approx((1, 0.1))
    assert all(a >= b for a, b in zip(factors, factors[1:], strict=False))


def test_runs_of_one_step_are_defined():
    assert learning_rate_factor("lin0", 0, 1, 0, 0.005, 0.1) == 1
    assert weight_decay_at(0, 1, 0.05, 0.2) == pytest.approx(0.05)


def test_weight_decay_is_constant_where_no_final_one_is_given():
    options = OptimizerOptions(weight_decay=0.05)
    assert {options.at(i, 100, 256)[1] for i in (0, 50, 99)} == {0.05}


@pytest.mark.parametrize("name", ["", "linear", "lin1", "lin1.0", "lin0.", "lin-0.3", "cosine", "lin0.0"])
def test_unknown_schedules_are_refused(name):
    with pytest.raises(InputError, match="must be one of cos, lin.*got") as caught:
        check_schedule(name)
    assert caught.value.field == "config.optimizer.schedule" and caught.value.given == name


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"ema_decay": -0.1}, "ema_decay"),
        ({"warmup_steps": 100}, "warmup_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"schedule": "flat"}, "schedule"),
        ({"schedule": "exp", "final_factor": 0.0}, "final_factor"),
    ],
)
def test_optimizer_options_out_of_range_are_refused(changes, field):
    with pytest.raises(InputError, match=f"^config.optimizer.{field} must be ") as caught:
        RunOptions(0, 100, 8, OptimizerOptions(**changes), make_mesh())
    assert caught.value.field == f"config.optimizer.{field}"


def test_warmup_may_fill_all_steps_but_the_last():
    assert RunOptions(0, 100, 8, OptimizerOptions(warmup_steps=99), make_mesh()).rates(99)[0] > 0
