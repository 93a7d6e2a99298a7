"""Linear operators on pytrees, as jit arguments.

An operator is a product and the shapes it takes. The data of the product (parameters, batch, a matrix)
travels inside a Partial as leaves of the pytree, so an operator is passed to jit like an array: the same
loss function and the same shapes compile once, and nothing is baked into the program as a constant.
A new operator is one function that returns an Operator; eigsh, svds, density and dense need no more than
this class. Those of a loss are in losses.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import Partial
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.errors import ProblemError
from specdef_jax.sharding import sharding_of


@dataclass(frozen=True)
class Layout:
    """Structure, shapes, dtypes and shardings of a tree of arrays, hashable so that it can be static."""

    treedef: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    def tree(self) -> PyTree:
        """Return the tree of jax.ShapeDtypeStruct."""
        return self.treedef.unflatten(self.leaves)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operator:
    """A real linear map from trees shaped like `template` to trees shaped like `image`.

    Attributes:
      product: Partial of the map, tree -> tree, with its data as leaves.
      domain: layout of the trees it takes (static).
      kind: name for messages and records (static).
      symmetric: whether the map is its own transpose, as claimed by whoever built it (static).
      transpose: function of the data and a tree that is the transposed map, where one is known that is
        cheaper than JAX's transposition of `product` (static).
    """

    product: Partial
    domain: Layout = field(metadata={"static": True})
    kind: str = field(metadata={"static": True})
    symmetric: bool = field(default=True, metadata={"static": True})
    transpose: Callable[..., PyTree] | None = field(default=None, metadata={"static": True})

    @property
    def template(self) -> PyTree:
        """Tree of jax.ShapeDtypeStruct that mv takes."""
        return self.domain.tree()

    @property
    def image(self) -> PyTree:
        """Tree of jax.ShapeDtypeStruct that mv returns and rmv takes."""
        return self.template if self.symmetric else jax.eval_shape(self.product, self.template)

    @property
    def shape(self) -> tuple[int, int]:
        """(entries of the image, entries of the domain), as of the matrix."""
        return trees.size(self.image), self.size

    @property
    def size(self) -> int:
        """Number of scalar entries of the domain."""
        return trees.size(self.template)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype that the leaves of the domain promote to."""
        return trees.result_dtype(self.template)

    def mv(self, tree: PyTree) -> PyTree:
        """Return the product with a tree shaped like `template`, cast to its dtypes first.

        Matrix products run at the highest precision unless the user chose one globally: TF32 or
        bfloat16 passes would set the rounding floor of a float32 spectrum.

        Raises:
          StructureError: a leaf is missing, not expected, or has another shape.
        """
        return _apply(self.product, self.template, tree, f"{self.kind}.mv")

    def rmv(self, tree: PyTree) -> PyTree:
        """Return the product of the transpose; the same as mv where the operator is symmetric.

        Raises:
          StructureError: a leaf is missing, not expected, or has another shape.
        """
        if self.symmetric:
            return self.mv(tree)
        template = self.template

        def transpose(cotangent: PyTree) -> PyTree:
            if self.transpose is not None:
                return self.transpose(*self.product.args, cotangent)
            return jax.linear_transpose(self.product, template)(cotangent)[0]

        return _apply(transpose, self.image, tree, f"{self.kind}.rmv")

    @property
    def T(self) -> Operator:
        """The transposed operator."""
        if self.symmetric:
            return self
        product = Partial(_transposed_product, self)
        return Operator(product, layout(self.image), self.kind, False, _product)


def from_matrix(matrix: ArrayLike, symmetric: bool = True) -> Operator:
    """Return a matrix as an operator on vectors; eigsh finds out when `symmetric` is not true.

    Raises:
      ProblemError: the array is no matrix, not square although symmetric, or not real floating point.
    """
    matrix = jnp.asarray(matrix)
    if matrix.ndim != 2 or (symmetric and matrix.shape[0] != matrix.shape[1]):
        what = "square matrix, or symmetric=False and a matrix"
        raise ProblemError(f"an operator needs a {what}; this one has shape {matrix.shape}.")
    vector = jax.ShapeDtypeStruct(matrix.shape[1:], matrix.dtype)
    return linear(Partial(jnp.matmul, matrix), vector, symmetric, kind="matrix")


def linear(
    mv: Callable[[PyTree], PyTree], template: PyTree, symmetric: bool = True, kind: str = "linear"
) -> Operator:
    """Return any linear function on trees as an operator.

    Args:
      mv: tree -> tree, linear. Use jax.tree_util.Partial(f, data) to keep data an argument.
      template: tree of arrays or shape structs that mv takes.
      symmetric: whether mv is its own transpose.
      kind: name for messages.

    Raises:
      ProblemError: a leaf of the template is not a real float, or the template is empty.
    """
    return Operator(mv if isinstance(mv, Partial) else Partial(mv), layout(template), kind, symmetric)


def flattened(op: Operator) -> Operator:
    """Return the operator on raveled vectors (n,), in the dtype that its leaves promote to."""
    vector = jax.ShapeDtypeStruct((op.size,), op.dtype)
    return Operator(Partial(_flat_product, op), layout(vector), op.kind, op.symmetric, _flat_transpose)


def is_spread(op: Operator) -> bool:
    """Tell whether data of the operator lies on several devices, or may: inside jit one cannot know."""
    data = [leaf for leaf in jax.tree.leaves(op) if isinstance(leaf, jax.Array)]
    return any(isinstance(x, Tracer) or len(x.devices()) > 1 for x in data)


def random_vector(op: Operator, key: PRNGKeyArray, dtype: DTypeLike) -> PyTree:
    """Return independent standard normals shaped like the domain; for a flattened operator the same ones."""
    inner = op.product.args[0] if op.product.func is _flat_product else op
    structs = (jax.ShapeDtypeStruct(t.shape, dtype, sharding=t.sharding) for t in inner.domain.leaves)
    drawn = trees.normal_like(key, inner.domain.treedef.unflatten(structs))
    return drawn if inner is op else _ravel(drawn, dtype)


def unravel(template: PyTree, vectors: Float[Array, "*batch n"]) -> PyTree:
    """Return raveled vectors as trees shaped like a template, leading axes kept."""
    leaves, start = [], 0
    for leaf in jax.tree.leaves(template):
        stop = start + math.prod(leaf.shape)
        leaves.append(vectors[..., start:stop].reshape(*vectors.shape[:-1], *leaf.shape))
        start = stop
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _flat_product(op: Operator, vector: Array) -> Array:
    return _ravel(op.mv(unravel(op.template, vector)), vector.dtype)


def _flat_transpose(op: Operator, vector: Array) -> Array:
    return _ravel(op.rmv(unravel(op.image, vector)), vector.dtype)


def _ravel(tree: PyTree, dtype: DTypeLike) -> Array:
    """Return the leaves in one vector, written one by one.

    XLA on CPU fuses a concatenation with the transpositions before it into one loop that branches for every
    entry: the Hessian product of an MLP took five times as long.
    """
    vector, start = jnp.zeros(trees.size(tree), dtype), 0
    for leaf in jax.tree.leaves(tree):
        vector = jax.lax.dynamic_update_slice(vector, leaf.astype(dtype).ravel(), (start,))
        start += leaf.size
    return vector


def _product(op: Operator, tree: PyTree) -> PyTree:
    return op.mv(tree)


def _transposed_product(op: Operator, tree: PyTree) -> PyTree:
    return op.rmv(tree)


def layout(tree: PyTree) -> Layout:
    """Return the layout of a tree of real float arrays or shape structs.

    Raises:
      ProblemError: a leaf is not a real float array (named), or there is no entry at all.
    """
    for name, leaf in trees.named_leaves(tree):
        _check_real(name, getattr(leaf, "dtype", type(leaf)))
    if trees.size(tree) == 0:
        raise ProblemError("an operator needs at least one parameter; this tree has none.")
    leaves, treedef = jax.tree.flatten(tree)
    return Layout(
        treedef,
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)) for x in leaves),
    )


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ProblemError unless the value is one of the choices."""
    if value not in choices:
        raise ProblemError(f"{name} = {value!r} is not known; give one of {', '.join(map(repr, choices))}.")


def _check_real(name: str, dtype: DTypeLike | type) -> None:
    """Raise ProblemError, naming the leaf, unless the dtype is a real float."""
    try:
        real = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        real = False
    if not real or isinstance(dtype, type):
        raise ProblemError(
            f"leaf '{name}' has dtype {dtype}; curvature needs real float arrays. "
            "Keep other leaves out of params: pass them to the loss as arguments."
        )


def _apply(fn: Callable[[PyTree], PyTree], template: PyTree, tree: PyTree, what: str) -> PyTree:
    trees.check_same_structure(template, tree, what)
    cast = jax.tree.map(lambda t, x: jnp.asarray(x, t.dtype), template, tree)
    unset = jax.config.jax_default_matmul_precision is None  # pyright: ignore[reportAttributeAccessIssue]
    with jax.default_matmul_precision("highest") if unset else contextlib.nullcontext():
        return fn(cast)
