"""The way of a folder of photographs: looked at, cached, trained from, through the commands."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_case import quick_jit
from image_files import write_tree
from PIL import Image
from small_case import MODEL, TOKENIZER, seeded_params

from mvar_jax.__main__ import main
from mvar_jax.checkpoints.model_directory import load_model, save_model
from mvar_jax.tokens import encode
from mvar_jax.tokens.cache_writer import classes_in
from mvar_jax.training import loop, transformer_task

SIZES = [
    f"--config.model.{name}={getattr(MODEL, name)}".replace(" ", "")
    for name in ("sides", "vocab_size", "code_width", "refine_step", "kernel_size", "depth", "width", "num_heads")
]


@pytest.fixture
def folder(tmp_path):
    """A tree with two bad files among 15, and a tokenizer beside it."""
    tree = write_tree(tmp_path / "tree")
    (tree / "train/bee/1.jpg").write_bytes((tree / "train/bee/1.jpg").read_bytes()[:-100])
    (tree / "train/cat/0.jpg").write_bytes(b"no picture")
    return tree


def _data(folder, share=0.2):
    values = {"path": folder, "image_size": TOKENIZER.image_size, "max_bad_share": share, "num_threads": 2}
    return ["--config=configs/folder.py", *(f"--config.data.{name}={value}" for name, value in values.items())]


def test_data_command_tells_counts_bad_files_balance_and_rate_and_draws_a_sheet(folder, tmp_path, capsys):
    out = tmp_path / "out"
    (folder / "train/fox").mkdir()
    assert main(["data", *_data(folder), "--out", str(out), "--num_pictures", "9"]) == 0
    text = capsys.readouterr().out
    for words in (
        "train: 15 images, 2 bad",
        "images/s with 2 threads",
        "val: 6 images, 0 bad",
        "4 classes, 1 of them",
    ):
        assert words in text
    assert "1 classes have no images: fox" in text
    assert "bad: bee/1.jpg: OSError" in text and "bad: cat/0.jpg: not a JPEG" in text
    found = json.loads((out / "data.json").read_text())
    assert found["train"]["counts"] == {"ant": 5, "bee": 4, "cat": 4, "fox": 0} and found["train"]["num_good"] == 13
    assert found["train"]["most"]["ant"] == 5 and found["train"]["images_per_s"] > 0
    assert found["data"]["path"] == str(folder)
    sheet = np.asarray(Image.open(out / "train.png"))
    assert sheet.shape == (3 * 12 + 2, 3 * 12 + 2, 3) and sheet[2:12, 2:12].std() > 10
    assert sorted(path.name for path in out.iterdir()) == ["data.json", "train.png", "val.png"]


def test_an_interrupted_survey_is_made_by_the_same_command(folder, tmp_path, monkeypatch):
    from mvar_jax.data import survey as module

    survey = module.survey

    def stop(source, transform, split, **options):
        if split == "val":
            raise KeyboardInterrupt
        return survey(source, transform, split, **options)

    command = ["data", *_data(folder), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(module, "survey", stop)
    assert main(command) == 130
    monkeypatch.setattr(module, "survey", survey)
    assert main(command) == 0


def test_channels_that_no_image_has_are_refused(folder, tmp_path, capsys):
    assert main(["data", "--config", "debug", "--config.model.channels=5", "--out", str(tmp_path / "out")]) == 2
    assert "channels must be" in capsys.readouterr().err


def test_data_command_fails_where_training_would_stop(folder, tmp_path, capsys):
    assert main(["data", *_data(folder, share=0.1), "--out", str(tmp_path / "out")]) == 1
    assert "too many bad images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.data.path=none", "data.path must be a folder that holds train/CLASS/, got 'none'"),
        ("--config.data.source=floppy", "data.source must be one of digits"),
        ("--config.data.crop=round", "data.crop must be one of centre, random, resized, got 'round'"),
        ("--config.data.num_workers=-1", "data.num_workers must be a whole number from 0 to 1024, got -1"),
        ("--num_pictures=-1", "--num_pictures must be from 0 to 10000, got -1"),
    ],
)
def test_data_command_refuses_what_it_cannot_walk(folder, tmp_path, capsys, override, words):
    out = tmp_path / "out"
    assert main(["data", *_data(folder), override, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and len(error.splitlines()) == 1
    assert not out.exists()


def test_training_from_a_folder_writes_its_classes_and_what_it_skipped(folder, tmp_path, capsys, monkeypatch):
    """Also without a validation split, and a restart does not undo the limit of bad images."""
    shutil.rmtree(folder / "val")
    (folder / "train/ant/notes.txt").write_text("no image")
    monkeypatch.setattr(transformer_task.jax, "jit", quick_jit)
    save_model(tmp_path / "tokenizer", {"tokenizer": TOKENIZER}, {"tokenizer": seeded_params(TOKENIZER)})
    workdir, run = tmp_path / "workdir", {"num_steps": 3, "batch_size": 8, "optimizer.warmup_steps": 1}
    monkeypatch.setattr(transformer_task.TransformerTask, "pictures", lambda self, state: {})
    arguments = [
        "train",
        *_data(folder),
        "--config.data.val_fraction=0.0",
        *SIZES,
        f"--config.data.tokenizer={tmp_path / 'tokenizer'}",
    ]
    arguments += [f"--config.{name}={value}" for name, value in run.items()]
    arguments += ["--config.model.dtype=float32", "--workdir", str(workdir)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert (
        said.count("there is no evaluation") == 1
        and "1 files of other kinds are ignored: 1 .txt (first: ant/n" in said
    )
    assert json.loads((workdir / "classes.json").read_text()) == ["ant", "bee", "cat"]
    skipped = json.loads((workdir / "skipped_train.json").read_text())
    assert [bad["name"] for bad in skipped["skipped"]] == ["bee/1.jpg", "cat/0.jpg"]
    assert not (workdir / "skipped_val.json").exists()
    assert load_model(workdir)[0]["transformer"].num_classes == 3
    assert main([*arguments, "--config.data.max_bad_share=0.1"]) == 2
    assert "2 bad images, but data.max_bad_share=0.1 allows at most 1 of 15 train" in capsys.readouterr().err
    shutil.copy(folder / "train/ant/0.jpg", folder / "train/ant/new.jpg")
    assert main(arguments) == 2
    assert "which had 15 train images, not 16; name the same data" in capsys.readouterr().err
    shutil.copytree(folder / "train/ant", folder / "train/dog")
    assert main(arguments) == 2
    assert "got 4; different: dog" in capsys.readouterr().err


@pytest.fixture
def numbered(tmp_path):
    """(A tree whose eleven class folders are called by numbers, these names by number)."""
    numbers = tuple(str(i) for i in range(11))
    return write_tree(tmp_path / "numbered", numbers, num_train=1, num_val=1), numbers


def test_a_run_keeps_the_order_of_its_class_folders(numbered, tmp_path, monkeypatch, capsys):
    """A run of version 0.1, which sorted folders called by numbers as text, resumes with its labels and samples."""
    tree, numbers = numbered
    workdir, seen = tmp_path / "run", []
    config = Path("configs/debug.py").read_text().replace("size=40", f"path={str(tree)!r}")
    (tmp_path / "config.py").write_text(config.replace('"synthetic"', '"folder"'))
    arguments = ["train", f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}"]

    def loop_run(task, workdir, settings, config, prepare, **options):
        seen.append((task.data["val"].label_names, config["data"].get("class_order", ())))
        return loop.RunResult(3, None, 0.0)

    monkeypatch.setattr(loop, "run", loop_run)
    assert main(arguments) == 0
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    (workdir / "classes.json").write_text(json.dumps(sorted(numbers)))
    assert main(arguments) == 0
    assert seen == [(numbers, ()), (tuple(sorted(numbers)), tuple(sorted(numbers)))]
    (workdir / "classes.json").write_text(json.dumps([*numbers[:-1], "x"]))
    assert main(arguments) == 2
    assert "got 11; different: 10, x" in capsys.readouterr().err


def test_a_token_cache_keeps_the_order_of_its_class_folders(numbered, tmp_path, monkeypatch):
    tree, numbers = numbered
    save_model(tmp_path / "vae", {"tokenizer": TOKENIZER}, {"tokenizer": seeded_params(TOKENIZER)})
    seen, out = [], tmp_path / "out"
    write = lambda out, path, networks, sources, *rest, **options: seen.append(sources["val"].label_names)
    monkeypatch.setattr(encode, "write_cache", write)
    meta = {"format": 1, "tokenizer_fingerprint": "", "tokenizer_path": "", "sides": [1], "vocab_size": 16}
    meta |= {"dtype": "uint16", "splits": {}, "label_names": sorted(numbers)}
    out.mkdir()
    (out / "cache.json").write_text(json.dumps(meta))
    assert main(["cache_tokens", *_data(tree), "--tokenizer", str(tmp_path / "vae"), "--out", str(out)]) == 0
    assert seen == [tuple(sorted(numbers))]
    (out / "cache.json").unlink()  # an interrupted one
    (out / "unfinished").mkdir()
    (out / "unfinished" / "train-identity.json").write_text(json.dumps(meta))
    assert classes_in(out) == sorted(numbers)


def test_two_processes_write_the_cache_that_one_writes(folder, tmp_path):
    save_model(tmp_path / "vae", {"tokenizer": TOKENIZER}, {"tokenizer": seeded_params(TOKENIZER)})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"

    def start(out, *more):
        command = [sys.executable, "-m", "mvar_jax", "cache_tokens", *_data(folder), "--images_per_shard", "4"]
        command += ["--tokenizer", str(tmp_path / "vae"), "--out", str(tmp_path / out), *more]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    processes = [start("one"), *(start("two", "--distributed", f"{address},2,{i}") for i in range(2))]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-2000:]
    files = lambda folder: (path for path in folder.iterdir() if path.is_file() and path.name != ".lock")
    one, two = ({path.name: path.read_bytes() for path in files(tmp_path / name)} for name in ("one", "two"))
    assert (tmp_path / "two" / "tokenizer" / "model.json").exists()
    assert len(one) == 1 + 4 + 2  # cache.json, shards of 15 and of 6 images
    assert one == two


@pytest.fixture
def own_tokenizer(tmp_path):
    save_model(tmp_path / "tokenizer", {"tokenizer": TOKENIZER}, {"tokenizer": seeded_params(TOKENIZER)})
    return tmp_path / "tokenizer"


def test_encoding_at_another_size_than_the_tokenizer_s_names_the_key(folder, own_tokenizer, tmp_path, capsys):
    command = ["cache_tokens", "--config=configs/folder.py", f"--config.data.path={folder}"]
    assert main([*command, "--tokenizer", str(own_tokenizer), "--out", str(tmp_path / "out")]) == 2
    words = "error: config.data.image_size must be 10 as in the tokenizer, got 256\n"
    assert capsys.readouterr().err == words and not (tmp_path / "out").exists()


def test_config_that_differs_from_the_tokenizer_names_every_key_at_once(folder, own_tokenizer, tmp_path, capsys):
    command = ["train", "--config=configs/folder.py", f"--config.data.path={folder}"]
    command += [f"--config.data.tokenizer={own_tokenizer}", "--workdir", str(tmp_path / "workdir")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "workdir").exists()
    wanted = {"data.image_size": 10, "model.sides": (1, 2, 4, 5), "model.vocab_size": 16, "model.code_width": 4}
    for key, value in wanted.items():
        assert f"config.{key} must be {value} as in the tokenizer, got " in error


def test_encoding_says_the_bytes_of_an_image_s_tokens_and_of_the_files(folder, own_tokenizer, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["cache_tokens", *_data(folder), "--tokenizer", str(own_tokenizer), "--out", str(out)]) == 0
    size = json.loads((out / "cache.json").read_text())["splits"]["train"]["bytes"]
    words = f"train: 13 images, 2 views, {2 * 46 * 2} bytes of tokens an image, {size:,} bytes of files, 2 skipped"
    assert words in capsys.readouterr().out.splitlines()
