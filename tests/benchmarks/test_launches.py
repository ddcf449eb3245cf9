import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "launches.py"
# as XLA writes a program: a loop of 12 with a slice of stacked weights, an update in place, and a product
TEXT = """HloModule jit_f

%sliced (p0: f32[12,64,32], p1: s32[]) -> f32[1,64,32] {
  %p0 = f32[12,64,32]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %part = f32[1,64,32]{2,1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,64,32}
}

%updated (p0: f32[12,64], p1: f32[1,64], p2: s32[]) -> f32[12,64] {
  %p0 = f32[12,64]{1,0} parameter(0)
  %p1 = f32[1,64]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %new = f32[12,64]{1,0} dynamic-update-slice(%p0, %p1, %p2)
}

%first (p0: f16[100]) -> f32[1] {
  %p0 = f16[100]{0} parameter(0)
  %wide = f32[100]{0} convert(%p0)
  ROOT %part = f32[1]{0} slice(%wide), slice={[0:1]}
}

%whole (p0: f16[100]) -> bf16[100] {
  %p0 = f16[100]{0} parameter(0)
  ROOT %narrow = bf16[100]{0} convert(%p0)
}

%body (arg: (s32[], f32[12,64,32], /*index=2*/f32[12,64])) -> (s32[], f32[12,64,32], f32[12,64]) {
  %arg = (s32[], f32[12,64,32]{2,1,0}, /*index=2*/f32[12,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %w = f32[12,64,32]{2,1,0} get-tuple-element(%arg), index=1
  %rows = f32[12,64]{1,0} get-tuple-element(%arg), index=2
  %fusion-start = ((f32[12,64,32]{2,1,0}, s32[]), f32[1,64,32]{2,1,0}, u32[]) fusion-start(%w, %i), calls=%sliced
  %fusion-done = f32[1,64,32]{2,1,0} fusion-done(%fusion-start)
  %product = (f32[1,64]{1,0}, s8[4096]{0}) custom-call(%fusion-done), custom_call_target="gemm"
  %row = f32[1,64]{1,0} get-tuple-element(%product), index=0
  %fusion = f32[12,64]{1,0} fusion(%rows, %row, %i), kind=kLoop, calls=%updated
  ROOT %out = (s32[], f32[12,64,32]{2,1,0}, f32[12,64]{1,0}) tuple(%i, %w, %fusion)
}

ENTRY %main (x: bf16[100]) -> bf16[100] {
  %x = bf16[100]{0} parameter(0)
  %start = (s32[], f32[12,64,32]{2,1,0}, /*index=2*/f32[12,64]{1,0}) tuple(%x)
  %loop = (s32[], f32[12,64,32], f32[12,64]) while(%start), body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %half = f16[100]{0} copy(%x)
  %one = f32[1]{0} fusion(%half), kind=kLoop, calls=%first
  %back = bf16[100]{0} fusion(%half), kind=kLoop, calls=%whole
  ROOT %copy = bf16[100]{0} copy(%back)
}
"""


@pytest.fixture(scope="module")
def launches():
    spec = importlib.util.spec_from_file_location("launches", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernels_and_bytes_of_a_loop_are_counted_as_often_as_it_runs(launches):
    """Of a sliced, even cast, or updated operand the part counts; what is only named or awaited is no kernel."""
    weights, row, index = 4 * 64 * 32, 4 * 64, 4
    expected = [(12, weights + weights + index), (12, weights + row), (12, row + row + index)]
    expected += [(1, 200 + 200), (1, 2 + 4), (1, 200 + 200), (1, 200 + 200)]
    found = [(kernel.launches, kernel.num_bytes // kernel.launches) for kernel in launches.kernels_of(TEXT)]
    assert found == expected


def test_the_script_reports_a_compiled_text(launches, tmp_path, capsys):
    path = tmp_path / "program.txt"
    path.write_text(TEXT)
    assert launches.main(["--text", str(path)]) == 0
    assert capsys.readouterr().out.startswith("40 kernels launched, 0.00 GB read and written")
