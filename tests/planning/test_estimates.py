"""What a plan makes of figures: times, what bounds them, and what would fit."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from plan_case import CONFIG, MACHINE, STEP, TOKENIZER

from mvar_jax.hardware.compiling import _out_of_memory
from mvar_jax.hardware.machines import machine_of
from mvar_jax.hardware.scratch import scratch_bytes
from mvar_jax.hardware.work import Collective, Work
from mvar_jax.ops.cost import attention_kernel_flops, keys_seen
from mvar_jax.planning import advice, calibration, compare, figures, plan, report
from mvar_jax.planning.calibration import machine_for
from mvar_jax.planning.figures import Figures
from mvar_jax.planning.report import Plan
from mvar_jax.planning.roofline import estimate
from mvar_jax.planning.tasks import compile_program, make_task, programs_of
from mvar_jax.scales import Pyramid
from mvar_jax.sharding import MESH_AXES, make_mesh, mesh_shapes


def test_each_instruction_takes_the_longer_of_its_products_and_its_bytes():
    work = (Work(3, 2e9, 10, "bfloat16"), Work(1, 1e9, 10, "float32"), Work(2, 1, 5e6, "float32"))
    near = Collective("all-gather", 2, 8e5, 4, 1, "")
    far = dataclasses.replace(near, num_hosts=4, times=1)
    time = estimate(dataclasses.replace(STEP, work=work, collectives=(near, far)), MACHINE)
    assert (time.compute_s, time.memory_s) == pytest.approx((3 + 1, 2 * 5))
    assert time.network_s == pytest.approx(2 * 6e5 / 1e5 + 6e5 / 1e4)  # three quarters of the array are sent
    assert time.bound == "network"


@pytest.mark.parametrize(
    ("num_devices", "num_hosts", "rate"),
    [(8, 1, 1e5), (2, 2, 1e4), (8, 2, 4e4), (64, 2, 1e5)],
)
def test_rings_between_hosts_share_the_network_of_all_their_devices(num_devices, num_hosts, rate):
    """Four devices of a host send over four shares of its network, 32 no faster than their own links."""
    one = Collective("all-gather", 1, 8e5, num_devices, num_hosts, "")
    time = estimate(dataclasses.replace(STEP, collectives=(one,)), MACHINE)
    assert time.network_s == pytest.approx(8e5 * (num_devices - 1) / num_devices / rate)


def test_every_kernel_adds_its_launch():
    work = (Work(3, 2e9, 10, "bfloat16"), Work(5, 0.0, 1e3, "float32"))
    time = estimate(dataclasses.replace(STEP, work=work), dataclasses.replace(MACHINE, launch_s=2.0))
    assert (time.launches_s, time.bound) == (8 * 2.0, "launches")
    assert time.total_s == pytest.approx(16 + 3 + 5e-3)


def test_temporary_memory_adds_its_allocation():
    time = estimate(STEP, dataclasses.replace(MACHINE, allocation_s=0.5))
    assert time.memory_s == STEP.activation_bytes * 0.5


def test_the_devices_here_have_the_rates_of_small_programs(monkeypatch):
    """If each took two seconds: its products or bytes in that time, and a loop's kernels share it."""
    called = []

    def least_s(call, x, num_calls=1):
        called.append(jax.tree.map(jnp.shape, call(x)))
        return 2.0

    monkeypatch.setattr(calibration, "SIZES", {True: (8, 2**12), False: (8, 2**12)})
    monkeypatch.setattr(calibration, "_least_s", least_s)
    rates = calibration.measure_rates.__wrapped__()
    assert rates.flops == {"float32": 2 * 8**3 / 2, "bfloat16": 2 * 8**3 / 2}
    assert rates.memory_bandwidth == 2 * 2**12 / 2
    # a product and its tanh; XLA may count the iterations in a kernel or two of their own
    assert 2 / (6 * calibration.NUM_LAUNCHES) <= rates.launch_s <= 2 / (2 * calibration.NUM_LAUNCHES)
    assert called == [(8, 8), (8, 8), (2**10,), (2**10,), (8, 8)]
    assert rates.allocation_s == 0.0  # a new array took no longer than one in place
    monkeypatch.setattr(calibration, "measure_rates", lambda: rates)
    assert machine_for("here").launch_s == rates.launch_s and machine_for("here").flops == rates.flops


def test_an_accelerator_is_asked_once_for_several_calls(monkeypatch):
    """So that neither the way to the device nor the wait for it counts. A CPU is asked for each, as the plan does."""
    asked, waited = [], []
    monkeypatch.setattr(calibration.jax, "block_until_ready", lambda x: waited.append(x) or x)
    assert calibration._least_s(lambda x: asked.append(x) or x + 1, 0, 10) < 1e-3
    assert asked == list(range(len(asked))) and len(asked) == 10 * len(waited)
    found = []
    monkeypatch.setattr(calibration, "_least_s", lambda call, x, num_calls=1: found.append(num_calls) or 1.0)
    for platform, num in (("gpu", 10), ("cpu", 1)):
        found.clear()
        monkeypatch.setattr(calibration, "SIZES", {True: (8, 2**12), False: (8, 2**12)})
        monkeypatch.setattr(calibration, "current_platform", lambda platform=platform: platform)
        calibration.measure_rates.__wrapped__()
        assert found == [num, num, *[1] * (platform == "cpu"), num, 1]


def test_operands_of_the_measured_programs_vary_and_stay_finite(monkeypatch):
    """Numbers that are all equal draw less power, and an accelerator clocks higher."""
    sizes = []

    def least_s(call, x, num_calls=1):
        if x is None or x.shape != (8, 8):  # not the tiny ones of the launches
            for _ in range(60):
                x = call(x)
            x = x.astype("float32")
            sizes.append((float(jnp.std(x) / jnp.abs(x).max()), float(jnp.abs(x).max())))
        return 1.0

    monkeypatch.setattr(calibration, "SIZES", {True: (16, 2**12), False: (16, 2**12)})
    monkeypatch.setattr(calibration, "_least_s", least_s)
    calibration.measure_rates.__wrapped__()
    assert len(sizes) == 4 and all(spread > 0.01 and 0 < most < 100 for spread, most in sizes)


def small_task():
    return make_task(CONFIG, tuple(jax.devices()[:1]), tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    "usable, words",
    [(96, "config.accumulate_steps=2"), (95, "config.accumulate_steps=4"), (63, "config.accumulate_steps=8")],
)
def test_what_does_not_fit_gets_the_fewest_parts_that_would(usable, words):
    change = advice.first_change(small_task(), [STEP], dataclasses.replace(MACHINE, usable_bytes=usable))
    assert change.words == words
    assert STEP.peak_bytes - change.saved_bytes <= usable


@pytest.mark.parametrize(
    "remat, machine, words",
    [
        ("dots", {"usable_bytes": 90}, "config.model.remat=full"),
        ("full", {"usable_bytes": 111}, "config.mesh.data=1 config.mesh.fsdp=2 config.mesh.tensor=1"),
        ("full", {"usable_bytes": 110}, "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment"),
        ("full", {"usable_bytes": 110, "platform": "tpu"}, None),
        ("full", {"usable_bytes": 75, "memory_bytes": 100}, None),
    ],
)
def test_what_parts_do_not_save_is_saved_by_the_next_change(monkeypatch, remat, machine, words):
    """Recomputation, then a wider fsdp axis, which halves 40 bytes of state and gradients, then what JAX reserves."""
    monkeypatch.setattr(advice, "MAX_PARTS", 1)
    monkeypatch.setattr(advice, "wider_meshes", lambda mesh: [AbstractMesh((1, 2, 1), MESH_AXES)])
    config = CONFIG | {"model": CONFIG["model"] | {"remat": remat}}
    task = make_task(config, tuple(jax.devices()[:1]), tokenizer=TOKENIZER)
    change = advice.first_change(task, [STEP], dataclasses.replace(MACHINE, **machine))
    assert (change and change.words) == words


def plan_of(*found: Figures, **changes) -> Plan:
    mesh = {"data": 2, "fsdp": 1, "tensor": 1}
    return Plan("c", "m:2", dataclasses.replace(MACHINE, **changes), mesh, 8, 10, found, (), None)


SAMPLE = dataclasses.replace(STEP, part="sample", name="sample 8", runs=0, optimizer_bytes=0, activation_bytes=150)


@pytest.mark.parametrize(
    "planned, words",
    [
        (plan_of(STEP, usable_bytes=131), "fits: step needs 0.128 KiB of 0.128 KiB"),
        (plan_of(STEP, usable_bytes=130), "does not fit: step needs .* no single change would"),
        (plan_of(STEP, SAMPLE, usable_bytes=131), "does not fit: sample 8 needs .* but training does; --samples"),
        (
            dataclasses.replace(plan_of(STEP), change=advice.Change("config.x=1", 64)),
            "does not fit: .*; config.x=1 would save about 0.0625 KiB of a step",
        ),
    ],
)
def test_the_verdict_says_what_would_help(planned, words):
    assert re.match(words, report.verdict(planned))


def test_the_run_takes_its_steps_and_mfu_is_the_models_share_of_all_devices():
    step = dataclasses.replace(STEP, model_flops=8e9, work=(Work(1, 4e9, 10, "bfloat16"),))  # 2 s at 2e9 FLOP/s
    planned = plan_of(step, dataclasses.replace(step, name="other", runs=5), SAMPLE)
    assert planned.run_s == pytest.approx((10 + 5) * 2)
    assert planned.mfu(step, estimate(step, MACHINE)) == pytest.approx(8e9 / 2 / 2e9 / 2)
    assert plan_of(step, dataclasses.replace(STEP, is_refused=True)).run_s is None


@pytest.mark.parametrize(
    "message, needed_bytes",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 34.5G of 15.75G hbm.", 34.5 * 2**30),
        ("RESOURCE_EXHAUSTED: total memory required for HLO temporaries (512M) exceeds available HBM", 2**29),
        ("RESOURCE_EXHAUSTED: total memory required for HLO temporaries (2.5T) exceeds available HBM", 2.5 * 2**40),
        ("RESOURCE_EXHAUSTED: in other words", 0),
    ],
)
def test_a_program_that_the_compiler_refuses_is_reported_with_what_it_named(monkeypatch, message, needed_bytes):
    def compile_program(*_):
        raise _out_of_memory(RuntimeError(message))

    monkeypatch.setattr(figures, "compile_program", compile_program)
    task = small_task()
    found = figures.compile_figures(task, programs_of(task, 1)[0], "here")
    assert found.is_refused
    assert found.peak_bytes == (needed_bytes or found.argument_bytes)  # what the compiler names holds the arguments
    planned = plan_of(found, usable_bytes=2**28)
    assert not planned.is_fitting and "refused" in report.describe(planned)
    assert report.verdict(planned).startswith("does not fit: ")
    assert _out_of_memory(RuntimeError("INTERNAL: no memory of this")) is None


@pytest.mark.parametrize(
    ("x", "text"), [(0.1453, "0.145"), (5.714, "5.71"), (566.4, "566"), (999.7, "1,000"), (1234567.0, "1,234,567")]
)
def test_numbers_have_three_digits_and_no_exponent(x, text):
    assert report.show_number(x) == text


def test_a_slow_step_has_a_rate_and_a_long_one_its_seconds():
    """A slow machine takes seven seconds for an image, or an hour for a batch."""
    slow = dataclasses.replace(STEP, work=(Work(1, 2e12, 10, "float32"),), images=300)
    row = next(line for line in report.describe(plan_of(slow, usable_bytes=2**28)).splitlines() if "step " in line)
    assert "2,000 s" in row and row.split("2,000 s")[1].split()[0] == "0.15"


def test_a_plan_for_this_cpu_has_what_its_libraries_hold(monkeypatch):
    """On several cores they hold more than on one: a plan that is kept for one number is not one for another."""
    task = small_task()
    program = programs_of(task, 2)[0]
    compiled = compile_program(task, program, "here")
    found, digests = [], set()
    for cores in (1, 2):
        monkeypatch.setattr(figures, "num_cores", lambda number=cores: number)
        found.append(figures.compile_figures(task, program, "here").peak_bytes - compiled.total_bytes)
        digests.add(figures._digest({}, "here", program))
    assert 0 < found[0] < found[1]
    assert found == [scratch_bytes(compiled.text, cores) for cores in (1, 2)]
    assert len(digests) == 2


@pytest.mark.parametrize("share", ["90%", "1.5", "0", "nan"])
def test_a_share_of_a_gpu_that_is_none_is_refused(monkeypatch, share):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
    with pytest.raises(figures.InputError, match="XLA_PYTHON_CLIENT_MEM_FRACTION must be a share .* got"):
        machine_for("h100:8")


def test_jax_may_be_told_to_reserve_another_share_of_a_gpu(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    h100, v5e = machine_for("h100:8"), machine_for("v5e:4x4")
    assert h100.usable_bytes == pytest.approx(0.9 * h100.memory_bytes)
    assert v5e == machine_of("v5e")


def test_meshes_of_a_search_divide_the_devices():
    shapes = [tuple(shape.values()) for shape in mesh_shapes(6, 4)]
    assert shapes == [(6, 1, 1), (3, 2, 1), (2, 3, 1), (1, 6, 1), (3, 1, 2), (1, 3, 2), (2, 1, 3), (1, 2, 3)]


def test_a_tensor_axis_over_processes_is_refused_for_machines_that_are_not_here_too():
    devices = [SimpleNamespace(process_index=i // 8) for i in range(16)]
    with pytest.raises(figures.InputError, match="mesh.tensor must be a divisor of 8, .* of one process, got 16"):
        make_mesh(tensor=16, devices=devices)


def test_what_fits_needs_no_change():
    assert advice.first_change(small_task(), [STEP], dataclasses.replace(MACHINE, usable_bytes=131)) is None


def test_kernels_of_all_scales_count_what_the_tables_of_the_paper_count():
    pyramid = Pyramid((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 8, 7)
    coarse = attention_kernel_flops(pyramid, "attention_forward", (2, 255, 4, 64))
    fine = [attention_kernel_flops(pyramid, "attention_forward", (2, area, 4, 64)) for area in (169, 256)]
    assert coarse + sum(fine) == 2 * 2 * keys_seen(pyramid, "markov") * 2 * 4 * 64
    assert attention_kernel_flops(pyramid, "attention_backward", (2, 256, 4, 64)) == 3.5 * fine[1]
    assert attention_kernel_flops(pyramid, "draw_row", (2, 256, 4, 64)) == 0
    assert attention_kernel_flops(pyramid, "splash_mha_fwd.1", (2 * 4, 1, 256, 64)) == fine[1]
    padded = attention_kernel_flops(pyramid, "splash_mha_fwd.1", (2 * 4, 1, 128, 64))
    assert padded == 2 * 2 * 100**2 * 2 * 4 * 64  # of 10 x 10 tokens, which all see each other


def test_comparison_has_the_published_ratio_at_its_batch_and_settings(monkeypatch):
    """bfloat16 halves VAR's cache and remat its activations, so the published figures stand beside neither."""

    def measure(task, programs, target, config, folder):
        model = config["model"]
        is_full, is_float32, is_whole = (
            model["conditioning"] == "full",
            model["dtype"] == "float32",
            model["remat"] == "none",
        )
        step = dataclasses.replace(STEP, images=32, activation_bytes=31 + 62 * is_full * (1 + is_whole))
        sample = dataclasses.replace(
            step,
            part="sample",
            name="sample 32",
            runs=0,
            optimizer_bytes=0,
            activation_bytes=300 * is_full * (1 + is_float32),
        )
        return [one for one in (step, sample) if any(one.name[:4] == program.name[:4] for program in programs)]

    monkeypatch.setattr(plan, "measure", measure)
    monkeypatch.setattr(plan, "machine_for", lambda target: MACHINE)
    model = {"depth": 16, "dtype": "bfloat16", "remat": "dots"}
    config = CONFIG | {"model": CONFIG["model"] | model, "batch_size": 32}
    rows = compare.compare_views(config, plan.Request("debug", "here", tokenizer=TOKENIZER))[2]
    refused = [dataclasses.replace(row, seconds=(1.0, None)) for row in rows]
    planned = dataclasses.replace(plan_of(STEP, SAMPLE), change=None)
    assert compare.describe_comparison(planned, planned, refused).splitlines()[-1].split()[-2:] == ["s", "refused"]
    assert [(row.part, row.peaks, row.published_mb) for row in rows] == [
        ("train", (62, 124), (None, None)),
        ("train, remat=none", (62, 186), (20676, 34319)),
        ("sample", (31, 331), (None, None)),
        ("sample, dtype=float32", (31, 631), (3846, 10882)),
    ]
