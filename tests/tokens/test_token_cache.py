import errno
import itertools
import json
import os
import pickle
import resource

import numpy as np
import pytest

from mvar_jax.data.pipeline import epoch_order, eval_batches, train_batches
from mvar_jax.errors import InputError
from mvar_jax.tokens.cache_reader import META_NAME, TokenCache, pick_views
from mvar_jax.tokens.cache_writer import UNFINISHED, CacheWriter
from mvar_jax.tokens.shards import writing_shard

SIDES = (1, 2, 3)
NUM_TOKENS = 14


def _records(num_records, num_views=2, vocab_size=50, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, vocab_size, (num_views, NUM_TOKENS)), i % 3) for i in range(num_records)]


def _writer(path, vocab_size=50, sides=SIDES, **options):
    return CacheWriter(
        path,
        sides=sides,
        vocab_size=vocab_size,
        tokenizer_fingerprint=options.pop("fingerprint", "abc"),
        tokenizer_path="runs/tokenizer",
        label_names=("a", "b", "c"),
        **options,
    )


def _from(records):
    return lambda begin, end, skipped: records[begin:end]


def _write(path, num_shards=1, vocab_size=50, seed=0):
    train, val = _records(11, vocab_size=vocab_size, seed=seed), _records(4, num_views=1, seed=seed + 1)
    with _writer(path, vocab_size) as writer:
        options = {"num_images": 11, "num_views": 2, "transform": {"degrees": 5.0}, "num_shards": num_shards}
        writer.write_split("train", _from(train), **options)
        writer.write_split("val", _from(val), num_images=4, num_views=1, transform={})
    return train, val


def test_a_cache_in_memory_keeps_no_shard_open(tmp_path):
    records = _write(tmp_path / "cache", num_shards=11)[0]
    count = lambda: len(os.listdir("/proc/self/fd"))
    before = count()
    cache = TokenCache(tmp_path / "cache", "train")
    assert count() < before + 11
    _assert_holds(cache, records)
    from_files = TokenCache(tmp_path / "cache", "train", max_memory_bytes=0)
    assert count() >= before + 11
    _assert_holds(pickle.loads(pickle.dumps(from_files)), records)


def _assert_holds(cache, records):
    assert len(cache) == len(records)
    for i, (ids, label) in enumerate(records):
        item = cache[i]
        assert item["ids"].dtype == np.int32 and item["label"] == label
        assert np.array_equal(item["ids"], ids)


@pytest.mark.parametrize("max_memory_bytes", [0, 2**20])
@pytest.mark.parametrize(("num_shards", "vocab_size"), [(1, 50), (3, 65536), (3, 100_000)])
def test_cache_returns_what_was_written(tmp_path, num_shards, vocab_size, max_memory_bytes):
    train, val = _write(tmp_path, num_shards, vocab_size)
    expected = {
        "expect_sides": SIDES,
        "expect_vocab_size": vocab_size,
        "max_memory_bytes": max_memory_bytes,
    }
    cache = TokenCache(tmp_path, "train", **expected)
    _assert_holds(cache, train)
    _assert_holds(TokenCache(tmp_path, "val", **expected), val)
    assert (cache.sides, cache.vocab_size) == (SIDES, vocab_size)
    assert (cache.label_names, cache.num_classes) == (("a", "b", "c"), 3)
    assert cache.tokenizer_path == "runs/tokenizer"
    assert cache.meta["splits"]["train"]["transform"] == {"degrees": 5.0}
    with pytest.raises(IndexError):
        cache[11]


def test_directory_holds_the_named_shards_and_nothing_temporary(tmp_path):
    _write(tmp_path, num_shards=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cache.json",
        "train-00000-of-00002.array_record",
        "train-00001-of-00002.array_record",
        "val-00000-of-00001.array_record",
    ]
    entry = json.loads((tmp_path / META_NAME).read_text())["splits"]["train"]
    assert (entry["num_records"], entry["num_views"]) == (11, 2)
    assert entry["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("train-*"))


class _Killed(BaseException):
    pass


def _dying(records, first_lost):
    """Records that end in an exception when number `first_lost` is due."""

    def read(begin, end, skipped):
        for number in range(begin, end):
            if number == first_lost:
                raise _Killed
            yield records[number]

    return read


def _write_dying(path, first_lost, num_shards=4, train=None, **options):
    train = _records(11) if train is None else train
    with pytest.raises(_Killed), _writer(path, **options) as writer:
        shape = {"num_images": 11, "num_views": 2, "transform": {"degrees": 5.0}, "num_shards": num_shards}
        writer.write_split("train", _dying(train, first_lost), **shape)


def _contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_writing_that_raises_in_its_first_shard_leaves_no_cache_and_no_file(tmp_path):
    _write_dying(tmp_path, first_lost=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="finished token cache"):
        TokenCache(tmp_path, "train")


def test_writing_that_raises_midway_leaves_an_older_cache_as_it_was(tmp_path):
    train, val = _write(tmp_path, num_shards=2)
    _write_dying(tmp_path, first_lost=6, train=_records(11, seed=9))
    _assert_holds(TokenCache(tmp_path, "train"), train)
    _assert_holds(TokenCache(tmp_path, "val"), val)


def test_new_cache_replaces_an_older_one_and_its_shards(tmp_path):
    _write(tmp_path, num_shards=3)
    train, _ = _write(tmp_path, num_shards=1, seed=7)
    _assert_holds(TokenCache(tmp_path, "train"), train)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("first_lost", [2, 5, 8, 10])
def test_killed_writer_goes_on_and_leaves_the_same_files(tmp_path, first_lost):
    _write(tmp_path / "whole", num_shards=4)
    _write_dying(tmp_path / "killed", first_lost)
    with pytest.raises(InputError, match="interrupted"):
        TokenCache(tmp_path / "killed", "train")
    bounds = [11 * shard // 4 for shard in range(5)]
    kept = max(bound for bound in bounds if bound <= first_lost)
    train, val = _records(11), _records(4, num_views=1, seed=1)
    train[:kept] = [None] * kept  # what the killed writer finished is not asked for again
    with _writer(tmp_path / "killed") as writer:
        options = {"num_images": 11, "num_views": 2, "transform": {"degrees": 5.0}, "num_shards": 4}
        writer.write_split("train", _from(train), **options)
        writer.write_split("val", _from(val), num_images=4, num_views=1, transform={})
    assert _contents(tmp_path / "killed") == _contents(tmp_path / "whole")


def test_work_of_an_interrupted_writer_of_another_tokenizer_is_refused_and_kept(tmp_path):
    _write_dying(tmp_path, first_lost=8, train=_records(11, seed=9), fingerprint="other")
    before = _contents(tmp_path / UNFINISHED)
    words = "tokenizer_fingerprint='abc' differs from 'other', used for the shards of an interrupted run in "
    with pytest.raises(InputError, match=f"{words}{tmp_path / UNFINISHED}; choose another --out"):
        _write(tmp_path, num_shards=4)
    assert _contents(tmp_path / UNFINISHED) == before and len(before) == 7


def _cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def _change(path):
    data = bytearray(path.read_bytes())
    data[200:220] = bytes(20)
    path.write_bytes(data)


def _damage_entry(path):
    path.with_name(f"{path.name}.json").write_text('{"shard": {"bytes": 7}}')


@pytest.mark.parametrize("damage", [_cut, _change, _damage_entry])
def test_damaged_shards_of_an_interrupted_writer_are_written_again(tmp_path, damage):
    train, _ = _write(tmp_path / "whole", num_shards=4)
    _write_dying(tmp_path / "killed", first_lost=8)
    kept, damaged = sorted((tmp_path / "killed" / UNFINISHED).glob("*.array_record"))[:2]
    damage(damaged)
    asked = []
    with _writer(tmp_path / "killed") as writer:
        options = {"num_images": 11, "num_views": 2, "transform": {"degrees": 5.0}, "num_shards": 4}
        writer.write_split("train", lambda begin, end, _: (asked.append(begin), train[begin:end])[1], **options)
        writer.write_split("val", _from(_records(4, num_views=1, seed=1)), num_images=4, num_views=1, transform={})
    assert asked == [2, 8], "the damaged shard and the last one, not the good ones"
    assert _contents(tmp_path / "killed") == _contents(tmp_path / "whole")


def test_shard_on_a_full_disk_is_an_os_error_that_names_it(tmp_path):
    """A file may grow to 64 KiB here, and the records are larger together."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with (
            pytest.raises(OSError, match="File too large") as caught,
            writing_shard(tmp_path / "a", tmp_path / "b") as write,
        ):
            for _ in range(100):
                write(bytes(2**16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "b"))


def test_two_processes_leave_the_files_of_one(tmp_path):
    _write(tmp_path / "one", num_shards=3)
    train, val = _records(11), _records(4, num_views=1, seed=1)
    waited = []
    for process in (1, 0):  # the first process puts together what both have written
        options = {"process_index": process, "process_count": 2, "wait": lambda: waited.append(1)}
        # one after the other here: the first must find the identity that process 0 writes
        if process == 1:
            _write_dying(tmp_path / "two", 0, num_shards=3, train=train, process_count=2)
            assert (tmp_path / "two" / UNFINISHED).exists()
        with _writer(tmp_path / "two", **options) as writer:
            shape = {"num_views": 2, "transform": {"degrees": 5.0}, "num_shards": 3}
            writer.write_split("train", _from(train), num_images=11, **shape)
            writer.write_split("val", _from(val), num_images=4, num_views=1, transform={})
    assert _contents(tmp_path / "two") == _contents(tmp_path / "one")
    assert len(waited) == 8


def test_skipped_images_are_listed_and_take_no_record(tmp_path):
    train = _records(11)

    def read(begin, end, skipped):
        for number in range(begin, end):
            if number in (4, 7):
                skipped.append({"number": number, "name": f"{number}.jpg", "reason": "cut short"})
            else:
                yield train[number]

    with _writer(tmp_path) as writer:
        writer.write_split("train", read, num_images=11, num_views=2, transform={}, num_shards=2)
        assert [bad["number"] for bad in writer.skipped()["train"]] == [4, 7]
    _assert_holds(TokenCache(tmp_path, "train"), [train[i] for i in range(11) if i not in (4, 7)])
    entry = json.loads((tmp_path / META_NAME).read_text())["splits"]["train"]
    assert entry["num_records"] == 9 and [bad["name"] for bad in entry["skipped"]] == ["4.jpg", "7.jpg"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([(np.full((2, NUM_TOKENS), 50), 0)], "ids must be from 0 to 49, got 50 to 50"),
        ([(np.full((2, NUM_TOKENS), -1), 0)], "ids must be .* got -1 to -1"),
        ([(np.zeros((2, NUM_TOKENS + 1), int), 0)], r"ids must be integers \[2, 14\].*got int64\[2, 15\]"),
        ([(np.zeros(NUM_TOKENS, int), 0)], r"ids must be .*got int64\[14\]"),
        ([(np.zeros((2, NUM_TOKENS)), 0)], "ids must be integers.*got float64"),
        ([*_records(1), *_records(1, num_views=3)], r"ids must be integers \[2, 14\].*got int64\[3, 14\]"),
        ([(np.zeros((2, NUM_TOKENS), int), 3)], "label must be a class from 0 to 2, got 3"),
        (_records(2), "num_images 3 must be the sum of 2 records"),
    ],
)
def test_writer_refuses_records(tmp_path, records, message):
    with pytest.raises(InputError, match=message), _writer(tmp_path) as writer:
        writer.write_split("train", _from(records), num_images=3, num_views=2, transform={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expect_sides": (1, 2, 4)}, r"sides \(1, 2, 3\), not \(1, 2, 4\)"),
        ({"expect_vocab_size": 64}, "vocab_size 50, not 64"),
        ({"split": "test"}, "split must be one of train, val.*'test'"),
    ],
)
def test_cache_of_another_tokenizer_or_split_is_refused_with_both_values(tmp_path, options, message):
    _write(tmp_path)
    with pytest.raises(InputError, match=message):
        TokenCache(tmp_path, **{"split": "train", **options})


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1, "splits": {}}', '{"format": 2}'])
def test_damaged_meta_is_refused(tmp_path, content):
    _write(tmp_path)
    (tmp_path / META_NAME).write_text(content)
    with pytest.raises(InputError, match="finished token cache"):
        TokenCache(tmp_path, "train")


def test_missing_and_cut_shards_are_refused(tmp_path):
    _write(tmp_path, num_shards=2)
    shard = tmp_path / "train-00001-of-00002.array_record"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(InputError, match=f"bytes of {shard.name} {len(data) - 100}, not {len(data)}"):
        TokenCache(tmp_path, "train")
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name} is missing"):
        TokenCache(tmp_path, "train")


@pytest.mark.parametrize("max_memory_bytes", [0, 2**20])
def test_damaged_bytes_are_refused(tmp_path, max_memory_bytes):
    _write(tmp_path)
    shard = tmp_path / "train-00000-of-00001.array_record"
    data = bytearray(shard.read_bytes())
    start = np.flatnonzero(np.frombuffer(bytes(data), np.uint8))[200]
    data[start : start + 40] = bytes(byte ^ 255 for byte in data[start : start + 40])
    shard.write_bytes(bytes(data))
    with pytest.raises(InputError, match="an undamaged token cache.*a record is damaged"):
        cache = TokenCache(tmp_path, "train", max_memory_bytes=max_memory_bytes)
        [cache[i] for i in range(11)]


def test_wrong_record_counts_are_refused(tmp_path):
    _write(tmp_path)
    meta = json.loads((tmp_path / META_NAME).read_text())
    entry = meta["splits"]["train"]
    entry["num_records"] = 12
    (tmp_path / META_NAME).write_text(json.dumps(meta))
    with pytest.raises(InputError, match="num_records 12, not 11"):
        TokenCache(tmp_path, "train")
    entry["shards"][0]["num_records"] = 12
    (tmp_path / META_NAME).write_text(json.dumps(meta))
    with pytest.raises(InputError, match="records of train-.* 11, not 12"):
        TokenCache(tmp_path, "train")
    entry["num_records"] = entry["shards"][0]["num_records"] = 11
    entry["num_views"] = 3
    (tmp_path / META_NAME).write_text(json.dumps(meta))
    with pytest.raises(InputError, match="bytes of a record"):
        TokenCache(tmp_path, "train")


def test_training_from_a_cache_draws_each_view_of_the_right_image(tmp_path):
    train, _ = _write(tmp_path)
    batches = train_batches(TokenCache(tmp_path, "train"), None, batch_size=11, seed=0)
    views_seen = set()
    for _ in range(10):
        batch = next(batches)
        for row, label in zip(batch["ids"], batch["label"], strict=True):
            matches = [
                (i, view) for i, (ids, _) in enumerate(train) for view in range(2) if np.array_equal(ids[view], row)
            ]
            assert len(matches) == 1 and train[matches[0][0]][1] == label
            views_seen.update(matches)
    batches.close()
    assert len(views_seen) == 22


def _philox(seed, index):
    return np.random.Generator(np.random.Philox(key=[seed, index]))


@pytest.mark.parametrize("max_memory_bytes", [0, 2**20])
def test_batches_read_at_once_are_those_read_row_by_row(tmp_path, max_memory_bytes):
    train, _ = _write(tmp_path, num_shards=3)
    cache = TokenCache(tmp_path, "train", max_memory_bytes=max_memory_bytes)
    batches = list(itertools.islice(train_batches(cache, None, batch_size=4, seed=5), 12))  # four epochs
    for row, index in enumerate(range(48)):
        batch, row = batches[row // 4], row % 4
        number = epoch_order(11, 5, index // 11)[index % 11]
        ids, label = train[number]
        assert np.array_equal(batch["ids"][row], ids[_philox(5, index).integers(2)])
        assert (batch["label"][row], batch["index"][row]) == (label, index)
    assert {name: x.dtype.name for name, x in batch.items()} == {"ids": "int32", "label": "int32", "index": "int64"}


def test_evaluation_reads_every_first_view_once_in_order(tmp_path):
    train, _ = _write(tmp_path)
    batches = list(eval_batches(TokenCache(tmp_path, "train"), None, batch_size=4))
    assert np.concatenate([batch["mask"] for batch in batches]).tolist() == [1.0] * 11 + [0.0]
    ids = np.concatenate([batch["ids"] for batch in batches])[:11]
    np.testing.assert_array_equal(ids, [views[0] for views, _ in train])


@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_view_of_each_row_is_drawn_by_numpy_s_generator_for_its_index(num_views):
    ids_BvL = np.arange(50 * num_views * 4).reshape(50, num_views, 4)
    index_B = np.arange(50) + 10**6
    expected = [
        ids[_philox(7, index).integers(num_views)] for ids, index in zip(ids_BvL, index_B.tolist(), strict=True)
    ]
    assert np.array_equal(pick_views(ids_BvL, 7, index_B), expected)
    assert np.array_equal(pick_views(ids_BvL, 7, None), ids_BvL[:, 0])


def test_cache_can_be_sent_to_another_process(tmp_path):
    train, _ = _write(tmp_path, num_shards=2)
    cache = TokenCache(tmp_path, "train", max_memory_bytes=0)
    _assert_holds(pickle.loads(pickle.dumps(cache)), train)
