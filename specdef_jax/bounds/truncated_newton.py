"""Conjugate gradients on a deformed Hessian: when a tolerance is met, and in how many steps (THEORY.md 4.3).

Three blocks of coordinates carry the factors alpha (C's fast directions), 1 (the rest) and 1 / alpha (the
deformed directions of the weight) in phi^-1.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Number = Float[Array, "..."] | float


def fast_alone_residual(
    H: Float[Array, "n n"], g: Float[Array, " n"], scales: Float[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return |H_a p + g_a| for the step that solves the fast block and moves nothing else, and |g_a|.

    The relative rule |H_a p + g_a| <= tol |g_a| is met by it iff tol is at least their ratio, which falls as
    1 / alpha. What is left over is the REDUCED gradient g_r - H_rf H_ff^-1 g_f, not g_r.

    Args:
      H: Hessian of the identity-inserted network, in coordinates in which phi is diagonal; H_ff invertible.
      g: its gradient.
      scales: phi^-1: alpha on the fast coordinates (every entry above 1 counts as fast), 1, 1 / alpha.
    """
    fast = scales > 1
    # The fast block, with the identity in place of the others, so that shapes do not depend on values.
    block = jnp.where(fast[:, None] & fast, H, jnp.eye(len(H), dtype=H.dtype))
    step = jnp.where(fast, jnp.linalg.solve(block, -g), 0)
    left = jnp.where(fast, 0, g + H @ step)
    return jnp.linalg.norm(scales * left), jnp.linalg.norm(scales * g)


def blocks_solved(
    residual: Float[Array, " n"], gradient: Float[Array, " n"], scales: Float[Array, " n"], tol: Number
) -> Bool[Array, ""]:
    """Tell whether the residual is at most tol times the gradient in every block of equal scale, by itself.

    Unlike the rule for the whole vector this one is the same before and after phi.

    Args:
      residual: H_a p + g_a.
      gradient: g_a.
      scales: phi^-1, one of three values in each coordinate: above 1, 1, below 1.
      tol: relative residual.
    """

    def solved(block: Bool[Array, " n"]) -> Bool[Array, ""]:
        left, right = (jnp.linalg.norm(jnp.where(block, x, 0)) for x in (residual, gradient))
        return left <= tol * right

    return solved(scales > 1) & solved(scales == 1) & solved(scales < 1)


def cg_iterations(
    above: int, below: Float[Array, " s"], low: Number, high: Number, tol: Number
) -> Float[Array, ""]:
    """Return a number of iterations within which conjugate gradients reduce the energy error to tol.

    For a positive definite matrix whose eigenvalues are `above` ones above [low, high], those in `below`
    under it, and any number within. Each outlier costs one iteration; those below also cost the factor
    high / value in accuracy, alpha^2 each on a deformed Hessian: the count grows as log(alpha).

    Args:
      above: how many eigenvalues lie above `high` (distinct ones).
      below: the distinct eigenvalues below `low`.
      low: of the interval, positive.
      high: of the interval.
      tol: relative error in the energy norm, in exact arithmetic.

    Source: Axelsson and Lindskog, Numer. Math. 48 (1986) 499; THEORY.md 4.3.
    """
    low, high = jnp.asarray(low), jnp.asarray(high)
    wanted = jnp.maximum(jnp.prod(high / below - 1) / tol, 1.0)
    width = jnp.maximum(high - low, jnp.finfo(low.dtype).tiny)
    degree = jnp.arccosh(wanted) / jnp.arccosh((high + low) / width)
    return above + below.size + jnp.maximum(jnp.ceil(degree), 1.0)


def outer_steps(gradient: Number, target: Number, tol: Number) -> Float[Array, "..."]:
    """Return within how many truncated Newton steps of relative residual tol |g_a| <= target on a quadratic.

    The gradient after a step is its residual, so |g_a| falls by tol a step. |g_a| is up to alpha |g_1| at the
    start: a deformation costs log(alpha) / log(1 / tol) more steps at most.

    Args:
      gradient: |g_a| at the start.
      target: to reach.
      tol: relative residual, in (0, 1).
    """
    return jnp.ceil(jnp.maximum(jnp.log(jnp.asarray(gradient) / target) / -jnp.log(jnp.asarray(tol)), 0.0))
