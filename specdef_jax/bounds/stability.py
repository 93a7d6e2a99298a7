"""Largest stable steps of first-order methods on a quadratic (THEORY.md 3.1).

For a Hessian H >= 0 with largest eigenvalue lambda the iteration converges iff the step is strictly
below the value given. LOCAL: near a minimum of a network it is the edge of linear stability, not a
cap on useful steps (training goes on at the edge of stability).
"""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from specdef_jax.errors import SpecError

Method = Literal["gd", "heavy_ball", "nesterov", "ema_momentum", "ema_nesterov"]


def max_stable_step(
    method: Method, curvature: Float[Array, "..."] | float, *, momentum: float = 0.9
) -> Float[Array, "..."]:
    """Return the supremum of stable step sizes; infinite where the curvature is not positive.

    Args:
      method: "gd"; "heavy_ball" (optax.sgd with momentum); "nesterov" (constant momentum, optax's
        form); "ema_momentum" and "ema_nesterov": m <- b m + (1 - b) g, as in Adam, with a frozen
        preconditioner P and `curvature` = lambda_max(P^-1 H).
      curvature: largest eigenvalue of the Hessian.
      momentum: b in [0, 1); ignored by "gd".

    Raises:
      SpecError: unknown method, or momentum outside [0, 1).

    Example:
      >>> float(max_stable_step("gd", 4.0))
      0.5
    """
    if method not in get_args(Method):
        raise SpecError(f"method {method!r}: must be one of {', '.join(get_args(Method))}.")
    if not 0 <= momentum < 1:
        raise SpecError(f"momentum = {momentum}: must lie in [0, 1).")
    b = momentum
    numerator = {
        "gd": 2.0,
        "heavy_ball": 2 * (1 + b),
        "nesterov": (2 + 2 * b) / (1 + 2 * b),
        "ema_momentum": (2 + 2 * b) / (1 - b),
        "ema_nesterov": (2 + 2 * b) / ((1 - b) * (1 + 2 * b)),
    }[method]
    curvature = jnp.asarray(curvature)
    flat = curvature <= 0  # and not ~(curvature > 0): a NaN stays one
    return jnp.where(flat, jnp.inf, numerator / jnp.where(flat, 1.0, curvature))


def max_stable_step_deformed(
    method: Method, k_max: Float[Array, "..."] | float, alpha: float, *, momentum: float = 0.9
) -> Float[Array, "..."]:
    """Return the step beyond which a deformed network is linearly unstable, from lambda_max(K_U).

    sigma_1(H_a) >= alpha^2 lambda_max(K_U) (THEORY.md 2.2), so no larger step is stable at that
    point when that eigenvalue is positive.
    """
    return max_stable_step(method, jnp.square(alpha) * jnp.asarray(k_max), momentum=momentum)
