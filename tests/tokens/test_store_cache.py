"""Token caches in object stores: the same batches as on a disk, and no more bytes than needed."""

import functools
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from test_token_cache import _change, _contents, _from, _records, _write, _write_dying, _writer

from mvar_jax.data.options import LoadOptions
from mvar_jax.data.pipeline import train_batches
from mvar_jax.errors import InputError, RunError
from mvar_jax.files.paths import as_path
from mvar_jax.files.stores import StorePath
from mvar_jax.tokens import cache_writer, copies, shards
from mvar_jax.tokens.cache_reader import TokenCache
from mvar_jax.tokens.cache_writer import UNFINISHED
from mvar_jax.tokens.requests import Requests

NUM_SHARDS = 4
DEADLINE_S = 60


@pytest.fixture
def folder(store, tmp_path):
    """A new folder of a store."""
    return as_path(f"{store.url}/{tmp_path.parent.name}-{tmp_path.name}")


@pytest.fixture
def local(tmp_path):
    """The cache on the disk, and its records."""
    train, _ = _write(tmp_path / "local", num_shards=NUM_SHARDS)
    return tmp_path / "local", train


def _upload(local, folder):
    for path in sorted(local.iterdir()):  # cache.json first; nobody reads yet
        (folder / path.name).upload(path)
    return folder


@pytest.fixture
def cache(local, folder):
    """The same cache in a store."""
    return _upload(local[0], folder)


@pytest.fixture
def traffic(folder, monkeypatch):
    """What is read from the folder of the store: names of whole objects, and bytes of parts.

    Of this folder alone: what another test has read ahead may still be on its way.
    """
    seen = {"whole": [], "parts": 0}
    download, read_range = StorePath.download, StorePath.read_range

    def count_download(self, file):
        if self.parent == folder:
            seen["whole"].append(self.name)
        return download(self, file)

    def count_range(self, start, size):
        data = read_range(self, start, size)
        if self.parent == folder:
            seen["parts"] += len(data)
        return data

    monkeypatch.setattr(StorePath, "download", count_download)
    monkeypatch.setattr(StorePath, "read_range", count_range)
    return seen


def _wait_until(holds) -> None:
    waiting = threading.Event()
    for _ in range(DEADLINE_S * 20):
        if holds():
            return
        waiting.wait(0.05)
    raise AssertionError("waited too long")


def _shard_bytes(local) -> list[int]:
    splits = json.loads((local / "cache.json").read_text())["splits"]
    return [shard["bytes"] for name in ("val", "train") for shard in splits[name]["shards"]]


def _batches(cache, count=9, **options):
    batches = train_batches(cache, None, batch_size=4, seed=5, options=LoadOptions(**options))
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def _assert_equal(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        for key in ("ids", "label", "index"):
            np.testing.assert_array_equal(batch[key], other[key], strict=True)


@pytest.mark.parametrize("num_copies", [0, 3, 5])
@pytest.mark.parametrize("in_memory", [False, True])
def test_batches_from_a_store_are_those_from_a_disk(local, cache, tmp_path, num_copies, in_memory):
    limit = sum(_shard_bytes(local[0])[:num_copies])
    options = {"max_memory_bytes": 2**20 * in_memory, "max_disk_bytes": limit, "disk_folder": tmp_path / "copies"}
    expected = _batches(TokenCache(local[0], "train"))
    _assert_equal(_batches(TokenCache(cache, "train", **options)), expected)
    assert sum(path.stat().st_size for path in (tmp_path / "copies").glob("*/*.array_record")) <= limit


def test_worker_processes_read_a_cache_of_a_store(local, cache, tmp_path):
    options = {"max_memory_bytes": 0, "disk_folder": tmp_path / "copies"}
    found = _batches(TokenCache(cache, "train", **options), num_workers=2)
    _assert_equal(found, _batches(TokenCache(local[0], "train")))


def test_without_room_on_the_disk_a_batch_reads_its_own_records_alone(local, cache, tmp_path, traffic):
    reader = TokenCache(cache, "train", max_memory_bytes=0, max_disk_bytes=0, disk_folder=tmp_path / "copies")
    reader.read(np.array([10, 0, 3]), 0, None)
    assert traffic == {"whole": [], "parts": 3 * (40 + 2 + 1 + 60)}


def test_copies_are_fetched_once_by_all_readers_and_kept_for_the_next_run(local, cache, tmp_path, traffic):
    options = {"max_memory_bytes": 0, "disk_folder": tmp_path / "copies"}
    readers = [TokenCache(cache, "train", **options) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(functools.partial(_batches, num_threads=0), readers))  # nothing is read ahead
    _wait_until(lambda: len(list((tmp_path / "copies").glob("*/train*.array_record"))) == NUM_SHARDS)
    assert sorted(traffic["whole"]) == [f"train-{i:05d}-of-00004.array_record" for i in range(NUM_SHARDS)]
    before = {"whole": [*traffic["whole"]], "parts": traffic["parts"]}
    _assert_equal(_batches(TokenCache(cache, "train", **options)), _batches(TokenCache(local[0], "train")))
    assert traffic == before
    assert not list((tmp_path / "copies").rglob("*.tmp"))


def test_copies_of_other_caches_make_room_the_least_recently_opened_first(local, cache, tmp_path):
    sizes = _shard_bytes(local[0])
    other = tmp_path / "copies" / "other"
    other.mkdir(parents=True)
    for name, time in (("old", 1), ("older", 0), ("new", 2)):
        (other / f"{name}.array_record").write_bytes(bytes(1000))
        copies.os.utime(other / f"{name}.array_record", (time, time))
    limit = sum(sizes) + 1500
    reader = TokenCache(cache, "train", max_disk_bytes=limit, disk_folder=tmp_path / "copies")
    assert len(reader) == 11
    TokenCache(cache, "val", max_disk_bytes=limit, disk_folder=tmp_path / "copies")
    assert [path.name for path in other.iterdir()] == ["new.array_record"]


def test_cache_with_compressed_records_is_read_whole_or_refused(folder, tmp_path, monkeypatch, traffic):
    monkeypatch.setattr(shards, "WRITE_OPTIONS", "group_size:1")
    local = tmp_path / "local"
    _write(local, num_shards=NUM_SHARDS)
    meta = json.loads((local / "cache.json").read_text())
    for split in meta["splits"].values():
        del split["compressed"]  # as 0.1.0 wrote it
    (local / "cache.json").write_text(json.dumps(meta))
    cache, options = _upload(local, folder), {"max_memory_bytes": 0, "disk_folder": tmp_path / "copies"}
    _assert_equal(_batches(TokenCache(cache, "train", **options)), _batches(TokenCache(local, "train")))
    assert traffic["parts"] == 0
    least = -(-sum(_shard_bytes(local)) // 2**20)
    with pytest.raises(InputError, match=f"cache_disk_mib must be {least} or more for {folder}, got 0.*compressed"):
        TokenCache(cache, "train", max_disk_bytes=0, **options)
    # a cache that says otherwise does not give wrong ids
    for split in meta["splits"].values():
        split["compressed"] = False
    (folder / "cache.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="does not begin a record of 60 bytes"):
        _batches(TokenCache(cache, "train", max_disk_bytes=0, **options))


def test_incomplete_cache_of_a_store_is_refused(cache, tmp_path):
    (cache / "train-00002-of-00004.array_record").unlink()
    with pytest.raises(InputError, match="train-00002-of-00004.array_record is missing"):
        TokenCache(cache, "train", disk_folder=tmp_path)
    (cache / "cache.json").unlink()
    with pytest.raises(InputError, match="finished token cache.*run it again"):
        TokenCache(cache, "train", disk_folder=tmp_path)


def test_damaged_copy_is_named(cache, tmp_path):
    options = {"max_memory_bytes": 0, "disk_folder": tmp_path / "copies"}
    _batches(TokenCache(cache, "train", **options))
    copy = lambda: list((tmp_path / "copies").glob("*/train-00001*.array_record"))
    _wait_until(copy)
    path = copy()[0]
    data = path.read_bytes()
    path.write_bytes(data[:120] + bytes([data[120] ^ 255]) + data[121:])  # inside the first record
    with pytest.raises(InputError, match=f"{path.parent} must be an undamaged token cache"):
        _batches(TokenCache(cache, "train", **options))


@pytest.mark.parametrize("record_bytes", [12, 2724, 65400, 65455, 65472, 65500, 200_001])
def test_place_of_a_record_follows_from_the_format(tmp_path, record_bytes):
    """Reading single records relies on it: every record must be found, also across the headers of blocks."""
    num_records = 80 if record_bytes > 10_000 else 400
    records = [np.random.default_rng(i).bytes(record_bytes) for i in range(num_records)]
    writer = ArrayRecordWriter(str(tmp_path / "shard"), shards.WRITE_OPTIONS)
    for record in records:
        writer.write(record)
    writer.close()
    data = (tmp_path / "shard").read_bytes()
    shard = shards.StoreShard(None, {"name": "shard"}, record_bytes, "cache", None, True)
    begins = shards.chunk_begins(num_records, record_bytes)
    found = [shard._unpack(begin, data[begin:end]) for begin, end in itertools.pairwise(begins)]
    assert found == records


def test_writing_to_a_store_leaves_the_files_of_a_disk(local, folder):
    _write(folder, num_shards=NUM_SHARDS)
    assert {name: (folder / name).read_bytes() for name in folder.find()} == _contents(local[0])


@pytest.mark.parametrize("first_lost", [2, 8])
def test_interrupted_writer_goes_on_with_the_first_missing_shard(local, folder, first_lost):
    _write_dying(folder, first_lost, num_shards=NUM_SHARDS)
    with pytest.raises(InputError, match="interrupted"):
        TokenCache(folder, "train")
    kept = max(bound for bound in (11 * shard // 4 for shard in range(5)) if bound <= first_lost)
    train, val = _records(11), _records(4, num_views=1, seed=1)
    train[:kept] = [None] * kept  # what is finished is not asked for again
    with _writer(folder) as writer:
        options = {"num_images": 11, "num_views": 2, "transform": {"degrees": 5.0}, "num_shards": NUM_SHARDS}
        writer.write_split("train", _from(train), **options)
        writer.write_split("val", _from(val), num_images=4, num_views=1, transform={})
    assert {name: (folder / name).read_bytes() for name in folder.find()} == _contents(local[0])


def test_damaged_shard_of_an_interrupted_writer_is_written_again(local, folder, capsys):
    """Its size is right: only its records tell."""
    _write_dying(folder, first_lost=8, num_shards=NUM_SHARDS)
    damaged = sorted((folder / UNFINISHED).glob("*.array_record"))[1]
    _change(damaged)
    _write(folder, num_shards=NUM_SHARDS)
    assert f"{damaged} is written again" in capsys.readouterr().err
    assert {name: (folder / name).read_bytes() for name in folder.find()} == _contents(local[0])


def test_failing_store_ends_writing_and_the_next_writer_goes_on(local, folder, monkeypatch):
    upload, uploaded = StorePath.upload, []

    def fail_later(self, file):
        if len(uploaded) == 2:
            raise OSError(5, "the store is gone", str(self))
        uploaded.append(self.name)
        upload(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(StorePath, "upload", fail_later)
        with pytest.raises(OSError, match="the store is gone"):
            _write(folder, num_shards=NUM_SHARDS)
    assert not (folder / "cache.json").exists() and (folder / UNFINISHED / uploaded[0]).is_file()
    again = []
    monkeypatch.setattr(StorePath, "upload", lambda self, file: again.append(self.name) or upload(self, file))
    _write(folder, num_shards=NUM_SHARDS)
    assert len(again) == 3 and not set(again) & set(uploaded)
    assert {name: (folder / name).read_bytes() for name in folder.find()} == _contents(local[0])


def test_writer_killed_while_it_puts_the_cache_together_goes_on(local, folder, monkeypatch):
    move, moved = cache_writer.CacheWriter._move, []

    def die_later(self, name):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(name)
        move(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "_NUM_MOVES", 1)
        patch.setattr(cache_writer.CacheWriter, "_move", die_later)
        with pytest.raises(KeyboardInterrupt):
            _write(folder, num_shards=NUM_SHARDS)
    assert not (folder / "cache.json").exists()
    none = lambda begin, end, skipped: pytest.fail("a finished shard is asked for again")
    with _writer(folder) as writer:
        options = {"num_images": 11, "num_views": 2, "transform": {"degrees": 5.0}, "num_shards": NUM_SHARDS}
        writer.write_split("train", none, **options)
        writer.write_split("val", none, num_images=4, num_views=1, transform={})
    assert {name: (folder / name).read_bytes() for name in folder.find()} == _contents(local[0])


def test_failed_request_ends_those_that_wait_and_no_later_one():
    pool, begun, go_on = Requests(1), threading.Event(), threading.Event()

    def fail():
        begun.set()
        go_on.wait(DEADLINE_S)
        raise OSError("gone")

    failed = [pool.submit(fail), pool.submit(int), pool.submit(int)]
    begun.wait(DEADLINE_S)
    go_on.set()
    assert all(isinstance(future.exception(DEADLINE_S), OSError) for future in failed)
    assert pool.submit(int, "7").result(DEADLINE_S) == 7


def test_what_a_killed_fetch_left_is_removed(cache, tmp_path):
    options = {"max_memory_bytes": 0, "disk_folder": tmp_path / "copies"}
    reader = TokenCache(cache, "train", **options)
    (folder,) = (tmp_path / "copies").iterdir()
    (folder / ".train-00001-of-00004.array_record.host-1.tmp").write_bytes(b"half")
    _batches(reader)
    _wait_until(lambda: len(list(folder.glob("train*.array_record"))) == NUM_SHARDS)
    assert not list(folder.glob(".*.tmp"))


def test_two_processes_share_the_work_in_a_store(local, folder):
    barrier = threading.Barrier(2)

    def write(process):
        options = {"process_index": process, "process_count": 2, "wait": lambda: barrier.wait(DEADLINE_S)}
        asked = []

        def read(records, begin, end, skipped):
            asked.append((len(records), begin))
            return records[begin:end]

        train, val = _records(11), _records(4, num_views=1, seed=1)
        with _writer(folder, **options) as writer:
            shape = {"num_views": 2, "transform": {"degrees": 5.0}, "num_shards": NUM_SHARDS}
            writer.write_split("train", functools.partial(read, train), num_images=11, **shape)
            writer.write_split("val", functools.partial(read, val), num_images=4, num_views=1, transform={})
        return asked

    with ThreadPoolExecutor(2) as threads:
        asked = list(threads.map(write, range(2)))
    assert asked == [[(11, 0), (11, 5), (4, 0)], [(11, 2), (11, 8)]]
    assert {name: (folder / name).read_bytes() for name in folder.find()} == _contents(local[0])


def test_store_that_is_gone_is_one_sentence(cache, tmp_path, monkeypatch):
    reader = TokenCache(cache, "train", max_memory_bytes=0, max_disk_bytes=0, disk_folder=tmp_path)

    def fail(self, start, size):
        raise OSError(5, "no answer", str(self))

    monkeypatch.setattr(StorePath, "read_range", fail)
    with pytest.raises(RunError, match=f"token cache {cache} cannot be read: no answer"):
        _batches(reader)
