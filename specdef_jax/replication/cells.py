"""Races of a replication: steps to the target, and what the network can do at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specdef_jax import race
from specdef_jax.errors import ProblemError
from specdef_jax.parametrization import Problem
from specdef_jax.programs import free_when_many
from specdef_jax.race.result import RaceResult
from specdef_jax.race.runs import Factory
from specdef_jax.replication.config import Config
from specdef_jax.tasks.experiment import Experiment


def raced(
    experiment: Experiment,
    config: Config,
    problems: Sequence[Problem],
    optimizers: Mapping[str, Factory],
    step_sizes: Sequence[float],
    folder: Path | None,
) -> RaceResult:
    """Race the attacks on the same row of several networks, minibatches drawn alike in every row."""
    free_when_many()
    return race.run_problems(
        problems,
        optimizers,
        sample=experiment.sample,
        steps=config.steps,
        step_sizes=step_sizes,
        target=list(experiment.targets[: len(problems)]),
        key=jax.random.key(config.seed),
        eval_every=config.judge_every,
        eval_args=experiment.judged_on,
        lanes=1,
        chunk=None if folder is None else len(problems),
        folder=folder,
    )


def ends(
    experiment: Experiment, config: Config, problems: Sequence[Problem], factory: Factory, result: RaceResult
) -> list[dict[str, Any]]:
    """Return, for each step size of the only optimizer, what every network needed and what it is after it."""
    (name,) = result.names
    key = jax.random.split(jax.random.key(config.seed), 1)[0]
    told = []
    for i, step_size in enumerate(result.grid(name)):
        cells = []
        for j, one in enumerate(problems):
            steps = float(result.to_target[0, i, j])
            taken = config.steps if np.isnan(steps) else int(np.ceil(steps))
            params = one.read_back(
                race.replay(one, factory, float(step_size), taken, sample=experiment.sample, key=key)
            )
            cells.append(
                {
                    "steps": steps,
                    "capability": float(experiment.capability(params)),
                    "retained": float(experiment.retained(params)),
                    "peak": float(result.peak[0, i, j]),
                }
            )
        told.append({"step_size": float(step_size), "networks": cells})
    return told


def row(
    experiment: Experiment, config: Config, problems: Sequence[Problem], folder: Path | None
) -> dict[str, Any]:
    """Return one row of the matrix: Adam at every step size. A start that is no start is told, not raced."""
    adam = race.FIRST_ORDER["adam"]
    start = [state(experiment, one) for one in problems]
    try:
        result = raced(experiment, config, problems, {"adam": adam}, config.step_sizes, folder)
    except ProblemError as error:
        return {"start": start, "cells": [], "refused": str(error)}
    return {"start": start, "cells": ends(experiment, config, problems, adam, result), "refused": ""}


def fastest(
    experiment: Experiment,
    config: Config,
    problems: Sequence[Problem],
    optimizers: Mapping[str, Factory],
    folder: Path | None,
) -> dict[str, Any]:
    """Return the steps of each optimizer at its best step size, network by network."""
    middle = config.step_sizes[len(config.step_sizes) // 2]
    grid = [middle * factor for factor in config.grid]
    try:
        result = raced(experiment, config, problems, optimizers, grid, folder)
    except ProblemError as error:
        return {"refused": str(error)}
    return {
        name: {
            "steps": result.steps(name).tolist(),
            "gradients": result.gradients(name).tolist(),
            "best_step_size": [
                float(result.grid(name)[b]) if b >= 0 else np.nan for b in result.best_index(name)
            ],
            "at_edge": result.at_edge(name),
            "diverged": result.diverged(name),
        }
        for name in result.names
    } | {"refused": ""}


def state(experiment: Experiment, one: Problem) -> dict[str, float]:
    """Return what a network can do where a problem starts."""
    params = one.read_back(one.params)
    return {
        "judged": float(_judged(one, experiment.judged_on)),
        "capability": float(experiment.capability(params)),
        "retained": float(experiment.retained(params)),
    }


@jax.jit
def _judged(one: Problem, args: tuple[Any, ...]) -> jax.Array:
    return one.loss(one.params, *args)
