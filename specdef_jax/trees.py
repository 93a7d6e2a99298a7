"""Pytrees as vectors: inner products, norms, key paths.

Inner products are written sum(a * b) and not vdot: vdot flattens its operands, which makes XLA
gather a sharded array, while an elementwise product keeps the sharding and reduces across it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, PRNGKeyArray, PyTree, Scalar

from specdef_jax.errors import StructureError
from specdef_jax.sharding import placed, sharding_of


def inner(a: PyTree, b: PyTree) -> Scalar:
    """Return the Euclidean inner product of two real trees of the same structure."""
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))


def norm(a: PyTree) -> Scalar:
    """Return the Euclidean norm of a real tree."""
    return jnp.sqrt(inner(a, a))


def scale(c: Inexact[Array, ""] | float, a: PyTree) -> PyTree:
    """Return c * a, leaf by leaf."""
    return jax.tree.map(lambda x: c * x, a)


def axpy(c: Inexact[Array, ""] | float, x: PyTree, y: PyTree) -> PyTree:
    """Return c * x + y, leaf by leaf."""
    return jax.tree.map(lambda u, v: c * u + v, x, y)


def size(a: PyTree) -> int:
    """Return the number of scalar entries in a tree of arrays or of shape structs."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(a))


def result_dtype(a: PyTree) -> jnp.dtype:
    """Return the dtype that the leaves of a tree promote to."""
    return jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(a)))


def double(a: PyTree) -> PyTree:
    """Return the tree with its floating leaves in float64; needs jax_enable_x64."""

    def convert(leaf: Any) -> Array:
        array = jnp.asarray(leaf)
        return array.astype(jnp.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array

    return jax.tree.map(convert, a)


def normal_like(key: PRNGKeyArray, a: PyTree) -> PyTree:
    """Draw a tree of independent standard normals with the structure, shapes, dtypes and shardings of `a`."""
    leaves, treedef = jax.tree.flatten(a)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        placed(jax.random.normal(k, leaf.shape, leaf.dtype), sharding_of(leaf))
        for k, leaf in zip(keys, leaves, strict=True)
    )


def signs(a: PyTree) -> PyTree:
    """Return 1 or -1 for every entry by its sign; of normals, independent fair signs."""
    return jax.tree.map(lambda x: jnp.where(x < 0, -1, 1).astype(x.dtype), a)


def path_name(path: tuple[Any, ...]) -> str:
    """Join a JAX key path with "/"; the ".value" that NNX variables add is dropped."""
    parts = [_key_name(entry) for entry in path]
    if parts and parts[-1] == "value" and isinstance(path[-1], jax.tree_util.GetAttrKey):
        parts = parts[:-1]
    return "/".join(parts)


def _key_name(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def named_leaves(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """Return (name, leaf) for every leaf, names joined by "/"."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(path_name(path), leaf) for path, leaf in pairs]


def map_named(fn: Callable[..., Any], tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> PyTree:
    """Map fn(name, leaf) over the leaves of a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fn(path_name(path), leaf), tree, is_leaf=is_leaf
    )


def check_same_structure(expected: PyTree, found: PyTree, what: str) -> None:
    """Raise StructureError, naming the first leaf that differs in path or shape."""
    a, b = dict(named_leaves(expected)), dict(named_leaves(found))
    for name in [*a, *(b.keys() - a.keys())]:
        if name not in b:
            raise StructureError(f"{what}: leaf '{name}' is missing; pass a tree with the same leaves.")
        if name not in a:
            raise StructureError(f"{what}: leaf '{name}' is not expected; pass a tree with the same leaves.")
        shape_a, shape_b = jnp.shape(a[name]), jnp.shape(b[name])
        if shape_a != shape_b:
            raise StructureError(
                f"{what}: leaf '{name}' has shape {shape_b}, expected {shape_a}; "
                "pass a tree with the same shapes."
            )
