"""cache_tokens into object stores, with real processes and servers, and what a run then finds there."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import stores
from image_files import write_tree
from small_case import TOKENIZER, seeded_params
from test_encode import _arguments, _contents, _open

from mvar_jax.__main__ import main
from mvar_jax.checkpoints.model_directory import save_model
from mvar_jax.files.paths import as_path
from mvar_jax.tokens.cache_writer import UNFINISHED

DEADLINE_S = 240


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder of images, a tokenizer, and the cache of both on the disk."""
    root = tmp_path_factory.mktemp("store_commands")
    params = seeded_params(TOKENIZER)
    save_model(root / "tokenizer", {"tokenizer": TOKENIZER}, {"tokenizer": params})
    found = SimpleNamespace(whole=write_tree(root / "whole"), tokenizer=root / "tokenizer", params=params)
    found.cache = root / "cache"
    assert main([*_arguments(found, found.cache), "--images_per_shard=2"]) == 0
    return found


def _shards(folder) -> dict[str, bytes]:
    """Contents of the shards and of cache.json."""
    return {name: (folder / name).read_bytes() for name in folder.find() if "/" not in name and name[0] != "."}


def test_cache_in_a_store_is_that_of_a_disk_and_holds_its_tokenizer(parts, store, tmp_path):
    out = as_path(f"{store.url}/{tmp_path.name}")
    assert main([*_arguments(parts, out), "--images_per_shard=2"]) == 0
    assert _shards(out) == _contents(parts.cache)
    networks = _open(cache=str(out), cache_folder=str(tmp_path))
    equal = jax.tree.map(np.array_equal, networks.tokenizer_params, parts.params)
    assert all(jax.tree.leaves(equal))


@pytest.fixture
def own_s3(monkeypatch):
    """An S3 server that the test may stop; the next test connects anew even if this one fails."""
    stores.need(("moto", "s3fs", "flask"))
    server = stores.start_s3()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    stores.forget_connections()
    yield server
    stores.forget_connections()


def test_server_that_is_killed_ends_encoding_in_one_line_and_the_same_command_continues(parts, own_s3, tmp_path):
    from moto.server import ThreadedMotoServer

    out = f"{own_s3.url}/killed"
    command = [sys.executable, "-m", "mvar_jax", *_arguments(parts, out), "--images_per_shard=1"]
    unfinished = as_path(out) / UNFINISHED
    with subprocess.Popen(command, text=True, stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + DEADLINE_S
            while len(list(unfinished.glob("*.json"))) < 3:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)
            own_s3.stop()
            lines = process.communicate(timeout=DEADLINE_S)[1].splitlines()
        finally:
            process.kill()
    assert process.returncode in (1, 2)
    assert sum(line.startswith("error: ") for line in lines) == 1, lines
    assert not any("Traceback" in line for line in lines), lines
    port = int(own_s3.environment["AWS_ENDPOINT_URL"].rpartition(":")[2])
    again = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    again.start()
    try:
        stores.forget_connections()
        kept = {path.name for path in unfinished.glob("*.array_record")}
        assert kept and not (as_path(out) / "cache.json").exists()
        done = subprocess.run(command, text=True, capture_output=True, timeout=DEADLINE_S)
        assert done.returncode == 0, done.stderr
        whole = tmp_path / "whole"
        assert main([*_arguments(parts, whole), "--images_per_shard=1"]) == 0
        assert _shards(as_path(out)) == _contents(Path(whole))
    finally:
        again.stop()
