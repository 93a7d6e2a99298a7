"""Damped Gauss-Newton; the damping follows how well the quadratic model predicted (Levenberg-Marquardt)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from specdef_jax import trees
from specdef_jax.optim.arguments import check_positive, gain_ratio, like, needed
from specdef_jax.optim.conjugate_gradient import truncated_cg


class DampedState(NamedTuple):
    """State of damped_gauss_newton.

    Attributes:
      steps: steps taken.
      damping: lambda of the next step.
      ratio: actual over predicted decrease of the last step.
      products: Gauss-Newton products of the last step.
      values: losses that it evaluated.
    """

    steps: Int[Array, ""]
    damping: Float[Array, ""]
    ratio: Float[Array, ""]
    products: Int[Array, ""]
    values: Int[Array, ""]


def damped_gauss_newton(
    damping: float | Array = 1.0,
    *,
    adapt: bool = True,
    tol: float = 1e-3,
    max_products: int = 200,
    smallest: float = 1e-12,
    largest: float = 1e12,
) -> optax.GradientTransformationExtraArgs:
    """Return p with (G + lambda I) p = -g.

    Needs gnvp and, to adapt, params, value and value_fn. After a step lambda is divided by 3 where the loss
    fell by more than 3/4 of what the model predicted, doubled where by less than 1/4; a step that raises the
    loss is not taken. A fixed lambda I is lambda phi^T phi on the original parameters (THEORY.md 4.1).

    Args:
      damping: lambda at the start.
      adapt: whether to adapt it and to refuse steps that raise the loss.
      tol: relative residual of the linear solve.
      max_products: most Gauss-Newton products in a step.
      smallest: of lambda.
      largest: of lambda.

    Raises:
      SpecError: an argument is not positive.
      ProblemError: (in update) an extra argument is missing.

    Source: Nocedal and Wright, section 10.3; Martens (2010) for the constants.
    """
    check_positive(damping=damping, tol=tol, max_products=max_products, smallest=smallest, largest=largest)  # type: ignore[arg-type]

    def init(params: PyTree) -> DampedState:
        dtype = trees.result_dtype(params)
        none = jnp.array(0)
        return DampedState(none, jnp.asarray(damping, dtype), jnp.ones((), dtype), none, none)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, DampedState]:
        (gnvp,) = needed(extra, "damped_gauss_newton", "gnvp")
        scale = state.damping
        found = truncated_cg(
            lambda d: trees.axpy(scale, d, gnvp(d)), trees.scale(-1.0, updates), tol, max_products
        )
        step, count = found.step, state.steps + 1
        if not adapt:
            return like(updates, step), DampedState(count, scale, state.ratio, found.products, jnp.array(0))
        predicted = -(trees.inner(updates, step) + trees.inner(step, gnvp(step)) / 2)
        ratio = gain_ratio(extra, params, step, predicted, "damped_gauss_newton")
        factor = jnp.where(ratio > 0.75, 1 / 3, jnp.where(ratio < 0.25, 2.0, 1.0))
        following = jnp.clip(scale * factor, smallest, largest).astype(scale.dtype)
        step = jax.tree.map(lambda p: jnp.where(ratio > 0, p, 0), step)
        return like(updates, step), DampedState(
            count, following, ratio.astype(scale.dtype), found.products + 1, jnp.array(1)
        )

    return optax.GradientTransformationExtraArgs(init, update)
