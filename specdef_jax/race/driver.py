"""Race optimizers to a target loss over a grid of step sizes and seeds."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.errors import ProblemError, SpecError, StructureError
from specdef_jax.parametrization import Problem, problem
from specdef_jax.race import runner
from specdef_jax.race.grid import check_grid
from specdef_jax.race.result import RaceResult

Grids = Sequence[float] | np.ndarray | Mapping[str, Sequence[float] | np.ndarray]
Report = Callable[[int, int], None]

RECORDS = 96
VISIT_SECONDS = 0.5
LANES = (1, 16)


def run(
    loss: Callable[..., Array],
    params: PyTree,
    optimizers: Mapping[str, runner.Factory],
    *,
    sample: Callable[[PRNGKeyArray], Sequence[Any]],
    steps: int,
    step_sizes: Grids,
    seeds: int = 1,
    target: float,
    key: PRNGKeyArray | None = None,
    eval_every: int = 1,
    eval_args: Sequence[Any] | None = None,
    prune: bool = False,
    lanes: int | None = None,
    progress: Report | None = None,
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
    _check_count("seeds", seeds)
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
    step_sizes: Grids,
    target: float | Sequence[float],
    key: PRNGKeyArray | None = None,
    orders: int = 1,
    eval_every: int = 1,
    eval_args: Sequence[Any] | None = None,
    prune: bool = False,
    lanes: int | None = None,
    progress: Report | None = None,
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
        _check_count(name, count)
    if lanes is not None:
        _check_count("lanes", lanes)
    if not optimizers:
        raise SpecError("no optimizer given; pass {name: step_size -> optax transformation}.")
    key = jax.random.key(0) if key is None else key
    as_partial = sample if isinstance(sample, Partial) else Partial(sample)
    stacked = _stack(problems)
    eval_args = None if eval_args is None else tuple(eval_args)
    targets = _targets(target, len(problems))
    _check_start(stacked, as_partial(key) if eval_args is None else eval_args, targets)
    grids = _grids(step_sizes, optimizers)
    record_at = _record_at(steps, eval_every)
    seeds = len(problems) * orders
    make = functools.partial(
        _runs, stacked, as_partial, eval_args, targets, orders, jnp.asarray(record_at), steps, prune, key
    )
    collected, compiling, running, done = [], 0.0, 0.0, 0
    total = sum(grid.size for grid in grids.values()) * seeds
    if lanes is None:
        name, factory = next(iter(optimizers.items()))
        lanes = _probe(make(grids[name]), factory, eval_every)
    for name, factory in optimizers.items():
        runs = make(grids[name])
        report = None if progress is None else functools.partial(_report_on, progress, done, total)
        results, compile_s, run_s = _race_one(runs, factory, eval_every, lanes, report)
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


def _stack(problems: Sequence[Problem]) -> Problem:
    if not problems:
        raise SpecError("no problem given; pass at least one.")
    first = jax.tree.structure(problems[0])
    for i, other in enumerate(problems):
        if jax.tree.structure(other) != first:
            raise StructureError(f"problem {i} has another structure than problem 0; race them apart.")
        for (name, a), b in zip(trees.named_leaves(problems[0]), jax.tree.leaves(other), strict=True):
            if (jnp.shape(a), jnp.result_type(a)) != (jnp.shape(b), jnp.result_type(b)):
                raise StructureError(
                    f"'{name}' is {jnp.result_type(b)}{jnp.shape(b)} in problem {i}, but "
                    f"{jnp.result_type(a)}{jnp.shape(a)} in problem 0; race them apart."
                )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)


def _targets(target: float | Sequence[float], count: int) -> np.ndarray:
    targets = np.asarray(target, float)
    if targets.shape not in ((), (count,)):
        raise SpecError(
            f"targets have shape {targets.shape} for {count} problems; give one, or one per problem."
        )
    return np.broadcast_to(targets, (count,))


def _grids(step_sizes: Grids, names: Iterable[str]) -> dict[str, np.ndarray]:
    grids = {}
    for name in names:
        if isinstance(step_sizes, Mapping) and name not in step_sizes:
            raise SpecError(f"optimizer {name!r} has no grid of step sizes; grids: {', '.join(step_sizes)}.")
        grids[name] = check_grid(name, step_sizes[name] if isinstance(step_sizes, Mapping) else step_sizes)
    if len({grid.size for grid in grids.values()}) != 1:
        raise SpecError("the grids of step sizes differ in length; give each optimizer as many.")
    return grids


@jax.jit
def _start_losses(problems: Problem, args: Sequence[Any]) -> Float[Array, "problems"]:
    return jax.lax.map(lambda p: p.loss(p.params, *args), problems)


def _check_start(problems: Problem, args: Sequence[Any], targets: np.ndarray) -> None:
    for i, (loss, target) in enumerate(
        zip(np.asarray(_start_losses(problems, tuple(args))), targets, strict=True)
    ):
        if not np.isfinite(loss):
            raise ProblemError(f"problem {i} starts at loss {loss}; repair its parameters or data.")
        if not np.isfinite(target):
            raise ProblemError(f"problem {i} has target {target}; give a finite loss.")
        if loss <= target:
            raise ProblemError(
                f"problem {i} starts at loss {loss:.4g}, which meets the target {target:.4g} already; "
                "choose a lower target."
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


def _race_one(
    runs: runner.Runs,
    factory: runner.Factory,
    eval_every: int,
    lanes: int,
    report: Callable[[int], None] | None,
) -> tuple[list[np.ndarray], float, float]:
    """Race one optimizer, on CPUs with one thread per core; return results and seconds."""
    shares = _shares(runs, lanes)
    parts = [_share(runs, share, len(shares[0])) for share in shares]
    begin = time.perf_counter()
    compiled = _compile(parts[0], factory, eval_every, lanes)
    compile_seconds = time.perf_counter() - begin
    done = np.zeros(len(shares), int)
    x64 = jax.config.read("jax_enable_x64")  # a context of the caller's does not reach other threads

    lock, stop = threading.Lock(), threading.Event()

    def drive(i: int) -> runner.Results:
        def count(n: int) -> None:
            if stop.is_set():
                raise CancelledError
            with lock:
                done[i] = n
                if report is not None:
                    report(int(done.sum()))

        with jax.enable_x64(x64):
            return _drive(parts[i], compiled, count)

    begin = time.perf_counter()
    with ThreadPoolExecutor(len(shares)) as pool:
        futures = [pool.submit(drive, i) for i in range(len(shares))]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # an interrupt too: leaving the pool waits for the threads
            stop.set()
            raise
    finished = [future.result() for future in futures]
    seconds = time.perf_counter() - begin
    merged = []
    for column in zip(*(jax.tree.leaves(f) for f in finished), strict=True):
        out = np.empty((runs.step_sizes.size, *column[0].shape[1:]), column[0].dtype)
        for share, part in zip(shares, column, strict=True):
            out[share] = np.asarray(part)[: len(share)]
        merged.append(out)
    return merged, compile_seconds, seconds


def _shares(runs: runner.Runs, lanes: int) -> list[np.ndarray]:
    """Deal the runs out to threads, on CPUs one per core: small programs use one core each.

    Seeds stay whole, so that pruning sees all step sizes of a seed, and the middle of the grid runs
    first, where the fastest runs are expected.
    """
    cores = (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1
    total, seeds = runs.step_sizes.size, runs.best.size
    threads = max(1, min(cores, seeds, total // lanes))
    step = np.arange(total) // seeds
    order = np.argsort(np.abs(step - (total // seeds - 1) / 2), kind="stable")
    seed = np.asarray(runs.seed)[order]
    return [order[seed % threads == i] for i in range(threads)]


def _share(runs: runner.Runs, share: np.ndarray, width: int) -> runner.Runs:
    """Take some of the runs, padded to a common width so that all shares compile once."""
    padded = np.resize(share, width)
    return replace(
        runs,
        problem=runs.problem[padded],
        seed=runs.seed[padded],
        keys=runs.keys[padded],
        step_sizes=runs.step_sizes[padded],
        targets=runs.targets[padded],
        count=jnp.asarray(len(share)),
    )


def _compile(runs: runner.Runs, factory: runner.Factory, eval_every: int, lanes: int) -> tuple:
    """Return (start, advance), compiled for these shapes by running them once for no iterations."""
    begin = functools.partial(runner.start, factory=factory, lanes=lanes)
    move = functools.partial(runner.advance, factory=factory, lanes=lanes, eval_every=eval_every)
    jax.block_until_ready(move(begin(runs), runs, jnp.asarray(0)))
    return begin, move


def _drive(runs: runner.Runs, compiled: tuple, count: Callable[[int], None]) -> runner.Results:
    """Advance until all runs are done, visiting the host about twice a second."""
    begin, move = compiled
    state, iterations = begin(runs), 16
    total = int(runs.count)
    while True:
        clock = time.perf_counter()
        state = move(state, runs, jnp.asarray(iterations))
        done = int(state.done)
        count(done)
        if done >= total:
            return jax.block_until_ready(state.results)
        elapsed = max(time.perf_counter() - clock, 1e-6)
        iterations = int(min(max(iterations * VISIT_SECONDS / elapsed, 1), 4 * iterations))


_PROBED: dict[Any, int] = {}


def _probe(runs: runner.Runs, factory: runner.Factory, eval_every: int) -> int:
    """Choose between map (one lane) and vmap (many) by timing both briefly; remembered per problem."""
    signature = (
        jax.tree.structure((runs.problems, runs.sample, runs.eval_args)),
        tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves((runs.problems, runs.eval_args))),
    )
    candidates = [n for n in LANES if n <= runs.step_sizes.size]
    if len(candidates) == 1:
        return candidates[0]
    if signature not in _PROBED:
        speed = {n: _seconds_per_step(runs, factory, eval_every, n) for n in candidates}
        _PROBED[signature] = min(speed, key=speed.__getitem__)
    return _PROBED[signature]


def _seconds_per_step(runs: runner.Runs, factory: runner.Factory, eval_every: int, lanes: int) -> float:
    shares = _shares(runs, lanes)
    runs = _share(runs, shares[0], len(shares[0]))
    begin, move = _compile(runs, factory, eval_every, lanes)
    best, iterations = np.inf, jnp.asarray(max(1, 64 // (lanes * eval_every)))
    for _ in range(3):
        state = jax.block_until_ready(begin(runs))
        clock = time.perf_counter()
        jax.block_until_ready(move(state, runs, iterations))
        best = min(best, time.perf_counter() - clock)
    return best / (lanes * int(iterations))


def _report_on(progress: Report, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _check_count(name: str, n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise SpecError(f"{name} = {n!r}: must be a positive integer.")
