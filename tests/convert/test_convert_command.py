import argparse
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch_files

from mvar_jax.cli import convert as command
from mvar_jax.errors import InputError

TINY = Path(__file__).parent.parent / "golden" / "tiny"


def run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def refuse(*arguments):
    with pytest.raises(InputError) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    return caught.value


def test_converts_there_and_back(tmp_path, capsys):
    files = ["--tokenizer", TINY / "vae.pth", "--transformer", TINY / "mvar.pth"]
    options = ["--patch_nums", "1,2,3,4,5,6,8,10,13,16", "--kernel_size", "5", "--refine_step", "9"]
    assert run(*files, "--out", tmp_path / "model", *options, "--conditioning", "markov") == 0
    fields = json.loads((tmp_path / "model" / "model.json").read_text())["transformer"]
    assert (fields["kernel_size"], fields["refine_step"], fields["conditioning"]) == (5, 9, "markov")
    assert run("--checkpoint", tmp_path / "model", "--to_torch", tmp_path / "torch") == 0
    assert sorted(path.name for path in (tmp_path / "torch").iterdir()) == ["mvar.pth", "vae.pth"]
    assert str(tmp_path / "model") in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "torch"]


def test_converts_to_safetensors_and_back(tmp_path, capsys):
    run("--transformer", TINY / "mvar.pth", "--out", tmp_path / "model")
    assert run("--checkpoint", tmp_path / "model", "--to_safetensors", tmp_path / "safe", "--shard_mib", "1") == 0
    index = tmp_path / "safe" / "mvar.safetensors.index.json"
    assert f"wrote {index}" in capsys.readouterr().out
    run("--transformer", index, "--out", tmp_path / "again")
    first, second = ((tmp_path / name / "model.json").read_text() for name in ("model", "again"))
    assert first == second


def test_one_of_several_state_dicts_is_chosen(tmp_path):
    state = dict(np.load(TINY / "mvar.npz"))
    torch_files.save(tmp_path / "x.pth", {"model": state, "ema": dict(state)})
    error = refuse("--transformer", tmp_path / "x.pth", "--out", tmp_path / "out")
    assert error.field == "weights" and not (tmp_path / "out").exists()
    run("--transformer", tmp_path / "x.pth", "--out", tmp_path / "out", "--weights", "ema")


def test_one_window_for_each_scale(tmp_path):
    run("--transformer", TINY / "mvar.pth", "--out", tmp_path / "model", "--kernel_size", "5,7")
    assert json.loads((tmp_path / "model" / "model.json").read_text())["transformer"]["kernel_size"] == [5, 7]


def test_options_that_a_tokenizer_s_file_cannot_hold_go_there_and_back(tmp_path, capsys):
    options = ["--patch_nums", "1,2,3,4,5,6,8,10,13,16", "--znorm", "--phi_ratio", "0.25"]
    run("--tokenizer", TINY / "vae.pth", "--out", tmp_path / "model", *options)
    run("--checkpoint", tmp_path / "model", "--to_torch", tmp_path / "torch")
    assert " ".join(options[2:]) in capsys.readouterr().err
    run("--tokenizer", tmp_path / "torch" / "vae.pth", "--out", tmp_path / "again", *options)
    first, second = (json.loads((tmp_path / name / "model.json").read_text()) for name in ("model", "again"))
    assert first == second and (first["tokenizer"]["znorm"], first["tokenizer"]["phi_ratio"]) == (True, 0.25)


def test_every_misfit_is_printed_above_the_error(tmp_path, capsys):
    state = dict(np.load(TINY / "mvar.npz"))
    missing = [name for name in state if ".ffn." in name]
    torch_files.save(tmp_path / "x.pth", {"mvar_wo_ddp": {k: v for k, v in state.items() if k not in missing}})
    message = str(refuse("--transformer", tmp_path / "x.pth", "--out", tmp_path / "model"))
    printed = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in printed] and {line.split()[0] for line in printed} == set(missing)
    assert f"{len(missing)} do not fit" in message and f"{len(missing) - 3} more" in message


def test_files_come_from_the_hub_by_name(tmp_path, monkeypatch):
    asked = []

    def hf_hub_download(repo_id, filename):
        asked.append((repo_id, filename))
        return str(TINY / filename)

    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    run("--from_hub", "some/repo", "--transformer", "mvar.pth", "--out", tmp_path / "one")
    files = ["--tokenizer", "vae.pth", "--transformer", "mvar.pth"]
    run("--from_hub", "first/repo", "second/repo", *files, "--out", tmp_path / "two")
    assert asked == [("some/repo", "mvar.pth"), ("first/repo", "vae.pth"), ("second/repo", "mvar.pth")]
    assert {path.name for path in (tmp_path / "two").iterdir()} >= {"tokenizer", "transformer", "model.json"}


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ([], "out"),
        (["--tokenizer", "vae.pth"], "out"),
        (["--out", "OUT"], "tokenizer"),
        (["--out", "OUT", "--from_hub", "a/b"], "tokenizer"),
        (["--out", "OUT", "--from_hub", "a/b", "c/d", "e/f", "--tokenizer", "x"], "from_hub"),
        (["--out", "OUT", "--tokenizer", "x", "--patch_nums", "1,2,x"], "patch_nums"),
        (["--out", "OUT", "--tokenizer", "x", "--patch_nums", ""], "patch_nums"),
        (["--out", "OUT", "--tokenizer", "x", "--refine_step", "1,2"], "refine_step"),
        (["--out", "OUT", "--tokenizer", "x", "--kernel_size", "7.5"], "kernel_size"),
        (["--out", "OUT", "--tokenizer", "missing.pth"], "tokenizer"),
        (["--out", "OUT", "--tokenizer", "x", "--phi_ratio", "half"], "phi_ratio"),
        (["--out", "OUT", "--transformer", "x", "--znorm"], "znorm"),
        (["--checkpoint", "x", "--to_torch", "OUT", "--znorm"], "znorm"),
        (["--checkpoint", "x"], "to_torch"),
        (["--to_torch", "OUT"], "checkpoint"),
        (["--checkpoint", "x", "--to_torch", "OUT"], "checkpoint"),
        (["--checkpoint", "x", "--to_torch", "OUT", "--kernel_size", "7"], "kernel_size"),
        (["--checkpoint", "x", "--to_torch", "OUT", "--out", "OUT"], "out"),
        (["--checkpoint", "x", "--to_torch", "OUT", "--weights", "ema"], "weights"),
        (["--checkpoint", "x", "--to_torch", "OUT", "--to_safetensors", "OUT"], "to_safetensors"),
        (["--checkpoint", "x", "--to_torch", "OUT", "--shard_mib", "1"], "shard_mib"),
        (["--checkpoint", "x", "--to_safetensors", "OUT", "--shard_mib", "x"], "shard_mib"),
        (["--checkpoint", "x", "--to_safetensors", "OUT", "--shard_mib", "0"], "shard_mib"),
        (["--shard_mib", "1", "--tokenizer", "x", "--out", "OUT"], "to_torch"),
        (["--to_safetensors", "OUT"], "checkpoint"),
    ],
)
def test_refusals_name_the_option(tmp_path, arguments, field):
    arguments = [tmp_path / "out" if argument == "OUT" else argument for argument in arguments]
    error = refuse(*arguments)
    assert error.field == field and field in str(error)
    assert list(tmp_path.iterdir()) == []
