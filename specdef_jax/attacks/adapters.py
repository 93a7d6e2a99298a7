"""Low-rank adapters beside matrices and pairs: how they start, and what they read back as."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.parametrization import Deformed, KernelAxes, is_structured, merge
from specdef_jax.parametrization import full_precision_matmul as matmul

Place = Literal["composite", "factors"]
Adapter = dict[str, Float[Array, "*stack _ _"]]
PLAIN = {
    2: KernelAxes((0,), (1,)),
    3: KernelAxes((1,), (2,), stack=(0,)),  # of rank 3 the first axis runs over layers, as in detect
    4: KernelAxes((2,), (3,), window=(0, 1)),
}


def start(leaf: Any, rank: int, on: Place, key: PRNGKeyArray) -> dict[str, Any]:
    """Return the adapter of a matrix, or of a pair that of its composite or those of its factors."""
    if not isinstance(leaf, Deformed):
        return _drawn(PLAIN[leaf.ndim].to_matrix(leaf, "output"), rank, key)
    matrix = leaf.axes.to_matrix(leaf.weight, "output")
    if on == "composite":
        return _drawn(matrix, rank, key)
    keys = jax.random.split(key)
    return {"weight": _drawn(matrix, rank, keys[0]), "comp": _drawn(leaf.comp, rank, keys[1])}


def _drawn(matrix: Array, rank: int, key: PRNGKeyArray) -> Adapter:
    *stack, rows, columns = matrix.shape
    down = jax.random.normal(key, (*stack, rows, rank), matrix.dtype) / rows**0.5
    return {"down": down, "up": jnp.zeros((*stack, rank, columns), matrix.dtype)}


@dataclass(frozen=True)
class Read:
    """How adapters read back as the plain network."""

    factor: float
    on: Place

    def __call__(self, deformed: PyTree, params: dict[str, Any]) -> PyTree:
        """Return the plain network."""
        adapted = trees.map_named(
            lambda name, x: self._adapted(x, params[name]) if name in params else x,
            deformed,
            is_leaf=is_structured,
        )
        return merge(adapted)

    def _adapted(self, leaf: Any, adapter: dict[str, Any]) -> Any:
        if not isinstance(leaf, Deformed):
            return leaf + self._added(PLAIN[leaf.ndim], leaf.shape, adapter)
        if self.on == "composite":
            return leaf.materialize() + self._added(leaf.axes, leaf.weight.shape, adapter)
        weight = leaf.weight + self._added(leaf.axes, leaf.weight.shape, adapter["weight"])
        return replace(leaf, weight=weight, comp=leaf.comp + self._product(adapter["comp"]))

    def _added(self, axes: KernelAxes, shape: tuple[int, ...], adapter: Adapter) -> Array:
        return axes.from_matrix(self._product(adapter), shape, "output")

    def _product(self, adapter: Adapter) -> Array:
        return self.factor * matmul(adapter["down"], adapter["up"])
