"""Layers one by one, "model.layers.3.NAME", or in one array per NAME, "model.layers.NAME", for lax.scan.

A stacked network compiles in the time of one layer. Deformed leaves are stacked factor by factor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from specdef_jax.errors import StructureError
from specdef_jax.parametrization import Deformed, KernelAxes, is_structured
from specdef_jax.trees import check_same_structure

PREFIX = "model.layers."
_NUMBERED = re.compile(r"model\.layers\.(\d+)\.(.+)")


def is_stacked(params: dict[str, Any]) -> bool:
    """Tell whether the layers of a network are stacked."""
    return any(name.startswith(PREFIX) and not _NUMBERED.fullmatch(name) for name in params)


def layer_of(params: dict[str, Any], index: int) -> dict[str, Any]:
    """Return the parameters of one layer of a network that is not stacked, without their prefix."""
    prefix = f"{PREFIX}{index}."
    return {name.removeprefix(prefix): leaf for name, leaf in params.items() if name.startswith(prefix)}


def stacked_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Return the stacked parameters of all layers, without their prefix."""
    return {name.removeprefix(PREFIX): leaf for name, leaf in params.items() if name.startswith(PREFIX)}


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Return the same network with its layers stacked: each leaf (layers, ...), under "model.layers.NAME".

    Raises:
      StructureError: layers differ in the names, shapes or kinds of their leaves; a layer is missing.

    Example:
      >>> params = {f"model.layers.{i}.norm.weight": jnp.ones(3) for i in range(2)}
      >>> stack_layers(params)["model.layers.norm.weight"].shape
      (2, 3)
    """
    if is_stacked(params):
        raise StructureError("the layers are stacked already; unstack_layers undoes it.")
    count = 1 + max((int(m[1]) for m in map(_NUMBERED.fullmatch, params) if m), default=-1)
    if count == 0:
        raise StructureError("there are no leaves 'model.layers.0.*' to stack; pass a whole model.")
    layers = [layer_of(params, i) for i in range(count)]
    for i, layer in enumerate(layers[1:], 1):
        _check_alike(layers[0], layer, f"layer {i} beside layer 0, which are to be stacked")
    stacked = {PREFIX + name: _stack(name, [layer[name] for layer in layers]) for name in layers[0]}
    return {name: leaf for name, leaf in params.items() if not name.startswith(PREFIX)} | stacked


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Undo stack_layers."""
    found = {}
    for name, leaf in params.items():
        if not name.startswith(PREFIX):
            found[name] = leaf
            continue
        for i in range(jax.tree.leaves(leaf)[0].shape[0]):
            found[f"{PREFIX}{i}.{name.removeprefix(PREFIX)}"] = take_layer(leaf, i)
    return found


def take_layer(leaf: Any, index: Any) -> Any:
    """Return the leaf of one layer of a stacked leaf, its axes without that of the stack."""
    return one_layer(jax.tree.map(lambda x: x[index], leaf))


def one_layer(leaf: Any) -> Any:
    """Give a leaf whose arrays were sliced along the first axis, as lax.scan does, the axes it has now."""
    if not isinstance(leaf, Deformed) or leaf.axes.stack[:1] != (0,):
        return leaf
    return replace(leaf, axes=_moved(leaf.axes, -1, leaf.axes.stack[1:]))


def _check_alike(first: dict[str, Any], layer: dict[str, Any], what: str) -> None:
    check_same_structure(dict.fromkeys(first, 0), dict.fromkeys(layer, 0), what)
    for name, leaf in first.items():
        if jax.tree.structure(leaf) != jax.tree.structure(layer[name]):
            raise StructureError(
                f"'{name}' is deformed in some layers only, or on different sides; deform it in all of them."
            )
    check_same_structure(first, layer, what)


def _stack(name: str, leaves: list[Any]) -> Any:
    joined = jax.tree.map(lambda *parts: jnp.stack(parts), *leaves)
    if isinstance(joined, Deformed):
        return replace(joined, axes=_moved(joined.axes, 1, (-1, *joined.axes.stack)))
    if is_structured(joined):
        raise StructureError(
            f"'{name}' is a {type(joined).__name__}, which cannot be stacked; merge it first."
        )
    return joined


def _moved(axes: KernelAxes, by: int, stack: Iterable[int]) -> KernelAxes:
    def shift(group: Iterable[int]) -> tuple[int, ...]:
        return tuple(i + by for i in group)

    return KernelAxes(shift(axes.inputs), shift(axes.outputs), shift(axes.window), shift(stack))
