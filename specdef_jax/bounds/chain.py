"""A chain of factors in the place of a deformed weight: sharper, not flatter (THEORY.md 5.4).

With C frozen, Wt = U_W S V^T is trained as a product of p factors that share its singular values evenly,
S^(1/p) each, where S holds a sigma_i on the deformed directions and sigma_i on the others. W = C F_1 ...
F_p throughout.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from specdef_jax.errors import SpecError


def chain_exponent(factors: int, *, whole: bool = False) -> float:
    """Return the power of alpha with which the curvature of a chain grows.

    2 (p - 1) / p when some output direction is not deformed (k < m); -2 / p for the layer's own curvature
    when all are (k = m). p = 1 is freezing (THEORY.md 5.2).

    Args:
      factors: p, at least 1.
      whole: whether k = m.

    Raises:
      SpecError: fewer than one factor.

    Example:
      >>> [chain_exponent(p) for p in (1, 2, 4)]
      [0.0, 1.0, 1.5]
    """
    if factors < 1:
        raise SpecError(f"factors = {factors}: a chain has at least one.")
    return -2 / factors if whole else 2 * (factors - 1) / factors


def chain_sides(
    values: Float[Array, " r"],
    deformed: Bool[Array, " r"],
    alpha: Float[Array, ""] | float,
    factors: int,
    rows: int,
    *,
    outside: Float[Array, ""] | float,
    sigma_1: Float[Array, ""] | float,
    gradient_norm: Float[Array, ""] | float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return what lies below and above the sharpness of the network with the chain.

    Below: s^(2 (p - 1) / p) K, with s the largest singular value of Wt, v its right singular vector and K the
    largest |curvature| of the loss along u v^T, u a unit vector orthogonal to U. Above:
    max(1, sum_j |C F_1 .. F_(j-1)|^2 |F_(j+1) .. F_p|^2) sigma_1(H) plus |g| times the norm of the matrix
    of second derivatives of the product.

    Args:
      values: singular values of W.
      deformed: which of them belong to directions in U.
      alpha: the factor, at least 1.
      factors: p, static.
      rows: m, the number of output features, static.
      outside: K.
      sigma_1: largest |eigenvalue| of the undeformed network's Hessian.
      gradient_norm: spectral norm of dL/dW.

    Raises:
      SpecError: fewer than one factor.

    Example:
      >>> ones, mask = jnp.array([4.0, 1.0]), jnp.array([True, False])
      >>> sides = chain_sides(ones, mask, 4.0, 2, 3, outside=1.0, sigma_1=1.0, gradient_norm=0.0)
      >>> [round(float(side), 2) for side in sides]
      [16.0, 17.0]
    """
    power = chain_exponent(factors) / 2
    stretched = jnp.where(deformed, alpha * values, values)
    top = jnp.max(stretched)
    lower = top ** (2 * power) * outside
    comp = jnp.where(deformed, 1 / alpha, 1.0)
    reaches_all = jnp.where(jnp.sum(deformed) < rows, 1.0, 1 / alpha)  # norm of C

    def before(j: int) -> Array:
        """Return the norm of C F_1 ... F_(j-1)."""
        return jnp.max(comp * stretched ** ((j - 1) / factors)) if j > 1 else reaches_all

    def after(j: int) -> Array:
        """Return the norm of F_(j+1) ... F_p."""
        return top ** ((factors - j) / factors)

    indices = range(1, factors + 1)
    jacobian = sum((before(j) * after(j)) ** 2 for j in indices)
    bilinear = jnp.zeros((factors, factors), stretched.dtype)
    for i in indices:
        for j in range(i + 1, factors + 1):
            norm = before(i) * top ** ((j - i - 1) / factors) * after(j)
            bilinear = bilinear.at[i - 1, j - 1].set(norm).at[j - 1, i - 1].set(norm)
    return lower, jnp.maximum(jacobian, 1.0) * sigma_1 + gradient_norm * jnp.linalg.norm(bilinear, 2)
