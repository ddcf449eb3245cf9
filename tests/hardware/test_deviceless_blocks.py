"""The gradient of a few blocks, compiled for an H100 that is not here: what stays in memory, and in which order."""

import jax
import jax.numpy as jnp
import pytest
from small_case import MODEL, shapes_of

from mvar_jax.errors import InputError
from mvar_jax.hardware.compiling import Compiled, compile_for, devices_of

pytestmark = pytest.mark.deviceless
BLOCKS = MODEL.clone(depth=4, width=128, num_heads=4, dtype=jnp.bfloat16)
PHASE = BLOCKS.phases()[1]


def gradient_of(batch_size: int, **changes) -> Compiled:
    """Compile the gradient of a loss of the blocks' logits."""
    model, code_width = BLOCKS.clone(**changes), BLOCKS.code_width
    try:
        devices_of("h100")
    except InputError as error:
        pytest.skip(f"no compiler for h100: {error.expected}")

    def loss(params, previous_BMc, labels_B, path_D2B):
        logits, _ = model.apply({"params": params}, previous_BMc, labels_B, PHASE, path_D2B)
        return jnp.sum(jnp.sin(logits))

    shape = jax.ShapeDtypeStruct
    previous = shape((batch_size, PHASE.num_tokens, code_width), jnp.float32)
    path = shape((model.depth, 2, batch_size), jnp.float32)
    return compile_for("h100", jax.grad(loss), shapes_of(model), previous, shape((batch_size,), jnp.int32), path)


def test_what_remat_leaves_out_is_not_kept_without_a_loop():
    """XLA then sees both passes at once, and could replace a repeated computation by the first one's result."""
    full, none = (gradient_of(512, remat=remat, scan_unroll=BLOCKS.depth) for remat in ("full", "none"))
    assert full.temp_bytes < 0.7 * none.temp_bytes


def test_without_a_loop_activations_keep_their_last_axis_innermost():
    text = gradient_of(32, remat="none", scan_unroll=BLOCKS.depth).text
    assert f"[32,{PHASE.num_tokens},{BLOCKS.width}]" in text
    assert f"[{PHASE.num_tokens},{BLOCKS.width},32]" not in text
