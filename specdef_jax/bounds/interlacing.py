"""Eigenvalues of a symmetric matrix and of its blocks (THEORY.md 2.3).

For H symmetric n x n and Q with p orthonormal columns, eigenvalues ascending, Poincare's separation theorem
says lambda_i(H) <= lambda_i(Q^T H Q) <= lambda_{i+n-p}(H). With Q made of columns of the identity the
compression is a principal block, for instance the Hessian in one layer's parameters, and this is Cauchy's
interlacing. All of it runs under jit, grad and vmap.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from specdef_jax.errors import ProblemError


def compression_intervals(
    values: Float[Array, " n"], size: int
) -> tuple[Float[Array, " p"], Float[Array, " p"]]:
    """Return the intervals in which the eigenvalues of a p x p compression lie, from those of the matrix.

    Args:
      values: (n,), eigenvalues of H, ascending.
      size: p, 1 <= p <= n.

    Returns:
      (low, high), each (p,): low_i <= lambda_i(Q^T H Q) <= high_i, ascending; units and dtype of `values`.

    Raises:
      ProblemError: size is not between 1 and n.

    Source: Poincare's separation theorem (Horn and Johnson, Matrix Analysis, 2nd ed., 4.3.37); THEORY.md 2.3.

    Example:
      >>> low, high = compression_intervals(jnp.array([1.0, 2.0, 5.0]), 2)
      >>> low.tolist(), high.tolist()
      ([1.0, 2.0], [2.0, 5.0])
    """
    n = len(values)
    if not 1 <= size <= n:
        raise ProblemError(f"size = {size}: a compression of an {n} x {n} matrix has between 1 and {n} rows.")
    return values[:size], values[n - size :]


def matrix_intervals(values: Float[Array, " p"], size: int) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Return the intervals in which the eigenvalues of a matrix lie, from those of a compression.

    Args:
      values: (p,), eigenvalues of Q^T H Q, ascending.
      size: n >= p, of H.

    Returns:
      (low, high), each (n,): low_j <= lambda_j(H) <= high_j, ascending; infinite where the compression
      says nothing. Units and dtype of `values`.

    Raises:
      ProblemError: size is below p, or `values` is empty.

    Source: Poincare's separation theorem, read backwards; THEORY.md 2.3.

    Example:
      >>> low, high = matrix_intervals(jnp.array([2.0, 5.0]), 3)
      >>> low.tolist(), high.tolist()
      ([-inf, 2.0, 5.0], [2.0, 5.0, inf])
    """
    p = len(values)
    if not 1 <= p <= size:
        raise ProblemError(f"size = {size}: the matrix must be at least as large as its block of {p} rows.")
    unknown = jnp.full(size - p, jnp.inf, values.dtype)
    return jnp.concatenate([-unknown, values]), jnp.concatenate([values, unknown])


def off_diagonal_bound(values: Float[Array, " n"]) -> Float[Array, ""]:
    """Return (lambda_max - lambda_min) / 2, an upper bound on sigma_1 of every off-diagonal block.

    A block Q^T H P is off-diagonal when Q^T P = 0: rows and columns of H with no index in common. Where they
    share some, sigma_1(H) is the bound.

    Args:
      values: (n,), eigenvalues of H, in any order.

    Source: THEORY.md 2.3.

    Example:
      >>> float(off_diagonal_bound(jnp.array([-1.0, 0.0, 5.0])))
      3.0
    """
    return (jnp.max(values) - jnp.min(values)) / 2
