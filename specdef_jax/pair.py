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
    frame = frame_of(U, basis)
    scales = (U.shape[-1], alpha, basis, side)
    return deformed_weight(matrix, frame, *scales), compensation(frame, *scales)


def frame_of(U: Float[Array, "*stack d k"], basis: Basis) -> Float[Array, "*stack d f"]:
    """Return in float64 what both factors are made of.

    In the symmetric basis U, polished to float64; in the rotated one Q = [U, U_perp]; in the axis basis U,
    columns of the identity.
    """
    with jax.enable_x64(True):
        U = U.astype(jnp.float64)
        if basis == "rotated":
            return jnp.linalg.qr(U, mode="complete")[0]
        return _orthonormalize(U) if basis == "symmetric" else U


def deformed_weight(
    matrix: Float[Array, "*stack rows columns"],
    frame: Float[Array, "*stack d f"],
    k: int,
    alpha: Float[Array, ""],
    basis: Basis,
    side: Side,
) -> Float[Array, "*stack rows columns"]:
    """Return M T(a), or T(a) M on the input side, in float64; M may be a part of `rest`."""
    with jax.enable_x64(True):
        alpha = alpha.astype(jnp.float64)
        if basis == "symmetric":
            return _symmetric(matrix, frame, alpha, side)
        scales = _scales(frame, k, alpha, basis)
        along = scales[..., None, :] if side == "output" else scales[..., :, None]
        if basis == "axis":
            return matrix * along
        matrix = matrix.astype(jnp.float64)
        # Scaling after the product: a power of two then changes exponents only (THEORY.md 1.3).
        turned = matmul(matrix, frame) if side == "output" else matmul(_transpose(frame), matrix)
        return turned * along


def compensation(
    frame: Float[Array, "*stack d f"], k: int, alpha: Float[Array, ""], basis: Basis, side: Side
) -> Float[Array, "*stack d d"]:
    """Return T(1/a) in float64; in the rotated basis D^-1 Q^T (output side) or Q D^-1 (input side)."""
    with jax.enable_x64(True):
        alpha = alpha.astype(jnp.float64)
        if basis == "symmetric":
            return jnp.eye(frame.shape[-2]) + matmul((1 / alpha - 1) * frame, _transpose(frame))
        scales = _scales(frame, k, alpha, basis)
        if basis == "axis":
            return jnp.eye(frame.shape[-2]) / scales[..., None, :]
        if side == "output":
            return _transpose(frame) / scales[..., :, None]
        return frame / scales[..., None, :]


def _symmetric(matrix: Array, U: Array, alpha: Array, side: Side) -> Array:
    """Return M T(a) or T(a) M with T(a) = I + (a - 1) U U^T."""
    narrow = U.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    if side == "output":
        along = (alpha - 1) * matmul(matrix, narrow).astype(jnp.float64)
        return matrix + matmul(along, _transpose(U))
    along = (alpha - 1) * matmul(_transpose(narrow), matrix).astype(jnp.float64)
    return matrix + matmul(U, along)


def _scales(frame: Array, k: int, alpha: Array, basis: Basis) -> Array:
    """Return the diagonal of D: a on k coordinates, 1 on the others."""
    rotated = jnp.arange(frame.shape[-2]) < k
    chosen = rotated if basis == "rotated" else jnp.sum(jnp.abs(frame), axis=-1) > 0.5
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
