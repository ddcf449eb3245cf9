"""Comparison of the published PyTorch program (a checkout of CVL-UESTC/MVAR) with ours on the same weights."""

import argparse
import contextlib
import functools
import importlib.util
import os
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.comparison import Table, channels_first, load_published_files, teacher_forced
from mvar_jax.convert.reader import open_weights
from mvar_jax.convert.sizes import MASK
from mvar_jax.convert.state_dicts import find_state_dict
from mvar_jax.errors import InputError
from mvar_jax.models.networks import Networks, apply_tokenizer
from mvar_jax.models.tokenizer import Tokenizer
from mvar_jax.models.transformer import Transformer, previous_of
from mvar_jax.ops.resize import resize_area
from mvar_jax.ops.window.geometry import window_mask
from mvar_jax.sampling.sampler import SampleOptions
from mvar_jax.scales import WINDOW


def stub_natten(torch) -> types.ModuleType:
    """Return a module `natten` whose na2d is dense attention with the mask of the clamped windows."""

    @functools.cache
    def mask_of(height: int, width: int, kernel_size: int, device):
        return torch.from_numpy(window_mask(height, width, kernel_size)).to(device)

    def na2d(query, key, value, kernel_size, dilation=1, scale=None):
        if dilation != 1:
            raise ValueError(f"dilation must be 1 in this substitute for natten, got {dilation}")
        B, Y, X, H, K = query.shape
        # under autocast, normalised queries and keys are float32 and values bfloat16
        flat = [x.to(value.dtype).reshape(B, Y * X, H, K).transpose(1, 2) for x in (query, key, value)]
        mask = mask_of(Y, X, kernel_size, query.device)
        y = torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=mask, scale=scale)
        return y.transpose(1, 2).reshape(B, Y, X, H, K)

    module = types.ModuleType("natten")
    module.na2d = na2d
    return module


def import_published(folder: Path, on_cpu: bool = True):
    """Return (torch, VQVAE, MVAR, notes). Raises InputError if the program or one of its libraries is missing.

    on_cpu: hide a GPU, which the program would use if it sees one and on which it rounds to TF32.
    """
    if not (folder / "models" / "mvar.py").is_file():
        message = f"--published={folder} must be a checkout of CVL-UESTC/MVAR with models/mvar.py"
        raise InputError(message, field="published", given=str(folder), expected="a checkout of CVL-UESTC/MVAR")
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    notes = []
    try:
        import torch

        if importlib.util.find_spec("natten") is None:
            sys.modules["natten"] = stub_natten(torch)
            notes.append("natten is not installed: masked dense attention replaces its windows")
        sys.path.insert(0, str(folder.resolve()))
        from models.mvar import MVAR
        from models.vqvae import VQVAE
    except ImportError as error:
        message = f"--published={folder} cannot be imported ({error}); install torch and the program's requirements"
        raise InputError(message, field="published", given=str(folder), expected="torch installed") from None
    return torch, VQVAE, MVAR, notes


def read_state(torch, kind: str, path: Path) -> dict:
    """Read a state dict with torch, from the place in the file where our converter finds it."""
    with open_weights(kind, path) as file:
        name = find_state_dict(kind, file).name
    content = torch.load(path, map_location="cpu", weights_only=True)
    for key in filter(None, name.split(".")):
        content = content[key]
    return content


def make_published(folder: Path, tokenizer: Tokenizer, ours: Transformer, on_cpu: bool = True):
    """Return (torch, tokenizer, transformer, notes): the published modules with our sizes and their own init."""
    torch, VQVAE, MVAR, notes = import_published(folder, on_cpu)
    with contextlib.redirect_stdout(sys.stderr):
        vae = VQVAE(
            vocab_size=tokenizer.vocab_size,
            z_channels=tokenizer.code_width,
            ch=tokenizer.ch,
            share_quant_resi=0 if tokenizer.num_phi == len(tokenizer.sides) else tokenizer.num_phi,
            v_patch_nums=tokenizer.sides,
        )
        mvar = MVAR(
            vae_local=vae,
            num_classes=ours.num_classes,
            depth=ours.depth,
            embed_dim=ours.width,
            num_heads=ours.num_heads,
            shared_aln=ours.shared_aln,
            cond_drop_rate=0.0,  # otherwise it drops labels in evaluation too
            attn_l2_norm=True,
            patch_nums=ours.sides,
            kernel_size=ours.kernel_size,
            refine_step=ours.refine_step,
        )
    return torch, vae.eval(), mvar.eval(), notes


def build_published(folder: Path, paths: dict[str, Path], model):
    """Return the same as `make_published`, with published weights."""
    torch, vae, mvar, notes = make_published(folder, model.tokenizer, model.transformer)
    vae.load_state_dict(read_state(torch, "tokenizer", paths["tokenizer"]))
    state = dict(read_state(torch, "transformer", paths["transformer"]))
    if MASK in state and not torch.equal(state[MASK], mvar.attn_bias_for_masking):
        notes.append("the file's attention mask is not MVAR's (fine-tuned from VAR?): MVAR's own is used")
    state[MASK] = mvar.attn_bias_for_masking
    mvar.load_state_dict(state)
    return torch, vae, mvar, notes


def run_published(torch, vae, mvar, images_BYX3, labels_B, phases, cfg: float) -> dict:
    """Return the arrays that the published program computes, NHWC, and `seconds` of each part."""
    result, seconds = {}, {}
    images = torch.from_numpy(channels_first(images_BYX3).copy())
    labels = torch.from_numpy(labels_B).long()
    drawn = []
    with torch.no_grad():
        with stopwatch(seconds, "encode"):
            result["f"] = vae.quant_conv(vae.encoder(images))
            ids = vae.img_to_idxBl(images)
        previous = vae.quantize.idxBl_to_mvar_input(ids)
        with stopwatch(seconds, "teacher-forced passes"):
            result["logits"] = [
                mvar(
                    label_B=labels,
                    x_BlCv_wo_first_l=previous_of(previous, phase, mvar.first_l),
                    L_bg=phase.begin,
                    L_ed=phase.end,
                    using_nattn=phase.attention == WINDOW,
                )
                for phase in phases
            ]
        hook = vae.quantize.embedding.register_forward_hook(lambda module, args, output: drawn.append(args[0]))
        with stopwatch(seconds, "sample"):
            f_hat = mvar.autoregressive_infer(B=len(labels), label_B=labels, g_seed=0, cfg=cfg, top_k=1)
        hook.remove()
        with stopwatch(seconds, "decode"):
            result["pixels"] = vae.fhat_to_img(f_hat)
    result |= {"previous": previous, "ids": torch.cat(ids, 1), "f_hat": f_hat, "drawn": torch.cat(drawn, 1)}
    arrays = {name: x.numpy() for name, x in result.items() if name != "logits"}
    arrays |= {name: arrays[name].transpose(0, 2, 3, 1) for name in ("f", "f_hat", "pixels")}
    return arrays | {"logits": [x.numpy() for x in result["logits"]], "seconds": seconds}


@contextlib.contextmanager
def stopwatch(seconds: dict[str, float], name: str):
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin


def run_ours(model, images_BYX3, labels_B, published: dict, cfg: float) -> dict:
    """Return the same from our model; logits are computed from the published ids, so that ids that differ affect
    no other row."""
    result, seconds = {}, {}
    options = SampleOptions(cfg, top_k=1)
    networks, ids = model.networks, jnp.asarray(published["ids"], jnp.int32)
    with stopwatch(seconds, "encode"):
        f, result["ids"] = jax.block_until_ready(encode(networks, images_BYX3))
    previous = apply_tokenizer(networks, ids, "teacher_forcing")
    with stopwatch(seconds, "teacher-forced passes"):
        logits = jax.block_until_ready(teacher_forced(networks, previous, labels_B))
    with stopwatch(seconds, "sample"):
        drawn, f_hat = jax.block_until_ready(model.sample_features(labels_B, 0, options))
    with stopwatch(seconds, "decode"):
        pixels = jax.block_until_ready(model.decode_features(f_hat))
    result |= {"f": f, "previous": previous, "logits": logits, "drawn": drawn, "f_hat": f_hat, "pixels": pixels}
    return result | {"decoded": model.decode_features(published["f_hat"]), "seconds": seconds}


@jax.jit
def encode(networks: Networks, images_BYX3):
    """Return (f, ids)."""
    both = lambda module, images: (module.features(images), module.encode(images))
    return networks.apply_tokenizer(images_BYX3, method=both)


def code_excess(model, f_BYXc, ids_BL) -> np.ndarray:
    """Return how much farther each code is from its residual than the nearest code, `[B, L]`; 0 if it is the nearest.

    The residual is that of our f after the coarser of these ids.
    """
    f_hats = apply_tokenizer(model.networks, jnp.asarray(ids_BL, jnp.int32), "f_hats")
    rests = [f_BYXc, *(f_BYXc - f_hat for f_hat in f_hats[:-1])]
    pooled = [resize_area(rest, side) for rest, side in zip(rests, model.tokenizer.sides, strict=True)]
    x_BLc = np.concatenate([x.reshape(len(ids_BL), -1, x.shape[-1]) for x in pooled], axis=1).astype(np.float64)
    codebook = np.asarray(model.tokenizer_params["codebook"], np.float64)
    squares_BLV = (codebook**2).sum(-1) - 2 * x_BLc @ codebook.T
    return np.take_along_axis(squares_BLV, ids_BL[..., None], -1)[..., 0] - squares_BLV.min(-1)


def compare_published(args: argparse.Namespace) -> Table:
    """Run both programs on published weights, random images and labels; print seconds, return the differences."""
    folder = Path(args.published)
    defaults = {"tokenizer": "vae_ch160v4096z32.pth", "transformer": "mvar-d16.pth"}
    paths = {kind: Path(getattr(args, kind) or folder / name) for kind, name in defaults.items()}
    for kind, path in paths.items():
        if not path.is_file():
            message = f"--{kind}={path} does not exist; give the file of the published {kind}"
            raise InputError(message, field=kind, given=str(path), expected="a file of published weights")
    jax.config.update("jax_platforms", "cpu")
    model = load_published_files(paths["tokenizer"], paths["transformer"], conditioning="markov")
    torch, vae, mvar, notes = build_published(folder, paths, model)
    rng, size = np.random.default_rng(args.seed), model.tokenizer.image_size
    images = rng.uniform(-1, 1, (args.num_images, size, size, 3)).astype(np.float32)
    labels = rng.integers(0, model.num_classes, args.num_images).astype(np.int32)
    theirs = run_published(torch, vae, mvar, images, labels, model.transformer.phases(), args.cfg)
    first = run_ours(model, images, labels, theirs, args.cfg)["seconds"]
    ours = run_ours(model, images, labels, theirs, args.cfg)

    table, pair = Table(has_magnitude=True), lambda name: (ours[name], theirs[name])
    table.add("encoder f", "f", pair("f"))
    excess = code_excess(model, ours["f"], theirs["ids"])
    table.add("their codes' squared distance above the nearest", "near tie", (excess, np.zeros_like(excess)))
    # one near tie at a coarse scale changes the residuals of finer ones, so the number of ids is not a criterion
    num_different = int(np.sum(np.asarray(ours["ids"]) != theirs["ids"]))
    table.rows.append((f"ids that differ (of {excess.size})", f"{num_different}", "near ties", table.rows[-1][-1]))
    table.add("teacher-forcing input of their ids", "teacher-forcing input", pair("previous"))
    for i, logits in enumerate(theirs["logits"]):
        table.add(f"phase {i} logits of their ids", "logits", (ours["logits"][i], logits))
    table.add(f"greedy cfg {args.cfg} ids (of {theirs['drawn'].size} that differ)", "ids", pair("drawn"))
    table.add(f"greedy cfg {args.cfg} f_hat", "f_hat", pair("f_hat"))
    table.add(f"greedy cfg {args.cfg} pixels", "images", pair("pixels"))
    table.add("pixels of their f_hat", "images", (ours["decoded"], theirs["pixels"]))

    for note in notes:
        print(f"note: {note}")
    print(f"{args.num_images} images, seed {args.seed}, float32 on a CPU; seconds: published, ours (first call)")
    for name, value in theirs["seconds"].items():
        print(f"  {name}: {value:.2f}, {ours['seconds'][name]:.2f} ({first[name]:.2f})")
    return table
