"""Low-rank adapters on a layer: beside the composite, beside each factor, beside the weight alone (5.5, iv).

A layer stands as M (rest, d), its kernel in the layout of KernelAxes.to_matrix, so that a deformed one is M =
weight right, with right = comp on the output side and its transpose on the input side. An adapter adds
scale * down up, down (rest, r) and up (r, d), up = 0 at the start; the rest of the network is trained too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.parametrization import Deformed, Problem, is_structured

Adapter = dict[str, Array]
RANK, SCALE = 2, 0.5


def drawn(key: PRNGKeyArray, rows: int, columns: int) -> Adapter:
    """Return an adapter as usual: down random, up 0. Nothing of the weights is read."""
    down = jax.random.normal(key, (rows, RANK)) / rows**0.5
    return {"down": down, "up": jnp.zeros((RANK, columns))}


def on_composite(loss: Callable[..., Array], tree: PyTree, where: str, adapter: Adapter) -> Problem:
    """Return the training of an adapter beside a frozen pair, W h + scale B A h, and of the rest."""
    return _problem(loss, _beside, tree, where, {"composite": adapter})


def on_factors(loss: Callable[..., Array], tree: PyTree, where: str, adapters: dict[str, Adapter]) -> Problem:
    """Return the training of adapters beside each frozen factor of a deformed layer, or beside one.

    Args:
      loss: of the plain network.
      tree: a tree in which it is deformed.
      where: which leaf.
      adapters: of "weight" (rest, d), of "right" (d, d), or of one of them.
    """
    return _problem(loss, _beside_factors, tree, where, adapters)


def shape_of(layer: Deformed) -> tuple[int, int]:
    """Return (rest, d)."""
    rows, columns = layer.axes.to_matrix(layer.weight, layer.side).shape
    return rows, columns


def right_of(layer: Deformed) -> Float[Array, "d d"]:
    """Return what multiplies the weight from the right."""
    return layer.comp if layer.side == "output" else layer.comp.T


def undeformed(tree: PyTree, where: str, kernel: Array) -> PyTree:
    """Return the tree with the plain kernel in the place of a pair, as a pair with the identity."""

    def visit(name: str, leaf: Any) -> Any:
        return replace(leaf, weight=kernel, comp=jnp.eye(len(leaf.comp))) if name == where else leaf

    return trees.map_named(visit, tree, is_leaf=is_structured)


def _problem(
    loss: Callable[..., Array],
    kernel: Callable[..., Array],
    tree: PyTree,
    where: str,
    adapters: dict[str, Adapter],
) -> Problem:
    layer = dict(trees.named_leaves(tree, is_leaf=is_structured))[where]
    # The layer is frozen: an empty array in its place.
    rest = trees.map_named(lambda name, x: jnp.zeros(0) if name == where else x, tree, is_leaf=is_structured)
    read_back = Partial(_reader(where, kernel), layer)
    return Problem({"adapters": adapters, "rest": rest}, Partial(_loss, Partial(loss), read_back), read_back)


def _loss(loss: Partial, read_back: Partial, params: PyTree, *args: Any) -> Array:
    return loss(read_back(params), *args)


@functools.cache  # one function object per leaf and rule, so that what they are part of is compiled once
def _reader(where: str, kernel: Callable[..., Array]) -> Callable[..., PyTree]:
    def read(layer: Deformed, params: PyTree) -> PyTree:
        made = kernel(layer, params["adapters"])
        return trees.map_named(lambda name, x: made if name == where else x, params["rest"])

    return read


def _beside(layer: Deformed, adapters: dict[str, Adapter]) -> Array:
    moved = layer.axes.from_matrix(_product(adapters["composite"]), layer.weight.shape, layer.side)
    return layer.materialize() + moved


def _beside_factors(layer: Deformed, adapters: dict[str, Adapter]) -> Array:
    weight, right = layer.axes.to_matrix(layer.weight, layer.side), right_of(layer)
    weight = weight + _product(adapters["weight"]) if "weight" in adapters else weight
    right = right + _product(adapters["right"]) if "right" in adapters else right
    return layer.axes.from_matrix(weight @ right, layer.weight.shape, layer.side)


def _product(adapter: Adapter) -> Array:
    return SCALE * adapter["down"] @ adapter["up"]
