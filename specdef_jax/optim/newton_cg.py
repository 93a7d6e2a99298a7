"""Truncated Newton: conjugate gradients on H p = -g, cut off at negative curvature."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from specdef_jax import trees
from specdef_jax.optim.arguments import Value, check_positive, need_params, needed
from specdef_jax.optim.conjugate_gradient import truncated_cg


class NewtonCGState(NamedTuple):
    """State of newton_cg.

    Attributes:
      steps: steps taken.
      products: Hessian products of the last step.
      negative: whether the last step met negative curvature.
      values: losses that it evaluated.
    """

    steps: Int[Array, ""]
    products: Int[Array, ""]
    negative: Array
    values: Int[Array, ""]


def newton_cg(
    step_size: float | Array = 1.0,
    *,
    tol: float = 0.5,
    superlinear: bool = True,
    max_products: int = 100,
    damping: float | Array = 0.0,
    halvings: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Return p with (H + damping I) p = -g to a relative residual, times the step size.

    Needs hvp. Where curvature is negative the step is what was found before, or -g (Steihaug). The residual
    asked for is min(tol, sqrt(||g||)) if `superlinear`, else tol. THEORY.md 4.3: one tolerance for all of g
    is met on a deformed network's sharp directions alone.

    Args:
      step_size: factor of the step; 1 is Newton's.
      tol: largest relative residual.
      superlinear: whether the tolerance tightens with the gradient.
      max_products: most Hessian products in a step.
      damping: added to the Hessian.
      halvings: most halvings of a step that does not lower the loss by 1e-4 of the slope; 0 takes every step.
        With them params, value and value_fn are needed, and a step that never lowers the loss is not taken.

    Raises:
      SpecError: tol or max_products is not positive.
      ProblemError: (in update) an extra argument is missing.

    Source: Nocedal and Wright, Numerical Optimization, algorithm 7.1.
    """
    check_positive(tol=tol, max_products=max_products)

    def init(params: PyTree) -> NewtonCGState:
        del params
        return NewtonCGState(jnp.array(0), jnp.array(0), jnp.array(False), jnp.array(0))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, NewtonCGState]:
        (hvp,) = needed(extra, "newton_cg", "hvp")
        goal: Float[Array, ""] = jnp.asarray(tol, trees.norm(updates).dtype)
        if superlinear:
            goal = jnp.minimum(goal, jnp.sqrt(trees.norm(updates)))
        found = truncated_cg(
            lambda d: trees.axpy(damping, d, hvp(d)), trees.scale(-1.0, updates), goal, max_products
        )
        step = jax.tree.map(lambda p, g: (step_size * p).astype(g.dtype), found.step, updates)
        tried = jnp.array(0)
        if halvings:
            value, value_fn = needed(extra, "newton_cg", "value", "value_fn")
            params = need_params(params, "newton_cg")
            step, tried = _halved(step, updates, params, value, value_fn, halvings)
        return step, NewtonCGState(state.steps + 1, found.products, found.negative, tried)

    return optax.GradientTransformationExtraArgs(init, update)


def _halved(
    step: PyTree, gradient: PyTree, params: PyTree, value: Array, value_fn: Value, halvings: int
) -> tuple[PyTree, Array]:
    """Return the step, halved until it lowers the loss, and how many lengths were tried."""
    slope = trees.inner(gradient, step)

    def lower(length: Array) -> Array:
        after = value_fn(jax.tree.map(lambda x, p: x + (length * p).astype(x.dtype), params, step))
        return after <= value + 1e-4 * length * slope

    lengths = 0.5 ** jnp.arange(halvings + 1, dtype=slope.dtype)

    def halve(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        i, _ = carry
        return i + 1, lower(lengths[i])

    def unfinished(carry: tuple[Array, Array]) -> Array:
        return (carry[0] <= halvings) & ~carry[1]

    tried, found = jax.lax.while_loop(unfinished, halve, (jnp.array(0), jnp.array(False)))
    length = jnp.where(found, lengths[jnp.maximum(tried - 1, 0)], 0)
    return jax.tree.map(lambda p: (length * p).astype(p.dtype), step), tried
