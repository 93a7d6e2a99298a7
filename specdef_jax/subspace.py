"""Singular subspaces of one matrix, without a full decomposition.

A matrix has shape (rest, d): its last axis holds the features of the deformed side, and the
subspace U (d, k) is spanned by right singular vectors. The deformed pair is exact for any
orthonormal U (THEORY.md 0), so an inaccurate subspace is a quality reported in `residual` and
`status`, never an error.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray, Shaped

from specdef_jax import block_iteration as search
from specdef_jax.errors import LeafError, SpecError
from specdef_jax.subspace_result import Status, Subspace

__all__ = [
    "Status",
    "Subspace",
    "axis_subspace",
    "bottom_subspace",
    "given_subspace",
    "random_subspace",
    "top_subspace",
]

DENSE_LIMIT = 256  # up to here a dense decomposition is as quick as compiling the iteration

# Any array is let in, so that a wrong shape or dtype is met by an error that says what to do.
Matrix = Shaped[Array | np.ndarray, "..."]


def top_subspace(
    matrix: Matrix,
    k: int,
    *,
    tol: float = 1e-2,
    max_passes: int = 12,
    key: PRNGKeyArray,
    transposed: bool = False,
) -> Subspace:
    """Return the leading k right singular vectors, by randomized block subspace iteration.

    One pass is a product with M, one with its transpose, and a Rayleigh-Ritz step on a block of
    about 1.5 k vectors. It stops when the residual (see Subspace) is at most `tol`; when the Ritz
    values predict, after a few passes, that `max_passes` will not reach it (FLAT_SPECTRUM); or at
    `max_passes` (STALLED). Small matrices are decomposed densely (EXACT). Compiles once per shape,
    dtype and k; may be jitted and vmapped over a stack.

    Args:
      matrix: M, (rest, d), any floating dtype; float16 and bfloat16 are computed in float32.
      k: number of directions, 1 <= k <= min(rest, d).
      tol: bound asked of the residual.
      max_passes: most passes to spend.
      key: draws the starting block.
      transposed: the array is M^T, (d, rest), which saves a copy of it.

    Raises:
      SpecError: k is out of range.
      LeafError: the matrix is not a 2-D floating array.

    Source: Halko, Martinsson and Tropp, SIAM Review 53 (2011), algorithm 4.4; THEORY.md 0.

    Example:
      >>> found = top_subspace(jnp.diag(jnp.arange(1.0, 5.0)), 2, key=jax.random.key(0))
      >>> [round(float(s), 3) for s in found.singular_values]
      [4.0, 3.0]
    """
    with jax.enable_x64(True):  # only so that a float64 matrix stays float64
        matrix = _checked(matrix, k)
        if _is_small(matrix, k):
            return search.dense(matrix, k, bottom=False, transposed=transposed)
        return search.top(matrix, k, tol, max_passes, key, transposed=transposed)


def bottom_subspace(
    matrix: Matrix,
    k: int,
    *,
    tol: float = 1e-2,
    max_passes: int = 30,
    key: PRNGKeyArray,
    transposed: bool = False,
) -> Subspace:
    """Return the right singular vectors of the k smallest of the min(rest, d) singular values.

    For rest < d the d - rest directions that every such matrix annihilates are left out: they carry
    no signal, so they would give no curvature (K_U = 0, THEORY.md 2.2). A matrix of lower rank
    still has zeros among its min(rest, d) singular values; those directions are returned, with
    status RANK_DEFICIENT. Block inverse iteration with one Cholesky factorization of the smaller
    Gram matrix, in float64 whatever the caller has enabled; singular values below about 1e-8 ||M||
    are not told apart. Small matrices are decomposed densely (EXACT).

    Args and errors are those of top_subspace.

    Source: Parlett, The Symmetric Eigenvalue Problem (1998), chapter 4; THEORY.md 3.3 (iv).
    """
    with jax.enable_x64(True):
        matrix = _checked(matrix, k)
        if _is_small(matrix, k):
            return search.dense(matrix, k, bottom=True, transposed=transposed)
        return search.bottom(matrix, k, tol, max_passes, key, transposed=transposed)


def axis_subspace(matrix: Matrix, k: int, *, bottom: bool = False, transposed: bool = False) -> Subspace:
    """Return the k columns of the identity at the features of largest norm (basis "axis").

    With `bottom`, the features of smallest norm that are not zero; zero features come last, with
    status RANK_DEFICIENT. Ties go to the lower index. Errors are those of top_subspace; the source
    is THEORY.md 0.
    """
    with jax.enable_x64(True):
        return search.axis(_checked(matrix, k), k, bottom, transposed=transposed)


def random_subspace(matrix: Matrix, k: int, *, key: PRNGKeyArray, transposed: bool = False) -> Subspace:
    """Return k uniformly random orthonormal directions: the control for a choice of directions.

    Errors are those of top_subspace.
    """
    with jax.enable_x64(True):
        matrix = _checked(matrix, k)
        directions = search.normal(key, (matrix.shape[0 if transposed else 1], k), jnp.float64)
        return search.given(matrix, directions, transposed=transposed)


def given_subspace(matrix: Matrix, directions: Matrix, *, transposed: bool = False) -> Subspace:
    """Return the user's directions, orthonormalized from the first column on.

    `directions` is (d, k); orthonormal ones come back unchanged. Under jit, where values cannot be looked at,
    finiteness and rank are not checked.

    Raises:
      SpecError: directions are not (d, k) with k <= min(rest, d), not finite, or not of full
        column rank.
      LeafError: the matrix is not a 2-D floating array.
    """
    with jax.enable_x64(True):
        directions = jnp.asarray(directions)
        if directions.ndim != 2:
            raise SpecError(f"directions have shape {directions.shape}: give an array (features, k).")
        matrix = _checked(matrix, directions.shape[1])
        features = matrix.shape[0 if transposed else 1]
        if directions.shape[0] != features:
            raise SpecError(
                f"directions have shape {directions.shape}, but the matrix has {features} features: "
                f"give an array ({features}, k)."
            )
        if not isinstance(directions, Tracer):
            _check_columns(np.asarray(directions))
        return search.given(matrix, directions.astype(jnp.float64), transposed=transposed)


def _checked(matrix: Matrix, k: int) -> Array:
    """Return the matrix in the dtype of the computation, float32 or float64."""
    matrix = jnp.asarray(matrix)
    if matrix.ndim != 2 or not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise LeafError(
            f"a subspace needs a real floating matrix (rest, d), found {matrix.dtype}{matrix.shape}; "
            "reshape it with KernelAxes.to_matrix and vmap over stacked layers."
        )
    if not 1 <= k <= min(matrix.shape):
        raise SpecError(f"k = {k}: must lie between 1 and min(rest, d) = {min(matrix.shape)}.")
    return matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))


def _check_columns(directions: np.ndarray) -> None:
    eps = float(jnp.finfo(directions.dtype).eps) if directions.dtype.kind != "i" else 0.0
    columns = directions.astype(np.float64)
    if not np.isfinite(columns).all():
        raise SpecError("directions hold NaN or Inf; give finite directions.")
    norms = np.linalg.norm(columns, axis=0)
    if not norms.all():
        raise SpecError(
            f"column {int(np.argmin(norms))} of directions is zero; give k independent directions."
        )
    spectrum = np.linalg.svd(columns / norms, compute_uv=False)
    rank = int(np.sum(spectrum > max(eps, 1e-14) * len(columns) ** 0.5 * spectrum[0]))
    if rank < columns.shape[1]:
        raise SpecError(
            f"directions have rank {rank}, fewer than their {columns.shape[1]} columns; "
            "drop the dependent ones."
        )


def _is_small(matrix: Array, k: int) -> bool:
    return min(matrix.shape) <= max(DENSE_LIMIT, 2 * search.block_size(k))
