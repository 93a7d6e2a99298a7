"""The arms of a certification's race: what is trained, and at which alpha."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from specdef_jax import attacks, curvature, race
from specdef_jax.certification.config import Config
from specdef_jax.parametrization import Problem, problem
from specdef_jax.spec import Plan, SpecDef
from specdef_jax.specdef import apply_plan
from specdef_jax.tasks.task import Task

SHARPNESS_TOL = 1e-5


@dataclass(frozen=True)
class Arm:
    """One set of problems, a problem per pretraining seed.

    Attributes:
      name: key in results.json.
      label: what tables and plots call it.
      problems: per seed.
      alphas: per seed; 1 where nothing is deformed.
      bill: what the attack costs, None where the arm is no attack.
    """

    name: str
    label: str
    problems: tuple[Problem, ...]
    alphas: tuple[float, ...]
    bill: attacks.Bill | None = None


def sharpness(task: Problem, args: tuple[Any, ...], key: PRNGKeyArray, tol: float = SHARPNESS_TOL) -> float:
    """Return sigma_1 of the Hessian, the largest |eigenvalue|, at a problem's parameters."""
    op = curvature.hessian(task.loss, task.params, *args)
    return float(jnp.abs(curvature.eigsh(op, tol=tol, key=key).values[0]))


def plans_for(task: Task, config: Config, directions: str) -> list[Plan]:
    """Plan every network at alpha = 1; arms change alpha only."""
    spec = SpecDef(alpha=1.0, k=config.k, directions=directions)  # type: ignore[arg-type]
    return [task.plan(spec, jax.random.key(config.seed), i) for i in range(len(task.networks))]


def deformed_arm(name: str, label: str, task: Task, plans: list[Plan], alphas: tuple[float, ...]) -> Arm:
    """Return the arm of the deformed networks, one alpha per network."""
    return Arm(
        name,
        label,
        tuple(
            problem(task.loss, _deformed(p, q, a), *task.args)
            for p, q, a in zip(task.networks, plans, alphas, strict=True)
        ),
        alphas,
    )


def original_arm(name: str, label: str, task: Task) -> Arm:
    """Return the arm of the undeformed networks."""
    problems = tuple(problem(task.loss, p, *task.args) for p in task.networks)
    return Arm(name, label, problems, (1.0,) * len(problems))


def attack_arm(
    name: str,
    label: str,
    task: Task,
    plans: list[Plan],
    alphas: tuple[float, ...],
    attack: Callable[..., attacks.Attack],
) -> Arm:
    """Return the arm of an attack on the deformed networks; the bill is that of the first."""
    made = [
        attack(task.loss, _deformed(p, q, a), *task.args)
        for p, q, a in zip(task.networks, plans, alphas, strict=True)
    ]
    return Arm(name, label, tuple(m.problem for m in made), alphas, made[0].bill)


def match_alphas(
    make: Callable[[int, float], Problem],
    targets: list[float],
    args: tuple[Any, ...],
    key: PRNGKeyArray,
    tol: float = SHARPNESS_TOL,
) -> list[float]:
    """Return the alpha that gives each network the sharpness asked for.

    Args:
      make: make(network, alpha) -> problem.
      targets: sharpness per network.
      args: data of the loss.
      key: for Lanczos.
      tol: of every sharpness.
    """
    alphas = []
    for i, target in enumerate(targets):
        start = sharpness(make(i, 1.0), args, key, tol)
        alpha, _ = race.match_sharpness(
            lambda a, i=i: sharpness(make(i, a), args, key, tol), target, guess=(target / start) ** 0.5
        )
        alphas.append(alpha)
    return alphas


def _deformed(params: PyTree, layers: Plan, alpha: float) -> PyTree:
    return apply_plan(params, layers.with_alpha(alpha))
