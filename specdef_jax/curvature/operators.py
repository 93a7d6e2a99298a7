"""Linear operators on pytrees, as jit arguments.

An operator is a product and the shapes it takes. The data of the product (parameters, batch, a matrix)
travels inside a Partial as leaves of the pytree, so an operator is passed to jit like an array: the same
loss function and the same shapes compile once, and nothing is baked into the program as a constant.
A new operator is one function that returns an Operator; eigsh and dense need no more than this class.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PyTree

from specdef_jax import trees
from specdef_jax.errors import ProblemError
from specdef_jax.parametrization import loss_on


@dataclass(frozen=True)
class Layout:
    """Structure, shapes and dtypes of a tree of arrays, hashable so that it can be static."""

    treedef: Any
    leaves: tuple[tuple[tuple[int, ...], jnp.dtype], ...]

    def tree(self) -> PyTree:
        """Return the tree of jax.ShapeDtypeStruct."""
        return self.treedef.unflatten(jax.ShapeDtypeStruct(s, d) for s, d in self.leaves)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operator:
    """A real linear map on trees shaped like `template`.

    Attributes:
      product: Partial of the map, tree -> tree, with its data as leaves.
      domain: layout of the trees it takes (static).
      kind: name for messages and records (static).
      symmetric: whether the map is its own transpose, as claimed by whoever built it (static).
    """

    product: Partial
    domain: Layout = field(metadata={"static": True})
    kind: str = field(metadata={"static": True})
    symmetric: bool = field(default=True, metadata={"static": True})

    @property
    def template(self) -> PyTree:
        """Tree of jax.ShapeDtypeStruct that mv takes."""
        return self.domain.tree()

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
        image = jax.eval_shape(self.product, template)

        def transpose(cotangent: PyTree) -> PyTree:
            return jax.linear_transpose(self.product, template)(cotangent)[0]

        return _apply(transpose, image, tree, f"{self.kind}.rmv")


def hessian(loss: Callable[..., Array], params: PyTree, *args: Any) -> Operator:
    """Return the Hessian of loss(params, *args) in params, as forward over reverse products.

    Args:
      loss: loss(params, *args) -> real scalar. A loss for plain parameters also takes a deformed tree:
        the Hessian is then in (weight, comp) (THEORY.md 2.1).
      params: tree of float arrays, at which the Hessian is taken.
      *args: data of the loss. Pass it here and not by closure; keep one `loss` object, or every call
        compiles again.

    Raises:
      ProblemError: a leaf of params is not a real float, or the loss does not evaluate to a real scalar.

    Example:
      >>> op = hessian(lambda x, a: a * jnp.sum(x**4), jnp.ones(3), 2.0)
      >>> op.mv(jnp.ones(3))
      Array([24., 24., 24.], dtype=float32)
    """
    domain = layout(params)
    return Operator(Partial(_hessian_product, loss_on(loss, params, *args), params, *args), domain, "hessian")


def from_matrix(matrix: ArrayLike, symmetric: bool = True) -> Operator:
    """Return a square matrix as an operator on vectors; eigsh finds out when `symmetric` is not true.

    Raises:
      ProblemError: the array is not square or not real floating point.
    """
    matrix = jnp.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ProblemError(f"an operator needs a square matrix, this one has shape {matrix.shape}.")
    return linear(Partial(jnp.matmul, matrix), matrix[0], symmetric, kind="matrix")


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
    return Operator(Partial(_flat_product, op), layout(vector), op.kind, op.symmetric)


def unflatten_vector(op: Operator, vectors: Float[Array, "*batch n"]) -> PyTree:
    """Return raveled vectors as trees shaped like op.template, leading axes kept."""
    template = op.template
    leaves, start = [], 0
    for leaf in jax.tree.leaves(template):
        stop = start + math.prod(leaf.shape)
        leaves.append(vectors[..., start:stop].reshape(*vectors.shape[:-1], *leaf.shape))
        start = stop
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _flat_product(op: Operator, vector: Array) -> Array:
    image = op.mv(unflatten_vector(op, vector))
    return jnp.concatenate([x.astype(vector.dtype).ravel() for x in jax.tree.leaves(image)])


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
    return Layout(treedef, tuple((tuple(x.shape), jnp.dtype(x.dtype)) for x in leaves))


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


def _hessian_product(loss: Partial, params: PyTree, *args: Any) -> PyTree:
    *data, tangent = args
    return jax.jvp(lambda p: jax.grad(loss)(p, *data), (params,), (tangent,))[1]


def _apply(fn: Callable[[PyTree], PyTree], template: PyTree, tree: PyTree, what: str) -> PyTree:
    trees.check_same_structure(template, tree, what)
    cast = jax.tree.map(lambda t, x: jnp.asarray(x, t.dtype), template, tree)
    unset = jax.config.jax_default_matmul_precision is None  # pyright: ignore[reportAttributeAccessIssue]
    with jax.default_matmul_precision("highest") if unset else contextlib.nullcontext():
        return fn(cast)
