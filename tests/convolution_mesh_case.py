"""Print the largest relative error of a kernel's gradient if images and channels lie on eight devices."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mvar_jax.ops.convolution import NUMBERS, convolve

mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
keys = jax.random.split(jax.random.key(0), 3)
x, kernel, grad = (
    jax.random.normal(key, shape)
    for key, shape in zip(keys, ((4, 12, 10, 128), (3, 3, 128, 128), (4, 12, 10, 128)), strict=True)
)
padding = ((1, 1), (1, 1))
of_xla = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=NUMBERS)
gradient = lambda f: jax.jit(lambda x, kernel, grad: jax.vjp(lambda k: f(x, k), kernel)[1](grad)[0])
place = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))
spread = (place(x, "data"), place(kernel, None, None, None, "tensor"), place(grad, "data", None, None, "tensor"))
found = gradient(lambda x, kernel: convolve(x, kernel, (1, 1), padding))(*spread)
wanted = gradient(of_xla)(x, kernel, grad)
print(float(jnp.abs(found - wanted).max() / jnp.abs(wanted).max()))
