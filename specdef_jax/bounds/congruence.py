"""The congruence between a deformed network and the identity-inserted one (THEORY.md 2.1).

phi maps parameters at alpha = 1 to parameters at alpha without changing the loss, and is linear, so

    H_a = phi^-T H_1 phi^-1,    g_a = phi^-T g_1.

phi is self-adjoint in the Euclidean inner product of the parameters: it multiplies by T(a) or by a
diagonal, from one side.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from specdef_jax import trees
from specdef_jax.errors import StructureError
from specdef_jax.parametrization import Deformed, is_structured
from specdef_jax.parametrization import full_precision_matmul as matmul
from specdef_jax.spec import Layer, Plan


def phi(tree: PyTree, plan: Plan) -> PyTree:
    """Map a tree (parameters or tangents) at alpha = 1 to the same function at the plan's alphas.

    On a deformed leaf (weight, comp) -> (weight T(a), T(1/a) comp) in matrix form, the identity on
    every other leaf; singular values alpha, 1/alpha and 1.

    Args:
      tree: a tree with the structure of apply_plan(params, plan), all alphas 1.
      plan: directions and alphas.

    Raises:
      StructureError: a planned leaf is missing, not deformed, or deformed by another plan.
    """
    return _scale_pairs(tree, plan, invert=False)


def phi_inverse(tree: PyTree, plan: Plan) -> PyTree:
    """Undo phi."""
    return _scale_pairs(tree, plan, invert=True)


def congruent_product(mv: Any, vector: PyTree, plan: Plan) -> PyTree:
    """Return phi^-T H_1 phi^-1 v, given mv: v -> H_1 v at alpha = 1.

    This equals the Hessian product at the plan's alphas exactly in real arithmetic.
    """
    return phi_inverse(mv(phi_inverse(vector, plan)), plan)


def condition(plan: Plan) -> Float[Array, ""]:
    """Return ||phi^-1|| = max over layers of max(alpha, 1 / alpha); ||phi|| is the same.

    By Ostrowski's theorem lambda_i(H_a) = c_i lambda_i(H_1) with condition^-2 <= c_i <= condition^2.
    """
    alphas = jnp.stack([layer.alpha for _, layer in plan.items()])
    return jnp.max(jnp.maximum(alphas, 1 / alphas))


def ostrowski(
    values: Float[Array, " n"], condition: Float[Array, ""] | float
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Return the intervals in which the eigenvalues of S H S^T lie, from those of H (Ostrowski 1959).

    The i-th eigenvalue is c_i times the i-th of H, both ascending, with smin(S)^2 <= c_i <= smax(S)^2. For
    S = phi^-1 the squares are condition^-2 and condition^2, so signs are kept.

    Args:
      values: eigenvalues of H, ascending.
      condition: ||S||, with ||S^-1|| the same.
    """
    grown, shrunk = values * jnp.square(condition), values / jnp.square(condition)
    return jnp.minimum(grown, shrunk), jnp.maximum(grown, shrunk)


def preconditioned(tree: PyTree, plan: Plan) -> PyTree:
    """Return phi^-1 phi^-T v: the preconditioner that deforming amounts to (THEORY.md 3.2).

    Gradient descent on the deformed network is, step for step, gradient descent with this preconditioner on
    the identity-inserted one. Its eigenvalues are alpha^2 (m k per layer), 1 and alpha^-2 (k n).

    Args:
      tree: gradient at alpha = 1, with the structure of apply_plan(params, plan).
      plan: directions and alphas.
    """
    return phi_inverse(phi_inverse(tree, plan), plan)  # phi is self-adjoint, in the rotated basis too


def _scale_pairs(tree: PyTree, plan: Plan, *, invert: bool) -> PyTree:
    found = set()

    def visit(name: str, leaf: Any) -> Any:
        if name not in plan.layers:
            return leaf
        if not isinstance(leaf, Deformed):
            raise StructureError(f"'{name}' is planned but not deformed; apply the plan first.")
        if (leaf.side, leaf.axes) != (plan[name].side, plan[name].axes):
            raise StructureError(
                f"'{name}' is deformed on the {leaf.side} side, but planned on the {plan[name].side} side "
                "or with other axes; pass the plan that it was deformed with."
            )
        found.add(name)
        return _scale_pair(leaf, plan[name], invert=invert)

    scaled = trees.map_named(visit, tree, is_leaf=is_structured)
    if missing := set(plan.layers) - found:
        raise StructureError(f"the plan names {sorted(missing)}, which the tree lacks.")
    return scaled


def _scale_pair(pair: Deformed, layer: Layer, *, invert: bool) -> Deformed:
    alpha = layer.alpha.astype(pair.weight.dtype)
    alpha = 1 / alpha if invert else alpha
    matrix = layer.axes.to_matrix(pair.weight, pair.side)
    right = pair.comp if pair.side == "output" else jnp.swapaxes(pair.comp, -1, -2)
    transform = _rotated_transform if layer.basis == "rotated" else _symmetric_transform
    matrix = transform(matrix, layer.U, alpha)
    right = jnp.swapaxes(transform(jnp.swapaxes(right, -1, -2), layer.U, 1 / alpha), -1, -2)
    weight = layer.axes.from_matrix(matrix, pair.weight.shape, pair.side)
    comp = right if pair.side == "output" else jnp.swapaxes(right, -1, -2)
    return Deformed(weight, comp, pair.side, pair.axes)


def _symmetric_transform(matrix: Array, U: Array, alpha: Array) -> Array:
    """Return M T(a), which is also the axis basis: there U holds columns of the identity."""
    U = U.astype(matrix.dtype)
    return matrix + (alpha - 1) * matmul(matmul(matrix, U), jnp.swapaxes(U, -1, -2))


def _rotated_transform(matrix: Array, U: Array, alpha: Array) -> Array:
    """Return M D: in the rotated basis the directions are the first k coordinates."""
    d, k = U.shape[-2:]
    return matrix * jnp.where(jnp.arange(d) < k, alpha, jnp.ones_like(alpha))
