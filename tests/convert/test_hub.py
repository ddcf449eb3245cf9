import json
import logging
import sys
import types
from pathlib import Path

import pytest

from mvar_jax.convert.hub import download
from mvar_jax.errors import InputError


def put_hub(monkeypatch, hf_hub_download):
    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_gives_the_local_path_of_the_file(monkeypatch):
    put_hub(monkeypatch, lambda repo_id, filename: f"/cache/{repo_id}/{filename}")
    assert download("some/repo", "mvar.pth") == Path("/cache/some/repo/mvar.pth")


def test_says_what_to_do_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub.*by hand"):
        download("some/repo", "mvar.pth")


@pytest.mark.parametrize("error", [ConnectionError("no route\nto the hub"), ValueError("no such repository")])
def test_says_in_one_line_what_to_do_without_a_network(monkeypatch, caplog, error):
    def fail(repo_id, filename):
        logging.getLogger("huggingface_hub.utils").warning("Retrying")
        raise error

    put_hub(monkeypatch, fail)
    with pytest.raises(InputError) as caught:
        download("some/repo", "mvar.pth")
    assert caught.value.field == "from_hub"
    message = str(caught.value)
    assert "some/repo mvar.pth" in message and "by hand" in message and "\n" not in message
    assert " ".join(str(error).split()) in message
    assert not caplog.records


def test_shards_are_downloaded_with_their_index(tmp_path, monkeypatch):
    weight_map = {"a": "x-00001-of-00002.safetensors", "b": "x-00002-of-00002.safetensors"}
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    asked = []

    def hf_hub_download(repo_id, filename):
        asked.append(filename)
        return str(tmp_path / Path(filename).name)

    put_hub(monkeypatch, hf_hub_download)
    assert download("some/repo", f"d16/{index.name}") == index
    assert asked == [f"d16/{name}" for name in (index.name, *weight_map.values())]
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))
    with pytest.raises(InputError, match="must name files beside it"):
        download("some/repo", index.name)
