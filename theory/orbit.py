"""The orbit of a pair of factors, (C, Wt) -> (C G^-1, G Wt): its tangents t_A = M_A theta (4.1, 4.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from specdef_jax import trees
from specdef_jax.parametrization import is_structured
from specdef_jax.spec import Plan
from theory.hessians import Curvature


def generators(inserted: PyTree, plan: Plan) -> tuple[Callable[[PyTree, Array], PyTree], int]:
    """Return M: (tree, A) -> M_A tree for the plan's first layer, and m, the features between its factors.

    Args:
      inserted: parameters with the identity inserted, for their structure.
      plan: what is deformed.
    """
    path, layer = next(plan.items())

    def generate(tree: PyTree, A: Array) -> PyTree:
        def visit(name: str, leaf: Any) -> Any:
            if name != path:
                return jax.tree.map(jnp.zeros_like, leaf)
            matrix = layer.axes.to_matrix(leaf.weight, leaf.side) @ A
            comp = -A @ leaf.comp if leaf.side == "output" else -leaf.comp @ A.T
            return replace(
                leaf, weight=layer.axes.from_matrix(matrix, leaf.weight.shape, leaf.side), comp=comp
            )

        return trees.map_named(visit, tree, is_leaf=is_structured)

    return generate, layer.U.shape[0]


def orbit_maps(one: Curvature, inserted: PyTree, plan: Plan) -> tuple[Array, Array]:
    """Return J: A -> t_A and N: A -> M_A^T g_1 as matrices (n, m^2).

    Args:
      one: gradient and Hessian of the inserted network.
      inserted: its parameters.
      plan: what is deformed.
    """
    generate, m = generators(inserted, plan)
    unravel = ravel_pytree(inserted)[1]
    gradient = unravel(one.gradient)
    units = jnp.eye(m * m).reshape(-1, m, m)

    def columns(tree: PyTree, transposed: bool) -> Array:
        def column(A: Array) -> Array:
            return ravel_pytree(generate(tree, A.T if transposed else A))[0]

        return jax.vmap(column)(units).T

    return columns(inserted, False), columns(gradient, True)
