"""The sandwich around the sharpness of a deformed network (THEORY.md 2.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from specdef_jax.bounds.congruence import condition
from specdef_jax.bounds.fast_subspace import fast_subspace
from specdef_jax.curvature import eigsh, hessian
from specdef_jax.spec import Plan
from specdef_jax.specdef import apply_plan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sandwich:
    """lower <= sigma_1(H_a) <= upper.

    Attributes:
      lower: ||K_U|| with the alphas in it: alpha^2 ||K_U|| for one layer. A Rayleigh quotient of
        H_a, so a rigorous lower bound up to rounding.
      upper: condition(phi)^2 sigma_1(H_1), with sigma_1(H_1) as Lanczos found it.
      allowance: how far rounding and the Lanczos residual may move either side.
      sigma_1: sigma_1(H_1) of the network with the identity inserted.
    """

    lower: Float[Array, ""]
    upper: Float[Array, ""]
    allowance: Float[Array, ""]
    sigma_1: Float[Array, ""]

    def holds(self, sharpness: Float[Array, ""] | float) -> Bool[Array, ""]:
        """Tell whether a measured sigma_1(H_a) lies between the two sides."""
        return (self.lower - self.allowance <= sharpness) & (sharpness <= self.upper + self.allowance)


def sandwich_sides(
    alpha: Float[Array, "..."] | float, k_norm: Float[Array, ""], sigma_1: Float[Array, ""]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return (alpha^2 ||K_U||, alpha^2 sigma_1(H_1)) for one layer and alpha >= 1."""
    return jnp.square(alpha) * k_norm, jnp.square(alpha) * sigma_1


def sandwich(
    loss: Callable[..., Array],
    params: PyTree,
    plan: Plan,
    *args: Any,
    key: PRNGKeyArray,
    tol: float = 1e-8,
) -> Sandwich:
    """Compute both sides for a loss on plain parameters, any number of planned layers.

    Args:
      loss: loss(params, *args) of the plain network, twice differentiable at params.
      params: plain parameters.
      plan: directions and alphas.
      args: data.
      key: for the Lanczos starting vectors.
      tol: relative tolerance of the two extreme eigenvalues.
    """
    block_key, full_key = jax.random.split(key)
    task = fast_subspace(loss, params, plan, *args)
    block = eigsh(hessian(task.loss, task.params, *args), k=1, which="LM", tol=tol, key=block_key)
    inserted = apply_plan(params, plan.with_alpha(1.0))
    full = eigsh(hessian(loss, inserted, *args), k=1, which="LM", tol=tol, key=full_key)
    lower, sigma_1 = jnp.abs(block.values[0]), jnp.abs(full.values[0])
    factor = jnp.square(condition(plan))
    upper = factor * sigma_1
    allowance = factor * (full.residuals[0] + full.floor) + block.floor
    return Sandwich(lower, upper, allowance, sigma_1)
