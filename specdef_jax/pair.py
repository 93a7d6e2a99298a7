"""The deformed pair of one matrix, rounded once from float64 (THEORY.md 0).

A matrix stands in the orientation of JAX kernels: (rest, d) on the output side, where the pair
multiplies from the right, M = (M T(a)) T(1/a), and (d, rest) on the input side, where it multiplies
from the left, M = T(1/a) (T(a) M); d are the deformed features.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specdef_jax.parametrization import Side
from specdef_jax.parametrization import full_precision_matmul as matmul

Basis = Literal["symmetric", "rotated", "axis"]


def build_pair(
    matrix: Float[Array, "*stack rows columns"],
    U: Float[Array, "*stack d k"],
    alpha: Float[Array, ""],
    basis: Basis,
    side: Side,
) -> tuple[Float[Array, "*stack rows columns"], Float[Array, "*stack d d"]]:
    """Return (weight, comp), float64, whose product is the matrix up to the choice of basis.

    float64 is used whether or not the caller has enabled it. The symmetric basis takes M U in the
    precision of M: an error there moves M along U only, and the compensation scales it back.

    Args:
      matrix: (rest, d) on the output side, (d, rest) on the input side.
      U: directions, orthonormal to single precision or better.
      alpha: the factor.
      basis: which basis.
      side: where the compensation stands; weight @ comp on the output side, comp @ weight on the input.
    """
    with jax.enable_x64(True):
        U, alpha = U.astype(jnp.float64), alpha.astype(jnp.float64)
        return _CONSTRUCTIONS[basis](matrix, U, alpha, side)


def _symmetric(matrix: Array, U: Array, alpha: Array, side: Side) -> tuple[Array, Array]:
    """Return M T(a) or T(a) M, and T(1/a), with T(a) = I + (a - 1) U U^T."""
    U = _orthonormalize(U)
    narrow = U.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    if side == "output":
        along = (alpha - 1) * matmul(matrix, narrow).astype(jnp.float64)
        added = matmul(along, _transpose(U))
    else:
        along = (alpha - 1) * matmul(_transpose(narrow), matrix).astype(jnp.float64)
        added = matmul(U, along)
    comp = jnp.eye(U.shape[-2]) + matmul((1 / alpha - 1) * U, _transpose(U))
    return matrix + added, comp


def _rotated(matrix: Array, U: Array, alpha: Array, side: Side) -> tuple[Array, Array]:
    """Return M Q D and D^-1 Q^T, or D Q^T M and Q D^-1, with Q = [U, U_perp], D = diag(a x k, 1, ...)."""
    Q = jnp.linalg.qr(U, mode="complete")[0]
    scales = _scales(jnp.arange(U.shape[-2]) < U.shape[-1], alpha)
    matrix = matrix.astype(jnp.float64)
    # Scaling after the product: a power of two then changes exponents only (THEORY.md 1.3).
    if side == "output":
        return matmul(matrix, Q) * scales, _transpose(Q) / scales[:, None]
    return scales[:, None] * matmul(_transpose(Q), matrix), Q / scales


def _axis(matrix: Array, U: Array, alpha: Array, side: Side) -> tuple[Array, Array]:
    """Return M D or D M, and D^-1, with D = T(a) diagonal: U holds columns of the identity."""
    scales = _scales(jnp.sum(jnp.abs(U), axis=-1) > 0.5, alpha)
    along = scales[..., None, :] if side == "output" else scales[..., :, None]
    return matrix * along, jnp.eye(U.shape[-2]) / scales[..., None, :]


_CONSTRUCTIONS = {"symmetric": _symmetric, "rotated": _rotated, "axis": _axis}


def _scales(chosen: Array, alpha: Array) -> Array:
    return jnp.where(chosen, alpha, jnp.ones_like(alpha))


def _orthonormalize(U: Array) -> Array:
    """Polish columns that are orthonormal to single precision: one Cholesky step in float64.

    C Wt = W holds to the orthonormality of U times alpha, so U as found is not good enough.
    """
    factor = jnp.linalg.cholesky(matmul(_transpose(U), U))
    identity = jnp.broadcast_to(jnp.eye(U.shape[-1]), factor.shape)
    inverse = jax.scipy.linalg.solve_triangular(factor, identity, lower=True)
    # A product and not a solve with U: LAPACK's column order would spread from a solve to the large
    # products, which then take twice as long on a CPU.
    return matmul(U, _transpose(inverse))


def _transpose(a: Array) -> Array:
    return jnp.swapaxes(a, -1, -2)
