"""Worst cases over a class of functions: steps to a point of small gradient (THEORY.md 3.6).

F(gap, L1, L2) holds the functions with f(x_0) - inf f <= gap, gradient L1-Lipschitz and Hessian L2-Lipschitz,
in any dimension. A bound here speaks of the slowest member of a class, with eps a gradient norm in the
coordinates in which L1 and L2 are measured; it says nothing about one network.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

Number = Float[Array, "..."] | float

# Of the hard function: f(0) - inf <= CHAIN_GAP a coordinate, and the Lipschitz constants of its gradient and
# Hessian (statement 3.6 derives them from the extreme values of its two building blocks).
CHAIN_GAP, CHAIN_L1, CHAIN_L2 = 12.0, 152.0, 2100.0


def first_order_upper(gap: Number, L1: Number, eps: Number) -> Float[Array, "..."]:
    """Return 2 gap L1 / eps^2: within so many steps gradient descent at step 1 / L1 meets |grad f| <= eps.

    Args:
      gap: f(x_0) - inf f.
      L1: Lipschitz constant of the gradient.
      eps: gradient norm to reach.

    Source: THEORY.md 3.6; Nesterov, Introductory Lectures on Convex Optimization (2004), 1.2.3.

    Example:
      >>> float(first_order_upper(1.0, 8.0, 0.5))
      64.0
    """
    return 2 * jnp.asarray(gap) * L1 / jnp.square(eps)


def second_order_upper(gap: Number, L2: Number, eps: Number) -> Float[Array, "..."]:
    """Return 12 gap sqrt(L2) eps^-3/2: so many steps of cubic-regularized Newton meet |grad f| <= eps.

    The regularization is L2 |s|^3 / 6 (sigma = L2 / 2 in optim.cubic_newton), its model minimized globally.

    Args:
      gap: f(x_0) - inf f.
      L2: Lipschitz constant of the Hessian.
      eps: gradient norm to reach.

    Source: THEORY.md 3.6; Nesterov and Polyak, Math. Program. 108 (2006) 177, with this constant.
    """
    return 12 * jnp.asarray(gap) * jnp.sqrt(L2) / jnp.asarray(eps) ** 1.5


def first_order_lower(gap: Number, L1: Number, eps: Number) -> Float[Array, "..."]:
    """Return a number of steps that some f in F(gap, L1) takes from every first-order method.

    After that many queries no method whose iterates stay in the span of the coordinates it has seen
    (zero-respecting; every deterministic method, after a rotation) has met |grad f| <= eps. The function
    needs as many dimensions.

    Args:
      gap: f(x_0) - inf f.
      L1: Lipschitz constant of the gradient.
      eps: gradient norm to reach.

    Source: THEORY.md 3.6; Carmon, Duchi, Hinder and Sidford, Math. Program. 184 (2020) 71, theorem 1.
    """
    return jnp.floor(jnp.asarray(gap) * L1 / (CHAIN_GAP * CHAIN_L1 * jnp.square(eps)))


def second_order_lower(gap: Number, L2: Number, eps: Number) -> Float[Array, "..."]:
    """Return a number of steps that some f in F(gap, L2) takes from every method that sees Hessians too.

    As first_order_lower; the method may use values, gradients and Hessians.

    Args:
      gap: f(x_0) - inf f.
      L2: Lipschitz constant of the Hessian.
      eps: gradient norm to reach.

    Source: THEORY.md 3.6; Carmon, Duchi, Hinder and Sidford (2020), theorem 1 with p = 2.
    """
    return jnp.floor(
        jnp.asarray(gap) * jnp.sqrt(L2) / (CHAIN_GAP * math.sqrt(CHAIN_L2) * jnp.asarray(eps) ** 1.5)
    )


def deformed_lipschitz(L1: Number, L2: Number, alpha: Number) -> tuple[Number, Number]:
    """Return alpha^2 L1 and alpha^3 L2: the least Lipschitz constants that hold for every deformed f.

    f o phi^-1 with ||phi^-1|| = alpha; attained by an f that varies along C's fast directions alone. So the
    first-order bounds grow by alpha^2 and the second-order ones by alpha^1.5, eps the norm of the DEFORMED
    gradient. A gradient norm eps of the original asks for eps / alpha in deformed coordinates.

    Args:
      L1: Lipschitz constant of the gradient in original coordinates.
      L2: of the Hessian.
      alpha: at least 1.

    Source: THEORY.md 3.6 and 4.2.
    """
    return L1 * jnp.square(alpha), L2 * jnp.asarray(alpha) ** 3
