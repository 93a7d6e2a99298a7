"""Assumptions of the statements, tested on an instance before its claim is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds, trees
from specdef_jax.curvature import kinks
from specdef_jax.parametrization import loss_on
from specdef_jax.spec import Plan
from theory.certificate import AssumptionViolated

INVARIANCE = 1e-9


def require(condition: bool, which: str) -> None:
    """Raise AssumptionViolated, naming the assumption, unless the condition is met."""
    if not condition:
        raise AssumptionViolated(which)


def require_alpha(*alphas: float) -> None:
    """Require alpha >= 1: below, the factors swap their roles."""
    for alpha in alphas:
        require(alpha >= 1, f"alpha >= 1 (alpha = {alpha:g}: swap the roles of the factors)")


def require_smooth(loss: Callable[..., Array], params: PyTree, *args: Any) -> None:
    """Require that the loss is twice differentiable at these parameters."""
    found = kinks(loss, params, *args)
    told = ", ".join(f"{k.entries} ties in '{k.primitive}'" for k in found)
    require(not found, f"the loss is twice differentiable at the point ({told})")


def require_invariance(
    loss: Callable[..., Array],
    phi: Callable[[PyTree], PyTree],
    params: PyTree,
    *args: Any,
    key: PRNGKeyArray,
    points: int = 3,
) -> None:
    """Require L(phi(theta)) = L(theta) around params: nothing nonlinear stands between weight and comp.

    Tried at params and at random points near it, where a map between the two factors that happens to be
    the identity at params shows.
    """
    near = [params]
    for k in jax.random.split(key, points - 1):
        near.append(trees.axpy(0.3, trees.normal_like(k, params), params))
    for point in near:
        here, there = loss(point, *args), loss(phi(point), *args)
        close = jnp.abs(there - here) <= INVARIANCE * (1 + jnp.abs(here))
        require(bool(close), "nothing nonlinear stands between weight and comp (L(phi theta) != L(theta))")


def require_congruence(
    loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any, key: PRNGKeyArray
) -> tuple[Callable[..., Array], PyTree]:
    """Require what phi needs of a network: alpha >= 1, L(phi(theta)) = L(theta), a smooth point.

    Returns:
      The loss on a deformed tree, and the parameters with the identity inserted.
    """
    require_alpha(*(float(layer.alpha) for _, layer in plan.items()))
    inserted = sd.apply_plan(params, plan.with_alpha(1.0))
    as_partial = loss_on(loss, inserted, *args)
    require_invariance(as_partial, lambda tree: bounds.phi(tree, plan), inserted, *args, key=key)
    require_smooth(as_partial, inserted, *args)
    return as_partial, inserted
