"""Race optimizers to a target loss over a grid of step sizes and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, PRNGKeyArray, PyTree

from specdef_jax.errors import SpecError
from specdef_jax.parametrization import Problem, problem
from specdef_jax.race import execution, inputs, refinement
from specdef_jax.race.inputs import Optimizers
from specdef_jax.race.result import RaceResult, merged
from specdef_jax.race.rounds import Rounds
from specdef_jax.race.store import Store

RECORDS = 96


def run(
    loss: Callable[..., Array],
    params: PyTree,
    optimizers: Optimizers,
    *,
    sample: Callable[[PRNGKeyArray], Sequence[Any]],
    steps: int,
    step_sizes: inputs.Grids,
    seeds: int = 1,
    target: float,
    key: PRNGKeyArray | None = None,
    **settings: Any,
) -> RaceResult:
    """Race optimizers from one starting point; seeds are data orders.

    Args:
      loss: loss(params, *args) -> scalar.
      params: starting parameters, plain or deformed.
      optimizers: name -> function from a (traced) step size to an optax transformation.
      sample: sample(key) -> args of one step, `race.full_batch(*data)` or `race.minibatches(size, *data)`
        or your own; a jax.tree_util.Partial keeps its data an argument. One that ignores its key makes
        the problem deterministic.
      steps: the cap on steps.
      step_sizes: one ascending grid for all, or name -> grid.
      seeds: number of data orders; 1 for a deterministic problem.
      target: loss at which a run has arrived.
      key: for the data orders; fixed by default, so that races of different problems are paired.
      settings: the other keywords of `run_problems`.

    Returns:
      A RaceResult.

    Raises:
      ProblemError: the start is not finite or meets the target already.
      SpecError: a grid or a count has no meaning, or several seeds of a deterministic problem.
    """
    inputs.check_count("seeds", seeds)
    key = jax.random.key(0) if key is None else key
    return run_problems(
        [problem(loss, params, *sample(key))],
        optimizers,
        sample=sample,
        steps=steps,
        step_sizes=step_sizes,
        target=target,
        key=key,
        orders=seeds,
        **settings,
    )


def run_problems(
    problems: Sequence[Problem],
    optimizers: Optimizers,
    *,
    sample: Callable[[PRNGKeyArray], Sequence[Any]],
    steps: int,
    step_sizes: inputs.Grids,
    target: float | Sequence[float],
    milestones: Sequence[float] = (),
    key: PRNGKeyArray | None = None,
    orders: int = 1,
    eval_every: int = 1,
    eval_args: Sequence[Any] | None = None,
    max_evaluations: float | None = None,
    refine: float | None = None,
    prune: bool = False,
    ends: bool = False,
    lanes: int | None = None,
    memory: float | None = None,
    chunk: int | None = None,
    folder: Path | str | None = None,
    mesh: Mesh | None = None,
    progress: execution.Report | None = None,
) -> RaceResult:
    """Race optimizers on several problems of one structure; a seed is a problem x a data order.

    The problems are usually one network per pretraining seed. Data order i has the same key in every
    call with the same `key`, so races at different alphas are paired.

    What a run computes depends on its problem, data order and step size alone: without `prune` the
    results are the same to the bit whatever `chunk`, `folder` and `mesh`. Other numbers of lanes are
    other compiled programs, equal to rounding.

    Args:
      problems: same structure and shapes.
      optimizers: as in `run`, like all that is not named otherwise here.
      sample: as in `run`.
      steps: as in `run`.
      step_sizes: as in `run`.
      target: one loss, or one per problem.
      milestones: higher losses, descending, whose crossing is told too: RaceResult.at. They cost nothing.
      key: as in `run`.
      orders: data orders per problem.
      eval_every: steps between evaluations against the target.
      eval_args: fixed args to evaluate on; None reads the loss of the step itself, which is exact
        when `sample` is deterministic and free of charge.
      max_evaluations: cap on gradient evaluations, beside that on steps; None for no such cap.
      refine: race further step sizes until the best one of each seed is inside its grid and its
        neighbours are within this factor of it, or 16 rounds are over; None races the grid alone.
      prune: stop a run once another step size of its seed has arrived in fewer steps. The best
        step size and its steps are the same, to every milestone too; the other runs are DOMINATED.
      ends: keep the parameters that each run was judged by last: RaceResult.end. Takes memory for one more
        set of parameters per lane and one per run, their number rounded up to a power of two, on the device;
        twice the latter on the host for a moment, once in the `folder`, and on every device of a mesh.
      lanes: runs in flight per thread; None finds it by a short probe.
      memory: bytes that the lanes may take; a quarter of the machine's or the device's by default.
      chunk: seeds raced at a time; None races all of them, or with a folder as many as there are cores.
      folder: where finished chunks are kept; the same race started again goes on where it was. A chunk is
        known by its program and all its numbers, so that nothing stale is ever taken.
      mesh: devices to spread the runs over, across processes too; each process calls this alike.
      progress: progress(done, total), called now and then, by one thread at a time; an exception
        that it raises ends the race. Refinement raises the total.

    Raises:
      ProblemError: a start is not finite or meets its target already.
      StructureError: the problems differ in structure, shapes or dtypes.
      SpecError: a grid or a count has no meaning, several orders of a deterministic sample, or ends of
        parameters that span processes.
    """
    counts = {"steps": steps, "orders": orders, "eval_every": eval_every, "lanes": lanes, "chunk": chunk}
    for name, count in counts.items():
        if count is not None:
            inputs.check_count(name, count)
    if not optimizers:
        raise SpecError("no optimizer given; pass {name: step_size -> optax transformation}.")
    refinement.check_factor(refine)
    key = jax.random.key(0) if key is None else key
    as_partial = sample if isinstance(sample, Partial) else Partial(sample)
    inputs.check_orders(as_partial, key, orders)
    stacked = inputs.stack(problems)
    if ends:
        inputs.check_ends(stacked)
    eval_args = None if eval_args is None else tuple(eval_args)
    targets = inputs.targets(target, milestones, len(problems))
    inputs.check_start(problems, as_partial(key) if eval_args is None else eval_args, targets[:, -1])
    grids = inputs.grids(step_sizes, optimizers)
    rounds = Rounds(
        problems=stacked,
        sample=as_partial,
        eval_args=eval_args,
        targets=targets,
        orders=orders,
        record_at=_record_at(steps, eval_every),
        steps=steps,
        evaluations=np.inf if max_evaluations is None else max_evaluations,
        eval_every=eval_every,
        prune=prune,
        ends=ends,
        key=key,
        lanes=lanes or 1,
        chunk=chunk or (len(problems) * orders if folder is None else execution.cores()),
        mesh=mesh,
        store=None if folder is None else Store(Path(folder)),
    )
    if lanes is None:
        name, factory = next(iter(optimizers.items()))
        seeds = np.arange(rounds.seeds)
        first = rounds.runs(grids[name], seeds, np.full(seeds.size, np.inf))
        rounds = rounds.with_lanes(execution.probe(first, factory, eval_every, memory))
    return _raced(rounds, optimizers, grids, refine, progress)


def _raced(
    rounds: Rounds,
    optimizers: Optimizers,
    grids: dict[str, np.ndarray],
    refine: float | None,
    progress: execution.Report | None,
) -> RaceResult:
    """Race one optimizer after the other, each until its best step size is bracketed."""
    total = sum(grid.size for grid in grids.values()) * rounds.seeds
    done = 0

    def report(now: int) -> None:
        if progress is not None:
            progress(done + now, total)

    races: dict[str, list[RaceResult]] = {name: [] for name in optimizers}
    for name, factory in optimizers.items():
        grid, best = grids[name], np.full(rounds.seeds, np.inf)
        for i in range(refinement.ROUNDS):
            races[name].append(rounds.race(name, factory, grid, best, report))
            done += grid.size * rounds.seeds
            if refine is None or i + 1 == refinement.ROUNDS:
                break
            so_far = merged({name: races[name]})
            grid = refinement.wanted(so_far, refine)
            if not grid.size:
                break
            total += grid.size * rounds.seeds
            if rounds.prune:
                best = np.nan_to_num(so_far.steps(name), nan=np.inf)
    return merged(races)


def _record_at(steps: int, eval_every: int) -> np.ndarray:
    """Return the evaluations to record: all of the first ones, then evenly in the logarithm."""
    last = steps // eval_every
    points = np.unique(np.round(np.geomspace(1, last + 1, RECORDS)).astype(int)) - 1
    return (points * eval_every).astype(np.int32)
