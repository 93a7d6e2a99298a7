"""Structured weights: a leaf that stands for a plain array, and how to read the array back.

A `Deformed` leaf stands for the kernel of one linear map as the product of two trainable factors
(THEORY.md 0). JAX kernels are the transpose of the theory's W: kernel (in, out) = W^T, applied as
h @ kernel + bias. In that layout

    output side   kernel = weight @ comp      y = (h @ weight) @ comp
    input side    kernel = comp @ weight      y = (h @ comp) @ weight

so on the output side the deformed weight comes first in the network and the compensation after it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from specdef_jax.errors import LayeredUnsupported, ProblemError, SpecError, StructureError

Side = Literal["output", "input"]
Kernel = TypeVar("Kernel", Array, np.ndarray)  # what is reshaped stays what it is


@dataclass(frozen=True)
class KernelAxes:
    """Which axes of a kernel are which.

    Attributes:
      stack: axes over independent copies of the layer (nn.scan layers, experts).
      window: spatial axes of a convolution; they go with the side that is not deformed.
      inputs: input feature axes, in order.
      outputs: output feature axes, in order.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    window: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        axes = self.stack + self.window + self.inputs + self.outputs
        if sorted(axes) != list(range(len(axes))) or not self.inputs or not self.outputs:
            raise SpecError(
                f"axes {self} do not name each axis of a kernel exactly once; "
                "give disjoint inputs and outputs, counted from 0."
            )

    def features(self, side: Side) -> tuple[int, ...]:
        """Return the axes that the compensation of this side acts on."""
        return self.outputs if side == "output" else self.inputs

    def dim(self, shape: tuple[int, ...], side: Side) -> int:
        """Return the number of features on one side of a kernel of this shape."""
        return math.prod(shape[i] for i in self.features(side))

    def to_matrix(self, kernel: Kernel, side: Side) -> Kernel:
        """Return the kernel as (*stack, rest, d): d the features of `side`, rest all else."""
        order, shape = self._matrix_layout(kernel.shape, side)
        return kernel.transpose(order).reshape(shape)

    def to_stack(self, kernel: Kernel, side: Side) -> Kernel:
        """Return the kernel as (stack, rest, d), its stack axes in one (of a plain kernel, one entry)."""
        found = self.to_matrix(kernel, side)
        return found.reshape(-1, *found.shape[-2:])

    def to_sided(self, kernel: Kernel, side: Side) -> Kernel:
        """Return (*stack, rest, d) on the output side and (*stack, d, rest) on the input side.

        The orientation in which a kernel (in, out) is its own matrix: nothing is moved or copied.
        """
        order, shape = self._sided_layout(kernel.shape, side)
        kernel = kernel if order == tuple(range(kernel.ndim)) else kernel.transpose(order)
        return kernel if shape == kernel.shape else kernel.reshape(shape)

    def to_linear(self, kernel: Kernel, side: Side) -> Kernel:
        """Return to_sided of the kernel of a linear map.

        Raises:
          StructureError: it is the kernel of a convolution.
        """
        if self.window:
            raise StructureError(
                f"a deformed kernel of shape {kernel.shape} with window axes {self.window} is a convolution, "
                "not a linear map; apply it through sd.layered, or merge it."
            )
        return self.to_sided(kernel, side)

    def from_sided(self, matrix: Kernel, shape: tuple[int, ...], side: Side) -> Kernel:
        """Undo to_sided for a kernel of the given shape."""
        order, _ = self._sided_layout(shape, side)
        inverse = tuple(order.index(i) for i in range(len(order)))
        return matrix.reshape(tuple(shape[i] for i in order)).transpose(inverse)

    def from_matrix(self, matrix: Kernel, shape: tuple[int, ...], side: Side) -> Kernel:
        """Undo to_matrix for a kernel of the given shape."""
        order, _ = self._matrix_layout(shape, side)
        inverse = tuple(order.index(i) for i in range(len(order)))
        return matrix.reshape(tuple(shape[i] for i in order)).transpose(inverse)

    def _matrix_layout(self, shape: tuple[int, ...], side: Side) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rest, features = self._groups(side)
        return self.stack + rest + features, self._sizes(shape, rest, features)

    def _sided_layout(self, shape: tuple[int, ...], side: Side) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rest, features = self._groups(side)
        rows, columns = (rest, features) if side == "output" else (features, rest)
        return self.stack + rows + columns, self._sizes(shape, rows, columns)

    def _groups(self, side: Side) -> tuple[tuple[int, ...], tuple[int, ...]]:
        other = self.inputs if side == "output" else self.outputs
        return self.window + other, self.features(side)

    def _sizes(self, shape: tuple[int, ...], *groups: tuple[int, ...]) -> tuple[int, ...]:
        stack = tuple(shape[i] for i in self.stack)
        return stack + tuple(math.prod(shape[i] for i in group) for group in groups)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Deformed:
    """One kernel as a pair of trainable factors (THEORY.md 0, placement insert).

    The leaves are arrays only, so jax.grad, optax, ravel_pytree and Orbax take a tree that holds
    Deformed nodes as it is. U and alpha are not here: they live in the Plan.

    Attributes:
      weight: the deformed kernel, in the shape and dtype of the original.
      comp: the compensation, (*stack, d, d) with d the features of `side`, multiplying from the
        right on the output side and from the left on the input side.
      side: "output" or "input" (static).
      axes: which axes of the kernel are which (static).
    """

    weight: Float[Array, "..."]
    comp: Float[Array, "..."]
    side: Side = field(metadata={"static": True})
    axes: KernelAxes = field(metadata={"static": True})

    def materialize(self) -> Float[Array, "..."]:
        """Return the plain kernel, in the shape of `weight` and the dtype that both factors promote to."""
        matrix = self.axes.to_matrix(self.weight, self.side)
        right = self.comp if self.side == "output" else jnp.swapaxes(self.comp, -1, -2)
        product = full_precision_matmul(matrix, right)
        return self.axes.from_matrix(product, self.weight.shape, self.side)


@runtime_checkable
class StructuredWeight(Protocol):
    """A pytree node that stands for one plain array."""

    def materialize(self) -> Array:
        """Return the array that the node stands for."""
        ...


def is_structured(node: Any) -> bool:
    """Tell whether a node of a tree stands for a plain array."""
    # The class is asked, since an NNX Variable passes attribute look-ups on to the value it holds.
    return callable(getattr(type(node), "materialize", None))


def merge(params: PyTree) -> PyTree:
    """Replace every structured weight by the plain array it stands for.

    The result has the structure and dtypes of the tree before deformation. Differentiable and
    pure; a tree without structured weights is returned unchanged.
    """
    return jax.tree.map(
        lambda leaf: leaf.materialize() if is_structured(leaf) else leaf,
        params,
        is_leaf=is_structured,
    )


def full_precision_matmul(a: Array, b: Array) -> Array:
    """Return a @ b with full-precision products and at least float32 accumulation.

    Accelerators may run float32 products in TF32 or bfloat16 by default, which a deformed layer
    amplifies by alpha (THEORY.md 1.2). The result has the promoted dtype of the operands.
    """
    return full_precision(jnp.matmul, jnp.result_type(a, b), a, b)


def full_precision(product: Callable[..., Array], dtype: Any, a: Array, b: Array) -> Array:
    """Return a bilinear product of two arrays, its terms exact and summed in at least float32, as `dtype`.

    Args:
      product: product(a, b, precision=, preferred_element_type=), as jnp.matmul.
      dtype: of the result.
      a: left operand.
      b: right operand.
    """
    common = jnp.result_type(a, b)
    a, b = jnp.asarray(a, common), jnp.asarray(b, common)
    product = functools.partial(product, precision=jax.lax.Precision.HIGHEST)
    accumulator = functools.reduce(jnp.promote_types, (common, dtype, jnp.float32))
    if common == dtype != accumulator:
        return _narrow(product, a, b)
    return product(a, b, preferred_element_type=accumulator).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _narrow(product: Callable[..., Array], a: Array, b: Array) -> Array:
    """Return the product in the narrow dtype of its operands, summed in float32."""
    return product(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


@functools.partial(_narrow.defjvp, symbolic_zeros=True)
def _narrow_jvp(product: Any, primals: Any, tangents: Any) -> tuple[Array, Any]:
    """Differentiate it without the wide accumulator.

    Its transpose would multiply cotangents in float32, which hold narrow numbers: the same to rounding, and
    many times slower on an accelerator.
    """
    (a, b), (da, db) = primals, tangents
    out = _narrow(product, a, b)
    parts = [] if isinstance(da, SymbolicZero) else [product(da, b)]
    parts += [] if isinstance(db, SymbolicZero) else [product(a, db)]
    return out, functools.reduce(jnp.add, parts)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Problem:
    """Something to train: parameters, a loss on them, and the plain network they stand for.

    Frozen arrays travel inside the Partials as data, never as closed-over constants.

    Attributes:
      params: the trainable tree.
      loss: loss(params, *args) -> scalar.
      read_back: read_back(params) -> plain parameters of the original architecture.
    """

    params: PyTree
    loss: Partial
    read_back: Partial


def problem(loss: Callable[..., Array], params: PyTree, *args: Any) -> Problem:
    """Return the problem of training `params`, merging structured weights where the loss needs it."""
    return Problem(params, loss_on(loss, params, *args), Partial(merge))


def loss_on(loss: Callable[..., Array], params: PyTree, *args: Any) -> Partial:
    """Return `loss` as a Partial that accepts `params` as they are.

    A loss that can read structured weights (it merges them itself, or applies sd.layered) is left
    alone. A loss written for the plain network is composed with merge, which is the same loss
    surface (THEORY.md 2.1). Which of the two holds is found by an abstract evaluation.

    Raises:
      ProblemError: the loss fails on the merged tree too, or does not return a real scalar.
    """
    as_partial = function_on(loss, params, *args)
    try:
        out = jax.eval_shape(as_partial, params, *args)
    except Exception as error:
        raise ProblemError(
            f"the loss cannot be evaluated on these parameters and arguments: {error}"
        ) from error
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ProblemError(f"a loss must return one real scalar, this one returns {out}.")
    return as_partial


def function_on(fn: Callable[..., Any], params: PyTree, *args: Any) -> Partial:
    """Return any function of (params, *args) as a Partial that accepts `params` as they are (see loss_on)."""
    as_partial = fn if isinstance(fn, Partial) else Partial(fn)
    structured = any(map(is_structured, jax.tree.leaves(params, is_leaf=is_structured)))
    if structured and not _accepts(as_partial, params, *args):
        return Partial(_through_merge, as_partial)
    return as_partial


def _accepts(fn: Partial, params: PyTree, *args: Any) -> bool:
    try:
        jax.eval_shape(fn, params, *args)
    except LayeredUnsupported:
        raise
    except Exception:  # whatever a model raises when it meets a node that is not an array
        return False
    return True


def _through_merge(fn: Partial, params: PyTree, *args: Any) -> Any:
    return fn(merge(params), *args)
