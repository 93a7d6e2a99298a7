"""The arms of a race, written as data: which deformation, at which alpha, in which number format.

An arm is a dictionary. {"name": "original"} is the network itself; {"alpha": 4.0} deforms it, with the
fields of SpecDef (k, basis, side, directions) and "where" beside; {"scalar": true} rescales one output bias
instead (THEORY.md 3.3 (v)); {"match": {...}} in place of "alpha" takes the alpha that gives the sharpness of
another arm. "dtype" casts the network and evaluates a deformed one layer by layer as it would be released.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import specdef_jax as sd
from specdef_jax import race
from specdef_jax.certification.arms import match_alphas, sharpness
from specdef_jax.parametrization import Problem, problem
from specdef_jax.tasks import digits, networks
from specdef_jax.tasks.task import Task

KEY = jax.random.key(0)
SPEC_FIELDS = ("k", "basis", "side", "directions")
NETWORKS = {
    "mlp": lambda: digits.MLP,
    "mlp small": lambda: networks.mlp((64, 16, 16, 10)),
    "cnn": lambda: networks.cnn(channels=(4, 8)),
    "transformer": lambda: networks.transformer(dim=16, heads=2, hidden=32),
}
Arm = dict[str, Any]


def task_of(config: dict[str, Any], first_seed: int) -> Task:
    """Return the digits task that a config names, from its first pretraining seed on."""
    given = dict(config)
    network = NETWORKS[given.pop("network")]()
    given.pop("first_seed", None)
    return digits.task(first_seed=first_seed, network=network, **given)


def problems_of(task: Task, arm: Arm) -> tuple[list[Problem], list[float]]:
    """Return one problem per pretrained network, and the alpha of each."""
    make = maker(task, arm)
    seeds = range(len(task.networks))
    if "match" in arm:
        return _matched(task, make, arm["match"])
    alphas = [float(arm.get("alpha", 1.0))] * len(task.networks)
    return [make(i, alphas[i]) for i in seeds], alphas


def args_of(task: Task, arm: Arm) -> tuple[Any, ...]:
    """Return the attacker's data in the number format of the arm."""
    return _cast(task.args, jnp.dtype(arm.get("dtype", "float64")))


def sharpness_of(problems: list[Problem], task: Task) -> list[float]:
    """Return the largest |eigenvalue| of every problem's Hessian at its start."""
    return [sharpness(p, task.args, KEY) for p in problems]


def maker(task: Task, arm: Arm) -> Callable[[int, float], Problem]:
    """Return make(network, alpha) -> problem."""
    dtype = jnp.dtype(arm.get("dtype", "float64"))
    nets = [_cast(p, dtype) for p in task.networks]
    args = args_of(task, arm)
    if arm.get("scalar"):
        return lambda i, a: race.scalar_control(task.loss, nets[i], task.control, a, *args)
    if not any(name in arm for name in ("alpha", "match", *SPEC_FIELDS)):
        return lambda i, a: problem(task.loss, nets[i], *args)
    plans = plans_for(task, arm)
    layered = _layered_loss(task.loss) if "dtype" in arm else task.loss

    def make(i: int, alpha: float) -> Problem:
        # built from the float64 network, then stored: the pair itself is exact before it is rounded
        deformed = sd.apply_plan(task.networks[i], plans[i].with_alpha(alpha))
        return problem(layered, _cast(deformed, dtype), *args)

    return make


def plans_for(task: Task, arm: Arm) -> list[sd.Plan]:
    """Plan every network at alpha = 1."""
    where = arm.get("where", task.where)
    fields = {name: arm[name] for name in SPEC_FIELDS if name in arm}
    batch = digits.load().x[:1000]  # what a defender has: benign inputs, none of the attacker's labels
    plans = []
    for params in task.networks:
        acts = None
        if fields.get("directions") == "resistant":
            acts = sd.activations(task.apply, params, batch, where=where)
        spec = sd.SpecDef(alpha=1.0, **fields)
        plans.append(sd.plan(params, spec, where=where, key=KEY, activations=acts))
    return plans


def _matched(
    task: Task, make: Callable[[int, float], Problem], other: Arm
) -> tuple[list[Problem], list[float]]:
    goal = sharpness_of(problems_of(task, other)[0], task)
    alphas = match_alphas(make, goal, task.args, KEY)
    return [make(i, a) for i, a in enumerate(alphas)], alphas


@functools.cache  # one function per loss, so that jit compiles it once
def _layered_loss(loss: Callable[..., Any]) -> Callable[..., Any]:
    return sd.layered(loss)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, np.floating) else leaf

    return jax.tree.map(cast, tree)
