"""The table between the names and layouts of published tensors and ours (numpy only)."""

import dataclasses
from collections.abc import Callable, Container, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """The conversion of one published tensor to our layout, and its inverse."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_published: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: its path in our tree, and its published name, or one name per layer if it is stacked."""

    path: tuple[str, ...]
    published: tuple[str, ...]
    layout: Layout
    is_stacked: bool = False


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
ROWS = Layout(lambda x: x[0], lambda x: x[None])
PHI = "quantize.quant_resi."
DEFAULT_NUM_PHI = 4  # of VAR's VQVAE
PHI_KEYS = {"one": "qresi.", "shared": "qresi_ls.{}.", "each": "{}."}
PUBLISHED_BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "quantize.ema_vocab_hit_SV")


def attention_layouts(num_heads: int) -> dict[str, Layout]:
    """Return the layouts with heads: qkv `[3HK, D]` <-> `[D, 3, H, K]`, biases, per-head scale, output projection."""
    H = num_heads
    return {
        "qkv": Layout(lambda x: x.T.reshape(x.shape[1], 3, H, -1), lambda x: x.reshape(x.shape[0], -1).T),
        "bias": Layout(lambda x: x.reshape(H, -1), lambda x: x.reshape(-1)),
        "scale": Layout(lambda x: x.reshape(H), lambda x: x.reshape(1, H, 1, 1)),
        "proj": Layout(lambda x: x.T.reshape(H, -1, x.shape[0]), lambda x: x.reshape(-1, x.shape[-1]).T),
    }


def adaptive_layouts(num_vectors: int) -> tuple[Layout, Layout]:
    """Return the layouts of an adaptive linear: weight `[nD, D]` <-> `[D, n, D]`, bias `[nD]` <-> `[n, D]`."""
    n = num_vectors
    weight = Layout(lambda x: x.T.reshape(x.shape[1], n, -1), lambda x: x.reshape(x.shape[0], -1).T)
    return weight, Layout(lambda x: x.reshape(n, -1), lambda x: x.reshape(-1))


def transformer_entries(depth: int, num_heads: int, shared_aln: bool) -> list[Entry]:
    """List every parameter of the transformer; buffers (masks, levels, the zero k-bias) are derived, not listed."""
    heads, (weight6, bias6), (weight2, bias2) = attention_layouts(num_heads), adaptive_layouts(6), adaptive_layouts(2)

    def one(path: str, published: str, layout: Layout = SAME) -> Entry:
        return Entry(tuple(path.split("/")), (published,), layout)

    def layers(path: str, published: str, layout: Layout = SAME) -> Entry:
        names = tuple(f"blocks.{i}.{published}" for i in range(depth))
        return Entry(("blocks", *path.split("/")), names, layout, is_stacked=True)

    entries = [
        one("class_embed", "class_emb.weight"),
        one("pos_start", "pos_start", ROWS),
        one("pos_embed", "pos_1LC", ROWS),
        one("level_embed", "lvl_embed.weight"),
        one("word_embed/kernel", "word_embed.weight", LINEAR),
        one("word_embed/bias", "word_embed.bias"),
        layers("attention/qkv", "attn.mat_qkv.weight", heads["qkv"]),
        layers("attention/q_bias", "attn.q_bias", heads["bias"]),
        layers("attention/v_bias", "attn.v_bias", heads["bias"]),
        layers("attention/log_scale", "attn.scale_mul_1H11", heads["scale"]),
        layers("attention/proj/kernel", "attn.proj.weight", heads["proj"]),
        layers("attention/proj/bias", "attn.proj.bias"),
        layers("ffn/up/kernel", "ffn.fc1.weight", LINEAR),
        layers("ffn/up/bias", "ffn.fc1.bias"),
        layers("ffn/down/kernel", "ffn.fc2.weight", LINEAR),
        layers("ffn/down/bias", "ffn.fc2.bias"),
        one("head_adaptive/kernel", "head_nm.ada_lin.1.weight", weight2),
        one("head_adaptive/bias", "head_nm.ada_lin.1.bias", bias2),
        one("head/kernel", "head.weight", LINEAR),
        one("head/bias", "head.bias"),
    ]
    if shared_aln:
        offset = Layout(lambda x: x[0, 0], lambda x: x[None, None])
        return entries + [
            one("shared_adaptive/kernel", "shared_ada_lin.1.weight", weight6),
            one("shared_adaptive/bias", "shared_ada_lin.1.bias", bias6),
            layers("adaptive_offset", "ada_gss", offset),
        ]
    return entries + [
        layers("adaptive/kernel", "ada_lin.1.weight", weight6),
        layers("adaptive/bias", "ada_lin.1.bias", bias6),
    ]


def phi_kind_of(num_phi: int, num_scales: int) -> str:
    """Return the key of PHI_KEYS by which VAR's VQVAE names its phi.

    Its option `share_quant_resi` is 1 for one, 0 for one each of the scales, and else their number, by default 4.
    """
    if num_phi == 1:
        return "one"
    return "each" if num_phi == num_scales != DEFAULT_NUM_PHI else "shared"


def find_phi_kind(names: Container[str]) -> str | None:
    """Return the key of PHI_KEYS that a published file uses, None if it has no phi."""
    return next((kind for kind, key in PHI_KEYS.items() if f"{PHI}{key.format(0)}weight" in names), None)


def tokenizer_entries(
    ch_mult: tuple[int, ...], num_res_blocks: int, num_phi: int, num_scales: int, phi_kind: str | None = None
) -> list[Entry]:
    """List every parameter of the tokenizer. phi_kind: a key of PHI_KEYS; None for that of `phi_kind_of`."""
    entries: list[Entry] = []

    def conv(path: str, published: str) -> None:
        root = tuple(path.split("/"))
        entries.append(Entry((*root, "kernel"), (f"{published}.weight",), CONV))
        entries.append(Entry((*root, "bias"), (f"{published}.bias",), SAME))

    def norm(path: str, published: str) -> None:
        root = tuple(path.split("/"))
        entries.append(Entry((*root, "scale"), (f"{published}.weight",), SAME))
        entries.append(Entry((*root, "bias"), (f"{published}.bias",), SAME))

    def residual(path: str, published: str, has_shortcut: bool) -> None:
        for i in (1, 2):
            norm(f"{path}/norm{i}", f"{published}.norm{i}")
            conv(f"{path}/conv{i}", f"{published}.conv{i}")
        if has_shortcut:
            conv(f"{path}/shortcut", f"{published}.nin_shortcut")

    def attention(path: str, published: str) -> None:
        norm(f"{path}/norm", f"{published}.norm")
        conv(f"{path}/qkv", f"{published}.qkv")
        conv(f"{path}/proj", f"{published}.proj_out")

    def levels(side: str, published: str, num_blocks: int, order: list[int], resample: str) -> None:
        last = len(ch_mult) - 1
        incoming = 1 if side == "encoder" else ch_mult[-1]  # widths as multiples of ch
        for level in order:
            for i in range(num_blocks):
                has_shortcut = i == 0 and incoming != ch_mult[level]
                residual(f"{side}/level{level}_block{i}", f"{side}.{published}.{level}.block.{i}", has_shortcut)
                if level == last:
                    attention(f"{side}/level{level}_attention{i}", f"{side}.{published}.{level}.attn.{i}")
            incoming = ch_mult[level]
            if level != order[-1]:
                path = f"{side}/level{level}_{published}"
                conv(path, f"{side}.{published}.{level}.{resample}.conv")

    order = list(range(len(ch_mult)))
    levels("encoder", "down", num_res_blocks, order, "downsample")
    levels("decoder", "up", num_res_blocks + 1, order[::-1], "upsample")
    for side in ("encoder", "decoder"):
        conv(f"{side}/conv_in", f"{side}.conv_in")
        residual(f"{side}/middle_block1", f"{side}.mid.block_1", has_shortcut=False)
        attention(f"{side}/middle_attention", f"{side}.mid.attn_1")
        residual(f"{side}/middle_block2", f"{side}.mid.block_2", has_shortcut=False)
        norm(f"{side}/norm_out", f"{side}.norm_out")
        conv(f"{side}/conv_out", f"{side}.conv_out")
    conv("quant_conv", "quant_conv")
    conv("post_quant_conv", "post_quant_conv")
    kind = phi_kind or phi_kind_of(num_phi, num_scales)
    for i in range(num_phi):
        conv(f"phi_convs_{i}", (PHI + PHI_KEYS[kind].format(i)).rstrip("."))
    entries.append(Entry(("codebook",), ("quantize.embedding.weight",), SAME))
    return entries


def published_shapes(entries: list[Entry], shapes: dict) -> dict[str, tuple[int, ...]]:
    """Return the shape of every published tensor. shapes: the parameter tree, with leaves that have a shape."""
    published = {}
    for entry in entries:
        leaf = shapes
        for key in entry.path:
            leaf = leaf[key]
        nothing = np.broadcast_to(np.float32(0), leaf.shape[1:] if entry.is_stacked else leaf.shape)
        shape = entry.layout.to_published(nothing).shape
        published |= dict.fromkeys(entry.published, shape)
    return published


def to_tree(entries: list[Entry], published: Mapping[str, np.ndarray]) -> dict:
    """Convert a published state dict that holds every entry to our parameter tree."""
    tree: dict = {}
    for entry in entries:
        parts = [np.ascontiguousarray(entry.layout.to_ours(np.asarray(published[name]))) for name in entry.published]
        node = tree
        for key in entry.path[:-1]:
            node = node.setdefault(key, {})
        node[entry.path[-1]] = np.stack(parts) if entry.is_stacked else parts[0]
    return tree


def to_published(entries: list[Entry], tree: dict) -> dict[str, np.ndarray]:
    """Convert a parameter tree to a published state dict (parameters only): the exact inverse of `to_tree`."""
    published = {}
    for entry in entries:
        leaf = tree
        for key in entry.path:
            leaf = leaf[key]
        parts = list(leaf) if entry.is_stacked else [leaf]
        for name, part in zip(entry.published, parts, strict=True):
            published[name] = np.ascontiguousarray(entry.layout.to_published(np.asarray(part)))
    return published
