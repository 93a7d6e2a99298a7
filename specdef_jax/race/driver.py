"""Race optimizers to a target loss over a grid of step sizes and seeds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.errors import SpecError
from specdef_jax.parametrization import Problem, problem
from specdef_jax.race import execution, inputs, runner
from specdef_jax.race.result import RaceResult

RECORDS = 96


def run(
    loss: Callable[..., Array],
    params: PyTree,
    optimizers: Mapping[str, runner.Factory],
    *,
    sample: Callable[[PRNGKeyArray], Sequence[Any]],
    steps: int,
    step_sizes: inputs.Grids,
    seeds: int = 1,
    target: float,
    key: PRNGKeyArray | None = None,
    eval_every: int = 1,
    eval_args: Sequence[Any] | None = None,
    prune: bool = False,
    lanes: int | None = None,
    progress: execution.Report | None = None,
) -> RaceResult:
    """Race optimizers from one starting point; seeds are data orders.

    Args:
      loss: loss(params, *args) -> scalar.
      params: starting parameters, plain or deformed.
      optimizers: name -> function from a (traced) step size to an optax transformation.
      sample: sample(key) -> args of one step. A jax.tree_util.Partial keeps its data an argument;
        a function that ignores its key makes the problem deterministic.
      steps: the cap on steps.
      step_sizes: one ascending grid for all, or name -> grid of equal lengths.
      seeds: number of data orders; 1 for a deterministic problem.
      target: loss at which a run has arrived.
      key: for the data orders; fixed by default, so that races of different problems are paired.
      eval_every: steps between evaluations against the target.
      eval_args: fixed args to evaluate on; None reads the loss of the step itself, which is exact
        when `sample` is deterministic and free of charge.
      prune: stop a run once another step size of its seed has arrived in fewer steps. The best
        step size and its steps are the same; the other runs are told as DOMINATED.
      lanes: runs in flight per thread; None finds it by a short probe.
      progress: progress(done, total), called now and then, by one thread at a time; an exception
        that it raises ends the race.

    Returns:
      A RaceResult.

    Raises:
      ProblemError: the start is not finite or meets the target already.
      SpecError: a grid or a count has no meaning.
    """
    inputs.check_count("seeds", seeds)
    key = jax.random.key(0) if key is None else key
    args = sample(key)
    return run_problems(
        [problem(loss, params, *args)],
        optimizers,
        sample=sample,
        steps=steps,
        step_sizes=step_sizes,
        target=target,
        key=key,
        orders=seeds,
        eval_every=eval_every,
        eval_args=eval_args,
        prune=prune,
        lanes=lanes,
        progress=progress,
    )


def run_problems(
    problems: Sequence[Problem],
    optimizers: Mapping[str, runner.Factory],
    *,
    sample: Callable[[PRNGKeyArray], Sequence[Any]],
    steps: int,
    step_sizes: inputs.Grids,
    target: float | Sequence[float],
    key: PRNGKeyArray | None = None,
    orders: int = 1,
    eval_every: int = 1,
    eval_args: Sequence[Any] | None = None,
    prune: bool = False,
    lanes: int | None = None,
    progress: execution.Report | None = None,
) -> RaceResult:
    """Race optimizers on several problems of one structure; a seed is a problem x a data order.

    The problems are usually one network per pretraining seed. Data order i has the same key in every
    call with the same `key`, so races at different alphas are paired.

    Args:
      problems: same structure and shapes.
      optimizers: as in `run`, like all that is not named otherwise here.
      sample: as in `run`.
      steps: as in `run`.
      step_sizes: as in `run`.
      target: one loss, or one per problem.
      key: as in `run`.
      orders: data orders per problem.
      eval_every: as in `run`.
      eval_args: as in `run`.
      prune: as in `run`.
      lanes: as in `run`.
      progress: as in `run`.

    Raises:
      ProblemError: a start is not finite or meets its target already.
      StructureError: the problems differ in structure, shapes or dtypes.
      SpecError: a grid or a count has no meaning.
    """
    for name, count in (("steps", steps), ("orders", orders), ("eval_every", eval_every)):
        inputs.check_count(name, count)
    if lanes is not None:
        inputs.check_count("lanes", lanes)
    if not optimizers:
        raise SpecError("no optimizer given; pass {name: step_size -> optax transformation}.")
    key = jax.random.key(0) if key is None else key
    as_partial = sample if isinstance(sample, Partial) else Partial(sample)
    stacked = inputs.stack(problems)
    eval_args = None if eval_args is None else tuple(eval_args)
    targets = inputs.targets(target, len(problems))
    inputs.check_start(stacked, as_partial(key) if eval_args is None else eval_args, targets)
    grids = inputs.grids(step_sizes, optimizers)
    record_at = _record_at(steps, eval_every)
    seeds = len(problems) * orders
    make = functools.partial(
        _runs, stacked, as_partial, eval_args, targets, orders, jnp.asarray(record_at), steps, prune, key
    )
    collected, compiling, running, done = [], 0.0, 0.0, 0
    total = sum(grid.size for grid in grids.values()) * seeds
    if lanes is None:
        name, factory = next(iter(optimizers.items()))
        lanes = execution.probe(make(grids[name]), factory, eval_every)
    for name, factory in optimizers.items():
        runs = make(grids[name])
        report = None if progress is None else functools.partial(_report_on, progress, done, total)
        results, compile_s, run_s = execution.race_one(runs, factory, eval_every, lanes, report)
        collected.append([x.reshape(grids[name].size, seeds, *x.shape[1:]) for x in results])
        compiling, running, done = compiling + compile_s, running + run_s, done + grids[name].size * seeds
    steps_to, outcome, last, peak, trace = (np.stack(column) for column in zip(*collected, strict=True))
    return RaceResult(
        names=tuple(optimizers),
        step_sizes=np.stack(list(grids.values())),
        to_target=steps_to,
        outcome=outcome,
        last=last,
        peak=peak,
        trace=trace,
        record_at=record_at,
        cap=steps,
        lanes=lanes,
        seconds=running,
        compile_seconds=compiling,
    )


def _record_at(steps: int, eval_every: int) -> np.ndarray:
    """Return the evaluations to record: all of the first ones, then evenly in the logarithm."""
    last = steps // eval_every
    points = np.unique(np.round(np.geomspace(1, last + 1, RECORDS)).astype(int)) - 1
    return (points * eval_every).astype(np.int32)


def _runs(
    problems: Problem,
    sample: Partial,
    eval_args: PyTree,
    targets: np.ndarray,
    orders: int,
    record_at: Array,
    steps: int,
    prune: bool,
    key: PRNGKeyArray,
    grid: np.ndarray,
) -> runner.Runs:
    """Lay out (step size, problem, order) as a flat list of runs, in the order of the results."""
    dtype = jnp.result_type(float)
    count = len(targets)
    step, index, order = (x.ravel() for x in np.indices((grid.size, count, orders), dtype=np.int32))
    keys = jax.random.split(key, orders)
    return runner.Runs(
        problems=problems,
        sample=sample,
        eval_args=eval_args,
        problem=jnp.asarray(index),
        seed=jnp.asarray(index * orders + order),
        keys=keys[order],
        step_sizes=jnp.asarray(grid[step], trees.result_dtype(problems.params)),
        targets=jnp.asarray(targets[index], dtype),
        count=jnp.asarray(step.size),
        steps=jnp.asarray(steps, jnp.int32),
        record_at=record_at,
        best=jnp.full(count * orders, jnp.inf, dtype),
        prune=jnp.asarray(prune),
    )


def _report_on(progress: execution.Report, before: int, total: int, done: int) -> None:
    progress(before + done, total)
