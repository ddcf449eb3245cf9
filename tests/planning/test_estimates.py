"""What a plan makes of figures: times, what bounds them, what would fit, and the choice of a search."""

import dataclasses

import jax
import pytest

from mvar_jax import build
from mvar_jax.cli.configuration import read_config
from mvar_jax.hardware.machines import Machine
from mvar_jax.hardware.work import Collective, Work
from mvar_jax.ops.cost import attention_kernel_flops, keys_seen
from mvar_jax.planning import compare, plan
from mvar_jax.planning.advice import first_change
from mvar_jax.planning.figures import Figures
from mvar_jax.planning.roofline import estimate
from mvar_jax.planning.tasks import make_task
from mvar_jax.scales import Pyramid

MACHINE = Machine("m", "", "gpu", (), {"float32": 1e9, "bfloat16": 2e9}, 200, 100, 1e6, 1e5, 1e4)
STEP = Figures("step", 10, 8, 0.0, 10, 20, 31, 100, False, 1.0)
CONFIG = read_config("debug_transformer", [])
TOKENIZER = build.build_module(read_config("debug", []))


def test_each_instruction_takes_the_longer_of_its_products_and_its_bytes():
    work = (Work(3, 2e9, 10, "bfloat16"), Work(1, 1e9, 10, "float32"), Work(2, 1, 5e6, "float32"))
    near = Collective("all-gather", 2, 8e5, 4, False, "")
    far = dataclasses.replace(near, crosses_hosts=True)
    time = estimate(dataclasses.replace(STEP, work=work, collectives=(near, far)), MACHINE)
    assert (time.compute_s, time.memory_s) == pytest.approx((3 + 1, 2 * 5))
    assert time.network_s == pytest.approx(2 * 6e5 / 1e5 + 2 * 6e5 / 1e4)  # three quarters of the array are sent
    assert time.bound == "network"


def small_task():
    return make_task(CONFIG, tuple(jax.devices()[:1]), tokenizer=TOKENIZER)


@pytest.mark.parametrize("usable, words", [(96, "config.accumulate_steps=2"), (63, "config.accumulate_steps=8")])
def test_what_does_not_fit_gets_the_fewest_parts_that_would(usable, words):
    change = first_change(small_task(), [STEP], dataclasses.replace(MACHINE, usable_bytes=usable))
    assert change.words == words
    assert STEP.peak_bytes - change.saved_bytes <= usable


def test_what_fits_needs_no_change():
    assert first_change(small_task(), [STEP], dataclasses.replace(MACHINE, usable_bytes=131)) is None


def test_kernels_of_all_scales_count_what_the_tables_of_the_paper_count():
    pyramid = Pyramid((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 8, 7)
    coarse = attention_kernel_flops(pyramid, "attention_forward", (2, 255, 4, 64))
    fine = [attention_kernel_flops(pyramid, "attention_forward", (2, area, 4, 64)) for area in (169, 256)]
    assert coarse + sum(fine) == 2 * 2 * keys_seen(pyramid, "markov") * 2 * 4 * 64
    backward = [
        attention_kernel_flops(pyramid, f"attention_backward_{part}", (2, 256, 4, 64)) for part in ("q", "kv")
    ]
    assert sum(backward) == 3.5 * fine[1]
    assert attention_kernel_flops(pyramid, "draw_row", (2, 256, 4, 64)) == 0
    assert attention_kernel_flops(pyramid, "splash_mha_fwd.1", (2 * 4, 1, 256, 64)) == fine[1]


def test_search_returns_the_fastest_that_fits(monkeypatch):
    """Full rematerialisation alone fits here, and of its parts the smallest number is fastest."""

    def measure(task, programs, target, config, folder):
        is_full, parts = config["model"].get("remat") == "full", config.get("accumulate_steps", 1)
        work = (Work(1, 1e9 * (1 + is_full) + 1e6 * parts, 1.0, "float32"),)
        return [dataclasses.replace(STEP, activation_bytes=60 if is_full else 100, work=work)]

    monkeypatch.setattr(plan, "measure", measure)
    monkeypatch.setattr(plan, "machine_for", lambda target: MACHINE)
    tries = plan.search(CONFIG, plan.Request("debug", "here", tokenizer=TOKENIZER), limit_s=60)
    assert tries[0].changes == {"remat": "full"}
    assert len(tries) == 3 * 4  # 16 parts of 8 images are not allowed
    assert plan.describe_tries(tries).endswith("best of 12: --config.model.remat=full")


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
            step, name="sample 32", runs=0, optimizer_bytes=0, activation_bytes=300 * is_full * (1 + is_float32)
        )
        return [one for one in (step, sample) if any(one.name[:4] == program.name[:4] for program in programs)]

    monkeypatch.setattr(plan, "measure", measure)
    monkeypatch.setattr(plan, "machine_for", lambda target: MACHINE)
    model = {"depth": 16, "dtype": "bfloat16", "remat": "dots"}
    config = CONFIG | {"model": CONFIG["model"] | model, "batch_size": 32}
    rows = compare.compare_views(config, plan.Request("debug", "here", tokenizer=TOKENIZER))[2]
    assert [(row.part, row.peaks, row.published_mb) for row in rows] == [
        ("train", (62, 124), (None, None)),
        ("train, remat=none", (62, 186), (20676, 34319)),
        ("sample", (31, 331), (None, None)),
        ("sample, dtype=float32", (31, 631), (3846, 10882)),
    ]
