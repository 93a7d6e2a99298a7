"""The directions dC = E U^T: as columns beside a dense Hessian, and their block by the formula of 2.2."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from specdef_jax import bounds, trees
from specdef_jax.parametrization import Deformed
from specdef_jax.spec import Layer, Plan
from theory.assumptions import require
from theory.hessians import linear_matrix
from theory.instances.layers import OpenLayer

INDEPENDENT = "the layer's input does not depend on the layer's own C"


@jax.jit
def fast_directions(like: PyTree, plan: Plan) -> Float[Array, "n p"]:
    """Return the orthonormal directions dC = E U^T as columns, in the order of ravel_pytree.

    Args:
      like: a tree with the structure of apply_plan(params, plan).
      plan: directions.

    Returns:
      (n, p), columns in the order of the entries of {path: E (d, k)}, as in bounds.fast_subspace.
    """

    def embed(E: dict[str, Array]) -> PyTree:
        def visit(path: str, leaf: Any) -> Any:
            if path not in plan.layers:
                return jnp.zeros_like(leaf)
            along = _stored(plan[path]) @ E[path].T
            comp = along if leaf.side == "output" else along.T
            return Deformed(jnp.zeros_like(leaf.weight), comp, leaf.side, leaf.axes)

        return trees.map_named(visit, like, is_leaf=lambda leaf: isinstance(leaf, Deformed))

    return linear_matrix(embed, {path: jnp.zeros(layer.U.shape) for path, layer in plan.items()})


def block_by_formula(layer: OpenLayer, planned: Layer) -> Float[Array, "p p"]:
    """Return K_U or K_V from the inputs of the layer and G, in the order of E (d, k)."""
    return _by_formula(
        layer.weight, layer.inputs(layer.params, layer.args[0]), layer.outputs_hessian(), planned
    )


def require_independent_input(layer: OpenLayer, key: PRNGKeyArray) -> None:
    """Require that the layer's inputs stay as they are when its kernel moves."""
    moved = trees.map_named(
        lambda path, leaf: leaf + jax.random.normal(key, leaf.shape) if path == layer.where else leaf,
        layer.params,
    )
    here, there = (layer.inputs(params, layer.args[0]) for params in (layer.params, moved))
    require(bool(jnp.array_equal(here, there)), INDEPENDENT)


def _stored(layer: Layer) -> Float[Array, "d k"]:
    """Return U in the coordinates that the compensation is stored in."""
    rotation = jnp.linalg.qr(layer.U, mode="complete")[0]
    return rotation.T @ layer.U if layer.basis == "rotated" else layer.U


@jax.jit
def _by_formula(W: Array, h: Array, G: Array, planned: Layer) -> Array:
    d, k = planned.U.shape
    if planned.side == "input":
        # The compensation of a convolution is shared over its window too: q taps of d channels.
        examples, positions, _ = h.shape
        taps = W.reshape(len(W), -1, d)
        count = positions * taps.shape[1]
        WV = taps @ planned.U
        between = jnp.einsum("aqi,etasb,brj->etqisrj", WV, G, WV).reshape(examples, count, k, count, k)
        return bounds.compensation_block_shared(h.reshape(examples, count, d), between)
    z = h @ W.T @ planned.U
    if h.shape[1] == 1:
        K = bounds.compensation_block(z[:, 0], G[:, 0, :, 0])
    else:
        K = bounds.compensation_block_shared(z, G)
    return K.reshape(k, d, k, d).transpose(1, 0, 3, 2).reshape(k * d, k * d)
