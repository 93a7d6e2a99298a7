"""The defences that are compared: one row each, a problem per network."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from specdef_jax import trees
from specdef_jax.activations import activations
from specdef_jax.certification.arms import match_alphas, sharpness
from specdef_jax.parametrization import Problem, problem
from specdef_jax.race.control import scalar_control
from specdef_jax.replication.config import Config
from specdef_jax.spec import Directions, Plan, SpecDef
from specdef_jax.specdef import apply_plan, plan
from specdef_jax.tasks.experiment import Experiment

SHARPNESS_TOL = 1e-2
UNLEARNED = {"ga": "gradient ascent", "npo": "NPO", "rmu": "RMU"}


@dataclass(frozen=True)
class Row:
    """One defence.

    Attributes:
      name: as tables call it.
      make: make(network) -> the attacker's problem.
      wide: whether it needs float64.
    """

    name: str
    make: Callable[[int], Problem]
    wide: bool = False


def rows(experiment: Experiment, config: Config) -> list[Row]:
    """Return every row: never learned, unlearned, the scalar control, and SpecDef on the defended variant."""
    found = [Row("never learned", functools.partial(plain, experiment, "ignorant"))]
    found += [
        Row(label, functools.partial(plain, experiment, variant))
        for variant, label in UNLEARNED.items()
        if variant in experiment.networks
    ]
    found.append(Row("one entry rescaled", functools.partial(_scalar, experiment, config)))
    for directions in config.directions:
        for alpha in config.alphas:
            make = functools.partial(deformed, experiment, config, alpha, directions)
            found.append(Row(f"SpecDef {alpha:g}, {directions}", make))
    exact = functools.partial(deformed, experiment, config, config.exact_alpha, "top", basis="axis")
    found.append(Row(f"SpecDef {config.exact_alpha:g}, axis", exact))
    for alpha in config.wide_alphas:
        make = functools.partial(deformed, experiment, config, alpha, "top", wide=True)
        found.append(Row(f"SpecDef {alpha:g}, float64", make, wide=True))
    return found


def plain(experiment: Experiment, variant: str, i: int) -> Problem:
    """Return the problem of fine-tuning a variant as it is."""
    return problem(experiment.loss, experiment.networks[variant][i], *experiment.judged_on)


def deformed(
    experiment: Experiment,
    config: Config,
    alpha: float,
    directions: Directions,
    i: int,
    *,
    basis: Any = "symmetric",
    wide: bool = False,
) -> Problem:
    """Return the problem of fine-tuning the defended variant under SpecDef, as it is released."""
    tree = released(experiment, config, alpha, directions, i, basis=basis, wide=wide)
    return problem(experiment.loss, tree, *experiment.judged_on)


def released(
    experiment: Experiment,
    config: Config,
    alpha: float,
    directions: Directions,
    i: int,
    *,
    basis: Any = "symmetric",
    wide: bool = False,
) -> PyTree:
    """Return the defended variant of network i, deformed."""
    params = experiment.networks[experiment.defended][i]
    with jax.enable_x64(wide or jax.config.read("jax_enable_x64")):
        params = trees.double(params) if wide else params
        return apply_plan(params, planned(experiment, config, params, alpha, directions, basis))


def planned(
    experiment: Experiment, config: Config, params: PyTree, alpha: float, directions: Directions, basis: Any
) -> Plan:
    """Return how to deform; whatever it does to the function, the table of utility tells it."""
    spec = SpecDef(alpha, config.k, basis, directions=directions, budget=math.inf)
    acts = None
    if directions == "resistant":
        acts = activations(
            experiment.apply, params, *experiment.inputs, where=experiment.where, axes=experiment.axes
        )
    key = jax.random.key(config.seed)
    return plan(params, spec, where=experiment.where, key=key, axes=experiment.axes, activations=acts)


def _scalar(experiment: Experiment, config: Config, i: int) -> Problem:
    """Return the scalar control at the sharpness of SpecDef's smallest alpha."""
    key = jax.random.key(config.seed)
    params = experiment.networks[experiment.defended][i]
    model = deformed(experiment, config, config.alphas[0], "top", i)
    args = experiment.judged_on

    def make(_: int, alpha: float) -> Problem:
        return scalar_control(experiment.loss, params, experiment.control, jnp.float32(alpha), *args)

    goal = sharpness(model, args, key, SHARPNESS_TOL)
    (alpha,) = match_alphas(make, [goal], args, key, SHARPNESS_TOL)
    return make(0, alpha)
