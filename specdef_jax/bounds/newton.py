"""What damping a second-order method on a deformed network damps in the original one (THEORY.md 4.1).

    (H_a + lambda I)^-1 g_a = phi (H_1 + lambda phi^T phi)^-1 g_1,

so undamped Newton does not see the deformation, and a damped one sees phi^T phi: alpha^-2 on C's fast
directions, alpha^2 on the deformed directions of the weight, 1 on everything else.
"""

from __future__ import annotations

from jaxtyping import Array, Float, PyTree

from specdef_jax import trees
from specdef_jax.bounds.congruence import phi
from specdef_jax.spec import Plan

Number = Float[Array, ""] | float


def damping_metric(tree: PyTree, plan: Plan) -> PyTree:
    """Return phi^T phi v: damping lambda I on the deformed network is lambda phi^T phi on the original.

    Args:
      tree: v, with the structure of apply_plan(params, plan).
      plan: directions and alphas.

    Raises:
      StructureError: a planned leaf is missing, not deformed, or deformed by another plan.
    """
    return phi(phi(tree, plan), plan)  # phi is self-adjoint, in the rotated basis too


def damping_norm(tree: PyTree, plan: Plan) -> Float[Array, ""]:
    """Return |phi s|: cubic regularization and trust regions of the deformed network measure steps by it.

    Args:
      tree: s, a step of the identity-inserted network, with the structure of apply_plan(params, plan).
      plan: directions and alphas.

    Raises:
      StructureError: as damping_metric.
    """
    return trees.norm(phi(tree, plan))


def damping_interval(damping: Number, condition: Number) -> tuple[Number, Number]:
    """Return the dampings of the original network between which a damping of the deformed one lies.

    For H >= 0, g^T (H + high I)^-1 g <= g_a^T (H_a + lambda I)^-1 g_a <= g^T (H + low I)^-1 g with low =
    lambda / condition^2 and high = lambda condition^2; twice the decrease that each step's model predicts
    with its damping.

    Args:
      damping: lambda.
      condition: max over layers of alpha (bounds.condition).
    """
    return damping / condition**2, damping * condition**2
