"""Truncated conjugate gradients on pytrees, which stop where curvature turns negative."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from specdef_jax import trees
from specdef_jax.optim.arguments import Product


class Solution(NamedTuple):
    """What truncated conjugate gradients found.

    Attributes:
      step: p with A p close to b, or the best before curvature turned negative.
      residual: ||A p - b||.
      products: products spent.
      negative: a direction d with <d, A d> <= 0 was met.
    """

    step: PyTree
    residual: Float[Array, ""]
    products: Int[Array, ""]
    negative: Bool[Array, ""]


def truncated_cg(product: Product, b: PyTree, tol: Float[Array, ""] | float, max_products: int) -> Solution:
    """Minimize 1/2 <p, A p> - <b, p> from p = 0 (Steihaug 1983, without a radius).

    Stops when ||A p - b|| <= tol ||b||, after max_products, or at a direction of no positive curvature. If
    that is the first direction, b itself, then p = b: a step along it decreases the quadratic without bound.

    Args:
      product: symmetric A.
      b: right-hand side.
      tol: relative residual.
      max_products: most products.
    """
    norm = trees.norm(b)

    def unfinished(carry: tuple[PyTree, PyTree, PyTree, Array, Array, Array]) -> Array:
        _, _, _, square, count, negative = carry
        return (jnp.sqrt(square) > tol * norm) & (count < max_products) & ~negative

    def step(
        carry: tuple[PyTree, PyTree, PyTree, Array, Array, Array],
    ) -> tuple[PyTree, PyTree, PyTree, Array, Array, Array]:
        p, residual, direction, square, count, _ = carry
        image = product(direction)
        curvature = trees.inner(direction, image)
        negative = ~(curvature > 0)  # NaN too
        length = jnp.where(negative, 0, square / jnp.where(negative, 1, curvature))
        first = negative & (count == 0)
        p = jax.tree.map(lambda x, d: jnp.where(first, d, x + length * d), p, direction)
        residual = trees.axpy(-length, image, residual)
        following = trees.inner(residual, residual)
        ratio = following / jnp.where(square > 0, square, 1)
        direction = trees.axpy(ratio, direction, residual)
        return p, residual, direction, following, count + 1, negative

    start = (trees.scale(0.0, b), b, b, trees.inner(b, b), jnp.array(0), jnp.array(False))
    p, _, _, square, count, negative = jax.lax.while_loop(unfinished, step, start)
    return Solution(p, jnp.sqrt(square), count, negative)
