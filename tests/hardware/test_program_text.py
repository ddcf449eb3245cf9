"""Work and collectives of compiled programs, counted in their text."""

import jax
import jax.numpy as jnp
import pytest

from mvar_jax.hardware.compiling import compile_for
from mvar_jax.hardware.work import work_of

CONVOLUTION = """ENTRY %main (x: bf16[8,16,16,32], k: bf16[3,3,32,64]) -> bf16[8,16,16,64] {{
  %x = bf16[8,16,16,32]{{3,2,1,0}} parameter(0)
  %k = bf16[3,3,32,64]{{3,2,1,0}} parameter(1)
  ROOT %y = {}
}}
"""
DIRECT = "bf16[8,16,16,64]{3,2,1,0} convolution(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"
CUDNN = "(bf16[8,16,16,64]{3,2,1,0}, s8[99]{0}) custom-call(%x, %k), window={size=3x3 pad=1_1x1_1}, "
CUDNN += 'dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward"'
COLLECTIVE = """ENTRY %main (x: f32[100,10]) -> f32[100,10] {{
  %x = f32[100,10]{{1,0}} parameter(0)
  ROOT %y = f32[100,10]{{1,0}} {}
}}
"""


def flops_of(text: str) -> float:
    return sum(one.times * one.flops for one in work_of(text, (0,))[0])


def test_products_of_a_loop_are_counted_as_often_as_it_runs():
    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    x, weights = jax.ShapeDtypeStruct((24, 16), jnp.float32), jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    compiled = compile_for("here", jax.grad(run, argnums=1), x, weights)
    # forward, and a product for each gradient; the first step's input needs none, but the loop makes it
    assert flops_of(compiled.text) == 3 * 5 * 2 * 24 * 16 * 16


def test_products_with_padding_do_not_count():
    """Along each side 16 * 3 pairs less one at each end; cuDNN's own counting keeps them."""
    assert flops_of(CONVOLUTION.format(DIRECT)) == 2 * 8 * 64 * 32 * (16 * 3 - 2) ** 2
    assert flops_of(CONVOLUTION.format(CUDNN)) == 2 * 8 * 64 * 32 * (16 * 3) ** 2


@pytest.mark.parametrize(
    ("instruction", "kind", "num_bytes", "num_devices", "sent", "crosses"),
    [
        ("all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add", "all-reduce", 4000, 4, 6000, True),
        ("all-reduce(%x), replica_groups=[2,2]<=[4], to_apply=%add", "all-reduce", 4000, 2, 4000, False),
        ("all-reduce(%x), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add", "all-reduce", 4000, 2, 4000, True),
        ("all-reduce(%x), replica_groups=mesh['a'=2,'b'=2] {'a'}, to_apply=%add", "all-reduce", 4000, 2, 4000, True),
        ("all-gather-start(%x), replica_groups={{0,1},{2,3}}", "all-gather", 8000, 2, 4000, False),
        ("reduce-scatter(%x), replica_groups={{0,2},{1,3}}", "reduce-scatter", 4000, 2, 2000, True),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", 4000, 2, 4000, False),
    ],
)
def test_collectives_have_their_groups_and_what_a_device_sends(
    instruction, kind, num_bytes, num_devices, sent, crosses
):
    (one,) = work_of(COLLECTIVE.format(instruction), (0, 0, 1, 1))[1]
    assert (one.kind, one.num_bytes, one.num_devices) == (kind, num_bytes, num_devices)
    assert (one.sent_bytes, one.num_hosts) == (sent, 1 + crosses)


NESTED = """%slice_of (layers: bf16[24,8,64], i: s32[]) -> bf16[8,64] {
  %layers = bf16[24,8,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,8,64]{2,1,0} dynamic-slice(%layers, %i, %zero, %zero), dynamic_slice_sizes={1,8,64}
  ROOT %flat = bf16[8,64]{1,0} bitcast(%one)
}

%update_of (layers: bf16[24,8,64], x: bf16[1,8,64], i: s32[]) -> bf16[24,8,64] {
  %layers = bf16[24,8,64]{2,1,0} parameter(0)
  %x = bf16[1,8,64]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %next = bf16[24,8,64]{2,1,0} dynamic-update-slice(%layers, %x, %i, %zero, %zero)
}

%fused (layers: bf16[24,8,64], i: s32[]) -> bf16[24,8,64] {
  %layers = bf16[24,8,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %slice = bf16[8,64]{1,0} fusion(%layers, %i), kind=kLoop, calls=%slice_of
  %twice = bf16[8,64]{1,0} add(%slice, %slice)
  %row = bf16[1,8,64]{2,1,0} bitcast(%twice)
  ROOT %updated = bf16[24,8,64]{2,1,0} fusion(%layers, %row, %i), kind=kLoop, calls=%update_of
}

ENTRY %main (layers: bf16[24,8,64], i: s32[]) -> bf16[24,8,64] {
  %layers = bf16[24,8,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %y = bf16[24,8,64]{2,1,0} fusion(%layers, %i), kind=kLoop, calls=%fused
}
"""


def test_fusions_within_a_fusion_move_the_layer_that_they_use():
    """A TPU's fusion that reads and writes one layer of a stack moves a layer, not the stack."""
    ((work,), _) = work_of(NESTED, (0,))
    assert work.num_bytes == 2 * (2 * 8 * 64) + 4  # the layer read and written, and its number


KERNEL = """ENTRY %main (q: bf16[4,1,256,64], t: s8[1,2,2]) -> bf16[4,1,256,64] {
  %q = bf16[4,1,256,64]{3,2,1,0} parameter(0)
  %t = s8[1,2,2]{2,1,0} parameter(1)
  %splash_mha_fwd.1 = bf16[4,1,256,64]{3,2,1,0} custom-call(%t, %q), custom_call_target="tpu_custom_call", metas={{
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(f)/pallas_call"}
  ROOT %y = bf16[4,1,256,64]{3,2,1,0} negate(%splash_mha_fwd.1)
}
"""


def test_a_kernel_with_attributes_on_several_lines_is_one_instruction():
    seen = []
    work, _ = work_of(KERNEL, (0,), lambda name, operands: seen.append((name, operands[1].sides)) or 8.0)
    assert seen == [("splash_mha_fwd.1", (4, 1, 256, 64))]
    size = 2 * 4 * 256 * 64
    assert [(one.flops, one.num_bytes) for one in work] == [(8.0, 2 * size), (0.0, 2 * size)]


AHEAD = """ENTRY %main (x: bf16[28,8,64]) -> bf16[7,8,64] {
  %x = bf16[28,8,64]{2,1,0} parameter(0)
  %space = bf16[28,8,64]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %slice-start.1 = ((bf16[28,8,64]{2,1,0}), bf16[7,8,64]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x)
  %slice-done.1 = bf16[7,8,64]{2,1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start.1)
  ROOT %y = bf16[7,8,64]{2,1,0} negate(%slice-done.1)
}
"""


def test_a_part_that_is_read_ahead_moves_itself_and_reserved_memory_nothing():
    work, _ = work_of(AHEAD, (0,))
    part = 2 * 7 * 8 * 64
    assert [one.num_bytes for one in work] == [part, part]  # read ahead into fast memory; the result written
