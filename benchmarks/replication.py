"""The paper's experiments in miniature: run some, keep their results.

    python -m benchmarks.replication TASK ... [--size small]

Runs `specdef certify --task` for each, resuming what was interrupted, and keeps results.json as
benchmarks/results/replication_TASK.json, figures beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import optax
from jax.tree_util import Partial

from benchmarks._harness import RESULTS
from specdef_jax import race
from specdef_jax.certification.store import dumps
from specdef_jax.parametrization import problem
from specdef_jax.replication import TASKS, figure, gallery, prepared, replicate
from specdef_jax.tasks.experiment import Experiment

STATE = Path("results/state/replication")  # ignored by git


def main() -> None:
    """Run the tasks in turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("tasks", nargs="+", choices=sorted(TASKS))
    parser.add_argument("--size", default="small")
    options = parser.parse_args()
    for task in options.tasks:
        name = task.replace("/", "_")
        folder = STATE / f"{name}_{options.size}"
        results = replicate(task, options.size, folder, progress=_told)
        if options.size == "small":
            share = step_share(prepared(task, options.size, folder), results["config"])
            keep(name, results | {"step_share": share})
        print(json.dumps({"task": task, "seconds": results["spent"]}))


def keep(name: str, results: dict) -> None:
    """Write what the documents read."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"replication_{name}.json").write_text(dumps(results))
    (RESULTS / f"replication_{name}.svg").write_bytes(figure.standalone(results))
    if gallery.pictures(results):
        (RESULTS / f"replication_{name}_gallery.svg").write_bytes(gallery.standalone(results))


def step_share(experiment: Experiment, config: dict[str, Any], pairs: int = 5) -> dict[str, float]:
    """Return the speed of the race's training steps over that of bare jitted steps of optax's Adam."""
    params = experiment.networks[experiment.defended][0]
    loss, sample, key, steps = Partial(experiment.loss), experiment.sample, jax.random.key(0), config["steps"]
    one = problem(experiment.loss, params, *experiment.judged_on)
    optimizer = optax.adam(1e-4)

    @jax.jit
    def step(params: Any, state: Any, t: int) -> tuple[Any, Any]:
        slopes = jax.grad(loss)(params, *sample(jax.random.fold_in(key, t)))
        updates, state = optimizer.update(slopes, state, params)
        return optax.apply_updates(params, updates), state

    def bare() -> float:
        now, state = params, optimizer.init(params)
        begin = time.perf_counter()
        for t in range(steps):
            now, state = step(now, state, t)
        jax.block_until_ready(now)
        return time.perf_counter() - begin

    def raced() -> float:
        return race.run_problems(
            [one], {"adam": race.FIRST_ORDER["adam"]}, sample=sample, steps=steps, step_sizes=[1e-4],
            target=-1e9, eval_every=steps, eval_args=experiment.judged_on, lanes=1,
        ).seconds  # fmt: skip

    bare(), raced()  # compile
    shares = [bare() / raced() for _ in range(pairs)]
    return {"median": statistics.median(shares), "lowest": min(shares), "highest": max(shares)}


def _told(stage: str, done: int, total: int) -> None:
    print(f"  {stage}: {done} of {total}", flush=True)


if __name__ == "__main__":
    main()
