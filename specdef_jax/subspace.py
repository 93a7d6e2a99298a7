"""Singular subspaces of one matrix, without a full decomposition.

A matrix has shape (rest, d): its last axis holds the features of the deformed side, and the
subspace U (d, k) is spanned by right singular vectors. The deformed pair is exact for any
orthonormal U (THEORY.md 0), so an inaccurate subspace is a quality reported in `residual` and
`status`, never an error.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, Shaped

from specdef_jax.errors import LeafError, SpecError
from specdef_jax.parametrization import full_precision_matmul as matmul

DENSE_LIMIT = 256  # up to here a dense decomposition is as quick as compiling the iteration
FLAT_AFTER = 5  # passes before a spectrum is called flat; a Gaussian then captures .94 of the best energy

# Any array is let in, so that a wrong shape or dtype is met by an error that says what to do.
Matrix = Shaped[Array | np.ndarray, "..."]


class Status(enum.IntEnum):
    """How a subspace was found; `advice` says what that means for the user."""

    CONVERGED = 0
    FLAT_SPECTRUM = 1
    STALLED = 2
    RANK_DEFICIENT = 3
    EXACT = 4

    @property
    def advice(self) -> str:
        """Return what this status means and what, if anything, to do about it."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "The residual is within the tolerance; nothing to do.",
    Status.FLAT_SPECTRUM: (
        "The tolerance was missed because the singular values hardly fall off around number k, so no "
        "k directions stand out. The deformation is exact all the same and nearly as good as with the "
        "exact directions; raise max_passes, loosen tol, or choose k at a gap of the spectrum."
    ),
    Status.STALLED: (
        "The passes were used up, or rounding stopped the progress, before the tolerance was met. The "
        "deformation is exact all the same; raise max_passes, loosen tol, or pass float64."
    ),
    Status.RANK_DEFICIENT: (
        "Some of the k singular values are zero to rounding. Those directions carry no signal and "
        "give no curvature, and any orthonormal completion is as good; choose k at most the rank, or "
        "other directions."
    ),
    Status.EXACT: "The directions were given or found by a dense decomposition; nothing to do.",
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Subspace:
    """An orthonormal basis, with what the matrix does on it.

    The residual is max_i ||M^T v_i - s_i u_i|| / max_j s_j with s_i = ||M u_i||, v_i = M u_i / s_i,
    over the directions whose s_i is not negligible (at most eps sqrt(max(rest, d)) ||M||, eps that
    of `U.dtype`). It is the size of the perturbation of M that would make (s_i, u_i, v_i) exact, in
    units of the largest s_j returned: of ||M|| for "top", of a small number, hence stricter, for
    "bottom". It is evaluated with products with M itself, so it certifies what is returned.

    Attributes:
      U: orthonormal basis, (d, k), in float64 for a float64 matrix and in float32 otherwise.
      singular_values: ||M u_i||, (k,), in descending order for "top", ascending for "bottom".
      residual: see above, scalar.
      status: a Status, as an int32 scalar.
      passes: steps of the iteration, int32 scalar; 0 where nothing was iterated.
    """

    U: Float[Array, "*stack d k"]
    singular_values: Float[Array, "*stack k"]
    residual: Float[Array, "*stack"]
    status: Int[Array, "*stack"]
    passes: Int[Array, "*stack"]


def top_subspace(
    matrix: Matrix,
    k: int,
    *,
    tol: float = 1e-2,
    max_passes: int = 12,
    key: PRNGKeyArray,
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
            return _dense(matrix, k, bottom=False)
        return _top(matrix, k, tol, max_passes, key)


def bottom_subspace(
    matrix: Matrix,
    k: int,
    *,
    tol: float = 1e-2,
    max_passes: int = 30,
    key: PRNGKeyArray,
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
            return _dense(matrix, k, bottom=True)
        return _bottom(matrix, k, tol, max_passes, key)


def axis_subspace(matrix: Matrix, k: int, *, bottom: bool = False) -> Subspace:
    """Return the k columns of the identity at the features of largest norm (basis "axis").

    With `bottom`, the features of smallest norm that are not zero; zero features come last, with
    status RANK_DEFICIENT. Ties go to the lower index. Errors are those of top_subspace; the source
    is THEORY.md 0.
    """
    with jax.enable_x64(True):
        return _axis(_checked(matrix, k), k, bottom)


def random_subspace(matrix: Matrix, k: int, *, key: PRNGKeyArray) -> Subspace:
    """Return k uniformly random orthonormal directions: the control for a choice of directions.

    Errors are those of top_subspace.
    """
    with jax.enable_x64(True):
        matrix = _checked(matrix, k)
        return _given(matrix, _normal(key, (matrix.shape[1], k), jnp.float64))


def given_subspace(matrix: Matrix, directions: Matrix) -> Subspace:
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
        if directions.shape[0] != matrix.shape[1]:
            raise SpecError(
                f"directions have shape {directions.shape}, but the matrix has {matrix.shape[1]} features: "
                f"give an array ({matrix.shape[1]}, k)."
            )
        if not isinstance(directions, Tracer):
            _check_columns(np.asarray(directions))
        return _given(matrix, directions.astype(jnp.float64))


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


def block_size(k: int) -> int:
    """Return the block width: 1.5 k + 8, rounded up to a width that matrix products like."""
    return -(-(3 * k // 2 + 8) // 16) * 16


def _is_small(matrix: Array, k: int) -> bool:
    return min(matrix.shape) <= max(DENSE_LIMIT, 2 * block_size(k))


@partial(jax.jit, static_argnames=("k",))
def _top(matrix: Array, k: int, tol: ArrayLike, max_passes: ArrayLike, key: PRNGKeyArray) -> Subspace:
    barrier = jax.lax.optimization_barrier

    def step(rows: Array) -> tuple[Array, _Ritz]:
        X, _ = jnp.linalg.qr(rows.T)
        Q, R = jnp.linalg.qr(matmul(matrix, X))
        P, s, Wt = jnp.linalg.svd(R)  # M X = Q P diag(s) Wt, so M (X W) = (Q P) diag(s)
        # Without the barriers XLA propagates LAPACK's column order into the products with M, which
        # then take twice as long on a CPU.
        left = barrier(matmul(Q, P))
        rows = barrier(matmul(left.T, matrix))
        Ut = matmul(Wt[:k], X.T)
        errors = jnp.linalg.norm(rows[:k] - s[:k, None] * Ut, axis=1)
        rate = jnp.square(s[-1] / s[k - 1])
        residual = _relative(errors, s[:k], s[:k] > _negligible(matrix, s[0]))
        return rows, _Ritz(Ut.T, s[:k], residual, rate)

    start = _normal(key, (block_size(k), matrix.shape[0]), matrix.dtype)
    ritz, passes, status = _iterate(step, matmul(start, matrix), tol, max_passes)
    return _found(ritz, _negligible(matrix, ritz.s[0]), passes, status)


@partial(jax.jit, static_argnames=("k",))
def _bottom(matrix: Array, k: int, tol: ArrayLike, max_passes: ArrayLike, key: PRNGKeyArray) -> Subspace:
    M = matrix.astype(jnp.float64)
    wide = M if M.shape[0] < M.shape[1] else M.T
    gram = matmul(wide, wide.T)
    energy = jnp.trace(gram)
    # Rounding leaves the Gram matrix indefinite by about eps times its norm.
    shift = jnp.where(energy > 0, 8 * len(gram) ** 0.5 * jnp.finfo(M.dtype).eps * energy, 1.0)
    factor = jnp.linalg.cholesky(gram + shift * jnp.eye(len(gram)))

    def solve(x: Array) -> Array:
        return jax.scipy.linalg.cho_solve((factor, True), x)

    def annihilated(x: Array) -> Array:
        """Project on the null space of `wide`; twice, as the shift leaves a remainder."""
        for _ in range(2):
            x = x - matmul(wide.T, solve(matmul(wide, x)))
        return x

    start_key, filler_key = jax.random.split(key)
    filler = _normal(filler_key, (wide.shape[1], k), M.dtype)

    def step(block: Array) -> tuple[Array, _Ritz]:
        X, _ = jnp.linalg.qr(solve(block))
        Q, R = jnp.linalg.qr(matmul(wide.T, X))
        P, s, Wt = jnp.linalg.svd(R)
        left, right, s = matmul(X, Wt.T)[:, ::-1], matmul(Q, P)[:, ::-1][:, :k], s[::-1]
        if wide is M:
            lost = s[:k] <= _negligible(matrix, jnp.sqrt(energy))
            U, _ = jnp.linalg.qr(jnp.where(lost, annihilated(filler), right))
        else:
            U = left[:, :k]
        U = U.astype(matrix.dtype)  # certify what is returned
        sigma, residual = _certify(M, U.astype(M.dtype), _negligible(matrix, jnp.sqrt(energy)))
        return left, _Ritz(U, sigma, residual, jnp.square(s[k - 1] / s[-1]))

    start = _normal(start_key, (len(gram), block_size(k)), M.dtype)
    ritz, passes, status = _iterate(step, start, tol, max_passes)
    return _found(ritz, _negligible(matrix, jnp.sqrt(energy)), passes, status)


@partial(jax.jit, static_argnames=("k", "bottom"))
def _dense(matrix: Array, k: int, bottom: bool) -> Subspace:
    M = matrix.astype(jnp.float64)
    _, s, rows = jnp.linalg.svd(M, full_matrices=False)
    chosen = rows[::-1][:k] if bottom else rows[:k]
    return _exact(matrix, chosen.T, s[0])


@partial(jax.jit, static_argnames=("k", "bottom"))
def _axis(matrix: Array, k: int, bottom: bool) -> Subspace:
    norms = jnp.linalg.norm(matrix.astype(jnp.float64), axis=0)
    rank_by = jnp.where(norms > 0, norms, jnp.inf) if bottom else -norms
    chosen = jnp.argsort(rank_by, stable=True)[:k]
    return _exact(matrix, jax.nn.one_hot(chosen, len(norms), dtype=matrix.dtype).T, jnp.max(norms))


@jax.jit
def _given(matrix: Array, directions: Array) -> Subspace:
    U, R = jnp.linalg.qr(directions)
    U = U * jnp.where(jnp.diagonal(R) < 0, -1.0, 1.0)
    return _exact(matrix, U, jnp.linalg.norm(matrix.astype(jnp.float64)))


def _exact(matrix: Array, U: Array, norm: Array) -> Subspace:
    """Measure what a matrix does on directions that were not searched for."""
    U = U.astype(matrix.dtype)
    threshold = _negligible(matrix, norm)
    s, residual = _certify(matrix.astype(jnp.float64), U.astype(jnp.float64), threshold)
    return _found(_Ritz(U, s, residual, jnp.zeros(())), threshold, jnp.int32(0), jnp.int32(Status.EXACT))


class _Ritz(NamedTuple):
    """Approximate singular vectors, their values and residual, and the predicted rate per pass."""

    U: Array
    s: Array
    residual: Array
    rate: Array


def _iterate(
    step: Callable[[Array], tuple[Array, _Ritz]], start: Array, tol: ArrayLike, max_passes: ArrayLike
) -> tuple[_Ritz, Array, Array]:
    """Repeat a step until it converges, cannot converge, or runs out of passes."""

    def running(state: tuple[Array, _Ritz, Array, Array]) -> Array:
        return (state[2] < max_passes) & (state[3] == Status.STALLED)

    def advance(state: tuple[Array, _Ritz, Array, Array]) -> tuple[Array, _Ritz, Array, Array]:
        block, ritz = step(state[0])
        passes = state[2] + 1
        # Without a gap the rate is near 1. Early Ritz values make it too small, which is the safe
        # side: at worst some passes are spent before a flat spectrum is seen.
        log_rate = jnp.log(jnp.clip(ritz.rate, 1e-12, 1 - 1e-6))
        predicted = passes + jnp.log(tol / ritz.residual) / log_rate
        flat = (passes >= FLAT_AFTER) & (predicted > max_passes)
        status = jnp.where(flat, Status.FLAT_SPECTRUM, Status.STALLED)
        status = jnp.where(ritz.residual <= tol, Status.CONVERGED, status)
        return block, ritz, passes, status.astype(jnp.int32)

    shapes = jax.eval_shape(step, start)[1]
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    state = (start, empty, jnp.int32(0), jnp.int32(Status.STALLED))
    _, ritz, passes, status = jax.lax.while_loop(running, advance, state)
    return ritz, passes, status


def _normal(key: PRNGKeyArray, shape: tuple[int, int], dtype: Any) -> Array:
    """Draw single-precision normals: float64 ones do not lower inside a jit of a caller without x64."""
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def _certify(M: Array, U: Array, threshold: Array) -> tuple[Array, Array]:
    """Return ||M u_i|| and the residual of Subspace, by products with M."""
    image = matmul(M, U)
    s = jnp.linalg.norm(image, axis=0)
    errors = jnp.linalg.norm(matmul(M.T, image / jnp.where(s > 0, s, 1.0)) - U * s, axis=0)
    return s, _relative(errors, s, s > threshold)


def _relative(errors: Array, s: Array, counted: Array) -> Array:
    largest = jnp.max(s)
    return jnp.max(jnp.where(counted, errors, 0.0)) / jnp.where(largest > 0, largest, 1.0)


def _negligible(matrix: Array, norm: Array) -> Array:
    """Return the size below which a singular value is zero to rounding of the matrix entries."""
    return jnp.finfo(matrix.dtype).eps * max(matrix.shape) ** 0.5 * norm


def _found(ritz: _Ritz, threshold: Array, passes: Array, status: Array) -> Subspace:
    status = jnp.where(jnp.any(ritz.s <= threshold), jnp.int32(Status.RANK_DEFICIENT), status)
    dtype = ritz.U.dtype
    return Subspace(ritz.U, ritz.s.astype(dtype), ritz.residual.astype(dtype), status, passes)
