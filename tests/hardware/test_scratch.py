"""What Eigen and YNNPACK hold, beside allocations counted while operations ran on two cores and on one."""

import pytest

from mvar_jax.hardware import scratch
from mvar_jax.hardware.scratch import scratch_bytes

MIB = 2**20
EIGEN = """ENTRY %main (x: f32[{x}], k: f32[{k}]) -> f32[{y}] {{
  %x = f32[{x}]{{3,2,1,0}} parameter(0)
  %k = f32[{k}]{{3,2,1,0}} parameter(1)
  ROOT %y = f32[{y}]{{3,2,1,0}} convolution(%x, %k), window={{{window}}}, dim_labels=b01f_01io->b01f
}}
"""
YNNPACK = """%fused (a: f32[{a}], b: f32[{b}]) -> f32[{y}] {{
  %a = f32[{a}]{{1,0}} parameter(0)
  %b = f32[{b}]{{1,0}} parameter(1)
{inside}
}}

ENTRY %main (x: f32[{a}], w: f32[{b}]) -> f32[{y}] {{
  %x = f32[{a}]{{1,0}} parameter(0)
  %w = f32[{b}]{{1,0}} parameter(1)
  ROOT %z = f32[{y}] fusion(%x, %w), kind={kind}, calls=%fused{config}
}}
"""
CONFIG = ', backend_config={"fusion_config":{"kind":"__ynn_fusion"},"outer_dimension_partitions":[]}'
DOT = "  {root}%d = f32[4096,384]{{1,0}} dot(%a, {b}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"


def product(inside: str, kind: str = "kCustom", config: str = CONFIG, y: str = "4096,384") -> str:
    return YNNPACK.format(a="4096,96", b="96,384", y=y, inside=inside, kind=kind, config=config)


# counted: MiB of the largest copy. There was a second one of 0.4 to 0.5 MiB, which a plan leaves out.
@pytest.mark.parametrize(
    ("x", "k", "y", "window", "counted"),
    [
        ("32,32,32,16", "3,3,16,16", "32,32,32,16", "size=3x3 pad=1_1x1_1", 18.04),
        ("4,64,64,16", "7,7,16,16", "4,64,64,16", "size=7x7 pad=3_3x3_3", 33.29),
    ],
)
def test_eigen_copies_all_windows_of_a_convolution_on_several_cores(x, k, y, window, counted):
    text = EIGEN.format(x=x, k=k, y=y, window=window)
    assert scratch_bytes(text, 2) / MIB == pytest.approx(counted, rel=0.01)
    assert scratch_bytes(text, 1) == 0


@pytest.mark.parametrize("cores", [1, 2])
def test_eigen_holds_the_products_of_a_transposed_convolution(cores):
    window = "size=3x3 pad=2_2x2_2 lhs_dilate=2x2"
    text = EIGEN.format(x="32,17,17,32", k="3,3,32,16", y="32,35,35,16", window=window)
    assert scratch_bytes(text, cores) / MIB == pytest.approx(5.08 + 1.22, rel=0.02)


def test_ynnpack_copies_the_second_operand_and_what_is_read_in_another_shape():
    inside = DOT.format(root="ROOT ", b="%b")
    assert scratch_bytes(product(inside), 2) == 96 * 384 * 4
    reshaped = [DOT.format(root="", b="%b"), "  ROOT %r = f32[64,64,384]{2,1,0} bitcast(%d)"]
    text = product("\n".join(reshaped), y="64,64,384")
    assert scratch_bytes(text, 2) == (96 * 384 + 4096 * 384) * 4  # counted: 0.28 and 6.00 MiB
    assert scratch_bytes(text, 1) == 4096 * 384 * 4  # one after the other
    weights = ["  %c = f32[96,384]{1,0} bitcast(%b)", DOT.format(root="ROOT ", b="%c")]
    assert scratch_bytes(product("\n".join(weights)), 2) == 96 * 384 * 4  # weights are read where they lie


def test_a_fusion_of_xlas_own_holds_nothing():
    assert scratch_bytes(product(DOT.format(root="ROOT ", b="%b"), kind="kLoop", config=""), 2) == 0


def test_a_process_has_the_cores_that_it_may_use(monkeypatch):
    monkeypatch.setattr(scratch.os, "sched_getaffinity", lambda process: {0, 3}, raising=False)
    assert scratch.num_cores() == 2
