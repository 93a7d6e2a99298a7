"""The defender's question: how to deform so that an attacker needs so many steps, and what is that worth?

Resistance is measured at small alphas, of the optimizer that does best, and carried on as a power of alpha as
far as the number format allows. What one network's race says of another attacker is an estimate, with the
interval of the fit; the attack that undoes it is not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from specdef_jax.campaign.auto import Told, Trial, auto
from specdef_jax.campaign.defence import of_tree
from specdef_jax.campaign.setting import Setting
from specdef_jax.errors import ProblemError, SpecDefError
from specdef_jax.parametrization import problem
from specdef_jax.precision import alpha_max
from specdef_jax.race.statistics import bootstrap_interval
from specdef_jax.spec import Plan, SpecDef
from specdef_jax.specdef import apply_plan, plan
from specdef_jax.trees import named_leaves

ALPHAS = (4.0, 8.0, 16.0)


@dataclass(frozen=True)
class Proposal:
    """One way to deform, judged.

    Attributes:
      spec: with the smallest alpha predicted to do, or the largest that the number format allows.
      limit: that largest alpha.
      exponent: of steps in alpha, mean over networks; low and high its 95% interval over networks.
      steps: predicted at spec.alpha for the best optimizer; low and high by the exponent's interval.
      enough: the budget is met at the lower end of the interval.
      cheapest: the attack that undoes it, None if none of those there are does.
      refused: why it is impossible, else empty.
    """

    spec: SpecDef
    limit: float
    exponent: tuple[float, float, float]
    steps: tuple[float, float, float]
    enough: bool
    cheapest: Trial | None
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def planner(
    loss: Callable[..., Array],
    networks: Sequence[PyTree],
    where: str,
    setting: Setting,
    *,
    steps: float,
    dtype: str | jnp.dtype,
    error: float,
    key: PRNGKeyArray,
    ks: Sequence[int] = (1,),
    bases: Sequence[str] = ("symmetric", "rotated", "axis"),
    directions: Sequence[str] = ("top", "bottom"),
    progress: Told | None = None,
) -> list[Proposal]:
    """Propose deformations, the most resistant first.

    Args:
      loss: of the plain network.
      networks: plain networks of one structure; with fewer than two there is no interval.
      where: glob of the layers.
      setting: of the races that measure resistance.
      steps: that an attacker shall need, at the best step size and with the best optimizer.
      dtype: that the weights are released in.
      error: relative error of a layer that is accepted (THEORY.md 1.2, rule of thumb).
      key: for the directions.
      ks: numbers of directions to try.
      bases: to try.
      directions: to try; "resistant" needs activations and is raced by benchmarks, not here.
      progress: progress(stage, done, total).

    Raises:
      ProblemError: steps or error is not positive.
    """
    if not steps > 0 or not error > 0:
        raise ProblemError(f"steps = {steps}, error = {error}: both must be positive.")
    ways = list(itertools.product(ks, bases, directions))
    found = []
    for i, (k, basis, chosen) in enumerate(ways):
        if progress is not None:
            progress(f"k {k}, {basis}, {chosen}", i, len(ways))
        spec = SpecDef(1.0, k, basis, directions=chosen)  # type: ignore[arg-type]
        try:
            found.append(_propose(loss, networks, where, setting, spec, steps, dtype, error, key))
        except SpecDefError as refusal:
            nothing = (math.nan, math.nan, math.nan)
            found.append(Proposal(spec, math.nan, nothing, nothing, False, None, str(refusal)))
    return sorted(found, key=lambda p: _worst(p.steps), reverse=True)


def _propose(
    loss: Callable[..., Array],
    networks: Sequence[PyTree],
    where: str,
    setting: Setting,
    spec: SpecDef,
    steps: float,
    dtype: str | jnp.dtype,
    error: float,
    key: PRNGKeyArray,
) -> Proposal:
    plans = [plan(p, spec, where=where, key=key) for p in networks]
    curve = []
    for alpha in ALPHAS:
        deformed = [apply_plan(p, q.with_alpha(alpha)) for p, q in zip(networks, plans, strict=True)]
        raced = setting.run([problem(loss, tree, *setting.args) for tree in deformed])
        best = np.nanmin([np.nan_to_num(raced.steps(n), nan=setting.steps) for n in raced.names], axis=0)
        curve.append(best)
    x = np.log(ALPHAS) - np.mean(np.log(ALPHAS))
    logs = np.log(np.array(curve))
    slopes = x @ logs / (x @ x)
    low, high = bootstrap_interval(slopes)
    exponent = (float(slopes.mean()), low, high)
    last, middle = float(np.exp(logs[-1].mean())), ALPHAS[-1]
    limit = _limit(networks[0], plans[0], spec, dtype, error)
    slope = low if math.isfinite(low) else exponent[0]
    wanted = middle * (steps / last) ** (1 / slope) if slope > 0 else math.inf
    alpha = float(min(max(wanted, 1.0), limit))
    mean, lower, upper = (last * (alpha / middle) ** p for p in exponent)
    deformed = apply_plan(networks[0], plans[0].with_alpha(min(alpha, ALPHAS[-1])))
    cheapest = auto(of_tree(loss, deformed), setting).cheapest
    predicted = (mean, lower, upper)
    return Proposal(
        replace(spec, alpha=alpha), limit, exponent, predicted, _worst(predicted) >= 0.999 * steps, cheapest
    )


def _worst(steps: tuple[float, float, float]) -> float:
    """Return the lower end of a prediction, its mean where there is no interval, -1 where there is none."""
    mean, low, _ = steps
    return low if math.isfinite(low) else mean if math.isfinite(mean) else -1.0


def _limit(params: PyTree, planned: Plan, spec: SpecDef, dtype: str | jnp.dtype, error: float) -> float:
    """Return the largest alpha that every layer's number format allows."""
    kernels = dict(named_leaves(params))
    limits = []
    for path, layer in planned.items():
        kernel = np.asarray(kernels[path], np.float64)
        energy = float(np.linalg.norm(layer.singular_values) / max(np.linalg.norm(kernel), 1e-300))
        features = layer.axes.dim(kernel.shape, layer.side)
        largest = float(np.max(np.abs(kernel)))
        limits.append(
            alpha_max(dtype, spec.basis, error, energy=min(energy, 1.0), largest=largest, features=features)
        )
    return min(limits)
