"""Bulk sampling: killed and resumed, in several processes, refused if the folder holds something else."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mvar_jax
from mvar_jax.__main__ import main
from mvar_jax.checkpoints.manager import restore_weights
from mvar_jax.errors import InputError
from mvar_jax.files.npz import save_npz
from mvar_jax.processes.holding import owned_folder
from mvar_jax.sampling import sampler
from mvar_jax.sampling.bulk import draw_all, place_networks
from mvar_jax.sampling.order import Order
from mvar_jax.sampling.sampler import SampleOptions
from mvar_jax.sharding import make_mesh

OPTIONS = ["--labels", "0-2,7", "--num", "3", "--batch_size", "5", "--top_k", "20", "--save_tokens"]
# the third image of the second batch is half written when the process dies
KILL_IN_THE_MIDDLE = """
import os, signal, sys
from mvar_jax.files.atomic import temporary_path
from mvar_jax.sampling import bulk
save = bulk.save_png

def save_or_die(path, image):
    if path.name == "000007.png":
        temporary_path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, image)

bulk.save_png = save_or_die
bulk.NUM_WRITERS = 1
from mvar_jax.__main__ import main
main(sys.argv[1:])
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def command(run):
    return ["sample", "--checkpoint", run.transformer, *OPTIONS, "--out"]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run: three batches, the last of two images, by one compiled sampler."""
    out = tmp_path_factory.mktemp("samples") / "whole"
    before = sampler.sample._cache_size()
    assert main([*command, str(out)]) == 0
    assert sampler.sample._cache_size() == before + 1, "the last batch is padded, not compiled separately"
    return out


def test_an_uninterrupted_run_leaves_these_files(whole):
    pngs = {f"{i:06d}.png" for i in range(12)}
    assert {path.name for path in whole.iterdir()} == pngs | {"grid.png", "samples.json", "samples.npz", "tokens.npz"}
    samples, tokens = np.load(whole / "samples.npz"), np.load(whole / "tokens.npz")
    assert samples["arr_1"].tolist() == [0, 1, 2, 7] * 3 == tokens["labels"].tolist(), "round-robin"
    assert len(np.unique(tokens["ids"], axis=0)) == 12


def test_resumed_after_a_kill_it_leaves_the_same_bytes(command, whole, tmp_path, capsys):
    """A run killed while it writes an image resumes to the bytes of `whole`, and keeps the batches it had finished.

    SIGKILL in `save_png` leaves a half-written file and a batch without arrays, the worst state of the folder.
    A batch marked finished too early, a temporary file taken for an image, or a sample that depends on the batches
    of its process breaks it. A third run must change no file.
    """
    out = tmp_path / "killed"
    child = [sys.executable, "-c", KILL_IN_THE_MIDDLE, *command, str(out)]
    died = subprocess.run(child, env=os.environ, timeout=300)
    assert died.returncode == -signal.SIGKILL
    assert [path.name for path in (out / "unfinished").iterdir()] == ["0000000.npz"]
    kept = (out / "000000.png").stat().st_mtime_ns
    assert main([*command, str(out)]) == 0
    assert (out / "000000.png").stat().st_mtime_ns == kept, "a finished batch was sampled again"
    assert contents(out) == contents(whole)
    assert "12 images written" in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main([*command, str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert "12 images already there" in capsys.readouterr().out


def unjoin(whole: Path, out: Path) -> None:
    """Make the folder that a run leaves which is killed before it joins its batches."""
    shutil.copytree(whole, out)
    samples, tokens = np.load(whole / "samples.npz"), np.load(whole / "tokens.npz")
    for batch in range(3):
        rows = slice(5 * batch, 5 * batch + 5)
        arrays = {"pixels": samples["arr_0"], "ids": tokens["ids"], "f_hat": tokens["f_hat"]}
        save_npz(out / "unfinished" / f"{batch:07d}.npz", **{name: x[rows] for name, x in arrays.items()})
    for name in ("samples.npz", "tokens.npz", "grid.png"):
        (out / name).unlink()


@pytest.fixture(scope="module")
def by_label(run, tmp_path_factory) -> Path:
    """A folder of the same samples as an earlier version wrote them: label by label, which its options do not say."""
    out = tmp_path_factory.mktemp("samples") / "by_label"
    mesh = make_mesh(devices=jax.local_devices())
    model = place_networks(mvar_jax.load(run.transformer).networks, mesh)
    order = Order((0, 1, 2, 7), 3, SampleOptions(top_k=20), batch_size=5, saves_tokens=True, is_by_label=True)
    with owned_folder("out", out, "sample", order.identity(model)):
        draw_all(model, order, out, mesh)
    return out


def test_round_robin_moves_samples_and_changes_none(whole, by_label):
    old, new = (np.load(out / "tokens.npz") for out in (by_label, whole))
    assert old["labels"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 7, 7, 7]
    np.testing.assert_array_equal(new["ids"].reshape(3, 4, -1), old["ids"].reshape(4, 3, -1).swapaxes(0, 1))
    assert (whole / "grid.png").read_bytes() == (by_label / "grid.png").read_bytes(), "a row is a class"


def test_samples_that_an_earlier_version_began_are_finished_in_their_own_order(command, by_label, tmp_path, capsys):
    stored = json.loads((by_label / "samples.json").read_text())
    assert "order" not in stored
    for is_done, words in ((True, "12 images already there"), (False, "12 images written")):
        out = tmp_path / words
        shutil.copytree(by_label, out) if is_done else unjoin(by_label, out)
        assert main([*command, str(out)]) == 0
        assert words in capsys.readouterr().out and contents(out) == contents(by_label)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"\0\0", b"\1\1", 50))


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (cut, ["unfinished/0000001.npz"]),
        (change, ["unfinished/0000000.npz", "unfinished/0000001.npz"]),
        (Path.unlink, ["000006.png"]),
        (cut, ["samples.npz"]),
        (cut, ["tokens.npz"]),
    ],
)
def test_damaged_leftovers_are_drawn_again(command, whole, tmp_path, damage, names):
    out = tmp_path / "out"
    shutil.copytree(whole, out) if names[0].endswith("s.npz") else unjoin(whole, out)
    for name in names:
        damage(out / name)
    assert main([*command, str(out)]) == 0
    assert contents(out) == contents(whole) and not (out / "unfinished").exists()


def test_processes_share_the_batches(run, whole, tmp_path):
    mesh = make_mesh(devices=jax.local_devices())
    model = place_networks(mvar_jax.load(run.transformer).networks, mesh)
    order = Order((0, 1, 2, 7), 3, SampleOptions(top_k=20), batch_size=5, saves_tokens=True)
    waited = []

    def other_process():
        """Run the second process's batches while the first waits for it."""
        waited.append(sorted(path.name for path in (tmp_path / "unfinished").glob("*.npz")))
        if len(waited) == 2:
            # the first process has sampled its batches and has not joined anything yet
            draw_all(model, order, tmp_path, mesh, process_index=1, process_count=2)

    with owned_folder("out", tmp_path, "sample", order.identity(model)):
        assert draw_all(model, order, tmp_path, mesh, process_index=0, process_count=2, wait=other_process)
    assert waited[:2] == [[], ["0000000.npz", "0000002.npz"]], "each process samples every second batch"
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--cfg", "2.0"], ["cfg=2.0", "1.5"]),
        (["--labels", "3"], ["labels='3'", "'0-2,7'"]),
        (["--seed", "1"], ["seed=1", "0"]),
        (["--batch_size", "6"], ["batch_size=6", "5"]),
        (["--dtype", "bfloat16"], ["dtype='bfloat16'", "'float32'"]),
        (["--smooth"], ["smooth=True", "False"]),
        (["--temperature", "2"], ["temperature=2.0", "1.0"]),
        (["--temperature", "2,1,1,1"], ["temperature=[2.0, 1.0, 1.0, 1.0]", "1.0"]),
    ],
    ids=lambda x: x[0],
)
def test_samples_of_other_options_are_refused(command, whole, capsys, changes, words):
    before = contents(whole)
    assert main([*command, str(whole), *changes]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in [*words, str(whole)]), error
    assert contents(whole) == before


def test_samples_of_other_weights_or_of_no_known_run_are_refused(command, whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    stored = json.loads((out / "samples.json").read_text())
    (out / "samples.json").write_text(json.dumps(stored | {"checkpoint": "weights 0123"}))
    assert main([*command, str(out)]) == 2
    error = capsys.readouterr().err
    assert f"checkpoint='{stored['checkpoint']}' differs from 'weights 0123'" in error
    (out / "samples.json").unlink()
    assert main([*command, str(out)]) == 2
    assert "holds 000000.png, which `sample` would replace; choose another --out" in capsys.readouterr().err


def test_the_best_checkpoint_can_be_loaded(run, tmp_path):
    with pytest.raises(InputError, match="has no best checkpoint; train with keep_best"):
        mvar_jax.load(run.transformer, which="best")
    workdir = tmp_path / "workdir"
    shutil.copytree(run.transformer, workdir)
    (workdir / "checkpoints" / "scores.json").write_text(json.dumps({"2": 1.0, "3": 0.5}))
    for which, step in (("best", 2), ("last", 3)):
        ours, expected = mvar_jax.load(workdir, which=which).params, restore_weights(workdir, step)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), ours, expected)))


def test_transformer_weights_take_the_requested_dtype(run):
    model = mvar_jax.load(run.transformer)
    placed = place_networks(model.networks, make_mesh(devices=jax.local_devices()), "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(placed.params)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(placed.tokenizer_params)} == {jnp.dtype("float32")}
    assert placed.transformer.dtype == placed.tokenizer.dtype == jnp.bfloat16
