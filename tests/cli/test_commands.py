"""The doors, from the outside: what each command leaves behind, and that they agree with the Python face."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import mvar_jax
from mvar_jax.__main__ import COMMANDS, main
from mvar_jax.checkpoints.manager import restore_weights
from mvar_jax.ops.pixels import from_levels
from mvar_jax.tokens.cache_reader import TokenCache


def test_help_lists_every_command_without_heavy_imports():
    code = (
        "import sys\nfrom mvar_jax.__main__ import main\n"
        "try:\n    main(['sample', '--help'])\nexcept SystemExit:\n    pass\nmain([])\n"
        "heavy = {'jax', 'tensorflow', 'sklearn', 'matplotlib', 'grain', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def test_training_leaves_checkpoints_metrics_events_config_and_pictures(run):
    of_tokenizer = ((run.tokenizer, name) for name in ("reconstructions", "scales"))
    for workdir, picture in (*of_tokenizer, (run.transformer, "samples")):
        names = {path.name for path in Path(workdir).iterdir()}
        assert {"checkpoints", "config.json", "metrics.jsonl", "model.json", "pictures", "tensorboard"} <= names
        lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
        assert {"train", "eval"} == {line["kind"] for line in lines}
        assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 3]
        assert list((Path(workdir) / "pictures").glob(f"{picture}_*.png"))
        assert list((Path(workdir) / "tensorboard").iterdir())


def test_transformer_metrics_hold_every_scale(run):
    lines = [json.loads(line) for line in (Path(run.transformer) / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert len(line["loss_per_scale"]) == 4
    weights = np.array([1, 4, 9, 36]) / 50
    last = lines[-1]
    assert np.isclose(last["loss"], weights @ last["loss_per_scale"], rtol=1e-5)
    assert np.isclose(lines[0]["loss"], np.log(32), rtol=0.02)


def test_training_again_changes_nothing(run):
    before = (Path(run.transformer) / "metrics.jsonl").read_bytes()
    assert main([*run.train_transformer, "--workdir", run.transformer]) == 0
    assert (Path(run.transformer) / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("task", ["tokenizer", "transformer"])
def test_resumed_training_is_bit_equal(run, tmp_path, task):
    whole, resumed = Path(getattr(run, task)), tmp_path / task
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "3")
    assert main([*getattr(run, f"train_{task}"), "--workdir", str(resumed)]) == 0
    for prefer_ema in (False, True):
        trees = [restore_weights(workdir, prefer_ema=prefer_ema) for workdir in (whole, resumed)]
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), *trees)))
    lines = [
        [json.loads(line) | {"images_per_s": 0} for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        for workdir in (whole, resumed)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 5


def test_fine_tuning_starts_from_the_given_weights(run, tmp_path):
    before = json.loads((Path(run.transformer) / "metrics.jsonl").read_text().splitlines()[-1])
    for conditioning in ("markov", "full"):
        workdir = tmp_path / conditioning
        overrides = [f"--config.init_from={run.transformer}", f"--config.model.conditioning={conditioning}"]
        assert main([*run.train_transformer, *overrides, "--config.num_steps=2", "--workdir", str(workdir)]) == 0
        first = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
        assert first["kind"] == "eval" and first["step"] == 0
        if conditioning == "markov":
            assert np.isclose(first["loss"], before["loss"], rtol=1e-6)


def test_cache_holds_the_ids_of_the_unaugmented_image_as_first_view(run):
    model = mvar_jax.load(run.tokenizer)
    cache = TokenCache(run.tokens, "train")
    assert cache[0]["ids"].shape == (2, 50)
    data = json.loads((Path(run.transformer) / "config.json").read_text())["data"]
    from mvar_jax.build import DataOptions
    from mvar_jax.fields import from_dict

    options = from_dict(DataOptions, data, "config.data")
    transform, source = options.transform(), options.open("train")
    images = np.stack([transform(source[i]["image"]) for i in range(4)])
    expected = np.asarray(model.encode(from_levels(images)))
    assert (np.stack([cache[i]["ids"][0] for i in range(4)]) == expected).mean() > 0.99
    assert (np.stack([cache[i]["ids"][1] for i in range(4)]) != expected).any()


def test_sample_writes_what_load_draws(run, tmp_path, capsys):
    out = tmp_path / "samples"
    arguments = ["--checkpoint", run.transformer, "--labels", "3,0-1", "--num", "2", "--cfg", "2.0", "--top_k", "20"]
    options = ["--top_p", "0.9", "--temperature", "1.5", "--seed", "5"]
    options += ["--batch_size", "4", "--save_tokens", "--out", str(out)]
    assert main(["sample", *arguments, *options]) == 0
    samples, tokens = np.load(out / "samples.npz"), np.load(out / "tokens.npz")
    labels, numbers = [3, 0, 1, 3, 0, 1], [0, 2, 4, 1, 3, 5]
    assert samples["arr_0"].shape == (6, 12, 12, 3) and samples["arr_0"].dtype == np.uint8
    assert samples["arr_1"].tolist() == tokens["labels"].tolist() == labels
    assert tokens["ids"].shape == (6, 50) and tokens["f_hat"].shape == (6, 6, 6, 16)
    assert sorted(path.name for path in out.glob("0*.png")) == [f"{i:06d}.png" for i in range(6)]
    assert (np.asarray(Image.open(out / "000004.png")) == samples["arr_0"][4]).all()
    assert Image.open(out / "grid.png").size[0] > 2 * 96

    model = mvar_jax.load(run.transformer)
    options = dict(cfg=2.0, top_k=20, top_p=0.9, temperature=1.5)
    images, ids = model.sample(np.array(labels), seed=5, index=np.array(numbers), **options)
    assert (np.asarray(ids) == tokens["ids"]).all()
    assert np.abs(np.rint((np.asarray(images) + 1) * 127.5) - samples["arr_0"]).max() <= 1
    assert np.allclose(model.decode(ids), images, atol=1e-5)


def test_smooth_sampling_and_truncation_change_the_pictures(run, tmp_path):
    base = ["sample", "--checkpoint", run.transformer, "--labels", "2", "--num", "3", "--out"]
    for name, flags in (("plain", []), ("smooth", ["--smooth"]), ("floor", ["--truncate_uint8"])):
        assert main([*base, str(tmp_path / name), *flags]) == 0
    plain, smooth, floor = (np.load(tmp_path / n / "samples.npz")["arr_0"] for n in ("plain", "smooth", "floor"))
    assert (plain != smooth).any()
    difference = plain.astype(int) - floor
    assert set(np.unique(difference)) == {0, 1}


def test_score_sums_to_the_validation_loss(run):
    model, cache = mvar_jax.load(run.transformer), TokenCache(run.tokens, "val")
    items = [cache[i] for i in range(len(cache))]
    ids, labels = np.stack([item["ids"][0] for item in items]), np.array([item["label"] for item in items])
    last = json.loads((Path(run.transformer) / "metrics.jsonl").read_text().splitlines()[-1])
    nll_BS = np.asarray(model.score(ids, labels))
    assert nll_BS.shape == (len(ids), 4)
    assert np.isclose(nll_BS.sum(1).mean() / 50, last["loss"], rtol=1e-5)
    assert model.logits(ids[:2], labels[:2]).shape == (2, 50, 32)


def test_reconstruct_writes_pairs_table_and_tokens(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i, mode in enumerate(("RGB", "L", "RGBA")):
        picture = Image.fromarray(rng.integers(0, 256, (40 + i, 64, 3), np.uint8)).convert(mode)
        picture.save(folder / f"{i}.png")
    out = tmp_path / "out"
    arguments = ["--checkpoint", run.tokenizer, "--images", str(folder), "--out", str(out)]
    assert main(["reconstruct", *arguments, "--save_tokens", "--batch_size", "2"]) == 0
    table = (out / "psnr.md").read_text()
    assert all(name in table for name in ("0.png", "1.png", "2.png", "mean", "PSNR", "SSIM"))
    assert np.load(out / "tokens.npz")["ids"].shape == (3, 50)
    assert len(list(out.glob("00000*.png"))) == 3 and (out / "reconstructions.png").exists()
    assert "mean" in capsys.readouterr().out
