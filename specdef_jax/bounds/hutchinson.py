"""Noise of a Hessian diagonal estimated from random probes (THEORY.md 4.4).

z * (H z) has the mean diag(H), and in entry i the variance sum_{j != i} H_ij^2 for random signs. In a basis
in which phi is diagonal, phi^-1 = diag(s), the deformed Hessian is s_i H_ij s_j: against its diagonal the
noise grows as alpha on the rest and as alpha^2 on the deformed directions of the weight.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def diagonal_variance(H: Float[Array, "n n"], *, normal: bool = False) -> Float[Array, " n"]:
    """Return the variance of each entry of z * (H z), one probe.

    sum_{j != i} H_ij^2 for random signs; 2 H_ii^2 more for standard normals.

    Args:
      H: symmetric.
      normal: whether probes are standard normal, and not random signs (Rademacher).

    Source: Bekas, Kokiopoulou and Saad, Appl. Numer. Math. 57 (2007) 1214; THEORY.md 4.4.

    Example:
      >>> import jax.numpy as jnp
      >>> diagonal_variance(jnp.array([[1.0, 2.0], [2.0, 5.0]])).tolist()
      [4.0, 4.0]
    """
    diagonal = jnp.diagonal(H)
    # Not (row of squares) - diagonal^2, which cancels.
    others = jnp.sum(jnp.square(H - jnp.diag(diagonal)), axis=1)
    return others + (2 * jnp.square(diagonal) if normal else 0)


def estimated_diagonal(H: Float[Array, "n n"]) -> Float[Array, " n"]:
    """Return the root mean square of each entry of z * (H z) for random signs: the norms of H's rows.

    AdaHessian divides by it once its mean square has settled, so H's off-diagonal entries take the place of
    its diagonal: scaled s_i H_ij s_j, the preconditioner is alpha s_i |H_i,fast|, and steps in original
    coordinates are s_i / alpha g_i / |H_i,fast|.

    Args:
      H: symmetric.

    Source: THEORY.md 4.4.
    """
    return jnp.linalg.norm(H, axis=1)


def probes_needed(
    H: Float[Array, "n n"], relative: float | Float[Array, ""], *, normal: bool = False
) -> Float[Array, " n"]:
    """Return how many probes give each diagonal entry to a relative standard deviation; inf for a zero one.

    Args:
      H: symmetric.
      relative: standard deviation of the mean over |H_ii|.
      normal: as in diagonal_variance.
    """
    diagonal = jnp.diagonal(H)
    zero = diagonal == 0
    wanted = jnp.square(relative * jnp.where(zero, 1, diagonal))
    return jnp.where(zero, jnp.inf, jnp.ceil(diagonal_variance(H, normal=normal) / wanted))
