"""When the attention layer leaves biases and unit norms to kernels that read the raw product."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh
from jaxprs import traced

from mvar_jax.models.layers import Attention
from mvar_jax.ops.platform import compiling_for
from mvar_jax.scales import Pyramid
from mvar_jax.sharding import MESH_AXES

PYRAMID = Pyramid((1, 2, 3, 5), 3, 3)
COARSE, WINDOW = PYRAMID.phases()
RAW, PREPARED = [5, 3], [4, 4, 4]  # ranks of the operands of a forward kernel


def kernels_of_layer(
    platform, phase, *, dtype="bfloat16", head_width=64, backend="auto", tensor=1
) -> list[list[int]]:
    """Return the ranks of the operands of each Triton kernel of one attention layer, forward."""
    width = 2 * head_width
    layer = Attention(PYRAMID, phase, 2, 0.02, 1, backend, jnp.dtype(dtype))
    x = jax.ShapeDtypeStruct((2, phase.num_tokens, width), jnp.float32)
    mesh = AbstractMesh((1, 1, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    with compiling_for(platform), use_abstract_mesh(mesh):
        params = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, None, 0), x)
        found = traced(lambda params, x: layer.apply(params, x, None, 0), params, x)
    calls = [equation for equation, _ in found if equation.primitive.name == "pallas_call"]
    return [[x.aval.ndim for x in call.invars] for call in calls]


@pytest.mark.parametrize("phase", [COARSE, WINDOW], ids=["within scales", "window"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_layer_in_half_precision_on_a_gpu_reads_the_raw_product(phase, dtype):
    assert kernels_of_layer("gpu", phase, dtype=dtype) == [RAW]


@pytest.mark.parametrize(
    ("phase", "options", "expected"),
    [
        (COARSE, {"dtype": "float32"}, []),
        (WINDOW, {"dtype": "float32"}, [PREPARED]),
        (COARSE, {"tensor": 2}, [PREPARED]),
        (WINDOW, {"tensor": 2}, [PREPARED]),
        (COARSE, {"head_width": 256}, []),
        (WINDOW, {"head_width": 256}, []),
        (WINDOW, {"backend": "tiled"}, []),
        (WINDOW, {"backend": "pallas_gpu"}, [RAW]),
        (COARSE, {"backend": "tiled"}, [RAW]),
        (*PYRAMID.phases("full"), {}, []),
    ],
)
def test_other_layers_attend_as_before(phase, options, expected):
    assert kernels_of_layer("gpu", phase, **options) == expected


@pytest.mark.parametrize("phase", [COARSE, WINDOW], ids=["within scales", "window"])
def test_no_other_platform_has_triton_kernels(phase):
    assert kernels_of_layer("cpu", phase) == kernels_of_layer("tpu", phase) == []


def test_the_parameters_are_the_same_on_every_platform():
    """Names, order and shapes: a parameter's initial value follows from its name and its place among the others."""
    layer = Attention(PYRAMID, COARSE, 2, 0.02, 1, "auto", jnp.dtype("bfloat16"))
    x = jax.ShapeDtypeStruct((1, COARSE.num_tokens, 128), jnp.float32)

    def shapes(platform):
        with compiling_for(platform):
            params = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, None, 0), x)["params"]
        return [(name, jax.tree.map(lambda leaf: leaf.shape, leaves)) for name, leaves in params.items()]

    assert shapes("gpu") == shapes("cpu")
