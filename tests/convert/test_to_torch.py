from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from mvar_jax.checkpoints.model_directory import module_from_dict, save_model
from mvar_jax.convert.reader import open_weights
from mvar_jax.convert.to_torch import to_torch, write_torch
from mvar_jax.convert.weights import convert
from mvar_jax.errors import InputError
from mvar_jax.models.init import abstract_params

TINY = Path(__file__).parent.parent / "golden" / "tiny"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder of vae.pth and mvar.pth, written from the model converted from the published ones."""
    root = tmp_path_factory.mktemp("written")
    convert(TINY / "vae.pth", TINY / "mvar.pth", root / "model")
    assert to_torch(root / "model", root / "torch") == [root / "torch" / "vae.pth", root / "torch" / "mvar.pth"]
    return root / "torch"


def read_all(path):
    with open_weights("checkpoint", path) as file:
        content = file.content.get("mvar_wo_ddp", file.content)
        assert path.name != "mvar.pth" or list(file.content) == ["mvar_wo_ddp"]
        return {name: file.read(tensor) for name, tensor in content.items()}


@pytest.mark.parametrize("name", ["vae", "mvar"])
def test_every_published_tensor_comes_back_bit_for_bit(written, name):
    expected, found = dict(np.load(TINY / f"{name}.npz")), read_all(written / f"{name}.pth")
    if name == "vae":  # code usage is counted anew
        hits = expected["quantize.ema_vocab_hit_SV"]
        expected["quantize.ema_vocab_hit_SV"] = np.zeros_like(hits)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert found[key].tobytes() == value.tobytes(), key


def test_var_baseline_comes_back_with_its_own_mask(tmp_path):
    convert(None, TINY / "var.pth", tmp_path / "model", conditioning="full")
    (path,) = to_torch(tmp_path / "model", tmp_path / "torch")
    assert path.name == "var.pth"
    found, expected = read_all(path), read_all(TINY / "var.pth")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, strict=True)


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("name", ["vae", "mvar"])
def test_torch_loads_what_is_written(written, name, is_mapped):
    torch = pytest.importorskip("torch")
    content = torch.load(written / f"{name}.pth", weights_only=True, mmap=is_mapped)
    expected = read_all(written / f"{name}.pth")
    content = content.get("mvar_wo_ddp", content)
    assert content.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(content[key].numpy(), value, strict=True)


def test_writes_arrays_of_any_order_and_rank(tmp_path):
    arrays = {
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "scalar": np.array(7, np.int64),
        "big_endian": np.arange(3, dtype=">f4").astype(np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    write_torch(tmp_path / "x.pth", {"inner": arrays})
    with open_weights("checkpoint", tmp_path / "x.pth") as file:
        for name, value in arrays.items():
            np.testing.assert_array_equal(file.read(file.content["inner"][name]), value, strict=True)


def save_zeros(folder, kind, fields):
    module = module_from_dict(kind, fields)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), nn.meta.unbox(abstract_params(module)))
    save_model(folder, {kind: module}, {kind: params})


TOKENIZER = {"sides": (1, 2), "vocab_size": 8, "code_width": 4, "ch": 32, "ch_mult": (1,), "num_phi": 1}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ch": 8, "num_groups": None, "group_size": 4}, "num_groups must be 32, .*, got None"),
        ({"channels": 1}, "channels must be 3, .*, got 1"),
        ({"phi_ratio": 0.0}, "phi_ratio must be above 0, .*, got 0.0"),
    ],
)
def test_tokenizer_that_the_published_program_has_no_option_for_is_refused(tmp_path, changed, words):
    save_zeros(tmp_path / "model", "tokenizer", TOKENIZER | changed)
    with pytest.raises(InputError, match=f"^{words}$"):
        to_torch(tmp_path / "model", tmp_path / "torch")
    assert not (tmp_path / "torch").exists()


WINDOW = {"sides": (1, 2, 3), "vocab_size": 8, "code_width": 4, "num_classes": 2, "depth": 1, "width": 8}
WINDOW |= {"num_heads": 1, "refine_step": 1, "kernel_size": (3, 1)}


@pytest.mark.parametrize(
    ("kind", "fields", "held", "options"),
    [
        (
            "tokenizer",
            TOKENIZER | {"znorm": True, "phi_ratio": 0.25},
            "znorm=True, phi_ratio=0.25: pass using_znorm=True, quant_resi=0.25 to VAR's VQVAE",
            "--znorm --phi_ratio 0.25",
        ),
        (
            "transformer",
            WINDOW,
            "kernel_size=(3, 1), refine_step=1: set them in MVAR's program",
            "--kernel_size 3,1 --refine_step 1",
        ),
        ("tokenizer", TOKENIZER, None, None),
        ("transformer", WINDOW | {"conditioning": "full"}, None, None),
    ],
)
def test_what_a_file_cannot_hold_is_said_with_the_options_that_give_it(tmp_path, capsys, kind, fields, held, options):
    save_zeros(tmp_path / "model", kind, fields)
    to_torch(tmp_path / "model", tmp_path / "torch")
    line = f"the {kind}'s file cannot hold {held}, and pass {options} to convert it back\n"
    assert capsys.readouterr().err == (line if held else "")


def test_no_model_or_a_taken_directory_is_refused(tmp_path):
    with pytest.raises(InputError) as caught:
        to_torch(tmp_path / "nowhere", tmp_path / "torch")
    assert caught.value.field == "checkpoint"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").write_text("")
    with pytest.raises(InputError) as caught:
        to_torch(tmp_path / "nowhere", tmp_path)
    assert caught.value.field == "to_torch"
