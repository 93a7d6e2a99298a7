"""Two step sizes: the compensation at c / alpha^2, everything else at c (THEORY.md 5.2b).

In that metric the deformed network is no sharper than the identity-inserted one, and all but a few directions
of the layer move at a speed that does not depend on alpha. A matrix M (rest, d) below stands as in
KernelAxes.to_matrix: the transpose of W on the output side, so that the compensation multiplies from the
right on both sides, and U is (d, k).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from specdef_jax import trees
from specdef_jax.errors import StructureError
from specdef_jax.parametrization import Deformed, is_structured
from specdef_jax.parametrization import full_precision_matmul as matmul
from specdef_jax.spec import Plan


def two_step_metric(deformed: PyTree, plan: Plan) -> PyTree:
    """Return the step multiplier of every leaf: alpha^-2 on a compensation, 1 elsewhere.

    Multiply the gradient by it, leaf by leaf, and step by c: that is the attack. One number per layer is all
    that it needs to know.

    Args:
      deformed: the deformed tree, for its structure.
      plan: the alphas.

    Raises:
      StructureError: a planned leaf is missing or not deformed.

    Example:
      >>> import jax, specdef_jax as sd
      >>> params, key = {"w": jnp.eye(3)}, jax.random.key(0)
      >>> plan = sd.plan(params, sd.SpecDef(alpha=4.0), where="w", key=key)
      >>> float(two_step_metric(sd.apply_plan(params, plan), plan)["w"].comp)
      0.0625
    """
    found = set()

    def visit(name: str, leaf: Any) -> Any:
        if name not in plan.layers:
            return jax.tree.map(lambda x: jnp.ones((), jnp.result_type(x)), leaf)
        if not isinstance(leaf, Deformed):
            raise StructureError(f"'{name}' is planned but not deformed; apply the plan first.")
        found.add(name)
        dtype = leaf.comp.dtype
        multiplier = (plan[name].alpha ** -2).astype(dtype)
        return Deformed(jnp.ones((), dtype), multiplier, leaf.side, leaf.axes)

    metric = trees.map_named(visit, deformed, is_leaf=is_structured)
    if missing := set(plan.layers) - found:
        raise StructureError(f"the plan names {sorted(missing)}, which the tree lacks.")
    return metric


def two_step_sides(
    sigma_1: Float[Array, "..."] | float, alpha: Float[Array, ""] | float
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return what lies below and above the top curvature in the metric of two_step_metric.

    sigma_1(H_1) / alpha^2 and sigma_1(H_1), alpha >= 1 the largest of several. The upper side is attained.

    Args:
      sigma_1: largest |eigenvalue| of the identity-inserted network's Hessian.
      alpha: the factor, at least 1.

    Example:
      >>> [float(side) for side in two_step_sides(8.0, 2.0)]
      [2.0, 8.0]
    """
    above = jnp.asarray(sigma_1)
    return above / jnp.square(alpha), above


def two_step_velocity(
    matrix: Float[Array, "rest d"],
    U: Float[Array, "d k"],
    alpha: Float[Array, ""] | float,
    gradient: Float[Array, "rest d"],
) -> Float[Array, "rest d"]:
    """Return -dM/dt of the undeformed matrix under gradient flow with two step sizes, at c = 1.

    alpha^-2 M T(alpha^2) M^T G + G T(alpha^-2). As alpha grows it tends to
    (M U)(M U)^T G + G (I - U U^T), which vanishes on G = E U^T with E orthogonal to the range of M U only.

    Args:
      matrix: M, undeformed.
      U: orthonormal directions.
      alpha: the factor.
      gradient: G = dL/dM.

    Example:
      >>> M, U, G = jnp.eye(2), jnp.eye(2)[:, :1], jnp.ones((2, 2))
      >>> two_step_velocity(M, U, 2.0, G).tolist()
      [[1.25, 2.0], [0.5, 1.25]]
    """
    square = jnp.square(alpha)
    through = matmul(matrix.T, gradient)
    fast = matmul(matrix, through + (square - 1) * matmul(U, matmul(U.T, through)))
    return fast / square + frozen_velocity(U, alpha, gradient)


def frozen_velocity(
    U: Float[Array, "d k"], alpha: Float[Array, ""] | float, gradient: Float[Array, "rest d"]
) -> Float[Array, "rest d"]:
    """Return -dM/dt of the undeformed matrix with the compensation frozen (THEORY.md 5.2): G T(alpha^-2).

    Step alpha^-2 on the k directions of U, 1 on the others, exactly and for steps of any size.

    Args:
      U: orthonormal directions.
      alpha: the factor.
      gradient: G = dL/dM.
    """
    along = matmul(matmul(gradient, U), U.T)
    return gradient - (1 - 1 / jnp.square(alpha)) * along


def slow_dimension(matrix: Float[Array, "rest d"], U: Float[Array, "d k"]) -> Int[Array, ""]:
    """Return how many directions of the layer stay slow with two step sizes: k (rest - rank M U).

    With the compensation frozen they are k rest.

    Args:
      matrix: M, undeformed.
      U: orthonormal directions.
    """
    rest, k = matrix.shape[0], U.shape[1]
    values = jnp.linalg.svd(matmul(matrix, U), compute_uv=False)
    floor = max(matrix.shape) * jnp.finfo(matrix.dtype).eps * jnp.linalg.norm(matrix)
    return k * (rest - jnp.sum(values > floor))
