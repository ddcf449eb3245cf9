"""Which generation of GPU kernels are shaped for."""

from types import SimpleNamespace

import jax
import pytest

from mvar_jax.ops import platform
from mvar_jax.ops.platform import HOPPER, compiling_for, current_generation
from mvar_jax.ops.triton_operands import Prepared
from mvar_jax.ops.triton_shapes import block_shapes

OF_CAPABILITIES = [("8.9", 8), ("9.0", HOPPER), ("10.0", 10), ("12.0", 12), ("gfx942", 0)]


@pytest.mark.parametrize(("capability", "generation"), [*OF_CAPABILITIES, (None, HOPPER)])
def test_a_program_compiled_for_a_card_has_its_generation(capability, generation):
    with compiling_for("gpu", capability):
        assert current_generation() == generation


@pytest.mark.parametrize(("capability", "generation"), OF_CAPABILITIES)
def test_a_program_for_the_card_here_has_its_generation(monkeypatch, capability, generation):
    monkeypatch.setattr(platform, "current_platform", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert current_generation() == generation


def test_interpreted_kernels_have_hoppers_shapes():
    assert current_generation() == HOPPER


def test_cards_that_multiply_from_registers_have_smaller_blocks_backward():
    of_hopper, of_b200, of_others = (block_shapes(Prepared, "bfloat16", 64, number)[1] for number in (HOPPER, 10, 8))
    assert of_hopper == of_b200
    assert of_others[:2] < of_hopper[:2]
