"""What sharpness can and cannot do to gradient and sign methods (THEORY.md 3.3 (v)).

A defence that is a linear change of parameters with metric P = phi^-1 phi^-T >= p I turns gradient descent
into gradient descent preconditioned by P. At sharpness s = lambda_max(P^1/2 H P^1/2) it cannot delay
descent by more than s / p; one rescaled scalar comes within a factor of four of that.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Number = Float[Array, "..."] | float


def ceiling_steps(
    sharpness: Number, convexity: Number, gap: Number, target: Number, *, metric: Number = 1.0
) -> Float[Array, "..."]:
    """Return the number of steps within which gradient descent at step 1 / s has closed the gap.

    For every P >= metric I and every loss with |grad L|^2 >= 2 convexity (L - L*) on the sublevel set of
    the start: L_T - L* <= (1 - metric convexity / s)^T gap.

    Args:
      sharpness: s, largest eigenvalue of the deformed Hessian on that sublevel set.
      convexity: mu, the Polyak-Lojasiewicz constant in undeformed parameters, metric * mu <= s.
      gap: L_0 - L*.
      target: L_T - L* to reach, < gap.
      metric: p, smallest eigenvalue of P; 1 for a defence that only speeds directions up.

    Source: THEORY.md 3.3 (v); Polyak 1963.

    Example:
      >>> round(float(ceiling_steps(100.0, 1.0, 1.0, 1e-3)))
      687
    """
    return jnp.log(jnp.asarray(gap) / target) / -jnp.log1p(-metric * jnp.asarray(convexity) / sharpness)


def stiff_scalar_steps(sharpness: Number, curvature: Number, gap: Number, target: Number) -> Number:
    """Return a lower bound on the steps of every stable gradient descent beside one stiff scalar.

    On a quadratic one coordinate is rescaled to curvature s, and the error lies along a direction of
    curvature mu = `curvature` that does not touch it. Stability needs a step below 2 / s, so the loss
    falls to more than (1 - 2 mu / s)^2 of itself in a step.

    Args:
      sharpness: s.
      curvature: mu, with 2 mu < s.
      gap: loss at the start.
      target: loss to reach, < gap.

    Source: THEORY.md 3.3 (v).
    """
    return jnp.log(jnp.asarray(gap) / target) / (-2 * jnp.log1p(-2 * jnp.asarray(curvature) / sharpness))


def slow_curvature(H: Float[Array, "n n"], fast: Int[Array, " f"]) -> Float[Array, "r r"]:
    """Return the Schur complement H_rr - H_rf H_ff^-1 H_fr: what the slow phase sees of a quadratic.

    Once the fast coordinates have settled they follow the rest, which then descends on this matrix. Its
    smallest eigenvalue is at least that of H: waiting for the fast set never slows the rest.

    Args:
      H: positive definite.
      fast: indices of the fast coordinates; the others keep their order.

    Source: THEORY.md 3.3 (v).
    """
    rest = jnp.setdiff1d(jnp.arange(len(H)), fast, size=len(H) - len(fast))
    cross = H[jnp.ix_(fast, rest)]
    return H[jnp.ix_(rest, rest)] - cross.T @ jnp.linalg.solve(H[jnp.ix_(fast, fast)], cross)


def sign_noise_floor(step: Number, sharpness: Number, direction: Float[Array, " n"]) -> Float[Array, ""]:
    """Return the least mean loss over two steps of sign descent along a stiff direction.

    On s (u^T theta)^2 / 2 sign descent moves u^T theta by exactly step ||u||_1, so two successive values
    cannot both be small: their mean loss is at least s (step ||u||_1)^2 / 8, attained when it oscillates
    symmetrically.

    Args:
      step: eta.
      sharpness: s.
      direction: the unit vector u.

    Source: THEORY.md 3.3 (v).
    """
    return sharpness * jnp.square(step * jnp.sum(jnp.abs(direction))) / 8


def sign_min_steps(
    distance: Number, sharpness: Number, direction: Float[Array, " n"], target: Number
) -> Float[Array, ""]:
    """Return a lower bound on the steps of sign descent that must travel beside a stiff direction.

    A mean loss `target` needs step <= sqrt(8 target / s) / ||u||_1, and a coordinate that has to move by
    `distance` moves by the step at most. One rescaled scalar has ||u||_1 = 1, the least of all unit
    vectors; a direction spread over n coordinates has up to sqrt(n).

    Args:
      distance: ||theta* - theta_0||_inf over the other coordinates.
      sharpness: s.
      direction: the unit vector u.
      target: mean loss over two successive steps.

    Source: THEORY.md 3.3 (v).
    """
    return distance * jnp.sum(jnp.abs(direction)) * jnp.sqrt(sharpness / (8 * jnp.asarray(target)))
