import json
import math

import numpy as np
import pytest

from mvar_jax.digits import report
from mvar_jax.digits.quality import Real, Samples
from mvar_jax.digits.report import Validation
from mvar_jax.errors import InputError


def good_run() -> dict:
    """Return arguments of `measure` for a run whose samples are as good as real images."""
    rng = np.random.default_rng(0)
    patterns = rng.uniform(0.2, 0.8, (10, 8, 8))

    def draw(num):
        labels = np.arange(num) % 10
        grey = np.clip(patterns[labels] + 0.05 * rng.normal(size=(num, 8, 8)), 0, 1)
        return np.repeat(np.kron(grey, np.ones((1, 2, 2)))[..., None], 3, axis=3) * 2 - 1, labels

    train, train_labels = draw(600)
    heldout, heldout_labels = draw(200)
    samples, sample_labels = draw(200)
    as_uint8 = lambda images: np.rint((images + 1) * 127.5).astype(np.uint8)
    return dict(
        real=Real(train, train_labels, heldout, heldout_labels),
        reconstructions=np.clip(heldout + 0.02 * rng.normal(size=heldout.shape), -1, 1),
        samples=Samples(as_uint8(samples), sample_labels, np.arange(200 * 5).reshape(200, 5)),
        code_counts_SV=np.array([[1] * 8 + [0] * 8, [3] * 15 + [0]]),
        validation=Validation([0, 100], [[2.8, 2.7], [1.0, 1.5]], [2.72, 1.4], [0.9, 1.4]),
        stages={
            "install": {"wall_s": 60.0, "cpu_s": 40.0, "peak_rss_mib": 200.0, "finished": True},
            "tokenizer": {"wall_s": 150.0, "cpu_s": 220.0, "peak_rss_mib": 1600.0, "finished": True},
            "transformer": {"wall_s": 230.0, "cpu_s": 420.0, "peak_rss_mib": 1500.0, "finished": True},
        },
    )


def failed(figures) -> set[str]:
    return {row["figure"] for row in report.check_requirements(figures) if not row["passed"]}


def test_good_run_passes_every_requirement_with_the_right_figures(tmp_path):
    """Figures that have a closed form equal it, every requirement passes, and the report holds the same figures.

    The run's arrays are small and chosen so that each figure can be computed by hand.
    """
    run = good_run()
    figures = report.measure(**run)
    assert failed(figures) == set()
    assert figures["codebook_used_fraction"] == 15 / 16
    assert figures["usage_per_scale"] == [0.5, 15 / 16]
    assert figures["perplexity_per_scale"] == pytest.approx([8, 15])
    assert figures["log_v"] == pytest.approx(math.log(16))
    assert figures["val_loss_worst_over_log_v"] == pytest.approx(1.5 / math.log(16))
    assert (figures["total_s"], figures["total_cpu_s"], figures["peak_rss_mib"]) == (380, 640, 1600)
    assert figures["clone_to_pictures_s"] == 440
    mse = ((run["real"].heldout - run["reconstructions"]) ** 2).mean()
    assert figures["psnr_pooled_mse_db"] == pytest.approx(10 * math.log10(4 / mse))
    assert figures["fd_bound"] == 2 * figures["fd_train"] + figures["fd_reconstructions"]
    assert figures["fd_allowed"] == 0.8 * figures["fd_bound"]
    assert 0.9 < figures["nearest_ratio"] < 1.1 and 0.9 < figures["within_class_spread"] < 1.1

    assert report.write_report(tmp_path, figures)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["passed"] and written["figures"] == figures
    text = (tmp_path / "report.md").read_text()
    assert "12 of 12 requirements passed" in text and "FAIL" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_bad_run_fails_every_requirement(tmp_path):
    """A run that is wrong in everything fails each requirement, so none passes without being computed.

    NaN in the validation loss must fail too, and become null in JSON.
    """
    run = good_run()
    rng = np.random.default_rng(1)
    real = run["real"]
    run["real"] = real._replace(heldout_labels=np.roll(real.heldout_labels, 1))
    run["reconstructions"] = np.clip(real.heldout + 0.3 * rng.normal(size=(200, 16, 16, 3)), -1, 1)
    run["samples"] = Samples(real.train[np.zeros(200, int)], run["samples"].labels, np.zeros((200, 5), int))
    run["code_counts_SV"] = np.array([[1] * 8 + [0] * 8] * 2)
    run["validation"] = run["validation"]._replace(loss_KS=[[2.8, 2.7], [0.1, math.nan]])
    run["stages"]["install"]["wall_s"] = 241.0
    run["stages"]["transformer"] |= {"wall_s": 331.0, "peak_rss_mib": 4100.0}
    figures = report.measure(**run)
    assert failed(figures) == {requirement.figure for requirement in report.REQUIREMENTS}
    assert figures["num_distinct_pyramids"] == 1 and figures["nearest_ratio"] == 0

    assert not report.write_report(tmp_path, figures)
    written = json.loads((tmp_path / "report.json").read_text())
    assert not written["passed"] and written["figures"]["val_loss_worst_over_log_v"] is None
    assert "0 of 12 requirements passed" in (tmp_path / "report.md").read_text()


def test_a_refiner_is_shown_beside_its_transformer(tmp_path):
    """The figures are those of the refiner; the transformer's are kept and stand in the same table."""
    run = good_run()
    worse = run["samples"]._replace(images=-run["real"].train[:200])
    refined = run["samples"], Validation([0, 50], [[1.0, 1.5], [0.9, 1.25]], [1.4, 1.2], [0.8, 1.2])
    figures = report.measure(**run | {"samples": worse, "refined": refined})
    assert failed(figures) == set() and figures["val_loss_end"] == 1.2
    base = report.measure(**run | {"samples": worse})
    assert all(base[name] == value for name, value in figures["base"].items())
    assert base["fd_samples"] > 2 * figures["fd_samples"]
    report.write_report(tmp_path, figures)
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "| figure | transformer alone | with the refiner |" in lines and "| val_loss_end | 1.4 | 1.2 |" in lines
    assert "| 1 | 0.9375 | 15 | 2.7 | 1.5 | 1.4 | 0.541 | 1.25 | 1.2 |" in lines


def test_requirement_fails_alone_just_beyond_its_bound():
    figures = {
        "psnr_db": 28.0,
        "codebook_used_fraction": 0.9,
        "judge_real_accuracy": 0.98,
        "judge_sample_accuracy": 0.98,
        "fd_samples": 0.3,
        "fd_allowed": 0.3,
        "within_class_spread": 0.75,
        "nearest_ratio": 0.75,
        "num_distinct_pyramids": 100,
        "num_samples": 100,
        "val_loss_worst_over_log_v": 0.5999,
        "total_s": 480.0,
        "clone_to_pictures_s": 720.0,
        "peak_rss_mib": 4096.0,
    }
    assert failed(figures) == set()
    for requirement in report.REQUIREMENTS:
        beyond = -1e-3 if requirement.direction == ">=" else 1e-3
        changed = figures | {requirement.figure: figures[requirement.figure] + beyond}
        assert failed(changed) == {requirement.figure}


def test_measure_names_the_argument_whose_length_is_wrong():
    run = good_run()
    run["samples"] = run["samples"]._replace(labels=run["samples"].labels[:-1])
    with pytest.raises(InputError, match="^sample_labels must have 200 entries, got 199$") as caught:
        report.measure(**run)
    assert caught.value.field == "sample_labels"
