"""How far Adam can move a parameter, whatever its gradients are (THEORY.md 3.5).

A coordinate moves by eta |m_hat| / sqrt(v_hat) at most, and by Cauchy and Schwarz that ratio is at most c_t,
a number of the two decay rates alone. No gradient, however large the curvature, lifts it. All of it is
per coordinate, for eps >= 0, and counts steps from t = 1. Under jit and vmap, where values cannot be looked
at, decay rates and t are not checked.

Source: THEORY.md 3.5 (ours); the moments are those of Kingma and Ba (2015), Nadam's are optax's.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from specdef_jax.errors import SpecError

Steps = Int[Array, "..."] | int


def adam_displacement(t: Steps, b1: float = 0.9, b2: float = 0.999) -> Float[Array, "..."]:
    """Return c_t, the largest |m_hat_t| / sqrt(v_hat_t) that any gradients g_1, ..., g_t give.

    With r = b1^2 / b2,

        c_t = (1 - b1) / sqrt((1 - b2) (1 - r)) sqrt((1 - r^t) (1 - b2^t)) / (1 - b1^t).

    c_1 = 1, c_t grows with t (and stays 1 if b1 = b2). The gradients g_i = (b2 / b1)^i attain it at every t.

    Args:
      t: steps taken, at least 1, any shape.
      b1: decay rate of the first moment, 0 <= b1 < 1.
      b2: decay rate of the second, b1^2 < b2 < 1.

    Raises:
      SpecError: a decay rate or t outside these ranges.

    Example:
      >>> [round(float(c), 2) for c in adam_displacement(jnp.array([1, 10, 1000, 100_000]))]
      [1.0, 1.04, 5.78, 7.27]
    """
    _check_rates(b1, b2)
    _check_count(t)
    return _adam(t, b1, b2)


def nadam_displacement(t: Steps, b1: float = 0.9, b2: float = 0.999) -> Float[Array, "..."]:
    """Return the same for Nadam in optax's form, whose numerator weighs the last gradient twice.

    m_hat_t = b1 m_t / (1 - b1^(t+1)) + (1 - b1) g_t / (1 - b1^t), v_hat_t as in Adam (Dozat's further factor
    b2 is left out). c_1 = (1 + 2 b1) / (1 + b1). It is not monotone: it falls at first. Arguments and errors
    are those of adam_displacement.

    Example:
      >>> [round(float(c), 2) for c in nadam_displacement(jnp.array([1, 5, 100_000]))]
      [1.47, 1.18, 8.42]
    """
    _check_rates(b1, b2)
    _check_count(t)
    return _nadam(t, b1, b2)


def weighted_displacement(weights: Float[Array, " t"], b2: float = 0.999) -> Float[Array, ""]:
    """Return the largest |sum_i w_i g_i| / sqrt(v_hat_t) over all gradients g_1, ..., g_t.

    It is sqrt(sum_i w_i^2 b2^-(t-i)) sqrt((1 - b2^t) / (1 - b2)), attained by g_i = w_i b2^-(t-i).

    Args:
      weights: w_1, ..., w_t, the oldest gradient first; any numbers, a fixed b1 is not needed.
      b2: decay rate of the second moment, 0 < b2 < 1.

    Raises:
      SpecError: no weights, or b2 outside (0, 1).

    Example:
      >>> round(float(weighted_displacement(jnp.array([0.0, 1.0]), 0.5)), 2)  # the last gradient alone
      1.22
    """
    if not isinstance(b2, Tracer) and not 0 < b2 < 1:
        raise SpecError(f"b2 = {b2}: must lie strictly between 0 and 1.")
    if not len(weights):
        raise SpecError("weights is empty; give one weight for each gradient, the oldest first.")
    return _weighted(weights, b2)


def displacement_limit(b1: float = 0.9, b2: float = 0.999, *, nesterov: bool = False) -> Float[Array, ""]:
    """Return lim c_t of Adam, 7.27 by default, or of Nadam (nesterov), 8.42.

    (1 - b1) / sqrt((1 - b2)(1 - r)), and (1 - b1) sqrt(((1 + b1)^2 + b1^2 r / (1 - r)) / (1 - b2)), with
    r = b1^2 / b2. For Adam it is also the supremum over t; for Nadam see displacement_supremum.

    Raises:
      SpecError: a decay rate out of range, see adam_displacement.
    """
    _check_rates(b1, b2)
    return _nadam_limit(b1, b2) if nesterov else _adam_limit(b1, b2)


def displacement_supremum(b1: float = 0.9, b2: float = 0.999, *, nesterov: bool = False) -> Float[Array, ""]:
    """Return sup_t c_t: the limit for Adam; for Nadam c_1 may be larger.

    Nadam's c_t is computed up to the t where b1^t is below rounding; beyond, it is at most its limit over
    1 - b1^t (THEORY.md 3.5), which is the limit to rounding.

    Raises:
      SpecError: a decay rate out of range, see adam_displacement.

    Example:
      >>> float(displacement_supremum(0.9, 0.9, nesterov=True)) == float(nadam_displacement(1, 0.9, 0.9))
      True
    """
    limit = displacement_limit(b1, b2, nesterov=nesterov)
    if not nesterov:
        return limit
    t = jnp.arange(_horizon(b1)) + 1
    return jnp.maximum(limit, jnp.max(nadam_displacement(t, b1, b2)))


def _horizon(b1: float) -> int:
    """Return a t, a power of two so that few shapes are compiled for, with b1^t below rounding."""
    until = 1 if b1 == 0 else math.log(2.0**-53) / math.log(b1)
    return 2 ** math.ceil(math.log2(until + 1))


def adam_reach(
    step_sizes: Float[Array, " steps"],
    b1: float = 0.9,
    b2: float = 0.999,
    *,
    weight_decay: float = 0.0,
    start: Float[Array, ""] | float = 0.0,
    nesterov: bool = False,
) -> Float[Array, " steps"]:
    """Return how far from its start a coordinate can be after 1, 2, ... steps of a schedule.

    sum eta_t c_t without decay. With decoupled decay w a step is theta <- (1 - eta w) theta - eta u, so
    d_t = (1 - eta_t w) d_(t-1) + eta_t (w |theta_0| + c_t); both are
    attained by Adam, and not by Nadam from t = 3 on.

    Args:
      step_sizes: eta_1, eta_2, ..., not negative.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      weight_decay: w of AdamW; eta w <= 1.
      start: |theta_0|, the magnitude that decay can take away.
      nesterov: Nadam, NadamW.

    Raises:
      SpecError: a decay rate out of range, see adam_displacement; or w < 0.

    Example:
      >>> [round(float(d), 4) for d in adam_reach(jnp.full(3, 1e-2))]
      [0.01, 0.02, 0.03]
    """
    if not weight_decay >= 0:
        raise SpecError(f"weight_decay = {weight_decay}: must not be negative.")
    _check_rates(b1, b2)
    ratios = (_nadam if nesterov else _adam)(jnp.arange(1, len(step_sizes) + 1), b1, b2)
    return _reach(step_sizes, ratios, weight_decay, start)


def adam_min_steps(
    distance: Float[Array, "..."] | float,
    step_size: float,
    b1: float = 0.9,
    b2: float = 0.999,
    *,
    weight_decay: float = 0.0,
    start: Float[Array, "..."] | float = 0.0,
    nesterov: bool = False,
) -> Float[Array, "..."]:
    """Return a number of steps below which Adam cannot have moved a coordinate by `distance`.

    distance / (eta sup c_t) without decay; elementwise. To a set of solutions the distance is that of the
    nearest one in the maximum norm. With decay the coordinate never leaves |theta_0| + sup c_t / w: beyond
    that the answer is infinite.

    Args:
      distance: |theta* - theta_0|, of any shape.
      step_size: eta > 0, constant (the largest one, for a schedule).
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      weight_decay: w of AdamW, 0 <= eta w < 1.
      start: |theta_0|, of the shape of `distance`.
      nesterov: Nadam, NadamW.

    Raises:
      SpecError: a decay rate out of range, see adam_displacement; a step size that is not positive, or
        eta w outside [0, 1).

    Example:
      >>> round(float(adam_min_steps(1.0, 1e-3)), 1)
      137.5
    """
    if not 0 < step_size < math.inf:
        raise SpecError(f"step_size = {step_size}: must be positive and finite.")
    shrink = step_size * weight_decay
    if not 0 <= shrink < 1:
        raise SpecError(f"step_size * weight_decay = {shrink}: must lie in [0, 1).")
    distance, ratio = jnp.asarray(distance), displacement_supremum(b1, b2, nesterov=nesterov)
    if not weight_decay:
        return distance / (step_size * ratio)
    # d_T = (|theta_0| + c / w) (1 - (1 - eta w)^T), solved for T.
    share = distance / (jnp.abs(jnp.asarray(start)) + ratio / weight_decay)
    return jnp.log1p(-jnp.minimum(share, 1)) / math.log1p(-shrink)  # infinite beyond all reach


@jax.jit
def _adam(t: Steps, b1: float, b2: float) -> Float[Array, "..."]:
    grown = _complement(b1**2 / b2, t) * _complement(b2, t)
    return _adam_limit(b1, b2) * jnp.sqrt(grown) / _complement(b1, t)


@jax.jit
def _nadam(t: Steps, b1: float, b2: float) -> Float[Array, "..."]:
    ratio, ahead, now = b1**2 / b2, b1 / _complement(b1, t + 1), 1 / _complement(b1, t)
    energy = ahead**2 * _complement(ratio, t) / (1 - ratio) + 2 * ahead * now + now**2
    return (1 - b1) * jnp.sqrt(energy * _complement(b2, t) / (1 - b2))


@jax.jit
def _weighted(weights: Float[Array, " t"], b2: float) -> Float[Array, ""]:
    age = jnp.arange(len(weights) - 1, -1, -1)
    # In logarithms: b2^-(t-i) overflows long before the weight that it multiplies vanishes.
    energy = jnp.exp(2 * jnp.log(jnp.abs(weights)) - age * jnp.log(b2))
    return jnp.sqrt(jnp.sum(energy) * _complement(b2, len(weights)) / (1 - b2))


@jax.jit
def _reach(step_sizes: Array, ratios: Array, weight_decay: float, start: Array | float) -> Array:
    def step(reach: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        eta, ratio = now
        reach = (1 - eta * weight_decay) * reach + eta * (weight_decay * jnp.abs(start) + ratio)
        return reach, reach

    return jax.lax.scan(step, jnp.zeros((), ratios.dtype), (step_sizes, ratios))[1]


@jax.jit
def _adam_limit(b1: float, b2: float) -> Float[Array, ""]:
    return (1 - b1) / jnp.sqrt((1 - b2) * (1 - b1**2 / b2))


@jax.jit
def _nadam_limit(b1: float, b2: float) -> Float[Array, ""]:
    ratio = b1**2 / b2
    return (1 - b1) * jnp.sqrt(((1 + b1) ** 2 + b1**2 * ratio / (1 - ratio)) / (1 - b2))


def _check_rates(b1: float, b2: float) -> None:
    if isinstance(b1, Tracer) or isinstance(b2, Tracer):
        return
    if not (0 <= b1 < 1 and 0 < b2 < 1):
        raise SpecError(f"b1 = {b1}, b2 = {b2}: decay rates lie in [0, 1), b2 is not 0.")
    if not b1**2 < b2:
        raise SpecError(
            f"b1 = {b1}, b2 = {b2}: needs b1^2 < b2, without which the displacement grows without bound; "
            "for finitely many steps see weighted_displacement."
        )


def _check_count(t: Steps) -> None:
    if not isinstance(t, Tracer) and np.any(np.asarray(t) < 1):
        raise SpecError(f"t = {t}: steps are counted from 1.")


def _complement(rate: float, t: Steps) -> Float[Array, "..."]:
    """Return 1 - rate^t without cancellation."""
    return -jnp.expm1(t * jnp.log(rate))
