import numpy as np
import pytest
from golden_case import load, load_json

from mvar_jax.errors import InputError
from mvar_jax.scales import BLOCK_CAUSAL, BLOCK_DIAGONAL, KNOWN_SIDES, WINDOW, Pyramid, areas_of, offsets_of, phase_of

GOLDEN_CYCLES = load_json("tiny/phase_cycle_prog_ed.json")
SKIPS_SCALES = ("scales10_refine7_ratio2", "scales10_refine6_ratio2")  # the published program never trains all


def first_scale_of_phase(num_scales: int, refine_step: int, ratio: int, step: int) -> int:
    phases = Pyramid(tuple(range(1, num_scales + 1)), refine_step).phases()
    phase = phases[phase_of(step, len(phases), ratio)]
    assert (phase.first == 0) == (phase.last < refine_step)
    return phase.last


def cycle_of(name: str) -> list[int]:
    num_scales, refine_step, ratio = (int(part.strip("scalerfinto")) for part in name.split("_"))
    return [
        first_scale_of_phase(num_scales, refine_step, ratio, step)
        for step in range(2 * (ratio + num_scales - refine_step))
    ]


@pytest.mark.parametrize("name", [name for name in GOLDEN_CYCLES if name not in SKIPS_SCALES])
def test_phase_cycle_equals_golden(name):
    golden = GOLDEN_CYCLES[name]
    assert cycle_of(name)[: len(golden)] == golden


@pytest.mark.parametrize("name", SKIPS_SCALES)
def test_phase_cycle_trains_every_scale_where_the_published_one_does_not(name):
    ours, refine_step = cycle_of(name), int(name.split("_")[1].removeprefix("refine"))
    half = len(ours) // 2
    assert ours[:half] == ours[half:] == [refine_step - 1] * 2 + list(range(refine_step, 10))
    assert ours != GOLDEN_CYCLES[name]


def test_phases_equal_golden():
    pyramid = Pyramid(KNOWN_SIDES[256], 8)
    rows = [(p.begin, p.end, int(p.attention == WINDOW)) for p in pyramid.phases()]
    assert rows == [tuple(row) for row in load("train")["phases"]]
    assert [p.trains_start for p in pyramid.phases()] == [True, False, False]


@pytest.mark.parametrize(("size", "num_scales", "num_tokens"), [(256, 10, 680), (512, 10, 2240), (1024, 14, 9451)])
def test_known_pyramids_have_the_published_numbers_of_tokens(size, num_scales, num_tokens):
    pyramid = Pyramid(KNOWN_SIDES[size], 8)
    assert (pyramid.num_scales, pyramid.num_tokens) == (num_scales, num_tokens)
    assert pyramid.sides[-1] == size // 16
    level_L = pyramid.level_of_token()
    for scale, side in enumerate(pyramid.sides):
        begin, end = pyramid.offsets[scale : scale + 2]
        assert end - begin == side * side
        assert (level_L[begin:end] == scale).all()


@pytest.mark.parametrize("size", sorted(KNOWN_SIDES))
@pytest.mark.parametrize("refine_step", [1, 5, 8, 10])
@pytest.mark.parametrize("conditioning", ["markov", "full"])
def test_phases_cover_every_token_once(size, refine_step, conditioning):
    phases = Pyramid(KNOWN_SIDES[size], refine_step).phases(conditioning)
    spans = np.concatenate([np.arange(p.begin, p.end) for p in phases])
    np.testing.assert_array_equal(spans, np.arange(sum(side**2 for side in KNOWN_SIDES[size])))
    assert sum(p.num_scales for p in phases) == len(KNOWN_SIDES[size])
    assert sum(p.num_tokens for p in phases) == len(spans)
    kinds = {p.attention for p in phases[1:]}
    if conditioning == "full":
        assert phases[0].attention == BLOCK_CAUSAL and not kinds
    else:
        assert phases[0].attention == BLOCK_DIAGONAL and kinds <= {WINDOW}


def test_single_scales_attend_as_in_their_phase():
    pyramid = Pyramid((1, 2, 3, 5), 2, 3)
    kinds = [pyramid.scale_phase(scale).attention for scale in range(4)]
    assert kinds == [BLOCK_DIAGONAL, BLOCK_DIAGONAL, WINDOW, WINDOW]
    assert {pyramid.scale_phase(scale, "full").attention for scale in range(4)} == {BLOCK_CAUSAL}
    assert [pyramid.window(scale) for scale in range(4)] == [None, None, 3, 3]


def test_each_window_scale_may_have_its_own_window():
    pyramid = Pyramid((1, 2, 3, 5), 2, (3, 5))
    assert [pyramid.window(scale) for scale in range(4)] == [None, None, 3, 5]
    assert Pyramid((1, 2), 2, ()).windows == ()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (((1, 2, 2), 1), "sides"),
        (((1, 3, 2), 1), "sides"),
        (((0, 1), 1), "sides"),
        (((), 1), "sides"),
        (((1, 2, 3), 0), "refine_step"),
        (((1, 2, 3), 4), "refine_step"),
        (((1, 2, 3), 1, 4), "kernel_size"),
        (((1, 2, 3), 1, -1), "kernel_size"),
        (((1, 2, 3), 1, (3, 2)), "kernel_size"),
        (((1, 2, 3), 1, (3,)), "kernel_size"),
    ],
)
def test_pyramid_refuses_what_does_not_fit(arguments, field):
    with pytest.raises(InputError, match=f"^{field} must be ") as caught:
        Pyramid(*arguments)
    assert caught.value.field == field and str(caught.value.given) in str(caught.value)


def test_offsets_of_sides_are_those_of_their_pyramid():
    areas = areas_of((1, 2, 4))
    assert (areas, offsets_of(areas)) == ((1, 4, 16), (0, 1, 5, 21))
    pyramid = Pyramid((1, 2, 4), 2)
    assert (pyramid.areas, pyramid.offsets, offsets_of(())) == (areas, offsets_of(areas), (0,))
