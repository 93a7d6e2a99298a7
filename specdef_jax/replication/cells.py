"""Races of a replication: steps to the target, and what the network can do at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specdef_jax import race
from specdef_jax.errors import SpecDefError
from specdef_jax.parametrization import Problem
from specdef_jax.programs import free_when_many
from specdef_jax.race import execution, inputs
from specdef_jax.race.result import RaceResult
from specdef_jax.race.runs import Factory
from specdef_jax.replication.config import Config
from specdef_jax.replication.rows import Row
from specdef_jax.tasks.experiment import Experiment
from specdef_jax.tasks.training import each


def raced(
    experiment: Experiment,
    config: Config,
    problems: Sequence[Problem],
    optimizers: Mapping[str, Factory],
    step_sizes: Sequence[float],
    folder: Path | None,
    refine: float | None = None,
) -> RaceResult:
    """Race the attacks on the same row of several networks, minibatches drawn alike in every row.

    As many networks at a time as there are cores, so that three and five of them are one program.
    """
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
        refine=refine,
        prune=refine is not None,
        ends=True,  # not only where they are read, so that all races of one structure are one program
        lanes=1,
        chunk=min(len(problems), execution.cores()),
        folder=folder,
    )


def ends(
    experiment: Experiment,
    problems: Sequence[Problem],
    result: RaceResult,
    *,
    shown: bool = False,
) -> list[dict[str, Any]]:
    """Return, for each step size of the only optimizer, what every network needed and what it is after it.

    Capability and retained loss are those of the parameters that the run was judged by last (RaceResult.end):
    the first to meet the target, or those at the cap. They are judged every few steps, and `steps` is
    interpolated in between. With `shown`, also samples of the first network.
    """
    (name,) = result.names
    grid = result.grid(name)

    def end(i: int, j: int) -> dict[str, Any]:
        params = problems[j].read_back(jax.tree.map(jnp.asarray, result.end(name, i, j)))
        found: dict[str, Any] = {
            "steps": float(result.to_target[0, i, j]),
            "capability": float(experiment.capability(params)),
            "retained": float(experiment.retained(params)),
            "peak": float(result.peak[0, i, j]),
        }
        if shown and j == 0 and experiment.samples is not None:
            found["samples"] = experiment.samples(params)
        return found

    told = each(end, *zip(*np.ndindex(len(grid), len(problems)), strict=True))
    return [
        {"step_size": float(step_size), "networks": list(told[i * len(problems) : (i + 1) * len(problems)])}
        for i, step_size in enumerate(grid)
    ]


def row(experiment: Experiment, config: Config, one: Row, folder: Path | None) -> dict[str, Any]:
    """Return one row of the matrix: Adam at every step size. What cannot be raced says why."""
    adam = race.FIRST_ORDER["adam"]
    count = experiment.seeds if one.headline else min(config.seeds, experiment.seeds)
    start: list[dict[str, float]] = []
    try:
        problems = [race.raveled(made) for made in each(one.make, range(count))]
        start = states(experiment, problems)
        result = raced(experiment, config, problems, {"adam": adam}, config.step_sizes, folder)
    except SpecDefError as error:
        return {"start": start, "cells": [], "refused": str(error)}
    told = ends(experiment, problems, result, shown=one.headline)
    return {"start": start, "cells": told, "refused": ""}


def fastest(
    experiment: Experiment,
    config: Config,
    problems: Sequence[Problem],
    optimizers: Mapping[str, Factory],
    folder: Path | None,
) -> dict[str, Any]:
    """Return the steps of each optimizer at its best step size, network by network."""
    if all(factory is race.FIRST_ORDER["adam"] for factory in optimizers.values()):
        problems = [race.raveled(one) for one in problems]
    try:
        result = raced(experiment, config, problems, optimizers, config.grid, folder, config.refine)
    except SpecDefError as error:
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


def states(experiment: Experiment, problems: Sequence[Problem]) -> list[dict[str, float]]:
    """Return what each of several networks can do where its problem starts.

    Raises:
      StructureError: the problems differ in structure or shapes, and cannot be raced together.
    """
    inputs.stack(problems)
    plain = [one.read_back(one.params) for one in problems]
    return [
        {
            "judged": float(inputs.start_loss(one, experiment.judged_on)),  # compiled for the race too
            "capability": float(experiment.capability(params)),
            "retained": float(experiment.retained(params)),
        }
        for one, params in zip(problems, plain, strict=True)
    ]
