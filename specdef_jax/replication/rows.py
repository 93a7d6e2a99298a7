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
from specdef_jax.attacks import ATTACKS
from specdef_jax.certification.arms import match_alphas, sharpness
from specdef_jax.parametrization import Problem, problem
from specdef_jax.race.control import scalar_control
from specdef_jax.replication.config import Config
from specdef_jax.spec import Directions, SpecDef
from specdef_jax.specdef import apply_plan, plan
from specdef_jax.tasks.experiment import Experiment

SHARPNESS_TOL = 1e-2
SPECDEF, CONTROL = "SpecDef", "one entry rescaled"
NAMES = {"ignorant": "never learned", "ga": "gradient ascent", "npo": "NPO", "rmu": "RMU"}
UNDOING = ("fuse", "inject")  # attacks that the matrix shows too


@dataclass(frozen=True)
class Way:
    """One way to deform the defended variant.

    Attributes:
      alpha: the multiplier.
      directions: of SpecDef.
      basis: of the compensation.
      wide: whether in float64.
    """

    alpha: float
    directions: Directions = "top"
    basis: Any = "symmetric"
    wide: bool = False

    @property
    def name(self) -> str:
        """As tables call it: alpha, and what is told apart by it."""
        kind = "float64" if self.wide else "axis" if self.basis == "axis" else self.directions
        return f"{self.alpha:g}, {kind}"


@dataclass(frozen=True)
class Row:
    """One defence.

    Attributes:
      name: as tables call it.
      make: make(network) -> the attacker's problem.
      wide: whether it needs float64.
      headline: whether it is raced on every network there is.
    """

    name: str
    make: Callable[[int], Problem]
    wide: bool = False
    headline: bool = False


def rows(experiment: Experiment, config: Config) -> list[Row]:
    """Return every row: what has no defence, the scalar control, SpecDef, and SpecDef undone."""
    found = []
    for variant, label in NAMES.items():
        if variant in experiment.networks:
            make = functools.partial(plain, experiment, variant)
            found.append(Row(label, make, headline=variant == experiment.defended))
    found.append(Row(CONTROL, functools.partial(_scalar, experiment, config)))
    strongest = Way(config.optimizer_alpha)
    for way in ways(config):
        make = functools.partial(deformed, experiment, config, way)
        found.append(Row(f"{SPECDEF} {way.name}", make, way.wide, headline=way == strongest))
    for name in UNDOING:
        make = functools.partial(_undone, experiment, config, strongest, name)
        found.append(Row(f"{name} on {SPECDEF} {strongest.name}", make, headline=True))
    return found


def ways(config: Config) -> list[Way]:
    """Return the deformations of the matrix."""
    found = [Way(alpha, directions) for directions in config.directions for alpha in config.alphas]
    found.append(Way(config.exact_alpha, basis="axis"))
    return found + [Way(alpha, wide=True) for alpha in config.wide_alphas]


def plain(experiment: Experiment, variant: str, i: int) -> Problem:
    """Return the problem of fine-tuning a variant as it is."""
    return problem(experiment.loss, experiment.networks[variant][i], *experiment.judged_on)


def deformed(experiment: Experiment, config: Config, way: Way, i: int) -> Problem:
    """Return the problem of fine-tuning the defended variant under SpecDef, as it is released."""
    return problem(experiment.loss, released(experiment, config, way, i), *experiment.judged_on)


def released(experiment: Experiment, config: Config, way: Way, i: int) -> PyTree:
    """Return the defended variant of network i, deformed; the table of utility tells what that changes."""
    params = experiment.networks[experiment.defended][i]
    with jax.enable_x64(way.wide or jax.config.read("jax_enable_x64")):
        params = trees.double(params) if way.wide else params
        spec = SpecDef(way.alpha, config.k, way.basis, directions=way.directions, budget=math.inf)
        where, axes = experiment.where, experiment.axes
        acts = None
        if way.directions == "resistant":
            acts = activations(experiment.apply, params, *experiment.inputs, where=where, axes=axes)
        key = jax.random.key(config.seed)
        return apply_plan(params, plan(params, spec, where=where, key=key, axes=axes, activations=acts))


def _undone(experiment: Experiment, config: Config, way: Way, attack: str, i: int) -> Problem:
    tree = released(experiment, config, way, i)
    return ATTACKS[attack](experiment.loss, tree, *experiment.judged_on).problem


def _scalar(experiment: Experiment, config: Config, i: int) -> Problem:
    """Return the scalar control at the sharpness of SpecDef's smallest alpha."""
    key = jax.random.key(config.seed)
    params = experiment.networks[experiment.defended][i]
    model = deformed(experiment, config, Way(config.alphas[0]), i)
    args = experiment.judged_on

    def make(_: int, alpha: float) -> Problem:
        return scalar_control(experiment.loss, params, experiment.control, jnp.float32(alpha), *args)

    goal = sharpness(model, args, key, SHARPNESS_TOL)
    (alpha,) = match_alphas(make, [goal], args, key, SHARPNESS_TOL)
    return make(0, alpha)
