"""Trace and diagonal of an operator from random products, with standard errors.

trace is XTrace, which uses every vector both to approximate the operator's range and to sample what is left:
its error falls as fast as the spectrum decays, and where the rank is below p it is exact.
Source: Epperly, Tropp and Webber, SIAM J. Matrix Anal. Appl. 45 (2024) 1; for the diagonal Bekas, Kokiopoulou
and Saad, Appl. Numer. Math. 57 (2007) 1214.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.curvature import basis as bs
from specdef_jax.curvature.operators import Operator, flattened, is_spread, random_vector, unravel
from specdef_jax.errors import ProblemError


class Estimate(NamedTuple):
    """A random estimate: unbiased, with its standard error (of each entry, for a tree) and its price."""

    value: PyTree
    stderr: PyTree
    matvecs: int


def trace(op: Operator, *, key: PRNGKeyArray, probes: int = 20) -> Estimate:
    """Return an estimate of the trace of a square operator, from 2 * probes products.

    Args:
      op: square operator, symmetric or not. Its image has the structure of its domain.
      key: seeds the vectors.
      probes: number p of vectors, at least 2 and below op.size; 2 p vectors are held. An operator of no more
        rows has its trace summed exactly, by op.size products.

    Raises:
      ProblemError: the operator is not square, or probes has no meaning.

    Example:
      >>> op = from_matrix(jnp.diag(jnp.array([1.0] * 3 + [0.0] * 97)))
      >>> round(float(trace(op, key=jax.random.key(0), probes=5).value), 3)
      3.0
    """
    _check_square(op, probes)
    if op.size <= probes:
        value = _exact_trace(op)
        return Estimate(value, jnp.zeros_like(value), op.size)
    value, stderr = _xtrace(op if is_spread(op) else flattened(op), key, probes)
    return Estimate(value, stderr, 2 * probes)


def diagonal(op: Operator, *, key: PRNGKeyArray, probes: int = 100) -> Estimate:
    """Return an estimate of the diagonal, the mean of v * A v over random signs v, one product each.

    Its variance in entry i is the sum of the squares of the other entries of row i (of the symmetric part,
    about), over probes.

    Args:
      op: square operator.
      key: seeds the signs.
      probes: number of products, at least 2.

    Raises:
      ProblemError: the operator is not square, or probes has no meaning.
    """
    _check_square(op, probes)
    value, stderr = _sampled_diagonal(op, key, probes)
    return Estimate(value, stderr, probes)


def _check_square(op: Operator, probes: int) -> None:
    if op.shape[0] != op.shape[1]:
        raise ProblemError(f"this needs a square operator, this {op.kind} has shape {op.shape}.")
    if probes < 2:
        raise ProblemError(f"probes = {probes}; give at least 2, for there to be a standard error.")


@jax.jit
def _exact_trace(op: Operator) -> Array:
    def entry(i: Array) -> Array:
        unit = jnp.zeros(op.size, op.dtype).at[i].set(1)
        return trees.inner(unravel(op.template, unit), op.mv(unravel(op.template, unit)))

    return jnp.sum(jax.lax.map(entry, jnp.arange(op.size)))


@partial(jax.jit, static_argnames="probes")
def _sampled_diagonal(op: Operator, key: PRNGKeyArray, probes: int) -> tuple[PyTree, PyTree]:
    dtype = jnp.promote_types(op.dtype, jnp.float32)
    zeros = bs.zero(op.template, dtype)

    def add(i: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        mean, squares = carry
        normals = random_vector(op, jax.random.fold_in(key, i), dtype)
        signs = trees.signs(normals)
        sample = jax.tree.map(jnp.multiply, signs, bs.in_dtype(op.mv, dtype)(signs))
        away = jax.tree.map(jnp.subtract, sample, mean)
        mean = jax.tree.map(lambda m, d: m + d / (i + 1), mean, away)  # Welford's update
        squares = jax.tree.map(lambda q, d, s, m: q + d * (s - m), squares, away, sample, mean)
        return mean, squares

    mean, squares = jax.lax.fori_loop(0, probes, add, (zeros, zeros))
    return mean, jax.tree.map(lambda q: jnp.sqrt(q / (probes * (probes - 1))), squares)


@partial(jax.jit, static_argnames="probes")
def _xtrace(op: Operator, key: PRNGKeyArray, probes: int) -> tuple[Array, Array]:
    dtype = jnp.promote_types(op.dtype, jnp.float32)
    product = bs.in_dtype(op.mv, dtype)
    p, n = probes, op.size
    like = bs.zeros(p, op.template, dtype)

    def images(basis: PyTree) -> PyTree:
        return jax.lax.map(product, basis)

    keys = jax.random.split(key, (2, p))
    drawn, spare = (jax.lax.map(lambda k: random_vector(op, k, dtype), row) for row in keys)
    reach = images(drawn)

    def orthonormal(j: Array, basis: PyTree) -> PyTree:
        # a zero image, of an operator of lower rank, is replaced by a draw of its own: any direction serves
        image, length = bs.normalize(bs.row(reach, j))
        vector = jax.tree.map(lambda a, b: jnp.where(length > 0, a, b), image, bs.row(spare, j))
        return bs.set_row(basis, j, bs.orthonormalize(vector, basis, jnp.arange(p) < j))

    Q = jax.lax.fori_loop(0, p, orthonormal, like)
    Z = images(Q)
    R, W, H, T = _gram(Q, reach), _gram(Q, drawn), _gram(Q, Z), _gram(Z, drawn)
    lengths = _gram(drawn, drawn)

    def leave_out(i: Array) -> Array:
        others = jnp.where(jnp.arange(p) == i, 0, R)
        s = jnp.linalg.svd(others)[0][:, -1]  # Q s is orthogonal to the images of the others
        x = W[:, i] - s * jnp.dot(s, W[:, i])
        rest = W[:, i] @ R[:, i] - T[:, i] @ x - x @ R[:, i] + x @ H @ x
        return jnp.trace(H) - s @ H @ s + (n - p + 1) * rest / (lengths[i, i] - x @ x)

    estimates = jax.vmap(leave_out)(jnp.arange(p))
    return jnp.mean(estimates), jnp.std(estimates, ddof=1) / jnp.sqrt(p)


def _gram(a: PyTree, b: PyTree) -> Float[Array, "p p"]:
    """Return the inner products of the vectors of two bases, which keep a sharding."""
    return jax.vmap(lambda v: bs.coefficients(a, v), out_axes=1)(b)
