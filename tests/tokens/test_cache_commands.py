"""cache_tokens into object stores, with real processes and servers, and what a run then finds there."""

import os
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


def test_server_that_is_killed_ends_encoding_in_one_line_and_the_same_command_continues(parts, tmp_path):
    stores.need(("moto", "s3fs", "flask"))
    from moto.server import ThreadedMotoServer

    server = stores.start_s3()
    out = f"{server.url}/killed"
    command = [sys.executable, "-m", "mvar_jax", *_arguments(parts, out), "--images_per_shard=1"]
    environment = os.environ | server.environment
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        stores.forget_connections()
        unfinished = as_path(out) / UNFINISHED
        with subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE) as process:
            try:
                deadline = time.monotonic() + DEADLINE_S
                while len(list(unfinished.glob("*.json"))) < 3:
                    assert time.monotonic() < deadline and process.poll() is None
                    time.sleep(0.01)
                server.stop()
                lines = process.communicate(timeout=DEADLINE_S)[1].splitlines()
            finally:
                process.kill()
        assert process.returncode in (1, 2)
        assert sum(line.startswith("error: ") for line in lines) == 1, lines
        assert not any("Traceback" in line for line in lines), lines
        port = int(server.environment["AWS_ENDPOINT_URL"].rpartition(":")[2])
        again = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        again.start()
        try:
            stores.forget_connections()
            kept = {path.name for path in unfinished.glob("*.array_record")}
            assert kept and not (as_path(out) / "cache.json").exists()
            done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=DEADLINE_S)
            assert done.returncode == 0, done.stderr
            whole = tmp_path / "whole"
            assert main([*_arguments(parts, whole), "--images_per_shard=1"]) == 0
            assert _shards(as_path(out)) == _contents(Path(whole))
        finally:
            again.stop()
            stores.forget_connections()
