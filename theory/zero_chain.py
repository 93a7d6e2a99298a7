"""The hard function of Carmon, Duchi, Hinder and Sidford: a chain that shows one coordinate at a time.

    f(x) = -Psi(1) Phi(x_1) + sum_(i >= 2) Psi(-x_(i-1)) Phi(-x_i) - Psi(x_(i-1)) Phi(x_i),
    Psi(x) = exp(1 - 1 / (2 x - 1)^2) for x > 1/2, else 0,      Phi(x) = sqrt(e) int_(-inf)^x exp(-t^2 / 2)
dt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specdef_jax.bounds.complexity import CHAIN_L1, CHAIN_L2

ROOT_E = float(np.sqrt(np.e))
FINEST = 1e-4  # spacing of the grids on which the extremes of Psi and Phi are found


def psi(x: Float[Array, ""] | float) -> Array:
    """Return Psi, with all its derivatives 0 up to 1/2."""
    u = 2 * jnp.asarray(x) - 1
    # Below 1/30 it is smaller than any float, and so are its derivatives.
    alive = u > 1 / 30
    return jnp.where(alive, jnp.exp(1 - 1 / jnp.square(jnp.where(alive, u, 1))), 0)


def big_phi(x: Float[Array, ""] | float) -> Array:
    """Return Phi."""
    return ROOT_E * np.sqrt(2 * np.pi) * jax.scipy.stats.norm.cdf(jnp.asarray(x))


def chain(x: Float[Array, " T"]) -> Float[Array, ""]:
    """Return f."""
    before = jnp.concatenate([jnp.ones(1, x.dtype), x[:-1]])
    return jnp.sum(psi(-before) * big_phi(-x) - psi(before) * big_phi(x))


def scaled(x: Float[Array, " T"], eps: float, lipschitz: float, order: int) -> Float[Array, ""]:
    """Return the chain scaled so that its gradient exceeds eps until the last coordinate is found.

    Args:
      x: (T,).
      eps: gradient norm.
      lipschitz: L1 (order 1) or L2 (order 2) that the function keeps to.
      order: which of the two.
    """
    own = CHAIN_L1 if order == 1 else CHAIN_L2
    sigma = (own * eps / lipschitz) ** (1 / order)
    return eps * sigma * chain(x / sigma)


def extremes(fn: Callable[[Array], Array], low: float, high: float, orders: int = 3) -> list[float]:
    """Return sup |fn|, |fn'|, ..., on [low, high], on a grid, each raised by what lies between its points.

    Args:
      fn: of one number.
      low: end of the interval.
      high: other end.
      orders: how many derivatives.
    """
    grid = jnp.arange(low, high, FINEST)
    found = []
    for _ in range(orders + 2):
        found.append(float(jnp.max(jnp.abs(jax.lax.map(fn, grid, batch_size=4096)))))
        fn = jax.grad(fn)
    return [size + FINEST / 2 * slope for size, slope in itertools.pairwise(found)]
