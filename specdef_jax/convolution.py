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
    height, width, n, m = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    down, across = ((x.shape[axis] - size) // stride * stride + 1 for axis, size in ((1, height), (2, width)))
    windows = jnp.stack(
        [x[:, i : i + down : stride, j : j + across : stride] for i in range(height) for j in range(width)],
        axis=-2,
    )
    # Outputs first: XLA computes the gradient of a (m, n) kernel twice as fast as that of a tall (n, m) one.
    taps = jnp.moveaxis(kernel, -1, 0).reshape(m, height * width, n)
    return jnp.einsum("bhwkn,mkn->bhwm", windows, taps, precision=precision)
