"""The race of a certification: arms, and what is compared with what."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from specdef_jax import attacks, race
from specdef_jax.certification import arms as arm
from specdef_jax.certification.config import Config
from specdef_jax.certification.store import Keep, Progress
from specdef_jax.parametrization import Problem, problem
from specdef_jax.race.control import scalar_control
from specdef_jax.spec import Plan
from specdef_jax.specdef import apply_plan
from specdef_jax.tasks.task import Task


def raced(task: Task, others: Task | None, config: Config, progress: Progress, keep: Keep) -> dict[str, Any]:
    """Race every arm and compare (THEORY.md 3.3, 5.1 to 5.3).

    Args:
      task: the networks.
      others: the same task from disjoint pretraining seeds, for the null control; None if there are none.
      config: settings.
      progress: told after each arm.
      keep: keep(name, compute) -> result, stored so that an interrupted race resumes.
    """
    key = jax.random.key(config.seed)
    made = _arms(task, others, config, key, progress, keep)
    rows: dict[str, Any] = {}
    for i, (name, build) in enumerate(made.items()):
        progress("race", i, len(made))
        rows[name] = keep(f"arm_{name}", functools.partial(_race_arm, build, task, config, key))
    progress("race", len(made), len(made))
    return {"arms": rows, "ratios": _ratios(rows, config), "steps_cap": config.steps}


def _race_arm(build: Callable[[], arm.Arm], task: Task, config: Config, key: PRNGKeyArray) -> dict[str, Any]:
    one = build()
    sharp = [arm.sharpness(p, task.args, key) for p in one.problems]
    center = float(np.median([2 / s for s in sharp]))
    result = race.run_problems(
        one.problems,
        race.DEFAULT,
        sample=race.full_batch(*task.args),
        steps=config.steps,
        step_sizes=race.log_grid(center, decades=config.decades, per_decade=config.per_decade),
        target=task.target,
        key=key,
        prune=True,
        lanes=1,
    )
    return _arm_row(one, sharp, result)


def _arms(
    task: Task, others: Task | None, config: Config, key: PRNGKeyArray, progress: Progress, keep: Keep
) -> dict[str, Callable[[], arm.Arm]]:
    """Say how to build each arm; bottom directions and the scalar control at the sharpness of top."""
    top, bottom = (arm.plans_for(task, config, d) for d in ("top", "bottom"))
    seeds = len(task.networks)
    strongest = (config.alphas[-1],) * seeds

    def make_bottom(i: int, alpha: float) -> Problem:
        return problem(task.loss, apply_plan(task.networks[i], bottom[i].with_alpha(alpha)), *task.args)

    def make_scalar(i: int, alpha: float) -> Problem:
        return scalar_control(task.loss, task.networks[i], task.control, alpha, *task.args)

    @functools.cache  # both matches aim at the same sharpness
    def targets() -> list[float]:
        model = arm.deformed_arm("", "", task, top, (config.matched,) * seeds)
        return [arm.sharpness(p, task.args, key) for p in model.problems]

    def match(make: Callable[[int, float], Problem]) -> list[float]:
        return arm.match_alphas(make, targets(), task.args, key)

    progress("matching sharpness", 0, 2)
    bottom_alphas = tuple(keep("match_bottom", lambda: match(make_bottom)))
    progress("matching sharpness", 1, 2)
    scalar_alphas = tuple(keep("match_scalar", lambda: match(make_scalar)))
    progress("matching sharpness", 2, 2)

    def deformed(a: float) -> Callable[[], arm.Arm]:
        return lambda: arm.deformed_arm(f"top_{a:g}", f"top, alpha {a:g}", task, top, (a,) * seeds)

    def attacked(name: str, label: str, plans: list[Plan], alphas: tuple[float, ...]) -> arm.Arm:
        attack = getattr(attacks, name.split("_")[0])
        return arm.attack_arm(name, label, task, plans, alphas, attack)

    made: dict[str, Callable[[], arm.Arm]] = {
        "original": lambda: arm.original_arm("original", "original", task)
    }
    if others is not None:
        made["original_other_seeds"] = lambda: arm.original_arm(
            "original_other_seeds", "original, other seeds", others
        )
    return {
        **made,
        **{f"top_{a:g}": deformed(a) for a in config.alphas},
        "bottom": lambda: arm.deformed_arm("bottom", "bottom, same sharpness", task, bottom, bottom_alphas),
        "scalar": lambda: arm.Arm(
            "scalar",
            "one bias rescaled, same sharpness",
            tuple(make_scalar(i, a) for i, a in enumerate(scalar_alphas)),
            scalar_alphas,
        ),
        "fuse": lambda: attacked("fuse", "fuse", top, strongest),
        "freeze": lambda: attacked("freeze", "freeze", top, strongest),
        "freeze_bottom": lambda: attacked("freeze_bottom", "freeze (bottom)", bottom, bottom_alphas),
        "inject": lambda: attacked("inject", "inject", top, strongest),
    }


def _arm_row(one: arm.Arm, sharp: list[float], result: race.RaceResult) -> dict[str, Any]:
    """Say what one arm did, with the loss curve of the best step size of each seed."""
    optimizers = {}
    for i, name in enumerate(result.names):
        best = result.best_index(name)
        shown = np.where(best < 0, result.last[i].argmin(axis=0), best)
        optimizers[name] = {
            "steps": result.steps(name),
            "best_step_size": np.where(best < 0, np.nan, result.step_sizes[i][best]),
            "at_edge": result.at_edge(name),
            "censored": int(np.isnan(result.steps(name)).sum()),
            "diverged": result.diverged(name),
            "recovered": result.recovered(name),
            "curves": [result.trace[i, shown[s], s] for s in range(len(sharp))],
        }
    return {
        "label": one.label,
        "alphas": one.alphas,
        "sharpness": sharp,
        "step_sizes": result.step_sizes[0],
        "record_at": result.record_at,
        "optimizers": optimizers,
        "bill": None if one.bill is None else asdict(one.bill) | {"knowledge": one.bill.knowledge.label},
        "seconds": result.seconds,
    }


def _ratios(rows: dict[str, Any], config: Config) -> list[dict[str, Any]]:
    """Compare arms: slowdown, insertion, controls, and what the attacks recovered."""
    comparisons = [(f"top_{a:g}", "top_1", "slowdown") for a in config.alphas[1:]]
    comparisons += [("bottom", "top_1", "slowdown"), ("scalar", "original", "positive control")]
    comparisons += [("top_1", "original", "insertion"), ("original_other_seeds", "original", "null control")]
    comparisons += [("inject", "original", "null control"), ("fuse", "original", "attack")]
    comparisons += [("freeze", "original", "attack"), ("freeze_bottom", "original", "attack")]
    return [
        {"arm": a, "baseline": b, "kind": kind, "optimizer": name}
        | asdict(race.ratio_of_means(_steps(rows[a], name), _steps(rows[b], name), config.steps))
        for a, b, kind in comparisons
        if a in rows
        for name in race.DEFAULT
    ]


def _steps(row: dict[str, Any], optimizer: str) -> np.ndarray:
    return np.asarray(row["optimizers"][optimizer]["steps"], float)
