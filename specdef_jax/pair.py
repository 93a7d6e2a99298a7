"""The deformed pair of one matrix, built in float64 (THEORY.md 0).

Matrices stand as (rest, d) with the deformed features last, so the pair multiplies from the right:
M = (M T(a)) T(1/a) up to the choice of basis.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Basis = Literal["symmetric", "rotated", "axis"]


def build_pair(
    matrix: Float[Array, "*stack rest d"],
    U: Float[Array, "*stack d k"],
    alpha: Float[Array, ""],
    basis: Basis,
) -> tuple[Float[Array, "*stack rest d"], Float[Array, "*stack d d"]]:
    """Return (weight, comp), float64, with weight @ comp = matrix in exact arithmetic.

    float64 is used whether or not the caller has enabled it, so that rounding to the storage dtype
    is the only error that matters.
    """
    with jax.enable_x64(True):
        wide = (x.astype(jnp.float64) for x in (matrix, U, alpha))
        return _CONSTRUCTIONS[basis](*wide)


def _symmetric(matrix: Array, U: Array, alpha: Array) -> tuple[Array, Array]:
    """Return M T(a) and T(1/a), T(a) = I + (a - 1) U U^T."""
    U = _orthonormalize(U)
    transposed = jnp.swapaxes(U, -1, -2)
    weight = matrix + (alpha - 1) * _matmul(_matmul(matrix, U), transposed)
    comp = jnp.eye(U.shape[-2]) + (1 / alpha - 1) * _matmul(U, transposed)
    return weight, comp


def _rotated(matrix: Array, U: Array, alpha: Array) -> tuple[Array, Array]:
    """Return M Q D and D^-1 Q^T, Q = [U, U_perp], D = diag(a x k, 1, ...)."""
    Q = jnp.linalg.qr(U, mode="complete")[0]
    scales = _scales(jnp.arange(U.shape[-2]) < U.shape[-1], alpha)
    # Scaling after the product: a power of two then changes exponents only (THEORY.md 1.3).
    return _matmul(matrix, Q) * scales, jnp.swapaxes(Q, -1, -2) / scales[:, None]


def _axis(matrix: Array, U: Array, alpha: Array) -> tuple[Array, Array]:
    """Return M D and D^-1 with D = T(a) diagonal: the columns of U are columns of the identity."""
    scales = _scales(jnp.sum(jnp.abs(U), axis=-1) > 0.5, alpha)
    return matrix * scales[..., None, :], jnp.eye(U.shape[-2]) / scales[..., None, :]


_CONSTRUCTIONS = {"symmetric": _symmetric, "rotated": _rotated, "axis": _axis}


def _scales(chosen: Array, alpha: Array) -> Array:
    return jnp.where(chosen, alpha, jnp.ones_like(alpha))


def _orthonormalize(U: Array) -> Array:
    """Polish columns that are orthonormal to single precision: one Cholesky step in float64.

    C Wt = W holds to the orthonormality of U times alpha, so U as found is not good enough.
    """
    gram = _matmul(jnp.swapaxes(U, -1, -2), U)
    factor = jnp.linalg.cholesky(gram)
    return jnp.swapaxes(
        jax.scipy.linalg.solve_triangular(factor, jnp.swapaxes(U, -1, -2), lower=True), -1, -2
    )


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
