"""Steps relative to the size of what they move: an optimizer that no rescaling of channels is seen by.

Rescaled as w -> d w, a gradient becomes g / d, and d^2 w^2 g / d = d (w^2 g): multiplied by the squared size
of what it moves, a step is rescaled as the parameter is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from specdef_jax.attacks.rescaling import Rescaled
from specdef_jax.race.runs import Factory

SWEEPS = 60


def relative(factory: Factory) -> Rescaled:
    """Return the optimizer in coordinates in which all parameters had one size at the start."""
    return Rescaled(factory, sizes)


def sizes(params: PyTree) -> PyTree:
    """Return the size of every entry."""
    return jax.tree.map(_root, params)


def _root(leaf: Array) -> Array:
    """Return the size of every entry as its row and column have it, by Sinkhorn's balancing of the squares.

    Rows and columns of the squares divided by it have mean 1, and it follows any rescaling of rows and
    columns. A vector's entries are their own size. Zeros say nothing of their scale: it is 1, or the mean.
    """
    square = jnp.square(leaf)
    mean = jnp.mean(square)
    if leaf.ndim < 2:
        found = jnp.where(square > 0, square, mean)
        return jnp.where(mean > 0, jnp.sqrt(found), jnp.ones_like(leaf))
    others = tuple(range(leaf.ndim - 1))

    def balance(_: int, scales: tuple[Array, Array]) -> tuple[Array, Array]:
        columns = scales[1]
        rows = _positive(jnp.mean(square / columns, axis=-1, keepdims=True))
        return rows, _positive(jnp.mean(square / rows, axis=others, keepdims=True))

    start = tuple(jnp.ones_like(jnp.mean(square, axis=a, keepdims=True)) for a in (-1, others))
    rows, columns = jax.lax.fori_loop(0, SWEEPS, balance, start)
    return jnp.sqrt(rows * columns)


def _positive(x: Array) -> Array:
    return jnp.where(x > 0, x, 1)
