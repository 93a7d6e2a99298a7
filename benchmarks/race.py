"""How much slower does each optimizer become? Tables of races, each from one saved config.

    python -m benchmarks.race CONFIG [--rerun] [--smoke]

CONFIG is a name in benchmarks/configs/: a task, arms (benchmarks/_race_arms.py), optimizers and the settings
of the race. Every arm races every optimizer over decades of step sizes around 2 / sharpness, or around a
center that the config gives, refined until the best one of each seed is bracketed; a seed is a pretrained
network. The table goes to benchmarks/results/race_CONFIG.json and .svg. `--rerun` takes disjoint pretraining
seeds and writes race_CONFIG_rerun.json. What was interrupted goes on where it was: finished chunks lie in
results/state/.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import _race_arms as arms
from benchmarks import _race_exponents as exponents
from benchmarks import _race_figures as figures
from benchmarks._harness import RESULTS, save
from specdef_jax import race
from specdef_jax.programs import free_when_many
from specdef_jax.race import RaceResult
from specdef_jax.tasks.task import Task

CONFIGS = Path(__file__).with_name("configs")
STATE = Path("results/state")  # ignored by git
ALL = race.FIRST_ORDER | race.SECOND_ORDER


def main() -> None:
    """Race the arms of a config, print a line for each, save JSON and a figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("config", choices=sorted(path.stem for path in CONFIGS.glob("*.json")))
    parser.add_argument("--rerun", action="store_true", help="disjoint pretraining seeds, saved beside")
    parser.add_argument("--arms", nargs="+", help="these arms of the config only")
    parser.add_argument("--smoke", action="store_true", help="two seeds, two arms, few steps; not saved")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    config = load(options.config)
    if options.smoke:
        config = smoke(config)
    if options.arms:
        config["arms"] = [arm for arm in config["arms"] if arm["name"] in options.arms]
    name = f"race_{options.config}" + ("_rerun" if options.rerun else "")
    begin = time.perf_counter()
    task = arms.task_of(config["task"], config["task"].get("first_seed", 0) + (1000 if options.rerun else 0))
    rows = table(task, config)
    summary: dict[str, Any] = {"seconds": time.perf_counter() - begin, "ratios": ratios(rows, config)}
    path = RESULTS / f"{name}.svg"
    if config.get("figure") == "exponents":
        summary["exponents"] = exponents.fits(config, rows, task)
    if options.smoke:
        return
    if "exponents" in summary:
        exponents.draw(summary["exponents"], path)
    else:
        figures.draw(config, summary["ratios"], path)
    save(name, config, rows, summary)


def load(name: str) -> dict[str, Any]:
    """Return a saved config."""
    return json.loads((CONFIGS / f"{name}.json").read_text())


def smoke(config: dict[str, Any]) -> dict[str, Any]:
    """Return the same table at the size of a test."""
    few = {"seeds": 2, "target": 1.5} | {k: v for k, v in config["task"].items() if k == "network"}
    race_settings = config["race"] | {"steps": 60, "decades": 2, "per_decade": 1, "refine": 4.0}
    race_settings.pop("milestones", None)
    kept = [config["arms"][0], config["arms"][1], config["arms"][-1]]
    return config | {
        "task": few,
        "race": race_settings,
        "arms": kept,
        "optimizers": config["optimizers"][-1:],
    }


def table(task: Task, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per arm and optimizer."""
    rows = []
    for arm in config["arms"]:
        began = time.perf_counter()
        found = rows_of(task, arm, config)
        rows += found
        told = "  ".join(f"{row['optimizer']} {_told(row)}" for row in found)
        print(f"{arm['name']:>28} {time.perf_counter() - began:6.0f} s  {told}", flush=True)
    return rows


def rows_of(task: Task, arm: arms.Arm, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Race every optimizer on one arm."""
    free_when_many()
    problems, alphas = arms.problems_of(task, arm)
    sharp = arms.sharpness_of(problems, task)
    settings = dict(config["race"])
    decades, per_decade = settings.pop("decades"), settings.pop("per_decade")
    # what divides by the curvature has a natural step size that does not depend on it
    center = settings.pop("center", None) or float(np.median([2 / s for s in sharp]))
    switches = arm.get("switches", {})
    optimizers = {
        name: race.Switched(ALL[name], **switches) if switches else ALL[name] for name in config["optimizers"]
    }
    args = arms.args_of(task, arm)
    batch = arm.get("batch")
    result = race.run_problems(
        problems,
        optimizers,
        sample=race.minibatches(batch, *args) if batch else race.full_batch(*args),
        eval_args=args if batch else None,
        step_sizes=race.log_grid(center, decades=decades, per_decade=per_decade),
        target=task.target,
        folder=STATE / "race",
        chunk=len(problems),
        lanes=1,
        **settings,
    )
    return [
        {"arm": arm["name"], "optimizer": name, "alphas": alphas, "sharpness": sharp} | _row(result, name)
        for name in result.names
    ]


def _row(result: RaceResult, name: str) -> dict[str, Any]:
    best, grid = result.best_index(name), result.grid(name)
    return {
        "steps": result.steps(name).tolist(),
        "evaluations": result.gradients(name).tolist(),
        "milestones": [result.at(j).steps(name).tolist() for j in range(result.targets.shape[1] - 1)],
        "best_step_size": [float(grid[b]) if b >= 0 else np.nan for b in best],
        "at_edge": result.at_edge(name),
        "censored": int(result.censored[name].sum()),
        "diverged": result.diverged(name),
        "recovered": result.recovered(name),
        "median": result.survival(name).median,
        "least_spent": result.least_spent(name).tolist(),
        "grid": grid.tolist(),
        "step_seconds": float(result.step_seconds[result.index(name)]),
        "seconds": result.seconds,
    }


def _told(row: dict[str, Any]) -> str:
    """Return median steps; * where a seed did not arrive, | where a best step size is at an edge."""
    return f"{row['median']:.0f}{'*' if row['censored'] else ''}{'|' if row['at_edge'] else ''}"


def ratios(rows: list[dict[str, Any]], config: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare every arm with the arm its config names as baseline, at the target and at every milestone."""
    by = {(row["arm"], row["optimizer"]): row for row in rows}
    found = []
    for arm in config["arms"]:
        if "baseline" not in arm or (arm["baseline"], rows[0]["optimizer"]) not in by:
            continue
        for name in config["optimizers"]:
            a, b = by[arm["name"], name], by[arm["baseline"], name]
            kinds = {"target": (a["steps"], b["steps"], config["race"]["steps"])}
            kinds["evaluations"] = (a["evaluations"], b["evaluations"], np.array(a["least_spent"]))
            for j, level in enumerate(config["race"].get("milestones", ())):
                kinds[f"{level:g}"] = (a["milestones"][j], b["milestones"][j], config["race"]["steps"])
            for kind, (ours, base, cap) in kinds.items():
                ratio = race.ratio_of_means(np.array(ours), np.array(base), cap)
                told = {"arm": arm["name"], "baseline": arm["baseline"], "optimizer": name, "to": kind}
                found.append(told | asdict(ratio))
    return found


if __name__ == "__main__":
    main()
