"""Vectors and bases as pytrees, for Krylov methods.

A basis is a tree whose leaves have a leading axis over the vectors, all leaves in one float dtype. Inner
products are elementwise products and sums: they keep a sharding, and XLA sums in a tree, where its float32
dot on CPU sums in sequence (errors of 2e-5 against 9e-9 at a million entries).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Scalar

from specdef_jax import trees
from specdef_jax.sharding import leading, placed, sharding_of

_COLUMNS = 1 << 14  # of a basis at a time while it is rotated


def zeros(count: int, template: PyTree, dtype: DTypeLike) -> PyTree:
    """Return a basis of `count` zero vectors shaped and sharded like `template`."""

    def one(t: jax.ShapeDtypeStruct | Array) -> Array:
        return placed(jnp.zeros((count, *t.shape), dtype), leading(sharding_of(t)))

    return jax.tree.map(one, template)


def zero(template: PyTree, dtype: DTypeLike) -> PyTree:
    """Return the zero vector shaped and sharded like `template`."""
    return jax.tree.map(lambda t: placed(jnp.zeros(t.shape, dtype), sharding_of(t)), template)


def row(basis: PyTree, i: Int[Array, ""] | int) -> PyTree:
    """Return vector i."""
    return jax.tree.map(lambda b: jax.lax.dynamic_index_in_dim(b, i, keepdims=False), basis)


def set_row(basis: PyTree, i: Int[Array, ""] | int, vector: PyTree) -> PyTree:
    """Return the basis with vector i replaced."""
    return jax.tree.map(lambda b, v: jax.lax.dynamic_update_index_in_dim(b, v, i, 0), basis, vector)


def coefficients(basis: PyTree, vector: PyTree) -> Float[Array, " m"]:
    """Return the inner product of every basis vector with a vector."""
    products = jax.tree.map(lambda b, v: jnp.sum(b * v, axis=tuple(range(1, b.ndim))), basis, vector)
    return jax.tree.reduce(jnp.add, products)


def dot(a: PyTree, b: PyTree) -> Scalar:
    """Return the inner product of two vectors."""
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))


def combine(weights: Float[Array, "*p m"], basis: PyTree) -> PyTree:
    """Return the combinations of the basis vectors with these weights, one tensordot per leaf."""
    return jax.tree.map(lambda b: jnp.tensordot(weights, b, axes=1, precision="highest"), basis)


def rotated(basis: PyTree, weights: Float[Array, "p m"], in_place: bool) -> PyTree:
    """Return the basis with its first p vectors replaced by combinations of all.

    Args:
      basis: of m vectors.
      weights: of the combinations.
      in_place: a few columns at a time, without a second basis: for one array (m, n) on one device. A split
        axis would be gathered.
    """
    if not in_place:
        mixed = combine(weights, basis)
        return jax.tree.map(lambda b, r: jax.lax.dynamic_update_slice_in_dim(b, r, 0, 0), basis, mixed)

    def turn(basis: Array, start: Array | int, width: int) -> Array:
        part = jax.lax.dynamic_slice_in_dim(basis, start, width, axis=1)
        return jax.lax.dynamic_update_slice(basis, combine(weights, part), (0, start))

    count, rest = divmod(basis.shape[1], _COLUMNS)
    if count:
        basis = jax.lax.fori_loop(0, count, lambda i, b: turn(b, i * _COLUMNS, _COLUMNS), basis)
    return turn(basis, count * _COLUMNS, rest) if rest else basis


def normalize(vector: PyTree) -> tuple[PyTree, Scalar]:
    """Return (vector / norm, norm); a zero vector is returned as it is.

    Scaled by the largest entry, so that the squares of 1e-30 or 1e30 in float32 neither vanish nor overflow.
    """
    largest = jax.tree.reduce(jnp.maximum, jax.tree.map(lambda x: jnp.max(jnp.abs(x), initial=0), vector))
    unit = jnp.where(largest > 0, largest, 1)
    scaled = jax.tree.map(lambda x: x / unit, vector)
    squares = jax.tree.map(lambda x: jnp.sum(x * x), scaled)
    length = jnp.sqrt(jax.tree.reduce(jnp.add, squares))
    divisor = jnp.where(length > 0, length, 1)
    return jax.tree.map(lambda x: x / divisor, scaled), length * largest


def orthogonalize(vector: PyTree, basis: PyTree, mask: Array, sweeps: int = 2) -> tuple[PyTree, Array]:
    """Return the vector minus its part in the masked basis vectors, and the coefficients removed."""
    removed = jnp.zeros(mask.shape, jax.tree.leaves(vector)[0].dtype)
    for _ in range(sweeps):
        weights = jnp.where(mask, coefficients(basis, vector), 0)
        vector = jax.tree.map(jnp.subtract, vector, combine(weights, basis))
        removed += weights
    return vector, removed


def orthonormalize(vector: PyTree, basis: PyTree, mask: Array) -> PyTree:
    """Return the unit vector along the part of `vector` orthogonal to the masked basis vectors."""
    # normalized in between: what is left after one sweep may be small against its own rounding
    first, _ = normalize(orthogonalize(vector, basis, mask, sweeps=1)[0])
    return normalize(orthogonalize(first, basis, mask)[0])[0]


def renewed(
    vector: PyTree, basis: PyTree, mask: Array, vacant: Array, raw: Array, key: PRNGKeyArray
) -> PyTree:
    """Return the vector; where vacant, a random one; where raw, made a unit orthogonal to the basis."""
    vector = jax.lax.cond(vacant, lambda v: trees.normal_like(key, v), lambda v: v, vector)
    return jax.lax.cond(raw, lambda v: orthonormalize(v, basis, mask), lambda v: v, vector)


def in_dtype(mv: Callable[[PyTree], PyTree], dtype: DTypeLike) -> Callable[[PyTree], PyTree]:
    """Return mv with its result cast to the dtype of the basis."""
    return lambda vector: jax.tree.map(lambda x: x.astype(dtype), mv(vector))
