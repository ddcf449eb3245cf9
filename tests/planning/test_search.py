"""What a search tries, in which order, and what it returns."""

import dataclasses
import time

import pytest
from plan_case import CONFIG, MACHINE, STEP, TOKENIZER

from mvar_jax.hardware.work import Work
from mvar_jax.planning import figures, plan
from mvar_jax.planning import search as search_module
from mvar_jax.planning.search import describe_tries, search, tries_to_json


def test_search_returns_the_fastest_that_fits(monkeypatch):
    """Full rematerialisation alone fits here, and of its parts the smallest number is fastest."""

    def measure(task, programs, target, config, folder):
        is_full, parts = config["model"].get("remat") == "full", config.get("accumulate_steps", 1)
        work = (Work(1, 1e9 * (1 + is_full) + 1e6 * parts, 1.0, "float32"),)
        return [dataclasses.replace(STEP, activation_bytes=60 if is_full else 100, work=work)]

    monkeypatch.setattr(plan, "measure", measure)
    monkeypatch.setattr(plan, "machine_for", lambda target: MACHINE)
    tries = search(CONFIG, plan.Request("debug", "here", tokenizer=TOKENIZER), limit_s=60)
    assert tries[0].changes == {"remat": "full"}
    assert len(tries) == 3 * 4  # 16 parts of 8 images are not allowed
    assert describe_tries(tries).endswith("best of 12: --config.model.remat=full")


def test_search_compiles_all_steps_of_the_best_and_drops_it_if_one_does_not_fit(monkeypatch):
    """Without rematerialisation the step with most products is fastest and fits, but the other phase's does not."""

    def measure(task, programs, target, config, folder):
        is_whole = config["model"].get("remat") == "none"
        work = (Work(1, 1e9 if is_whole else 2e9, 1.0, "float32"),)
        return [
            dataclasses.replace(
                STEP, name=one.name, runs=one.runs, work=work, activation_bytes=100 if i and is_whole else 60
            )
            for i, one in enumerate(sorted(programs, key=lambda one: -one.flops))
        ]

    monkeypatch.setattr(plan, "measure", measure)
    monkeypatch.setattr(plan, "machine_for", lambda target: MACHINE)
    config = CONFIG | {"model": CONFIG["model"] | {"remat": "dots"}}
    tries = search(config, plan.Request("debug", "here", tokenizer=TOKENIZER), limit_s=60)
    assert tries[0].changes == {} and tries[0].images_per_s and len(tries[0].plan.figures) == 2
    (dropped,) = [one for one in tries if one.changes == {"remat": "none"}]
    assert dropped.images_per_s == 0 and len(dropped.plan.figures) == 2
    report_of = tries_to_json(tries)
    assert report_of["days"] > 0 and len(report_of["tries"]) == len(tries)
    assert report_of["tries"][0] == {
        "options": "the config as it is",
        "step": tries[0].step.name,
        "peak_bytes": STEP.argument_bytes + 60,
        "seconds": 2.0,
        "images_per_s": 4.0,
    }
    alone = dataclasses.replace(tries[0].plan, figures=tries[0].plan.figures[:1])
    assert alone.run_s is None  # one step of two says nothing about the run


def test_search_tries_the_nearest_settings_first():
    config = CONFIG | {"model": CONFIG["model"] | {"remat": "dots"}}
    found = search_module._candidates(config, {"data": 2, "fsdp": 128, "tensor": 1}, "tpu")
    assert {tuple(one) for one in found[:5]} == {("mesh",), ("remat",), ("accumulate_steps",)}
    assert [one["mesh"]["fsdp"] for one in found if set(one) == {"mesh"} and one["mesh"]["tensor"] == 1] == [
        64, 256, 32, 16, 8, 4, 2, 1,
    ]  # fmt: skip
    assert {} not in found


@pytest.mark.parametrize(
    ("task", "platform", "unrolled"),
    [("transformer", "gpu", {4}), ("transformer", "tpu", set()), ("refiner", "gpu", set())],
)
def test_search_tries_a_transformer_without_a_loop_over_its_blocks_on_a_gpu(task, platform, unrolled):
    config = CONFIG | {"task": task, "model": CONFIG["model"] | {"depth": 4, "remat": "dots"}}
    found = search_module._candidates(config, {"data": 1, "fsdp": 1, "tensor": 1}, platform)
    assert {one["scan_unroll"] for one in found if "scan_unroll" in one} == unrolled
    if unrolled:
        assert {"scan_unroll": 4} in found[:5] and {"scan_unroll": 4, "remat": "none"} in found
        changed = search_module._changed(config, found[found.index({"scan_unroll": 4, "remat": "none"})])
        assert changed["model"]["scan_unroll"] == 4 and changed["model"]["remat"] == "none"
        words = search_module.words_of({"scan_unroll": 4, "accumulate_steps": 2})
        assert words == "--config.model.scan_unroll=4 --config.accumulate_steps=2"


def test_an_error_in_one_thread_stops_the_others():
    queue, seen = list(range(100)), []

    def work():
        while queue:
            number = queue.pop(0)
            seen.append(number)
            if number == 1:
                raise ValueError("no")
            time.sleep(0.01)

    with pytest.raises(ValueError, match="no"):
        figures.run_together(work, queue.clear)
    assert len(seen) < 50


def test_search_ends_when_its_time_is_up_but_tries_the_config(monkeypatch):
    monkeypatch.setattr(plan, "measure", lambda *_: [dataclasses.replace(STEP, activation_bytes=100)])
    monkeypatch.setattr(plan, "machine_for", lambda target: MACHINE)
    tries = search(CONFIG, plan.Request("debug", "here", tokenizer=TOKENIZER), limit_s=0)
    assert [(one.changes, one.images_per_s) for one in tries] == [({}, 0.0)]
    assert describe_tries(tries).endswith("none of 1 fits")
