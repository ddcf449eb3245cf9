"""From images to a token cache: what it holds, that a killed run goes on, and that training cannot tell."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import quick_jit
from image_files import write_tree
from small_case import MODEL, TOKENIZER, seeded_params

from mvar_jax import build
from mvar_jax.__main__ import main
from mvar_jax.checkpoints.model_directory import module_to_dict, save_model
from mvar_jax.cli.configuration import read_config
from mvar_jax.cli.train import notes_on
from mvar_jax.data.pipeline import LoadOptions, train_batches
from mvar_jax.data.sources import ArraySource, open_source
from mvar_jax.data.transforms import PhotoTransform
from mvar_jax.errors import InputError
from mvar_jax.models.networks import Networks, apply_tokenizer
from mvar_jax.ops.pixels import from_levels
from mvar_jax.tokens.cache_reader import TokenCache
from mvar_jax.tokens.cache_writer import UNFINISHED
from mvar_jax.tokens.encode import Encoder, encode_range, write_cache
from mvar_jax.tokens.opening import open_tokens
from mvar_jax.training.transformer_task import with_input

FLIPS = PhotoTransform(TOKENIZER.image_size, flip=True)
encode = jax.jit(with_input)
SMALL = {**module_to_dict(MODEL), "num_classes": 0}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder of images, of which train/bee/1.jpg is cut short, and a tokenizer."""
    root = tmp_path_factory.mktemp("encode")
    tree, whole = write_tree(root / "tree"), write_tree(root / "whole")
    (tree / "train/bee/1.jpg").write_bytes((tree / "train/bee/1.jpg").read_bytes()[:-100])
    params = seeded_params(TOKENIZER)
    save_model(root / "tokenizer", {"tokenizer": TOKENIZER}, {"tokenizer": params})
    networks = Networks(TOKENIZER, params)
    return SimpleNamespace(root=root, tree=tree, whole=whole, tokenizer=root / "tokenizer", networks=networks)


def _write(parts, out, tree, source_of=lambda source: source, **options):
    sources = {split: source_of(open_source("folder", split, path=str(tree))) for split in ("train", "val")}
    options = {"num_views": 2, "seed": 0, "batch_size": 8, "images_per_shard": 4, **options}
    options.setdefault("loading", LoadOptions(max_bad_share=0.1))
    description, networks = options.pop("description", {}), options.pop("networks", parts.networks)
    write_cache(out, parts.tokenizer, networks, sources, FLIPS, description, **options)
    return sources


@pytest.fixture(scope="module")
def cache(parts):
    """The cache of the whole folder."""
    _write(parts, parts.root / "cache", parts.whole)
    return parts.root / "cache"


def _contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file() and file.name != ".lock"}


def test_cache_holds_both_flips_and_skips_and_lists_what_is_bad(parts, tmp_path):
    sources = _write(parts, tmp_path, parts.tree)
    train, val = (TokenCache(tmp_path, split) for split in ("train", "val"))
    good = [i for i in range(15) if sources["train"].name_of(i) != "bee/1.jpg"]
    assert len(train) == len(good) == 14 and len(val) == 6
    for record, number in enumerate(good):
        item = sources["train"][number]
        straight = FLIPS(item["image"])
        pair = np.stack([straight, straight[:, ::-1]])
        # the shape that is compiled already
        expected = apply_tokenizer(parts.networks, jnp.asarray(from_levels(np.concatenate([pair] * 4))), "encode")[:2]
        assert np.array_equal(train[record]["ids"], expected) and train[record]["label"] == item["label"]
    assert val[0]["ids"].shape == (1, sum(side**2 for side in TOKENIZER.sides))
    entry = json.loads((tmp_path / "cache.json").read_text())["splits"]["train"]
    assert [(bad["number"], bad["name"]) for bad in entry["skipped"]] == [(6, "bee/1.jpg")]
    assert "truncated" in entry["skipped"][0]["reason"] and len(entry["shards"]) == 4


class _Killed(BaseException):
    pass


class _Dying:
    """A source that kills the process that reads its item 9."""

    def __init__(self, source):
        self._source = source

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if index == 9:
            raise _Killed
        return self._source[index]


def test_killed_encoding_goes_on_and_leaves_the_same_files(parts, cache, tmp_path):
    with pytest.raises(_Killed):
        _write(parts, tmp_path, parts.whole, _Dying)
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / UNFINISHED).glob("*.array_record")}
    assert shards
    with pytest.raises(InputError, match="interrupted"):
        TokenCache(tmp_path, "train")
    _write(parts, tmp_path, parts.whole)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in shards} == shards  # kept, not made again
    assert _contents(tmp_path) == _contents(cache)


@pytest.mark.parametrize("name", ["train-00001-of-00004.array_record", "tokenizer/model.json"])
def test_finished_cache_that_lacks_a_file_is_written_again(parts, cache, tmp_path, capsys, name):
    shutil.copytree(cache, tmp_path / "cut")
    path = tmp_path / "cut" / name
    path.unlink() if "json" in name else path.write_bytes(path.read_bytes()[:-1])
    _write(parts, tmp_path / "cut", parts.whole)
    assert f"cut is written again: {name} is missing or was cut" in capsys.readouterr().err
    assert _contents(tmp_path / "cut") == _contents(cache) and path.is_file()


def test_too_many_bad_images_end_encoding_also_when_they_are_spread_over_two_runs(parts, tmp_path):
    words = "1 bad images, .*at most 0 of 15 train.*bee/1.jpg.*truncated"
    with pytest.raises(InputError, match=words):
        _write(parts, tmp_path, parts.tree, loading=LoadOptions(max_bad_share=0.05))
    tree = tmp_path / "tree"
    shutil.copytree(parts.tree, tree)
    (tree / "train/cat/4.jpg").write_bytes(b"")
    with pytest.raises(_Killed):
        _write(parts, tmp_path / "out", tree, _Dying)
    with pytest.raises(InputError, match="2 bad images, .*at most 1 of 15 train"):
        _write(parts, tmp_path / "out", tree)
    assert not (tmp_path / "out/cache.json").exists()


def _change(tree, how):
    """Change a copy of the folder of images; return what the data are then."""
    if how == "class":
        shutil.copytree(tree / "train/ant", tree / "train/fox")
    elif how == "image":
        shutil.copy(tree / "train/ant/0.jpg", tree / "train/bee/new.jpg")
    elif how == "name":
        os.rename(tree / "train/bee/3.jpg", tree / "train/bee/3.jpeg")
    elif how == "size":
        (tree / "val/cat/1.jpg").write_bytes((tree / "val/cat/0.jpg").read_bytes() + b"\0")
    elif how == "val":
        shutil.rmtree(tree / "val")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("class", r"of 15 train images in 3 classes, but the data has 20 in 4 \(new: fox\)"),
        ("image", "of 15 train images in 3 classes, but the data has 16 in 3"),
        (
            "name",
            "of other train images: between bee/2.jpg and cat/0.jpg files have other names, sizes or labels now",
        ),
        ("size", "of other val images: between bee/1.jpg and cat/1.jpg files have other names, sizes or labels now"),
        ("val", "of 15 train images in 3 classes, but the data has 12 in 3"),
    ],
)
def test_cache_of_images_that_have_changed_is_refused_with_what_changed(parts, cache, tmp_path, how, message):
    shutil.copytree(parts.whole, tmp_path / "tree")
    _write(parts, cache, tmp_path / "tree")  # the same images at another place
    _change(tmp_path / "tree", how)
    with pytest.raises(InputError) as error:
        _write(parts, cache, tmp_path / "tree")
    words = f"--out {cache} holds a token cache {message}: use another folder or delete it"
    assert re.fullmatch(words, str(error.value)) and len(str(error.value)) < 300


def test_finished_cache_is_the_same_by_any_spelling_of_its_folder_and_names_other_options(parts, cache, tmp_path):
    options = {"path": f"{parts.whole}", "image_size": 10, "crop": "centre"}
    _write(parts, tmp_path, parts.whole, description=options)
    meta = json.loads((tmp_path / "cache.json").read_text())
    for knows_files in (True, False):
        if not knows_files:  # as an older version wrote it
            for entry in meta["splits"].values():
                for shard in entry["shards"]:
                    del shard["files"]
            (tmp_path / "cache.json").write_text(json.dumps(meta))
            assert len(TokenCache(tmp_path, "train")) == 15
        for path in (f"{parts.whole}/", os.path.relpath(parts.whole), f"{parts.whole}/../whole"):
            _write(parts, tmp_path, parts.whole, description=options | {"path": path, "val_fraction": 0.2})
        with pytest.raises(
            InputError, match="made with data.crop='centre', but it is 'random' now: use another folder"
        ):
            _write(parts, tmp_path, parts.whole, description=options | {"crop": "random"})
        with pytest.raises(InputError, match="made with config.seed=0, but it is 1 now"):
            _write(parts, tmp_path, parts.whole, description=options, seed=1)
    with pytest.raises(InputError, match="made with data.path='.*whole', but it is '.*tree' now"):
        _write(parts, tmp_path, parts.whole, description=options | {"path": str(parts.tree)})
    other = parts.networks.replace(tokenizer_params=seeded_params(TOKENIZER, seed=1))
    with pytest.raises(InputError, match=r"of another tokenizer \(\w{32}, not \w{32}\): use another folder"):
        _write(parts, tmp_path, parts.whole, description=options, networks=other)


def test_unfinished_shards_of_files_that_have_changed_are_made_again(parts, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(parts.tree, tree)  # bee/1.jpg, number 6, is cut short
    with pytest.raises(_Killed):
        _write(parts, tmp_path / "out", tree, _Dying)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / UNFINISHED).glob("*.array_record")}
    assert len(kept) == 2
    shutil.copy(parts.whole / "train/bee/1.jpg", tree / "train/bee/1.jpg")
    _write(parts, tmp_path / "out", tree)
    is_same = [(tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in sorted(kept.items())]
    assert is_same == [True, False] and len(TokenCache(tmp_path / "out", "train")) == 15


def test_a_batch_larger_than_the_data_is_as_large_as_they_are(parts, cache, tmp_path):
    _write(parts, tmp_path / "out", parts.whole, batch_size=10**12)
    assert _contents(tmp_path / "out") == _contents(cache)


def test_encoding_holds_a_batch_or_two_of_decoded_images_whatever_the_threads(parts):
    """Each image kept costs its views' pixels: 12.6 MB at 1024 px with both flips."""
    num_images, batch_size, num_threads = 160, 8, 2
    alive: set[int] = set()
    most, lock = 0, threading.Lock()

    class View(np.ndarray):
        pass

    class Counting:
        def view(self, image, view, rng):
            nonlocal most
            pixels = image.view(View)
            with lock:
                alive.add(key := id(pixels))
                most = max(most, len(alive))
            weakref.finalize(pixels, alive.discard, key)
            return pixels

    images = np.zeros((num_images, TOKENIZER.image_size, TOKENIZER.image_size, 3), np.uint8)
    source = ArraySource(images, np.zeros(num_images, int), ("one",))
    encoder = Encoder(parts.networks, batch_size)
    options = {"num_views": 2, "seed": 0, "num_threads": num_threads, "skip": lambda *bad: pytest.fail(str(bad))}
    records = encode_range(encoder, source, Counting(), 0, num_images, **options)
    for _ in itertools.islice(records, 40):
        time.sleep(0.01)  # a slow device: the threads get ahead as far as they may
    records.close()
    # waiting, being collected, and for each thread an image in work and one that nobody has taken
    assert batch_size < most <= 2 * batch_size + 2 * num_threads * 2


@pytest.mark.parametrize("seed", [0, 5])
def test_training_batches_from_images_and_from_the_cache_are_identical(parts, cache, seed):
    source = open_source("folder", "train", path=str(parts.whole))
    images = train_batches(source, FLIPS, batch_size=8, seed=seed)
    tokens = train_batches(TokenCache(cache, "train"), None, batch_size=8, seed=seed)
    for batch, expected in itertools.islice(zip(images, tokens, strict=True), 6):
        found = encode(parts.networks, {**batch, "index": batch["index"].astype(np.uint32)})
        assert set(found) == {"ids", "label", "index", "previous"}
        for name in ("ids", "label", "index"):
            assert np.array_equal(found[name], expected[name]), name
    images.close()
    tokens.close()


def _config(**data):
    config = read_config("folder", [])
    config["model"] = SMALL | {"dtype": "float32"}
    config["optimizer"] |= {"warmup_steps": 1, "ema_decay": 0.0}
    config |= {"num_steps": 3, "batch_size": 8, "log_every_steps": 1}
    config["data"] |= {"image_size": TOKENIZER.image_size, **data}
    return config


def test_training_steps_from_images_and_from_the_cache_are_bit_equal(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "jit", quick_jit)  # what is compared is the data's way into the step
    found = []
    _write_by_command(parts, tmp_path / "cache")
    for data in ({"cache": str(tmp_path / "cache")}, {"path": str(parts.whole), "tokenizer": str(parts.tokenizer)}):
        task, modules, _ = build.build_task(_config(**data))
        assert modules["transformer"].num_classes == 3
        state, batches = task.init_state(), task.batches(0)
        state, metrics = task.train_step(state, next(batches), 0)
        batches.close()
        found.append((jax.device_get(metrics), jax.device_get(state.params)))
    equal = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), *found)
    assert all(jax.tree.leaves(equal))
    assert np.isclose(task.evaluate(state)["loss"], np.log(16), atol=0.1)


def test_the_tokenizer_of_a_run_computes_in_its_precision(parts):
    config, tasks = _config(path=str(parts.whole), tokenizer=str(parts.tokenizer)), []
    for precision in ("standard", "exact"):
        tasks.append(build.build_task({**config, "model": {**config["model"], "precision": precision}})[0])
    assert [task.tokenizer.tokenizer.precision for task in tasks] == ["standard", "exact"]
    assert tasks[0].data_identity == tasks[1].data_identity, "the same ids but for rounding"


def _arguments(parts, out):
    model = {**SMALL, "dtype": "float32"}
    sizes = [f"--config.model.{name}={model[name]}" for name in ("vocab_size", "code_width", "dtype")]
    data = [f"--config.data.path={parts.whole}", f"--config.data.image_size={TOKENIZER.image_size}"]
    return [
        "cache_tokens",
        "--config=configs/folder.py",
        *sizes,
        *data,
        f"--tokenizer={parts.tokenizer}",
        f"--out={out}",
        "--batch_size=6",
    ]


def _write_by_command(parts, out):
    assert main(_arguments(parts, out)) == 0


def test_encoding_on_two_devices_leaves_the_files_of_one(parts, tmp_path):
    _write_by_command(parts, tmp_path / "one")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, "-m", "mvar_jax", *_arguments(parts, tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "train: 15 images, 2 views" in done.stdout
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "config.data must name a token cache or a tokenizer"),
        ({"cache": "a", "tokenizer": "b"}, "a must be a finished token cache"),
        ({"tokenizer": "none"}, "none"),
    ],
)
def test_transformer_without_cache_and_tokenizer_is_refused(data, message):
    with pytest.raises(InputError, match=message):
        build.build_task(_config(**data))


@pytest.fixture(scope="module")
def moved(parts, tmp_path_factory):
    """A cache far from where it was made, by a tokenizer that is gone."""
    root = tmp_path_factory.mktemp("moved")
    shutil.copytree(parts.tokenizer, root / "gone")
    _write_by_command(SimpleNamespace(**vars(parts) | {"tokenizer": root / "gone"}), root / "made")
    shutil.rmtree(root / "gone")
    (root / "made").rename(root / "cache")
    return root / "cache"


def _older(cache, folder, tokenizer):
    """The cache as 0.1.0 wrote it: without a tokenizer of its own."""
    shutil.copytree(cache, folder)
    shutil.rmtree(folder / "tokenizer")
    meta = json.loads((folder / "cache.json").read_text())
    del meta["tokenizer"]
    (folder / "cache.json").write_text(json.dumps(meta | {"tokenizer_path": str(tokenizer)}))
    return folder


def _open(**data):
    networks, sources, transform = open_tokens(build.build_data(_config(**data)), MODEL)
    assert transform is None and len(sources["train"]) == 15
    return networks


def test_cache_works_where_it_was_copied_to(parts, moved):
    networks = _open(cache=str(moved))
    equal = jax.tree.map(np.array_equal, networks.tokenizer_params, parts.networks.tokenizer_params)
    assert all(jax.tree.leaves(equal)) and networks.tokenizer == TOKENIZER


def test_tokenizer_beside_a_cache_is_taken_if_it_made_the_cache(parts, moved, tmp_path):
    gone = _older(moved, tmp_path / "older", tmp_path / "gone")
    beside = _older(moved, tmp_path / "beside", parts.tokenizer)
    given = {"tokenizer": str(parts.tokenizer)}
    for cache, more in ((moved, given), (gone, given), (beside, {})):
        assert _open(cache=str(cache), **more).tokenizer == TOKENIZER


def test_other_tokenizer_than_the_cache_s_is_refused_with_the_reason(parts, moved, tmp_path):
    params = seeded_params(TOKENIZER, seed=1)
    save_model(tmp_path / "other", {"tokenizer": TOKENIZER}, {"tokenizer": params})
    other = str(tmp_path / "other")
    with pytest.raises(
        InputError, match=f"data.tokenizer={other} is not the tokenizer that made token cache {moved}"
    ):
        _open(cache=str(moved), tokenizer=other)
    older = _older(moved, tmp_path / "older", other)
    with pytest.raises(InputError, match=f"{other} has changed since it made .*, perhaps by more training"):
        _open(cache=str(older))
    gone = _older(moved, tmp_path / "lonely", tmp_path / "gone")
    with pytest.raises(InputError, match="lonely cannot be read: .*gone.*; pass config.data.tokenizer=DIR"):
        _open(cache=str(gone))
    shutil.copytree(moved, tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed/tokenizer")
    shutil.copytree(other, tmp_path / "mixed/tokenizer")
    with pytest.raises(InputError, match="mixed holds another tokenizer than the one that made it"):
        _open(cache=str(tmp_path / "mixed"))


def test_data_without_a_validation_split_train_without_evaluation(parts, tmp_path):
    shutil.copytree(parts.whole / "train", tmp_path / "tree/train")
    images = {"path": str(tmp_path / "tree"), "tokenizer": str(parts.tokenizer), "val_fraction": 0.0}
    sources = build.build_data(_config(**images)).open_all()
    options = {"num_views": 2, "seed": 0, "batch_size": 8}
    write_cache(tmp_path / "cache", parts.tokenizer, parts.networks, sources, FLIPS, {}, **options)
    meta = json.loads((tmp_path / "cache/cache.json").read_text())
    fingerprint = build.build_task(_config(**images))[0].data_identity["tokenizer"]
    (tmp_path / "cache/cache.json").write_text(json.dumps(meta | {"tokenizer_fingerprint": fingerprint}))
    for data in (images, {"cache": str(tmp_path / "cache")}):
        task = build.build_task(_config(**data))[0]
        assert task.data.keys() == {"train"} and len(task.data["train"]) == 15
        assert not task.has_evaluation and task.evaluate(None) == {}
        assert notes_on(task) == ["there is no evaluation: the data have no validation split"]


def test_number_of_classes_that_the_data_do_not_have_is_refused(parts):
    config = _config(path=str(parts.whole), tokenizer=str(parts.tokenizer))
    config["model"]["num_classes"] = 4
    with pytest.raises(InputError, match="config.model.num_classes must be 3, the number of classes of .*, got 4"):
        build.build_task(config)


def test_ids_of_a_batch_that_has_them_are_left_alone(parts):
    batch = {"ids": jnp.zeros((2, sum(side**2 for side in TOKENIZER.sides)), jnp.int32), "label": jnp.zeros(2)}
    assert with_input(parts.networks, batch)["ids"] is batch["ids"]
