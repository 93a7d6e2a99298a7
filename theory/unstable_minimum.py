"""Statement 3.1 at a minimum of a deformed network, unstable beyond 2 / (a^2 lambda_max(K_U)).

Proofs in theory/s3_1_stability.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.bounds import Method
from specdef_jax.parametrization import loss_on
from specdef_jax.spec import Plan
from specdef_jax.words import Word
from theory.assumptions import require, require_alpha, require_smooth
from theory.certificate import Certificate, Certificates, inequality, seen, tight, under_assumptions
from theory.hessians import curvature_of
from theory.instances.minima import descend
from theory.instances.networks import Instance
from theory.methods import radii

UNSTABLE = "the point is linearly unstable beyond the step for a^2 lambda_max(K_U)"
CHECKED = Word.CHECKED  # Hessians by automatic differentiation: their rounding is not derived


def on_network(loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any, name: str) -> Certificates:
    """Certify the consequence at a minimum of anyone's network, small enough for a dense Hessian.

    Args:
      loss: loss(params, *args) on plain parameters.
      params: plain parameters at a minimum.
      plan: a single layer to deform, alpha at least 1.
      *args: data.
      name: of the instance.
    """

    def evaluate() -> list[Certificate]:
        (layer,) = (one for _, one in plan.items())
        alpha = float(layer.alpha)
        require_alpha(alpha)
        require_smooth(loss, params, *args)
        deformed = sd.apply_plan(params, plan)
        at = curvature_of(loss, deformed, *args)
        H, gradient = np.asarray(at.hessian), float(jnp.linalg.norm(at.gradient))
        H = (H + H.T) / 2
        values = np.linalg.eigvalsh(H)
        scale = np.abs(values).max()
        require(gradient <= 1e-7 * scale, f"the point is stationary (gradient {gradient:.1e})")
        k_max = _largest_of_K(loss, params, plan, *args)
        require(k_max > 1e-9 * scale, f"lambda_max(K_U) > 0 (it is {k_max:.1e})")
        require(values[0] >= -1e-7 * scale, "the point is a minimum (no curvature is negative)")
        found = [_unstable_map(method, k_max, alpha, H, name) for method in get_args(Method)]
        return [*found, *_true_map(loss, deformed, k_max, alpha, H, name, *args)]

    return under_assumptions(UNSTABLE, name, evaluate)


def _largest_of_K(loss: Any, params: PyTree, plan: Plan, *args: Any) -> float:
    task = bounds.fast_subspace(loss, params, plan.with_alpha(1.0), *args)
    return float(np.linalg.eigvalsh(curvature_of(task.loss, task.params, *args).hessian)[-1])


def _unstable_map(method: Method, k_max: float, alpha: float, H: np.ndarray, name: str) -> Certificate:
    step = bounds.max_stable_step_deformed(method, k_max, alpha)
    (radius,) = radii(method, 1.01 * step[None], 0.9, H, np.eye(len(H)))
    claim = f"{method}: optax's map has radius > 1, 1% beyond the step for a^2 lambda_max(K_U)"
    return inequality(claim, name, 1 + 1e-6, radius, word=CHECKED)


def _true_map(
    loss: Any, deformed: PyTree, k_max: float, alpha: float, H: np.ndarray, name: str, *args: Any
) -> list[Certificate]:
    """Follow GD on the network from beside the minimum, beyond the step and below 2 / lambda_max(H_a)."""
    values, vectors = np.linalg.eigh(H)
    flat, unravel = ravel_pytree(deformed)
    start, as_partial = unravel(flat + 1e-5 * vectors[:, -1]), loss_on(loss, deformed, *args)
    lowest = as_partial(deformed, *args)
    beyond, within = 1.01 * bounds.max_stable_step_deformed("gd", k_max, alpha), 0.99 * 2 / values[-1]
    grown, shrunk = (
        np.asarray(descend(as_partial, start, jnp.asarray(step), args, steps=1_000) - lowest)
        for step in (beyond, within)
    )
    return [
        inequality("GD on the network runs away from the minimum, 1% beyond 2 / (a^2 lambda_max(K_U))", name,
                   1e3 * grown[0], np.nanmax(grown), scale=grown[0], word=CHECKED,
                   note="L - L*, first and largest of 1,000 steps from 1e-5 beside the minimum"),
        inequality("and returns to it at .99 times 2 / lambda_max(H_a)", name, shrunk[-1], 1e-3 * shrunk[0],
                   scale=shrunk[0], word=CHECKED),
    ]  # fmt: skip


def tight_at_large_alpha(instance: Instance, params: PyTree, key: PRNGKeyArray) -> Certificate:
    """For large alpha the consequence gives away nothing."""
    alpha = 1e3
    plan = sd.plan(params, sd.SpecDef(alpha=alpha, side="output"), where=instance.where, key=key)
    H = curvature_of(instance.loss, sd.apply_plan(params, plan), *instance.args).hessian
    k_max = _largest_of_K(instance.loss, params, plan, *instance.args)
    exact, found = 2 / np.linalg.eigvalsh(H)[-1], bounds.max_stable_step_deformed("gd", k_max, alpha)
    name = f"a minimum of {instance.name}, a = 1000"
    return tight("2 / lambda_max(H_a) <= 2 / (a^2 lambda_max(K_U))", name, exact, found, factor=1.001,
                 allowance=1e-12 * exact, word=CHECKED)  # fmt: skip


def beyond_the_edge(instance: Instance) -> Certificate:
    """A run at 2.5 / lambda: the loss falls all the same."""
    H = curvature_of(instance.loss, instance.params, *instance.args).hessian
    step = 2.5 / np.linalg.eigvalsh(H)[-1]
    as_partial = loss_on(instance.loss, instance.params, *instance.args)
    losses = np.asarray(descend(as_partial, instance.params, jnp.asarray(step), instance.args, steps=2_000))
    rising = int((np.diff(losses) > 0).sum())
    return seen(
        "LOCAL: training goes on at a step of 2.5 / lambda_max, beyond the limit where it starts",
        f"{instance.name}, GD, 2,000 steps, last loss over first",
        losses[-1] / losses[0],
        bool(losses[-1] < 0.1 * losses[0]),
        against=0.1,
        note=f"loss from {losses[0]:.3g} to {losses[-1]:.3g}, rising in {rising} steps",
    )
