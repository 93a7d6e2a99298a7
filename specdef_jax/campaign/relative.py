"""Steps relative to the size of what they move: an optimizer that no rescaling of channels is seen by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from specdef_jax.race.runs import Factory


@dataclass(frozen=True)
class Relative:
    """An optimizer whose gradient is multiplied by the mean squares of rows and columns of the parameters.

    Rescaled as w -> d w, a gradient becomes g / d, and d^2 w^2 g / d = d (w^2 g): the step is rescaled as the
    parameter is. Held fixed at the start, so that it is one diagonal preconditioner.

    Attributes:
      factory: step_size -> optax transformation.
    """

    factory: Factory

    def __call__(self, step_size: Array | float) -> optax.GradientTransformation:
        """Return the transformation at a step size."""
        inner = optax.with_extra_args_support(self.factory(step_size))

        def init(params: PyTree) -> tuple[PyTree, PyTree]:
            return jax.tree.map(_root, params), inner.init(params)

        def update(updates: PyTree, state: tuple, params: PyTree | None = None, **extra: Any) -> tuple:
            root, held = state
            # the inner optimizer sees coordinates in which the parameters have one size
            seen = jax.tree.map(jnp.multiply, root, updates)
            moved, held = inner.update(seen, held, params, **extra)
            return jax.tree.map(jnp.multiply, root, moved), (root, held)

        return optax.GradientTransformationExtraArgs(init, update)


def _root(leaf: Array) -> Array:
    """Return the root mean squares, of rank one in a matrix, relative to the whole; 1 where all is zero."""
    square = jnp.square(leaf)
    mean = jnp.mean(square)
    if leaf.ndim < 2:
        found = square + 0.01 * mean  # an entry near zero still moves
    else:
        rows = jnp.mean(square, axis=-1, keepdims=True)
        columns = jnp.mean(square, axis=tuple(range(leaf.ndim - 1)), keepdims=True)
        found = rows * columns / jnp.where(mean > 0, mean, 1)
    return jnp.where(mean > 0, jnp.sqrt(found), jnp.ones_like(leaf))
