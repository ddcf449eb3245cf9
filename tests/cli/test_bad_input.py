"""Bad input: one line that names the field and both values, exit status 2, and nothing half-written."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import mvar_jax
from mvar_jax.__main__ import main
from mvar_jax.errors import InputError


def refuse(capfd, arguments: list[str], *words: str) -> str:
    """Run a command that must fail, and return its one line."""
    capfd.readouterr()
    try:
        status = main(arguments)
    except SystemExit as error:
        status = error.code
    lines = capfd.readouterr().err.strip().splitlines()
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--labels", "10"], ["labels must be", "got 10", "0 to 9"]),
        (["--labels", "-1"], ["labels must be", "got -1", "0 to 9"]),
        (["--labels", "cat"], ["labels", "'cat'"]),
        (["--labels", "5-3"], ["labels", "range", "got 5-3"]),
        (["--top_k", "-1"], ["top_k must be 0 or more (0: off), got -1"]),
        (["--top_p", "1.5"], ["top_p must be from 0 to 1 (0: off), got 1.5"]),
        (["--top_p", "-0.1"], ["top_p must be", "got -0.1"]),
        (["--top_p", "nan"], ["top_p must be", "got nan"]),
        (["--cfg", "-2"], ["cfg must be", "got -2"]),
        (["--cfg", "inf"], ["cfg must be from 0 (no guidance) to 1e6, got inf"]),
        (["--cfg", "1e39"], ["cfg must be", "got 1e+39"]),
        (["--cfg", "nan"], ["cfg must be", "got nan"]),
        (["--temperature", "0"], ["temperature must be from 1e-6", "got 0.0"]),
        (["--temperature", "1,nan"], ["temperature must be from 1e-6", "got nan"]),
        (["--temperature", "1.2,1"], ["temperature must be one number or 4, one for each scale, got 2"]),
        (["--temperature", "1;2"], ["--temperature", "must be a number, or numbers such as", "'1;2'"]),
        (["--num", "0"], ["--num must be 1 or more, got 0"]),
        (["--batch_size", "0"], ["--batch_size must be 1 or more, got 0"]),
        (["--seed", "-1"], ["seed must be from 0 to 2**32 - 1, got -1"]),
        (["--seed", "4294967301"], ["seed must be from 0 to 2**32 - 1, got 4294967301"]),
        (["--colour", "red"], ["unrecognized", "--colour"]),
    ],
)
def test_sample_option_out_of_range_is_refused(run, tmp_path, capfd, flags, words):
    out = tmp_path / "out"
    base = ["sample", "--checkpoint", run.transformer, "--out", str(out), "--labels", "1"]
    refuse(capfd, [*base, *flags], *words)
    assert not out.exists()


def test_unknown_command_is_refused(capfd):
    refuse(capfd, ["trian"], "trian", "sample")


@pytest.mark.parametrize(
    "override, words",
    [
        (
            "--config.optimizer.wieght_decay=0.1",
            ["unknown key config.optimizer.wieght_decay. Did you mean weight_decay?"],
        ),
        ("--config.colour=red", ["unknown key config.colour"]),
        ("--config.num_steps=many", ["many"]),
        ("--config.num_steps=0", ["config.num_steps", "got 0"]),
        ("--config.batch_size=0", ["batch_size must be a positive multiple of 1", "got 0"]),
        ("--config.model.vocab_size=64", ["config.model.vocab_size must be 32", "got 64"]),
        ("--config.model.num_classes=9", ["config.model.num_classes must be 10", "got 9"]),
        ("--config.optimizer.schedule=linear", ["config.optimizer.schedule must be", "lin0", "got 'linear'"]),
        ("--config.phases.schedule=both", ["config.phases.schedule must be paper or joint, got 'both'"]),
        ("--config.init_from=/nowhere", ["/nowhere"]),
        ("--config.eval_temperature=1.2,1", ["config.eval_temperature must be one number or 4", "got 2"]),
        ("--config.mesh.data=3", ["mesh", "3", "1, the number of devices"]),
    ],
)
def test_config_value_out_of_range_is_refused(run, tmp_path, capfd, override, words):
    workdir = tmp_path / "workdir"
    refuse(capfd, [*run.train_transformer, override, "--workdir", str(workdir)], *words)
    assert not workdir.exists()


@pytest.mark.parametrize(
    "given, other, words",
    [
        ("kernel_size=3", "kernel_size=4", ["config.model.kernel_size", "4", "odd"]),
        ("(1,2,3,6)", "(1,2,2,6)", ["config.model.sides", "(1, 2, 2, 6)", "increas"]),
        ("(1,2,3,6)", "(1,2,3,7)", ["config.model.sides must be (1, 2, 3, 6)", "got (1, 2, 3, 7)"]),
    ],
)
def test_impossible_tuple_is_refused(run, tmp_path, capfd, given, other, words):
    """The flag is replaced, since giving it twice would join the tuples."""
    workdir = tmp_path / "workdir"
    arguments = [argument.replace(given, other) for argument in run.train_transformer]
    refuse(capfd, [*arguments, "--workdir", str(workdir)], *words)
    assert not workdir.exists()


def test_scales_that_do_not_end_at_the_latent_side_are_refused(run, tmp_path, capfd):
    workdir = tmp_path / "workdir"
    override = "--config.data.image_size=16"
    words = ["config.model.sides", "8", "16"]
    refuse(capfd, [*run.train_tokenizer, override, "--workdir", str(workdir)], *words)
    assert not workdir.exists()


def test_missing_or_broken_config_file_is_refused(tmp_path, capfd):
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config(:\n")
    for path in (tmp_path / "none.py", broken):
        refuse(capfd, ["train", "--config", str(path), "--workdir", str(tmp_path / "w")], "config", str(path))
    assert not (tmp_path / "w").exists()


def test_workdir_of_another_config_is_refused(run, capfd):
    before = (Path(run.transformer) / "config.json").read_bytes()
    arguments = [*run.train_transformer, "--config.seed=7", "--workdir", run.transformer]
    refuse(capfd, arguments, "config.seed is 7, but the run in", "has 0")
    assert (Path(run.transformer) / "config.json").read_bytes() == before


def test_cache_of_another_tokenizer_is_refused(run, tmp_path, capfd):
    other = tmp_path / "tokenizer"
    shutil.copytree(run.tokenizer, other)
    shutil.rmtree(other / "checkpoints" / "3")  # its weights are now those of step 2
    arguments = [argument if argument != run.tokenizer else str(other) for argument in run.cache]
    refuse(capfd, [*arguments, "--out", run.tokens], "token cache of another tokenizer", run.tokens)


@pytest.mark.parametrize("name", ["none", "file", "empty", "damaged", "half"])
def test_unreadable_checkpoint_is_refused(run, tmp_path, capfd, name):
    path = tmp_path / name
    if name == "file":
        path.write_text("not a model")
    elif name == "empty":
        path.mkdir()
    elif name != "none":
        shutil.copytree(run.transformer, path)
        newest = max((path / "checkpoints").glob("[0-9]*"))
        if name == "half":
            shutil.rmtree(newest / "ema")
        else:
            largest = max((p for p in (newest / "ema").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
            content = bytearray(largest.read_bytes())
            content[len(content) // 2] ^= 255
            largest.write_bytes(bytes(content))
    out = tmp_path / "out"
    refuse(capfd, ["sample", "--checkpoint", str(path), "--labels", "1", "--out", str(out)], "checkpoint", str(path))
    assert not out.exists()


def test_output_that_cannot_be_written_is_refused(run, tmp_path, capfd):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for out in (blocked / "out", Path("/proc/nowhere")):
        refuse(
            capfd, ["sample", "--checkpoint", run.transformer, "--labels", "1", "--out", str(out)], "out", str(out)
        )
        refuse(capfd, [*run.train_tokenizer, "--workdir", str(out)], "workdir", str(out))
        refuse(capfd, [*run.cache, "--out", str(out)], "out", str(out))
    assert blocked.read_text() == "in the way"


def test_file_that_is_not_an_image_is_refused(run, tmp_path, capfd):
    (tmp_path / "a.png").write_bytes(b"not a png")
    out = tmp_path / "out"
    base = ["reconstruct", "--checkpoint", run.tokenizer, "--out", str(out), "--images"]
    refuse(capfd, [*base, str(tmp_path)], "images", "a.png")
    refuse(capfd, [*base, str(tmp_path / "none")], "images", "none")
    assert not out.exists()


def test_python_api_refuses_wrong_shapes_and_values(run):
    model = mvar_jax.load(run.transformer)
    for call, field in (
        (lambda: model.encode(np.zeros((1, 16, 16, 3))), "images"),
        (lambda: model.decode(np.zeros((1, 129), int)), "ids"),
        (lambda: model.decode(np.full((1, 50), 32)), "ids"),
        (lambda: model.sample([11]), "labels"),
        (lambda: model.sample([1], top_p=2), "top_p"),
        (lambda: mvar_jax.load(run.tokenizer).sample([1]), "checkpoint"),
        (lambda: mvar_jax.load("/nowhere"), "checkpoint"),
        (lambda: mvar_jax.load(3), "checkpoint"),
        (lambda: mvar_jax.load(run.transformer, tokenizer=3), "tokenizer"),
        (lambda: mvar_jax.load(run.transformer, refiner="off"), "refiner"),
        (lambda: mvar_jax.load(run.transformer, refine_scales=1), "refine_scales"),
        (lambda: mvar_jax.load(run.transformer, refine_scales=[1.0]), "refine_scales"),
        (lambda: mvar_jax.load(run.transformer, refine_scales="1-2"), "refine_scales"),
        (lambda: mvar_jax.load(run.transformer, switch=2), "switch"),
        (lambda: mvar_jax.load(run.transformer, switch=(2,)), "switch"),
        (lambda: mvar_jax.load(run.transformer, switch=(2, None)), "switch"),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert error.value.field == field
