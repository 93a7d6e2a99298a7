"""Blocked randomized and inverse iteration for singular subspaces, compiled once per shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from specdef_jax.parametrization import full_precision_matmul as matmul
from specdef_jax.subspace_result import Status, Subspace

FLAT_AFTER = 5  # passes before a spectrum is called flat; a Gaussian then captures .94 of the best energy


def block_size(k: int) -> int:
    """Return the block width: 1.5 k + 8, rounded up to a width that matrix products like."""
    return -(-(3 * k // 2 + 8) // 16) * 16


@partial(jax.jit, static_argnames=("k", "transposed"))
def top(
    matrix: Array, k: int, tol: ArrayLike, max_passes: ArrayLike, key: PRNGKeyArray, *, transposed: bool
) -> Subspace:
    """Return the k largest right singular vectors of (rest, d) by blocked randomized iteration."""
    barrier = jax.lax.optimization_barrier

    def times(X: Array) -> Array:  # M X, in the order that costs least on a CPU
        return barrier(matmul(barrier(X).T, matrix)).T if transposed else matmul(matrix, X)

    def times_transposed(Q: Array) -> Array:  # (M^T Q)^T
        return barrier(matmul(matrix, barrier(Q))).T if transposed else matmul(Q.T, matrix)

    def step(rows: Array) -> tuple[Array, _Ritz]:
        X, _ = jnp.linalg.qr(rows.T)
        Q, R = jnp.linalg.qr(times(X))
        P, s, Wt = jnp.linalg.svd(R)  # M X = Q P diag(s) Wt, so M (X W) = (Q P) diag(s)
        # Without the barriers XLA propagates LAPACK's column order into the products with M, which
        # then take twice as long on a CPU.
        left = barrier(matmul(Q, P))
        rows = barrier(times_transposed(left))
        Ut = matmul(Wt[:k], X.T)
        errors = jnp.linalg.norm(rows[:k] - s[:k, None] * Ut, axis=1)
        rate = jnp.square(s[-1] / s[k - 1])
        residual = _relative(errors, s[:k], s[:k] > _negligible(matrix, s[0]))
        return rows, _Ritz(Ut.T, s[:k], residual, rate)

    rest = matrix.shape[1 if transposed else 0]
    start = normal(key, (rest, block_size(k)), matrix.dtype)
    ritz, passes, status = _iterate(step, times_transposed(start), tol, max_passes)
    return _found(ritz, _negligible(matrix, ritz.s[0]), passes, status)


@partial(jax.jit, static_argnames=("k", "transposed"))
def bottom(
    matrix: Array, k: int, tol: ArrayLike, max_passes: ArrayLike, key: PRNGKeyArray, *, transposed: bool
) -> Subspace:
    """Return the k smallest of min(rest, d) by inverse iteration with a Cholesky factor in float64."""
    matrix = matrix.T if transposed else matrix
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
    filler = normal(filler_key, (wide.shape[1], k), M.dtype)

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

    start = normal(start_key, (len(gram), block_size(k)), M.dtype)
    ritz, passes, status = _iterate(step, start, tol, max_passes)
    return _found(ritz, _negligible(matrix, jnp.sqrt(energy)), passes, status)


@partial(jax.jit, static_argnames=("k", "bottom", "transposed"))
def dense(matrix: Array, k: int, bottom: bool, *, transposed: bool) -> Subspace:
    """Return the k largest or smallest of a small matrix by its full decomposition in float64."""
    matrix = matrix.T if transposed else matrix
    M = matrix.astype(jnp.float64)
    _, s, rows = jnp.linalg.svd(M, full_matrices=False)
    chosen = rows[::-1][:k] if bottom else rows[:k]
    return _exact(matrix, chosen.T, s[0])


@partial(jax.jit, static_argnames=("k", "bottom", "transposed"))
def axis(matrix: Array, k: int, bottom: bool, *, transposed: bool) -> Subspace:
    """Return the k columns of the identity whose features have the largest or smallest non-zero norm."""
    matrix = matrix.T if transposed else matrix
    norms = jnp.linalg.norm(matrix.astype(jnp.float64), axis=0)
    rank_by = jnp.where(norms > 0, norms, jnp.inf) if bottom else -norms
    chosen = jnp.argsort(rank_by, stable=True)[:k]
    return _exact(matrix, jax.nn.one_hot(chosen, len(norms), dtype=matrix.dtype).T, jnp.max(norms))


@partial(jax.jit, static_argnames=("transposed",))
def given(matrix: Array, directions: Array, *, transposed: bool) -> Subspace:
    """Return the span of the given columns, orthonormalized with their signs kept."""
    matrix = matrix.T if transposed else matrix
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


def normal(key: PRNGKeyArray, shape: tuple[int, int], dtype: Any) -> Array:
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
