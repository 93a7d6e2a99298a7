"""Defences that can be attacked alike: structured weights, or a change of parameters that keeps the function.

SpecDef is one. The two others here are what a reader may think of next: channels rescaled against one
another, which a ReLU does not see, and linear chains, a kernel written as a product of many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from specdef_jax import trees
from specdef_jax.errors import ProblemError, SelectionError
from specdef_jax.parametrization import Problem, full_precision_matmul, merge, problem


@dataclass(frozen=True)
class Defence:
    """What was released, and what it stands for.

    Attributes:
      name: as tables call it.
      loss: loss(params, *args) of the plain network.
      params: the released tree, with structured weights or without.
      undefended: the plain network, which computes the same function.
      change: change(params) -> plain parameters, where the released tree is neither plain nor structured;
        None else. A Partial, so that jit sees its data as arguments.
    """

    name: str
    loss: Callable[..., Array]
    params: PyTree
    undefended: PyTree
    change: Partial | None = None

    def problem(self, *args: Any) -> Problem:
        """Return the problem of training what was released.

        Raises:
          ProblemError: the released loss is not that of the undefended network, to 1e-6 relative.
        """
        if self.change is None:
            made = problem(self.loss, self.params, *args)
        else:
            made = Problem(self.params, Partial(_changed_loss, Partial(self.loss), self.change), self.change)
        ours, plain = made.loss(made.params, *args), self.loss(self.undefended, *args)
        if not abs(ours - plain) <= 1e-6 * max(abs(plain), 1e-30):
            raise ProblemError(
                f"{self.name} changes the function: loss {ours:.8g} against {plain:.8g} undefended; a "
                "defence here keeps it."
            )
        return made


def _changed_loss(loss: Partial, change: Partial, params: PyTree, *args: Any) -> Array:
    return loss(change(params), *args)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chain:
    """A kernel (in, out) as a product of factors, all trained."""

    factors: tuple[Float[Array, "rows cols"], ...]

    def materialize(self) -> Float[Array, "rows cols"]:
        """Return the kernel."""
        product = self.factors[0]
        for factor in self.factors[1:]:
            product = full_precision_matmul(product, factor)
        return product


def chain(loss: Callable[..., Array], params: PyTree, path: str, alpha: float, factors: int = 3) -> Defence:
    """Return the defence that writes one kernel as W / alpha^(p-1) times p - 1 factors alpha I.

    Args:
      loss: of the plain network.
      params: the plain network.
      path: name of a 2-D leaf.
      alpha: the multiple; the first factor's curvature grows as alpha^(2 (p - 1)).
      factors: p, at least 2.

    Raises:
      SelectionError: no matrix has this name.
    """
    leaves = dict(trees.named_leaves(params))
    if path not in leaves or leaves[path].ndim != 2:
        raise SelectionError(f"no matrix '{path}'; leaves: {', '.join(map(repr, leaves))}.")

    def replaced(name: str, leaf: Array) -> Any:
        if name != path:
            return leaf
        eye = alpha * jnp.eye(leaf.shape[1], dtype=leaf.dtype)
        return Chain((leaf / alpha ** (factors - 1), *[eye] * (factors - 1)))

    return Defence(f"chain of {factors}", loss, trees.map_named(replaced, params), params)


def rescaled_channels(
    loss: Callable[..., Array],
    params: PyTree,
    first: Sequence[str],
    second: str,
    scales: Float[Array, "channels"],
) -> Defence:
    """Return the defence that multiplies channels of one layer and divides the next layer's rows by the same.

    Between the two stands an activation that is positively homogeneous (ReLU, leaky ReLU, none).

    Args:
      loss: of the plain network.
      params: the plain network.
      first: names of the leaves whose last axis is the channels: a kernel and its bias.
      second: name of the kernel whose first axis is the channels.
      scales: positive factors, one per channel.

    Raises:
      SelectionError: a name is not in the tree.
    """
    leaves = dict(trees.named_leaves(params))
    missing = [name for name in (*first, second) if name not in leaves]
    if missing:
        raise SelectionError(f"no leaf '{missing[0]}'; leaves: {', '.join(map(repr, leaves))}.")

    def scaled(name: str, leaf: Array) -> Array:
        if name in first:
            return leaf * scales
        return leaf / scales[:, None] if name == second else leaf

    return Defence("rescaled channels", loss, trees.map_named(scaled, params), params)


def of_tree(loss: Callable[..., Array], released: PyTree, name: str = "SpecDef") -> Defence:
    """Return the defence of a tree with structured weights."""
    return Defence(name, loss, released, merge(released))
