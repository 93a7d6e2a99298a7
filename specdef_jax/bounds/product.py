"""Lower bounds on the largest singular value of a product A B C (THEORY.md 2.4).

An off-diagonal block of a Hessian factors as A B C with B a weight, so a bound on sigma_1(A B C) that
sees the spectrum of B says what deforming it does to the curvature. With P the top r1 right singular
vectors of A and Q the top r2 left ones of C, sigma_1(ABC) >= sigma_r1(A) ||P^T B Q|| sigma_r2(C); the
bounds differ in how they take B apart, and each is maximised over its indices.

Shapes: A (p, m), B (m, n), C (n, q), real, one float dtype. All of it runs under jit, grad and vmap.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specdef_jax.parametrization import full_precision_matmul as matmul

Left = Float[Array, "p m"]
Weight = Float[Array, "m n"]
Right = Float[Array, "n q"]
ROUNDING = 8.0  # see product_allowance


class Overlaps(NamedTuple):
    """What the bounds are made of.

    Attributes:
      a: singular values of A, (i,).
      b: singular values of B, (j + 1,), a zero appended.
      c: singular values of C, (l,).
      left: P_r^T U_j for every r, (i, i, j): rows beyond r are zero.
      right: Q_r^T V_j for every r, (l, l, j).
      sin_1: sine of the angle between u_1 and P_r, for every r, (i,).
      sin_2: of that between v_1 and Q_r, (l,).
    """

    a: Float[Array, " i"]
    b: Float[Array, " j_plus_1"]
    c: Float[Array, " l"]
    left: Float[Array, "i i j"]
    right: Float[Array, "l l j"]
    sin_1: Float[Array, " i"]
    sin_2: Float[Array, " l"]


def product_reported(A: Left, B: Weight, C: Right) -> Float[Array, ""]:
    """Return sup sigma_r1(A) sigma_1(B) sigma_r2(C) cos(th1) cos(th2): FALSE as a bound.

    th1 and th2 are read as the angles between B's top singular vectors and the two subspaces. Refuted by
    diag(1.01, 1) between two rotated rows; kept to show by how much and how often it fails.
    """
    o = _overlaps(A, B, C)
    return o.b[0] * jnp.max(o.a * _cosine(o.left)) * jnp.max(o.c * _cosine(o.right))


def product_v1(A: Left, B: Weight, C: Right) -> Float[Array, ""]:
    """Return V1 = sup sigma_r1(A) sigma_1(B) sigma_r2(C) smin(P^T U_B) smin(V_B^T Q), over r1, r2 >= rank B.

    U_B and V_B are the singular vectors of B's nonzero singular values. Zero where A or C has fewer
    singular values than B has rank: the bound is then vacuous.
    """
    o = _overlaps(A, B, C)
    rank = _rank(o.b[:-1], max(B.shape))
    low_1, low_2 = _smallest(o.left, rank), _smallest(o.right, rank)
    return o.b[0] * jnp.max(o.a * low_1) * jnp.max(o.c * low_2)


def product_v2(A: Left, B: Weight, C: Right) -> Float[Array, ""]:
    """Return V2 = sup sigma_r1(A) sigma_r2(C) [sigma_1(B) c1 c2 - sigma_2(B) s1 s2]_+.

    c1, s1 are cosine and sine of the angle between B's top left singular vector and P; c2, s2 those
    between its top right one and Q.
    """
    o = _overlaps(A, B, C)
    cosines = jnp.outer(_cosine(o.left), _cosine(o.right))
    inside = o.b[0] * cosines - o.b[1] * jnp.outer(o.sin_1, o.sin_2)
    return jnp.max(jnp.outer(o.a, o.c) * jnp.maximum(inside, 0))


def product_v2k(A: Left, B: Weight, C: Right) -> Float[Array, ""]:
    """Return V2k = sup sigma_r1(A) sigma_r2(C) [sigma_1(B) smin(P^T U_k) smin(V_k^T Q) - sigma_{k+1}(B)]_+.

    The supremum runs over k <= r1, r2; sigma_{k+1} = 0 for k = min(m, n).
    """
    o = _overlaps(A, B, C)
    ranks = jnp.arange(1, len(o.b))
    low_1, low_2 = (jax.vmap(lambda k, x=x: _smallest(x, k))(ranks) for x in (o.left, o.right))
    inside = o.b[0] * low_1[:, :, None] * low_2[:, None, :] - o.b[1:, None, None]
    return jnp.max(jnp.outer(o.a, o.c) * jnp.maximum(inside, 0))


def product_bound(A: Left, B: Weight, C: Right) -> Float[Array, ""]:
    """Return the best of the valid bounds V1, V2, V2k on sigma_1(A B C) from below.

    Zero means that it says nothing. In exact arithmetic it never exceeds sigma_1(A B C); computed, by no
    more than product_allowance.

    Args:
      A: (p, m).
      B: (m, n), the weight.
      C: (n, q).

    Source: Theorem 3 of arXiv 2602.18868 as reported, corrected; THEORY.md 2.4.

    Example:
      >>> A, B, C = jnp.eye(2), jnp.diag(jnp.array([3.0, 1.0])), jnp.eye(2)
      >>> float(product_bound(A, B, C))
      3.0
    """
    return jnp.maximum(product_v1(A, B, C), jnp.maximum(product_v2(A, B, C), product_v2k(A, B, C)))


def product_allowance(A: Left, B: Weight, C: Right) -> Float[Array, ""]:
    """Return how far rounding may lift a computed bound above sigma_1(A B C), or lower the latter.

    A computed singular value decomposition is the exact one of a matrix within p(d) eps of its own (backward
    stability), so the computed bounds belong to A', B', C' and || A'B'C' - ABC || <= 3 p(d) eps
    ||A|| ||B|| ||C|| to first order; the overlaps add as much again. Taken as ROUNDING d eps with d the
    largest dimension; the multiple is validated against 50-digit arithmetic in the tests.
    """
    d = max(*A.shape, *B.shape, *C.shape)
    norms = [jnp.linalg.norm(X, 2) for X in (A, B, C)]
    return ROUNDING * d * jnp.finfo(B.dtype).eps * norms[0] * norms[1] * norms[2]


def _overlaps(A: Left, B: Weight, C: Right) -> Overlaps:
    _, a, Pt = jnp.linalg.svd(A, full_matrices=False)
    U, b, Vt = jnp.linalg.svd(B, full_matrices=False)
    Q, c, _ = jnp.linalg.svd(C, full_matrices=False)
    return Overlaps(
        a,
        jnp.concatenate([b, jnp.zeros(1, b.dtype)]),
        c,
        _leading_rows(matmul(Pt, U)),
        _leading_rows(matmul(Q.T, Vt.T)),
        _sines(Pt, U[:, 0]),
        _sines(Q.T, Vt[0]),
    )


def _leading_rows(overlap: Float[Array, "i j"]) -> Float[Array, "i i j"]:
    """Return, for every r, the overlap with all rows beyond the first r set to zero."""
    i = len(overlap)
    return overlap * jnp.tril(jnp.ones((i, i), overlap.dtype))[:, :, None]


def _cosine(overlaps: Float[Array, "r i j"]) -> Float[Array, " r"]:
    """Return the cosine of the angle between B's top singular vector and each subspace."""
    return jnp.linalg.norm(overlaps[..., 0], axis=1)


def _sines(rows: Float[Array, "i d"], u: Float[Array, " d"]) -> Float[Array, " i"]:
    """Return |u - P_r P_r^T u| for every r: sqrt(1 - cos^2) would lose half the digits of a small angle."""
    along = jnp.cumsum(rows * (rows @ u)[:, None], axis=0)
    return jnp.linalg.norm(u - along, axis=1)


def _smallest(overlaps: Float[Array, "r i j"], rank: Int[Array, ""]) -> Float[Array, " r"]:
    """Return the rank-th singular value of each overlap's first `rank` columns; zero if there is none."""
    kept = overlaps * (jnp.arange(overlaps.shape[-1]) < rank)
    values = jnp.linalg.svd(kept, compute_uv=False)
    exists = rank <= values.shape[-1]
    return jnp.where(exists, jnp.take(values, jnp.minimum(rank, values.shape[-1]) - 1, axis=-1), 0)


def _rank(values: Float[Array, " j"], d: int) -> Int[Array, ""]:
    """Return the numerical rank: what is dropped is within the rounding allowance."""
    return jnp.sum(values > d * jnp.finfo(values.dtype).eps * values[0])
