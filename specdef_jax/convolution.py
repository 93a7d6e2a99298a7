"""Convolutions as one product with the stacked windows: what a CPU does fast, in any dtype and in loops.

XLA's convolutions run one multiplication at a time on a CPU in float64, and in float32 their gradients do
inside a loop: ten to fifty times slower.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]


def by_windows(
    x: Float[Array, "batch height width n"],
    kernel: Float[Array, "v u n m"],
    stride: int,
    padding: Padding,
    precision: lax.Precision | None = None,
) -> Float[Array, "batch _ _ m"]:
    """Return what lax.conv_general_dilated does with NHWC inputs and an HWIO kernel.

    Args:
      x: input.
      kernel: of the convolution.
      stride: of both axes.
      padding: zeros before and after each axis.
      precision: of the product.
    """
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    for axis, size in ((1, kernel.shape[0]), (2, kernel.shape[1])):
        last = (x.shape[axis] - size) // stride * stride
        x = jnp.stack(
            [lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(size)], axis=x.ndim - 1
        )
    return jnp.einsum("bhwijc,ijcf->bhwf", x, kernel, precision=precision)
