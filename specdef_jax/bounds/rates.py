"""Rates of gradient descent and heavy ball on a quadratic (THEORY.md 3.4).

On L(x) = (x - x*)^T H (x - x*) / 2 the coordinates of x - x* along the eigenvectors of H do not mix. Under
gradient descent with a fixed step the i-th is multiplied by 1 - step lambda_i at every step, exactly. All
functions are elementwise and run under jit, grad and vmap.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specdef_jax.errors import SpecError

Real = Float[Array, "..."] | float
Count = Int[Array, "..."] | int


class BestHeavyBall(NamedTuple):
    """The step and momentum of the smallest asymptotic rate, and that rate, per step."""

    step: Float[Array, "..."]
    momentum: Float[Array, "..."]
    rate: Float[Array, "..."]


def decay_factor(step: Real, curvature: Real, steps: Count) -> Float[Array, "..."]:
    """Return (1 - step * curvature)^steps, what gradient descent leaves of a coordinate.

    Args:
      step: step size.
      curvature: eigenvalue of H that belongs to the coordinate.
      steps: how many, >= 0.

    Source: THEORY.md 3.4.

    Example:
      >>> float(decay_factor(0.25, 2.0, 3))
      0.125
    """
    return (1 - jnp.multiply(step, curvature)) ** steps


def quadratic_loss(
    step: Float[Array, ""] | float,
    eigenvalues: Float[Array, " n"],
    coordinates: Float[Array, " n"],
    steps: Int[Array, ""] | int,
) -> Float[Array, ""]:
    """Return the loss above its minimum after T steps: sum_i lambda_i c_i^2 (1 - step lambda_i)^(2 T) / 2.

    Args:
      step: step size.
      eigenvalues: (n,), of H.
      coordinates: (n,), of x_0 - x* along the eigenvectors.
      steps: T.

    Source: THEORY.md 3.4.

    Example:
      >>> float(quadratic_loss(0.25, jnp.array([2.0]), jnp.array([1.0]), 1))
      0.25
    """
    left = coordinates * decay_factor(step, eigenvalues, steps)
    return jnp.sum(eigenvalues * jnp.square(left)) / 2


def steps_to_reduce(step: Real, curvature: Real, fraction: Real) -> Float[Array, "..."]:
    """Return the smallest T with |1 - step * curvature|^T <= fraction, infinite if there is none.

    Whole numbers as floats. Where a power equals the fraction up to rounding of the logarithms it counts as
    having reached it.

    Args:
      step: step size.
      curvature: eigenvalue of the coordinate.
      fraction: what may be left of it, > 0; 1 and more needs no step.

    Source: THEORY.md 3.4.

    Example:
      >>> float(steps_to_reduce(0.25, 2.0, 0.1))
      4.0
    """
    left = jnp.abs(1 - jnp.multiply(step, curvature))
    exact = jnp.log(fraction) / jnp.log(left)
    needed = jnp.maximum(jnp.ceil(exact * (1 - 8 * jnp.finfo(exact.dtype).eps)), 1)
    return jnp.where(jnp.asarray(fraction) >= 1, 0, jnp.where(left < 1, needed, jnp.inf))


def best_step(low: Real, high: Real) -> Float[Array, "..."]:
    """Return 2 / (low + high), the fixed step at which gradient descent's worst rate is smallest.

    Args:
      low: smallest eigenvalue of H, > 0.
      high: largest.

    Source: THEORY.md 3.4.

    Example:
      >>> float(best_step(1.0, 3.0))
      0.5
    """
    return 2 / jnp.add(low, high)


def best_rate(condition: Real) -> Float[Array, "..."]:
    """Return (kappa - 1) / (kappa + 1), the worst rate per step at best_step; no fixed step has a smaller.

    Args:
      condition: kappa = largest / smallest eigenvalue, >= 1.

    Source: THEORY.md 3.4.

    Example:
      >>> float(best_rate(3.0))
      0.5
    """
    return jnp.subtract(condition, 1) / jnp.add(condition, 1)


def heavy_ball_factor(
    step: Float[Array, ""] | float, curvature: Float[Array, ""] | float, steps: int, *, momentum: float = 0.9
) -> Float[Array, ""]:
    """Return what heavy ball, started at rest as optax.sgd is, leaves of a coordinate, with its sign.

    e_{t+1} = (1 + b - step curvature) e_t - b e_{t-1} with e_{-1} = e_0, by a matrix power.

    Args:
      step: step size.
      curvature: eigenvalue of the coordinate.
      steps: how many, >= 0 (static).
      momentum: b in [0, 1).

    Raises:
      SpecError: momentum outside [0, 1), or steps negative.

    Source: THEORY.md 3.4.

    Example:
      >>> float(heavy_ball_factor(0.5, 1.0, 2, momentum=0.0))
      0.25
    """
    _check_momentum(momentum)
    if steps < 0:
        raise SpecError(f"steps = {steps}: must not be negative.")
    trace = 1 + momentum - jnp.multiply(step, curvature)
    one, zero = jnp.ones_like(trace), jnp.zeros_like(trace)
    companion = jnp.array([[trace, -momentum * one], [one, zero]])
    return jnp.sum(jnp.linalg.matrix_power(companion, steps)[0])


def heavy_ball_rate(step: Real, curvature: Real, *, momentum: float = 0.9) -> Float[Array, "..."]:
    """Return heavy ball's asymptotic rate per step, the spectral radius of its update.

    Below 1 iff it converges; sqrt(momentum) wherever the roots are complex, and never less. At a double
    root rounding moves it by the square root of eps.

    Args:
      step: step size.
      curvature: eigenvalue of the coordinate.
      momentum: b in [0, 1).

    Raises:
      SpecError: momentum outside [0, 1).

    Source: THEORY.md 3.4.

    Example:
      >>> float(heavy_ball_rate(1.0, 1.0, momentum=0.25))
      0.5
    """
    _check_momentum(momentum)
    trace = jnp.abs(1 + momentum - jnp.multiply(step, curvature))
    discriminant = jnp.square(trace) - 4 * momentum
    real = (trace + jnp.sqrt(jnp.maximum(discriminant, 0))) / 2
    return jnp.where(discriminant > 0, real, jnp.sqrt(momentum))


def best_heavy_ball(low: Real, high: Real) -> BestHeavyBall:
    """Return heavy ball's best fixed step and momentum for a spectrum in [low, high], and its rate.

    The rate is (sqrt(kappa) - 1) / (sqrt(kappa) + 1) (Polyak 1964). It is asymptotic: at both ends of the
    spectrum the root is double, so that T steps leave about T rate^T.

    Args:
      low: smallest eigenvalue of H, > 0.
      high: largest.

    Source: THEORY.md 3.4.

    Example:
      >>> [float(x) for x in best_heavy_ball(1.0, 9.0)]
      [0.25, 0.25, 0.5]
    """
    root_low, root_high = jnp.sqrt(low), jnp.sqrt(high)
    rate = (root_high - root_low) / (root_high + root_low)
    return BestHeavyBall(4 / jnp.square(root_high + root_low), jnp.square(rate), rate)


def _check_momentum(momentum: float) -> None:
    if not 0 <= momentum < 1:
        raise SpecError(f"momentum = {momentum}: must lie in [0, 1).")
