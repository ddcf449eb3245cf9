"""A run that resumes recognises another token cache, although its records have numbers for names."""

import json

import pytest
from image_files import write_tree
from small_case import TOKENIZER, seeded_params

from mvar_jax.data.options import LoadOptions
from mvar_jax.data.sources import open_source
from mvar_jax.data.transforms import PhotoTransform
from mvar_jax.errors import InputError
from mvar_jax.models.networks import Networks
from mvar_jax.tokens.cache_reader import TokenCache
from mvar_jax.tokens.encode import write_cache
from mvar_jax.training import resume_rules
from mvar_jax.training.resume_rules import check_resumable, keep_identity


@pytest.fixture(scope="module")
def networks():
    return Networks(TOKENIZER, seeded_params(TOKENIZER))


@pytest.fixture
def identity(networks, tmp_path):
    """(folder of images, name of the cache) -> identity of the training split of a new cache."""

    def identity(tree, name="cache", **options):
        sources = {"train": open_source("folder", "train", path=str(tree))}
        options = {"num_views": 2, "seed": 0, "images_per_shard": 4, "loading": LoadOptions(), **options}
        transform = PhotoTransform(TOKENIZER.image_size, flip=True)
        write_cache(tmp_path / name, "tokenizer", networks, sources, transform, {}, **options)
        return TokenCache(tmp_path / name, "train").identity()

    return identity


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """(identity of a cache, of another) -> why a run begun with the first is refused the second, or None."""
    monkeypatch.setattr(resume_rules, "has_checkpoint", lambda workdir: (workdir / "config.json").exists())

    def refusal(before, after) -> str | None:
        keep_identity(tmp_path, {}, {"train": before})
        try:
            check_resumable(tmp_path, {}, {"train": after})
        except InputError as error:
            return str(error)
        return None

    return refusal


def _swap(tree, how):
    first, second = tree / "train/ant/0.jpg", tree / "train/bee/0.jpg"
    if how == "sizes":
        first.write_bytes(first.read_bytes() + b"\0")
    elif how == "names":
        first.rename(first.with_name("00.jpg"))
    else:  # a label
        first.rename(second.with_name("9.jpg"))
        second.rename(first)


@pytest.mark.parametrize("how", ["sizes", "names", "labels"])
def test_a_cache_of_other_images_is_refused(identity, refusal, tmp_path, how):
    before = identity(write_tree(tmp_path / "tree"), "before")
    _swap(tmp_path / "tree", how)
    words = "whose token cache was made of other train images: files had other names, sizes or labels; name the same"
    assert words in refusal(before, identity(tmp_path / "tree", "after"))


def test_the_same_images_at_another_place_resume(identity, refusal, tmp_path):
    one, two = (identity(write_tree(tmp_path / name), name) for name in ("one", "two"))
    assert refusal(one, two) is None


def test_the_same_images_in_another_number_of_shards_resume(identity, refusal, tmp_path):
    tree = write_tree(tmp_path / "tree")
    assert refusal(identity(tree, "four"), identity(tree, "five", images_per_shard=5)) is None


def test_a_cache_or_a_run_of_an_older_version_resumes(identity, refusal, tmp_path):
    now = identity(write_tree(tmp_path / "tree"))
    meta = json.loads((tmp_path / "cache/cache.json").read_text())
    for shard in meta["splits"]["train"]["shards"]:
        del shard["files"]
    (tmp_path / "cache/cache.json").write_text(json.dumps(meta))
    older = TokenCache(tmp_path / "cache", "train").identity()
    assert refusal(older, now) is None
    assert refusal(now, older) is None
