import argparse
import collections
import datetime
from pathlib import Path

import numpy as np
import pytest
import torch_files

from mvar_jax.checkpoints.model_directory import load_model
from mvar_jax.convert.reader import open_weights
from mvar_jax.convert.state_dicts import find_state_dict
from mvar_jax.convert.weights import convert
from mvar_jax.errors import InputError

TINY = Path(__file__).parent.parent / "golden" / "tiny"


def state(value=0.0):
    """A state dict as far as it is looked for: the marker and another tensor, which tells it from others."""
    return {"pos_1LC": np.ones((1, 2, 3), np.float32), "head.bias": np.full(1, value, np.float32)}


def prefixed(prefix, value=0.0):
    return {f"{prefix}{name}": x for name, x in state(value).items()}


def find(tmp_path, content, chosen=None):
    """Return (name, value) of the state dict that is found."""
    torch_files.save(tmp_path / "x.pth", content)
    with open_weights("transformer", tmp_path / "x.pth") as file:
        found = find_state_dict("transformer", file, chosen)
        assert set(found) == set(state())
        return found.name, float(found["head.bias"][0])


def refusal(tmp_path, content, chosen=None):
    with pytest.raises(InputError) as caught:
        find(tmp_path, content, chosen)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "ema", "module", "mvar_wo_ddp", "anything"])
def test_a_state_dict_is_found_in_any_dictionary(tmp_path, wrapper):
    beside = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": np.ones(2, np.float32)}}, "param_groups": [{}]}}
    assert find(tmp_path, beside | {wrapper: state()}) == (wrapper, 0)
    assert find(tmp_path, beside | {"trainer": {wrapper: state()}}) == (f"trainer.{wrapper}", 0)


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("module.", ""),
        ("_orig_mod.", ""),
        ("module._orig_mod.", ""),
        ("_orig_mod.module.module._orig_mod.", ""),
        ("_fsdp_wrapped_module.", ""),
        ("model.", "model"),
        ("module.model._orig_mod.", "model"),
        ("ema.online.", "ema.online"),
    ],
)
def test_prefixes_are_removed(tmp_path, prefix, name):
    assert find(tmp_path, prefixed(prefix)) == (name, 0)
    content = {"state_dict": prefixed(prefix) | ({"loss.weight": np.ones(1, np.float32)} if name else {})}
    assert find(tmp_path, content) == (f"state_dict.{name}".rstrip("."), 0)


def test_wrappers_of_parts_are_removed(tmp_path):
    assert find(tmp_path, {"pos_1LC": state()["pos_1LC"], "head._orig_mod.bias": state(2)["head.bias"]}) == ("", 2)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    assert "one name" in str(refusal(tmp_path, state() | prefixed("module.")))


def test_of_several_one_must_be_chosen(tmp_path):
    content = {"model": state(1), "ema": {"shadow": state(2)}}
    error = refusal(tmp_path, content)
    assert error.field == "weights" and "2 state dicts, model, ema.shadow: choose one by convert --weights" in str(
        error
    )
    assert find(tmp_path, content, "model") == ("model", 1)
    assert find(tmp_path, content, "shadow") == ("ema.shadow", 2)
    assert find(tmp_path, content, "ema.shadow") == ("ema.shadow", 2)
    assert refusal(tmp_path, content, "ema").given == "ema"
    content = prefixed("model.", 1) | prefixed("ema_model.", 2)
    assert "model, ema_model" in str(refusal(tmp_path, content))
    assert find(tmp_path, content, "ema_model") == ("ema_model", 2)


def test_plain_and_published_ones_are_taken_before_others_and_it_is_said(tmp_path, capsys):
    assert find(tmp_path, state(1) | prefixed("ema.", 2)) == ("", 1)
    assert find(tmp_path, state(1) | prefixed("ema.", 2), "ema") == ("ema", 2)
    content = {"trainer": {"ema": state(2), "mvar_wo_ddp": state(1)}}
    assert capsys.readouterr().err.count("--weights chooses another") == 1
    assert find(tmp_path, content) == ("trainer.mvar_wo_ddp", 1)
    assert "the transformer is trainer.mvar_wo_ddp of trainer.ema, trainer.mvar_wo_ddp" in capsys.readouterr().err
    assert find(tmp_path, content, "ema") == ("trainer.ema", 2)


def test_a_choice_that_no_file_has_is_refused(tmp_path):
    with pytest.raises(InputError, match="--weights must name .*mvar_wo_ddp.*'ema'") as caught:
        convert(TINY / "vae.pth", TINY / "mvar.pth", tmp_path / "model", weights="ema")
    assert caught.value.field == "weights" and not (tmp_path / "model").exists()


def test_a_training_checkpoint_full_of_other_things_converts(tmp_path):
    """What people save beside weights: settings as a Namespace, numpy's scalars, paths, dates, optimizer states."""
    weights = torch_files.ModuleState({f"module.{k}": v for k, v in np.load(TINY / "mvar.npz").items()})
    content = {
        "model": weights,
        "args": argparse.Namespace(
            kernel_size=5, refine_step=9, data=Path("/data"), started=datetime.date(2024, 5, 1)
        ),
        "metrics": collections.defaultdict(list, {"fid": [np.float64(3.1), np.int64(2)]}),
        "best": np.float32(3.5),
        "rng": [(3, tuple(range(624)), None)],
        "optimizer": {"state": {i: {"step": i, "exp_avg": np.ones(3, np.float32)} for i in range(5)}},
        (1, 2): {"a tuple": "as key"},
    }
    for save in (torch_files.save, torch_files.save_legacy):
        save(tmp_path / "x.pth", content)
        module = convert(None, tmp_path / "x.pth", tmp_path / save.__name__)["transformer"]
        assert (module.kernel_size, module.refine_step, module.conditioning) == (5, 9, "markov")


@pytest.mark.parametrize("setting", [[7, 7, 5], "9", 7.5])
def test_a_setting_of_another_form_is_refused_not_replaced(tmp_path, setting):
    """The window changes no shape, so nothing later would notice."""
    content = {
        "model": dict(np.load(TINY / "mvar.npz")),
        "args": argparse.Namespace(kernel_size=setting, refine_step=9),
    }
    torch_files.save(tmp_path / "x.pth", content)
    with pytest.raises(InputError, match="give --kernel_size: the file says"):
        convert(None, tmp_path / "x.pth", tmp_path / "model")
    convert(None, tmp_path / "x.pth", tmp_path / "model", kernel_size=5)


def test_prefixes_within_prefixes_are_told_apart(tmp_path):
    """As Lightning saves a module that holds its average: `model.*` and `model.ema.*`."""
    plain = dict(np.load(TINY / "mvar.npz"))
    average = plain | {"class_emb.weight": plain["class_emb.weight"] + 1}
    content = {f"model.{name}": x for name, x in plain.items()}
    content |= {f"model.ema.{name}": x for name, x in average.items()}
    torch_files.save(tmp_path / "x.pth", content)
    tables = []
    for name in ("model", "model.ema"):
        convert(None, tmp_path / "x.pth", tmp_path / name, weights=name, kernel_size=5, refine_step=9)
        tables.append(load_model(tmp_path / name)[1]["transformer"]["class_embed"])
    np.testing.assert_allclose(tables[1], tables[0] + 1, rtol=1e-6)


class Module:
    """A whole object, as `torch.save(model)` writes."""


def test_what_holds_no_state_dict_says_what_to_do(tmp_path):
    for content, words in (
        (Module(), "save its state_dict() instead"),
        ({"vae_local": {"quantize.embedding.weight": np.ones(3, np.float32)}}, "it holds a tokenizer"),
        ({"a": {"b": {"c": {"d": {"e": state()}}}}}, "must hold a transformer's state dict"),
        ([state()], "must hold a transformer's state dict"),
        (state() | {"epoch": 3}, "must hold tensors by name, got 'epoch': int"),
        (state() | {"args": Module()}, "got 'args': test_state_dicts.Module"),
        (state() | {3: np.ones(2, np.float32)}, "got 'int'"),
    ):
        assert words in str(refusal(tmp_path, content))


def test_containers_that_hold_themselves_are_searched_once(tmp_path):
    content = {"model": state()}
    content["again"] = {"itself": content}
    assert find(tmp_path, content) == ("model", 0)
