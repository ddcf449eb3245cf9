"""Scores of given features against those of the published evaluator."""

import subprocess
import sys
import warnings

import eval_case
import numpy as np
import pytest

from mvar_jax import evaluation
from mvar_jax.errors import InputError
from mvar_jax.evaluation import frechet_distance, inception_score, manifolds, precision_recall


def without_column(x_ND):
    return np.where(np.arange(x_ND.shape[1]) == 3, 0, x_ND)


def frechet_sets(name: str):
    x = eval_case.load("features.npz")
    pairs = {
        "A_B": (x["A"], x["B"]),
        "A_A": (x["A"], x["A"]),
        "A_lowrank": (x["A"], x["low_rank_B"]),
        "one_dim": (x["A"][:, :1], x["B"][:, :1]),
        "constant": (x["A"], np.repeat(x["A"][:1], 50, 0)),
        "dead_column": (without_column(x["A"]), without_column(x["B"])),
        "two_rows": (x["A"][:2], x["A"][2:4]),
    }
    return pairs.get(name) or (x[f"{name}_A"], x[f"{name}_B"])


FRECHET = ["A_B", "A_A", "low_rank", "near_singular", "few", "A_lowrank", "one_dim", "constant", "dead_column"]


@pytest.mark.parametrize("name", [*FRECHET, "two_rows"])
def test_frechet_distance_of_full_deficient_and_singular_sets(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = frechet_distance(*frechet_sets(name))
    assert found == pytest.approx(eval_case.load("scores.json")["frechet"][name]["exact"], rel=1e-6, abs=1e-9)


def test_a_frechet_distance_of_fewer_rows_than_features_is_computed_with_a_warning():
    with pytest.warns(UserWarning, match="^a Frechet distance of 21 rows of 64 features is too large; take 65 "):
        assert frechet_distance(*frechet_sets("few")) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert frechet_distance(*frechet_sets("A_B")) > 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("score", [frechet_distance, precision_recall])
def test_features_that_are_not_finite_are_refused_at_once(score, value):
    x = eval_case.load("features.npz")
    bad = x["A"].copy()
    bad[3, 5] = value
    for pair in ((bad, x["B"]), (x["B"], bad)):
        with pytest.raises(InputError, match="must be finite, got NaN or infinity in row 3 of 400$"):
            score(*pair)


@pytest.mark.parametrize("split_size", [100, 400, 1030, 5000])
def test_inception_score_in_parts_and_a_shorter_last_one(split_size):
    golden = eval_case.load("scores.json")["inception_score"]
    found = inception_score(eval_case.load("probabilities.npz")["p"], split_size)
    assert found == pytest.approx(golden[f"split{split_size}"], rel=1e-6)


def test_inception_score_depends_on_the_order():
    p = eval_case.load("probabilities.npz")["p"]
    sorted_p = p[np.argsort(p.argmax(1), kind="stable")]
    golden = eval_case.load("scores.json")["inception_score"]["sorted_by_argmax_split100"]
    assert inception_score(sorted_p, 100) == pytest.approx(golden, rel=1e-6)


def test_a_probability_of_exactly_zero_adds_nothing():
    p = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert inception_score(p) == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        ([[0.5, np.nan]], "^probabilities must be finite, got NaN or infinity in row 0 of 1$"),
        ([[0.5, 0.5], [-1.5, 2.5]], "^probabilities must be between 0 and 1, got -1.5 to 2.5 in row 1$"),
        ([0.5, 0.5], r"^probabilities must be numbers \[N, D\] with at least 1 row, got float64 \[2\]$"),
    ],
)
def test_what_are_no_probabilities_is_refused(p, message):
    with pytest.raises(InputError, match=message):
        inception_score(np.array(p))


@pytest.mark.parametrize("split_size", [0, 2.5, True])
def test_a_split_size_that_is_no_count_is_refused(split_size):
    with pytest.raises(InputError, match="^split_size must be (a whole number, )?1 or more, got "):
        inception_score(np.full((2, 2), 0.5), split_size)


def manifold_sets(name: str):
    x = eval_case.load("features.npz")
    a, b = x["A"], x["B"]
    far_a, far_b = a.copy(), b.copy()
    far_a[:5] *= 400
    far_b[-5:] *= 400
    return {
        "A_B": (a, b),
        "scaled_200": (a * 200, b * 200),
        "mixed_blocks_128": (far_a, far_b),
        "ties": (x["ties_A"], x["ties_B"]),
        "identical": (a, a),
        "swapped": (b, a),
    }[name]


@pytest.mark.parametrize("name", ["A_B", "scaled_200", "mixed_blocks_128", "ties", "identical", "swapped"])
def test_precision_and_recall(name):
    golden = eval_case.load("scores.json")["precision_recall"][name]["float64"]
    reference_ND, sample_ND = manifold_sets(name)
    assert precision_recall(reference_ND, sample_ND) == pytest.approx(golden, abs=0.002)
    assert precision_recall(reference_ND.astype(np.float64), sample_ND) == tuple(golden)


@pytest.mark.parametrize(("num_references", "num_samples"), [(40, 5), (5, 40), (1, 5)])
def test_exact_copies_lie_in_each_others_balls(num_references, num_samples):
    """Repeated points have balls of radius 0, which must hold their copies in the other set.

    Of 2048 float32 features |u|^2 - 2uv + |v|^2 of equal rows is rarely 0, and depends on the rows' place in a tile.
    """
    points_ND = np.abs(np.random.default_rng(0).normal(size=(60, 2048))).astype(np.float32)
    references_ND, samples_ND = np.tile(points_ND, (num_references, 1)), np.tile(points_ND, (num_samples, 1))
    assert precision_recall(references_ND, samples_ND) == (1, 1)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(manifolds, "TILE_ROWS", 96)
    monkeypatch.setattr(manifolds, "TILE_COLUMNS", 130)


def test_tiles_do_not_change_precision_and_recall(small_tiles):
    """Whole tiles, and a shorter last one in both directions: its padding is in no ball and no neighbour."""
    a, b = manifold_sets("A_B")
    whole = eval_case.load("scores.json")["precision_recall"]["A_B"]["float64"]
    assert precision_recall(a, b) == tuple(whole)
    near_zero = a - a[0], b - a[0]  # where the padding is
    assert precision_recall(*near_zero) == pytest.approx(whole, abs=0.002)


class Killed(Exception):
    pass


def kill_after(monkeypatch, name: str, num: int) -> list:
    """Make a program of manifolds.py raise at its call number `num`; return the list of its calls."""
    program, calls = getattr(manifolds, name), []

    def run(*args):
        if len(calls) == num:
            raise Killed
        calls.append(name)
        return program(*args)

    monkeypatch.setattr(manifolds, name, run)
    return calls


def test_precision_and_recall_continue_where_a_kill_left_them(tmp_path, monkeypatch, small_tiles):
    """Of 5 x 4 tiles of references, 6 x 4 of samples and 6 x 4 of both, no row of tiles runs twice."""
    monkeypatch.setattr(manifolds, "SAVE_EVERY_S", 0)
    (a, b), path = manifold_sets("A_B"), tmp_path / "progress.npz"
    whole = precision_recall(a, b)
    for program, num in (("_update_nearest", 9), ("_update_nearest", 20), ("_compare", 10)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(patch, program, num)
            precision_recall(a, b, progress=path)
    with monkeypatch.context() as patch:
        radii, comparisons = kill_after(patch, "_update_nearest", -1), kill_after(patch, "_compare", -1)
        assert precision_recall(a, b, progress=path) == whole
        assert (len(radii), len(comparisons)) == (0, 16)
    with monkeypatch.context() as patch:  # a finished one is read only
        kill_after(patch, "_compare", 0)
        assert precision_recall(a, b, progress=path) == whole


def test_a_large_offset_of_all_features_changes_nothing():
    """The features are so coarse that float32 holds them with the offset, too."""
    rng = np.random.default_rng(0)
    coarse = lambda num, scale: (np.round(256 * scale * rng.normal(size=(num, 8))) / 256).astype(np.float32)
    a, b = coarse(300, 1), coarse(250, 3)
    found = precision_recall(a + np.float32(4096), b + np.float32(4096))
    assert found == precision_recall(a, b) and 0 < found[0] < 1


@pytest.mark.parametrize("stale", ["other k", "other sets", "cut"])
def test_progress_of_something_else_is_replaced(tmp_path, stale):
    (a, b), path = manifold_sets("A_B"), tmp_path / "progress.npz"
    precision_recall(*((b, a) if stale == "other sets" else (a, b)), k=2 if stale == "other k" else 3, progress=path)
    if stale == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    assert precision_recall(a, b, progress=path) == precision_recall(a, b)


@pytest.mark.parametrize(
    ("shapes", "k", "message"),
    [
        (((5, 2), (5, 3)), 3, "^features of both sets must have the same width, got 2 and 3$"),
        (((3, 2), (5, 2)), 3, r"^reference must be numbers \[N, D\] with at least 4 rows, got float64 \[3, 2\]$"),
        (((5, 2), (5, 2)), 0, "^k must be 1 or more, got 0$"),
        (((5, 2), (5, 2)), 2.0, "^k must be a whole number, 1 or more, got 2.0$"),
    ],
)
def test_sets_or_neighbours_that_do_not_fit_are_refused(shapes, k, message):
    with pytest.raises(InputError, match=message):
        precision_recall(*map(np.zeros, shapes), k)


def test_importing_the_package_imports_no_jax():
    script = "import sys, mvar_jax.evaluation; assert not {'jax', 'scipy', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    with pytest.raises(AttributeError, match="has no attribute 'fid'"):
        evaluation.fid  # noqa: B018


def test_every_public_score_is_a_function():
    for name in evaluation._PUBLIC:
        assert callable(getattr(evaluation, name))
