"""Compiling for other machines; those whose compiler is not installed are skipped, with the reason printed."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from mvar_jax.errors import InputError
from mvar_jax.hardware.compiling import compile_for, devices_of
from mvar_jax.hardware.machines import platform_of
from mvar_jax.hardware.work import work_of
from mvar_jax.ops import draw_gpu
from mvar_jax.ops.block_diagonal import Segments, block_diagonal_attention
from mvar_jax.ops.platform import current_platform
from mvar_jax.ops.triton_attention import attend_raw
from mvar_jax.ops.window import local_window_attention, pallas_tpu
from mvar_jax.ops.window.pallas_gpu import Window
from mvar_jax.planning.figures import _kernel_flops
from mvar_jax.scales import Pyramid
from mvar_jax.sharding import make_mesh, spec_of, use_mesh

# as it is compiled for use: tests/conftest.py spares LLVM's work, and registers then spill
FAIL_ON_SPILLS = {"xla_backend_optimization_level": 3, "xla_gpu_fail_ptx_compilation_on_register_spilling": True}
CARDS = ("h100", "a100-80", "rtx4090", "b200", "rtx5090")  # compute capabilities 9.0, 8.0, 8.9, 10.0 and 12.0
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


def devices_or_skip(target: str):
    try:
        return devices_of(target)
    except InputError as error:
        pytest.skip(f"no compiler for {target}: {error.expected}")


def qkv_like(side: int, batch: int, dtype="bfloat16", num_heads: int = 16, head_width: int = 64):
    return [jax.ShapeDtypeStruct((batch, side, side, num_heads, head_width), jnp.dtype(dtype))] * 4


def forward_and_backward(backend, window, q, k, v, cotangent):
    out, pull_back = jax.vjp(lambda *qkv: local_window_attention(*qkv, window, backend=backend), q, k, v)
    return out, *pull_back(cotangent)


def test_memory_and_work_of_a_program_for_the_devices_here():
    a = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    b = jax.ShapeDtypeStruct((32, 16), jnp.float32)
    compiled = compile_for("here", lambda a, b: a @ b, a, b)
    assert compiled.argument_bytes == 4 * (64 * 32 + 32 * 16)
    assert compiled.output_bytes == 4 * 64 * 16
    assert compiled.flops == 2 * 64 * 32 * 16
    assert compiled.total_bytes >= compiled.argument_bytes + compiled.output_bytes
    assert "dot" in compiled.text or "fusion" in compiled.text


def test_a_donated_argument_is_counted_once():
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    kept, donated = (compile_for("here", lambda x: x + 1, x, donate=donate) for donate in ((), (0,)))
    assert kept.total_bytes - donated.total_bytes == donated.alias_bytes == 4096


@pytest.mark.parametrize(
    ("target", "expected"),
    [("h1000", "h100:8"), ("h100:eight", "h100:2x8"), ("v5e:4x", "v5e:4x4"), ("h100:0", "h100:8")],
)
def test_an_unknown_target_is_refused_with_what_would_do(target, expected):
    with pytest.raises(InputError, match=f"^target must be .*{expected}.*, got '{target}'$"):
        compile_for(target, lambda x: x, jax.ShapeDtypeStruct((), jnp.float32))


def test_platforms_of_targets():
    assert [platform_of(target) for target in ("h100:8", "v5e:4x4", "here")] == ["gpu", "tpu", current_platform()]


@pytest.mark.deviceless
@pytest.mark.parametrize(
    ("side", "card"),
    # backward on 64 x 64 spills on a B200; the shape stays, since it is the fastest that was measured on Hopper
    [(side, card) for side in (16, 32, 64) for card in CARDS if (side, card) != (64, "b200")],
)
def test_triton_kernels_compile_in_twice_the_output_and_without_spills(side, card):
    devices_or_skip(card)
    qkv = qkv_like(side, 64)
    forward = lambda q, k, v, _: local_window_attention(q, k, v, 7)
    output_bytes = 2 * 64 * side**2 * 16 * 64
    for program in (forward, functools.partial(forward_and_backward, "pallas_gpu", 7)):
        compiled = compile_for(card, program, *qkv, options=FAIL_ON_SPILLS)
        assert "attention_forward" in compiled.text
        assert compiled.temp_bytes <= 2 * output_bytes


@pytest.mark.deviceless
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
    ("side", "dtype", "head_width"),
    [
        (13, "bfloat16", 24),
        (13, "bfloat16", 64),
        (13, "bfloat16", 128),
        (13, "float32", 64),
        (13, "float32", 128),
        (16, "float32", 64),
    ],
)
def test_triton_kernels_have_no_spills_for_other_maps_and_heads(side, dtype, head_width, card):
    devices_or_skip(card)
    program = functools.partial(forward_and_backward, "pallas_gpu", 5)
    compiled = compile_for(card, program, *qkv_like(side, 2, dtype, 2, head_width), options=FAIL_ON_SPILLS)
    assert "attention_backward" in compiled.text


@pytest.mark.deviceless
@pytest.mark.parametrize("card", CARDS)
def test_attention_within_scales_compiles_to_triton_kernels_without_spills(card):
    areas = (1, 4, 9, 16, 25, 36, 64, 100)
    devices_or_skip(card)
    x = jax.ShapeDtypeStruct((2, sum(areas), 2, 64), jnp.bfloat16)

    def program(q, k, v, cotangent):
        out, pull_back = jax.vjp(lambda q, k, v: block_diagonal_attention(q, k, v, areas), q, k, v)
        return out, pull_back(cotangent)

    text = compile_for(card, program, x, x, x, x, options=FAIL_ON_SPILLS).text
    assert "attention_forward" in text
    assert "attention_backward" in text


@pytest.mark.deviceless
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
    ("rule", "dtype", "head_width"),
    [
        (Segments((1, 4, 9, 16, 25, 36, 64, 100)), "bfloat16", 64),
        (Segments((1, 4, 9, 16, 25, 36, 64, 100)), "float16", 128),
        (Window(13, 13, 7, 7), "bfloat16", 24),
        (Window(13, 13, 7, 7), "bfloat16", 64),
        (Window(13, 13, 7, 7), "bfloat16", 96),
        (Window(13, 13, 7, 7), "float32", 64),
    ],
    ids=lambda value: type(value).__name__.lower() if isinstance(value, (Segments, Window)) else str(value),
)
def test_kernels_of_a_raw_product_have_no_spills_and_no_copies_and_their_products_are_counted(
    rule, dtype, head_width, card
):
    """2 products forward, 7 backward; no temporary is as large as a third of the product."""
    devices_or_skip(card)
    B, N, H, K = 2, rule.num_tokens, 2, head_width
    like = lambda *shape, of=dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(of))
    parameters = like(H, K, of="float32"), like(H, K, of="float32"), like(H, of="float32")

    def program(qkv, q_bias, v_bias, scale, cotangent):
        out, pull_back = jax.vjp(functools.partial(attend_raw, rule), qkv, q_bias, v_bias, scale)
        return out, pull_back(cotangent)

    operands = like(B, N, 3, H, K), *parameters, like(B, N, H, K)
    compiled = compile_for(card, program, *operands, options=FAIL_ON_SPILLS)
    assert compiled.temp_bytes < B * N * H * K * jnp.dtype(dtype).itemsize
    sides, first_window = ((1, 2, 3, 4, 5, 6, 8, 10), 8) if isinstance(rule, Segments) else ((1, 13), 1)
    task = SimpleNamespace(transformer=SimpleNamespace(pyramid=Pyramid(sides, first_window, 7)))
    work, _ = work_of(compiled.text, (0,), functools.partial(_kernel_flops, task))
    pairs = sum(area**2 for area in rule.lengths) if isinstance(rule, Segments) else 13**2 * 7**2
    assert sum(one.times * one.flops for one in work) == 9 * 2 * pairs * B * H * K


def logits_and_keys(batch: int, num_codes: int):
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    return jax.ShapeDtypeStruct((batch, 256, num_codes), jnp.float32), keys


@pytest.mark.deviceless
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(("num_codes", "smooth"), [(4096, None), (draw_gpu.MAX_CODES, (3, 10))])
def test_draw_kernel_compiles_without_spills_or_arrays_of_logits(num_codes, smooth, card):
    devices_or_skip(card)
    draw = functools.partial(draw_gpu.draw_filtered, draw_gpu.Kernel(1200, 0.99, smooth=smooth))
    compiled = compile_for(card, draw, *logits_and_keys(8, num_codes), options=FAIL_ON_SPILLS)
    assert "draw_row" in compiled.text
    assert compiled.temp_bytes <= 4096


@pytest.mark.deviceless
def test_draws_of_a_sharded_batch_need_no_communication():
    mesh = make_mesh(data=4, fsdp=2, devices=list(devices_or_skip("h100:8")))
    draw = functools.partial(draw_gpu.draw_filtered, draw_gpu.Kernel(1200, 0.99))
    with use_mesh(mesh):
        sharding = NamedSharding(mesh, spec_of(("batch",)))
        text = compile_for("h100:8", draw, *logits_and_keys(16, 64), shardings=sharding).text
    assert "draw_row" in text
    assert not any(word in text for word in COLLECTIVES)


@pytest.mark.deviceless
@pytest.mark.parametrize(("side", "dtype"), [(16, "float32"), (64, "bfloat16")])
def test_splash_kernels_compile_for_a_tpu_and_their_products_are_counted(side, dtype):
    """2 products forward; backward those 2 again, 3 for the gradient of q and 4 for those of k and v."""
    devices_or_skip("v5e")
    program = functools.partial(forward_and_backward, "pallas_tpu", 7)
    text = compile_for("v5e", program, *qkv_like(side, 2, dtype)).text
    task = SimpleNamespace(transformer=SimpleNamespace(pyramid=Pyramid((1, side), 1, 7)))
    work, _ = work_of(text, (0,), functools.partial(_kernel_flops, task))
    assert sum(one.times * one.flops for one in work) == 11 * 2 * 49 * side**2 * 2 * 16 * 64


CASES = [("h100:8", "pallas_gpu"), ("h100:8", "tiled"), ("v5e:2x4", "band"), ("v5e:2x4", "pallas_tpu")]


@pytest.mark.deviceless
@pytest.mark.parametrize(("target", "backend"), CASES)
def test_sharded_batch_and_heads_need_no_communication(target, backend):
    mesh = make_mesh(data=4, tensor=2, devices=list(devices_or_skip(target)))
    sharding = NamedSharding(mesh, spec_of(("batch", None, None, "heads", None)))
    program = functools.partial(forward_and_backward, backend, 7)
    pallas_tpu.splash_kernel.cache_clear()  # it must be possible to build within a mesh of devices that are not here
    pallas_tpu.operations.cache_clear()
    with use_mesh(mesh):
        text = compile_for(target, program, *qkv_like(16, 8), shardings=sharding).text
    assert not any(word in text for word in COLLECTIVES)
