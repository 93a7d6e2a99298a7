"""What rounding and inexact directions take from a deformed pair (THEORY.md 0, 1.1, 1.3 to 1.5).

The rounding bound of the pair itself and the largest usable alpha stand in specdef_jax/precision.py.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specdef_jax.pair import Basis
from specdef_jax.parametrization import full_precision_matmul as matmul
from specdef_jax.precision import unit_roundoff


def paper_compensation(
    weight: Float[Array, "m n"], k: Int[Array, ""] | int, alpha: Float[Array, ""] | float
) -> Float[Array, "m m"]:
    """Return the paper's C = U S S~^+ U^T of W = U S V^T, where S~ is S with the top k values times alpha.

    It equals T(1/alpha) P with P the orthogonal projector onto the range of W, so T(1/alpha) itself only
    where W has full row rank. C T(alpha) W = W all the same.

    Args:
      weight: W in the orientation of THEORY.md, y = W h; a kernel is its transpose.
      k: number of top singular directions, at most the rank of W.
      alpha: the factor.

    Returns:
      C, in the dtype that W and alpha promote to. Singular values below max(m, n) eps sigma_1 count as zero.

    Source: THEORY.md 0; arXiv 2602.18868 as reported. The pseudoinverse is ours: S~ need not be invertible.

    Example:
      >>> C = paper_compensation(jnp.diag(jnp.array([2.0, 1.0, 0.0])), 1, 4.0)
      >>> jnp.diagonal(C).tolist()
      [0.25, 1.0, 0.0]
    """
    U, values, _ = jnp.linalg.svd(weight, full_matrices=False)
    grown = values * jnp.where(jnp.arange(values.size) < k, alpha, 1.0)
    zero = values <= max(weight.shape) * jnp.finfo(values.dtype).eps * values[0]
    return matmul(U * jnp.where(zero, 0.0, values / jnp.where(zero, 1.0, grown)), U.T)


def pair_defect(
    weight: Float[Array, "m n"], U: Float[Array, "m k"], alpha: Float[Array, ""] | float
) -> Float[Array, "m n"]:
    """Return T(1/alpha) T(alpha) W - W = -((alpha - 1)^2 / alpha) U (U^T U - I) U^T W, for any U.

    Zero for orthonormal U. A defect of U is amplified in proportion to alpha, so directions that are
    orthonormal to single precision only do not give a pair that is exact to single precision.

    Args:
      weight: W, y = W h.
      U: directions, as they are.
      alpha: the factor.

    Source: THEORY.md 1.1.

    Example:
      >>> float(pair_defect(jnp.eye(2), jnp.array([[1.5], [0.0]]), 2.0)[0, 0])
      -1.40625
    """
    defect = matmul(U.T, U) - jnp.eye(U.shape[1], dtype=U.dtype)
    factor = -jnp.square(alpha - 1) / alpha
    return factor * matmul(matmul(U, defect), matmul(U.T, weight))


def exact_alpha_range(
    grown: Float[Array, "..."], shrunk: Float[Array, "..."], dtype: jnp.dtype | type
) -> Float[Array, ""]:
    """Return the largest alpha for which both stored factors stay within the normal numbers of a dtype.

    Up to it a power of two changes exponents only (THEORY.md 1.3), as far as the weights are concerned;
    activations must stay in range too.

    Args:
      grown: the entries that alpha multiplies, at alpha = 1: the k deformed features of W (axis) or of
        Q^T W (rotated).
      shrunk: the entries that alpha divides, at alpha = 1: ones (axis) or the first k columns of Q
        (rotated). Zeros do not count.
      dtype: storage dtype.

    Returns:
      A scalar in float64, or float32 where float64 is not enabled; infinite if nothing limits alpha.

    Source: THEORY.md 1.4.

    Example:
      >>> float(exact_alpha_range(jnp.array([0.5, -2.0]), jnp.ones(2), jnp.float16))
      16384.0
    """
    info = jnp.finfo(dtype)
    grown, shrunk = (x.astype(jnp.result_type(float)) for x in (grown, shrunk))
    largest = jnp.max(jnp.abs(grown))
    smallest = jnp.min(jnp.where(shrunk == 0, jnp.inf, jnp.abs(shrunk)))
    return jnp.minimum(float(info.max) / largest, smallest / float(info.tiny))


def entry_growth(alpha: Float[Array, "..."] | float, m: int, basis: Basis) -> Float[Array, "..."]:
    """Return the sharp bound on max |Wt| / max |W| over all W with m deformed features and all directions.

    1 + (alpha - 1)(1 + sqrt(m)) / 2 in the symmetric, alpha sqrt(m) in the rotated and alpha in the axis
    basis, for alpha >= 1. An alpha with entry_growth times max |W| within the largest number cannot overflow
    the weight.

    Args:
      alpha: the factor, at least 1.
      m: features of the deformed side.
      basis: which basis.

    Source: THEORY.md 1.4.

    Example:
      >>> [float(entry_growth(8.0, 4, basis)) for basis in ("symmetric", "rotated", "axis")]
      [11.5, 16.0, 8.0]
    """
    alpha = jnp.asarray(alpha)
    if basis == "symmetric":
        return 1 + (alpha - 1) * (1 + m**0.5) / 2
    return alpha * (m**0.5 if basis == "rotated" else 1.0)


def lost_update_threshold(theta: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return half the gaps from a stored number to its neighbours: towards zero, and away from it.

    Rounding theta + d to nearest gives theta again when |d| is smaller than the half gap on the side of d,
    and something else when it is larger; a tie goes to the even neighbour. Both lie in
    [u |theta| / 2, u |theta|] for normal theta.

    Args:
      theta: parameters, in their storage dtype.

    Returns:
      (towards, away), in float64, or float32 where float64 is not enabled; there a half gap below the
      smallest normal number may come out as zero.

    Source: THEORY.md 1.5.

    Example:
      >>> [float(x) for x in lost_update_threshold(jnp.asarray(1.0, jnp.bfloat16))]
      [0.001953125, 0.00390625]
    """
    info = jnp.finfo(theta.dtype)
    size = jnp.abs(theta).astype(jnp.result_type(float))
    mantissa, exponent = jnp.frexp(size)  # size = mantissa 2^exponent, mantissa in [1/2, 1)
    # Subnormal numbers are spaced as those of the lowest binade, whose frexp exponent is minexp + 1.
    lowest = exponent <= info.minexp + 1
    exponent = jnp.maximum(jnp.where(size == 0, info.minexp, exponent), info.minexp + 1)
    away = jnp.ldexp(jnp.full_like(size, unit_roundoff(theta.dtype)), exponent - 1)
    return jnp.where((mantissa == 0.5) & ~lowest, away / 2, away), away


def update_is_lost(theta: Float[Array, "..."], update: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Tell whether theta + update, rounded to nearest, ties to even, is theta again.

    The sum is not formed: |update| is compared with lost_update_threshold. An update of zero counts as lost.
    A tie at an odd subnormal number counts as lost on backends that flush subnormal numbers to zero.

    Args:
      theta: parameters, in their storage dtype.
      update: what an optimizer adds, in the storage dtype or one that float64 holds.

    Source: THEORY.md 1.5.

    Example:
      >>> theta = jnp.asarray(1.75, jnp.bfloat16)  # its half gap is 2^-8
      >>> update_is_lost(theta, jnp.array([0.0039, 0.005])).tolist()
      [True, False]
    """
    towards, away = lost_update_threshold(theta)
    step = update.astype(away.dtype)
    half = jnp.where(jnp.signbit(theta) == jnp.signbit(step), away, towards)
    odd = jnp.mod(jnp.abs(theta).astype(away.dtype) / (2 * away), 2) == 1
    return jnp.where(odd, jnp.abs(step) < half, jnp.abs(step) <= half)
