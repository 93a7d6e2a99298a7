"""Operators that are means over minibatches, one batch in memory at a time.

    op = streamed(partial(hessian, loss), params, batches)

Stacked arrays stay on the device and are scanned. A host sequence is read batch by batch from inside the
compiled loop, always in the same order: a product that shuffles, drops out or augments is no linear map, so
the sequence is probed by two products, which must agree to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from specdef_jax import trees
from specdef_jax.curvature.operators import Layout, Operator
from specdef_jax.errors import ProblemError, StructureError

Build = Callable[..., Operator]


@runtime_checkable
class Batches(Protocol):
    """A sequence of tuples of arrays, of which no more is asked than this."""

    def __len__(self) -> int:
        """Return the number of batches."""
        ...

    def __getitem__(self, i: int, /) -> Any:
        """Return batch i."""
        ...


def stacked(build: Build, params: PyTree, batches: PyTree) -> Operator:
    """Return the mean of build(params, *batch) over a leading axis of arrays on the device.

    Args:
      build: build(params, *batch) -> Operator on trees like params, e.g. partial(hessian, loss). Keep one
        object, or every call compiles again.
      params: tree of float arrays.
      batches: tuple of trees of arrays, whose leading axis counts the batches.

    Raises:
      ProblemError: there is no batch.
      StructureError: leading axes differ; the leaf is named.
    """
    counts = {name: jnp.shape(leaf)[:1] for name, leaf in trees.named_leaves(batches)}
    first = next(iter(counts.values()), ())
    for name, count in counts.items():
        if count != first:
            raise StructureError(f"batches: leaf '{name}' has a leading axis of {count}, others of {first}.")
    if not first or first[0] == 0:
        raise ProblemError("an operator over batches needs at least one batch.")
    one = build(params, *jax.tree.map(lambda leaf: leaf[0], batches))
    product = Partial(_Scanned(build), params, batches)
    return Operator(product, one.domain, f"mean {one.kind}", one.symmetric)


def streamed(build: Build, params: PyTree, batches: Batches, *, key: jax.Array) -> Operator:
    """Return the mean of build(params, *batch) over batches on the host, read again for every product.

    Args:
      build: as in stacked.
      params: tree of float arrays.
      batches: sequence of tuples of arrays, all of the same shapes; batches[i] may load from disk. It is
        called from inside a compiled program, and must not call JAX itself.
      key: of the vector that the order is probed with; two products are spent.

    Raises:
      ProblemError: there is no batch, or two passes over the batches do not agree to the bit.
      StructureError: a batch has another structure or other shapes than the first.
    """
    if len(batches) == 0:
        raise ProblemError("an operator over batches needs at least one batch.")
    first = jax.tree.map(np.asarray, tuple(batches[0]))
    one = build(params, *first)
    leaves, treedef = jax.tree.flatten(first)
    of_batch = Layout(treedef, tuple(jax.ShapeDtypeStruct(x.shape, _dtype(x)) for x in leaves))
    for i in range(1, len(batches)):
        trees.check_same_structure(first, tuple(batches[i]), f"batch {i}")
    product = Partial(_Streamed(build, _Source(batches), of_batch), params)
    op = Operator(product, one.domain, f"mean {one.kind}", one.symmetric)
    _probe(op, key)
    return op


def _probe(op: Operator, key: jax.Array) -> None:
    vector = trees.normal_like(key, op.template)
    once, again = (_apply(op, vector) for _ in range(2))
    for (name, a), (_, b) in zip(trees.named_leaves(once), trees.named_leaves(again), strict=True):
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            raise ProblemError(
                f"{op.kind}: two passes over the batches give different products (leaf '{name}'). "
                "Read the same data in the same order each time: no shuffling, no random augmentation."
            )


@jax.jit
def _apply(op: Operator, vector: PyTree) -> PyTree:
    return op.mv(vector)


@dataclass(frozen=True)
class _Scanned:
    build: Build

    def __call__(self, params: PyTree, batches: PyTree, tangent: PyTree) -> PyTree:
        count = jax.tree.leaves(batches)[0].shape[0]

        def add(total: PyTree, batch: PyTree) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, self.build(params, *batch).mv(tangent)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, tangent), batches)
        return jax.tree.map(lambda x: x / count, total)


class _Source:
    """A host sequence, static in a compiled program by its identity."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __hash__(self) -> int:
        return id(self.batches)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source) and other.batches is self.batches

    def read(self, i: Any) -> tuple[np.ndarray, ...]:
        batch = jax.tree.leaves(tuple(self.batches[int(i)]))
        return tuple(np.asarray(x, _dtype(np.asarray(x))) for x in batch)


def _dtype(x: np.ndarray) -> np.dtype:
    return jax.dtypes.canonicalize_dtype(x.dtype)


@dataclass(frozen=True)
class _Streamed:
    build: Build
    source: _Source
    batch: Layout

    def __call__(self, params: PyTree, tangent: PyTree) -> PyTree:
        count = len(self.source.batches)

        def add(i: Array, total: PyTree) -> PyTree:
            leaves = jax.pure_callback(self.source.read, self.batch.leaves, i)
            batch = self.batch.treedef.unflatten(leaves)
            return jax.tree.map(jnp.add, total, self.build(params, *batch).mv(tangent))

        total = jax.lax.fori_loop(0, count, add, jax.tree.map(jnp.zeros_like, tangent))
        return jax.tree.map(lambda x: x / count, total)
