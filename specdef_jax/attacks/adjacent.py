"""Two matrices that stand next to each other, as an attacker finds them: which is which is not asked.

The attacker sees two linear maps with nothing nonlinear between, h -> (h X) Y in the layout of kernels. That
is the two leaves of a Deformed node, or two kernels of the architecture (the value and output projections of
attention). Which of them was multiplied by T(a), and which compensates, is nowhere used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from specdef_jax import trees
from specdef_jax.errors import ProblemError, StructureError
from specdef_jax.parametrization import Deformed, is_structured


@dataclass(frozen=True)
class AdjacentPair:
    """Names of two adjacent kernels of an architecture.

    Attributes:
      first: the kernel (in, groups * d) that is applied first, in a transformer v_proj.
      second: the kernel (heads * d, out) that reads it, heads a multiple of groups: o_proj.
      bias: that of the first map, (groups * d,); None if there is none.
      groups: blocks of features that do not mix (key-value heads).
    """

    first: str
    second: str
    bias: str | None = None
    groups: int = 1

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"{self.first} + {self.second}"


def kernels_of(
    leaves: dict[str, Any], pair: AdjacentPair
) -> tuple[Float[Array, "g n d"], Float[Array, "g d m"]]:
    """Return the maps of each group, float64: X with the bias as its last row, Y with its heads side by side.

    Raises:
      ProblemError: a name is not in the tree, or no plain matrix.
      StructureError: the shapes do not fit together.
    """
    for name in filter(None, (pair.first, pair.second, pair.bias)):
        rank = 1 if name == pair.bias else 2
        if name not in leaves or is_structured(leaves[name]) or jnp.ndim(leaves[name]) != rank:
            raise ProblemError(
                f"'{name}' is no plain leaf of rank {rank} of this tree; check the pair's names."
            )
    X, Y = leaves[pair.first], leaves[pair.second]
    b = None if pair.bias is None else leaves[pair.bias]
    features = X.shape[1]
    if pair.groups < 1 or features % pair.groups or Y.shape[0] % features:
        raise StructureError(
            f"'{pair.first}' {X.shape} and '{pair.second}' {Y.shape} do not fit together in {pair.groups} "
            "groups: (in, groups * d) and (heads * d, out), heads a multiple of groups."
        )
    if b is not None and b.shape != (features,):
        raise StructureError(f"'{pair.bias}' has shape {b.shape}, '{pair.first}' {features} features.")
    d = features // pair.groups
    rows = X if b is None else jnp.concatenate([X, b[None]])
    blocks = Y.reshape(pair.groups, -1, d, Y.shape[1])
    wide = jnp.moveaxis(blocks, 1, 2).reshape(pair.groups, d, -1)
    return jnp.moveaxis(rows.reshape(len(rows), pair.groups, d), 1, 0), wide


def put_kernels(
    params: PyTree, pair: AdjacentPair, X: Float[Array, "g n d"], Y: Float[Array, "g d m"]
) -> PyTree:
    """Undo kernels_of: put the maps of each group back into the tree, in its shapes and dtypes."""
    leaves = dict(trees.named_leaves(params, is_leaf=is_structured))
    first, second = leaves[pair.first], leaves[pair.second]
    rows = jnp.moveaxis(X, 0, 1).reshape(X.shape[1], -1)
    blocks = Y.reshape(*Y.shape[:2], -1, second.shape[1])
    new = {pair.first: rows[: len(first)], pair.second: jnp.moveaxis(blocks, 2, 1).reshape(second.shape)}
    if pair.bias is not None:
        new[pair.bias] = rows[-1]
    return trees.map_named(
        lambda name, leaf: new[name].astype(leaf.dtype) if name in new else leaf,
        params,
        is_leaf=is_structured,
    )


def factors_of(leaf: Deformed) -> tuple[Float[Array, "s n d"], Float[Array, "s d m"]]:
    """Return the two maps of a node in the order in which they are applied, one stack axis in front."""
    weight = leaf.axes.to_stack(leaf.weight, leaf.side)
    comp = leaf.comp.reshape(-1, *leaf.comp.shape[-2:])
    return (weight, comp) if leaf.side == "output" else (comp, jnp.swapaxes(weight, -1, -2))


def put_factors(leaf: Deformed, X: Float[Array, "s n d"], Y: Float[Array, "s d m"]) -> Deformed:
    """Undo factors_of."""
    weight, comp = (X, Y) if leaf.side == "output" else (jnp.swapaxes(Y, -1, -2), X)
    matrix = leaf.axes.to_matrix(leaf.weight, leaf.side).shape
    kernel = leaf.axes.from_matrix(weight.reshape(matrix), leaf.weight.shape, leaf.side)
    return replace(
        leaf,
        weight=kernel.astype(leaf.weight.dtype),
        comp=comp.reshape(leaf.comp.shape).astype(leaf.comp.dtype),
    )


def check_disjoint(pairs: Sequence[AdjacentPair]) -> None:
    """Raise ProblemError if a leaf is in two pairs: balancing one would unbalance the other."""
    names = [name for pair in pairs for name in (pair.first, pair.second)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ProblemError(f"{', '.join(map(repr, twice))} stand in two pairs; name each kernel once.")
