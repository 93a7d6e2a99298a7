"""Run a flat list of runs: one thread per core on CPUs, or a mesh; a probe for the number of lanes."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from specdef_jax.programs import in_this_precision
from specdef_jax.race import mesh as on_mesh
from specdef_jax.race import runner
from specdef_jax.race.pacing import FIRST, paced
from specdef_jax.race.runs import Factory, Progress, Results, Runs
from specdef_jax.sharding import sharding_of

Report = Callable[[int, int], None]  # report(done, total), over all optimizers
Count = Callable[[int], None]  # count(done), of one optimizer

WIDEST = 16  # lanes
NARROWEST = 8  # runs of a share, padding counted: a round of refinement may have one
TURNS = 2  # runs that a lane should see: with fewer, lanes wait idle for the last to arrive
SMALL = 1 << 22  # bytes of parameters whose lanes fit any machine


@dataclass(frozen=True)
class Finished:
    """What racing some runs gave.

    Attributes:
      results: of every run, in the order given, as numpy arrays.
      steps: taken by all runs together.
      compile_seconds: until the compiled functions stood.
      seconds: after that.
    """

    results: Results
    steps: float
    compile_seconds: float
    seconds: float


def race_one(
    runs: Runs, factory: Factory, eval_every: int, lanes: int, report: Count | None, mesh: Mesh | None = None
) -> Finished:
    """Race one optimizer, on CPUs with one thread per core, or over a mesh."""
    shares = _shares(runs, lanes, mesh)
    width = max(NARROWEST, 1 << (max(map(len, shares)) - 1).bit_length())  # so that rounds share programs
    parts = [_share(runs, share, width) for share in shares]
    begin = time.perf_counter()
    if mesh is not None:
        spread = on_mesh.Spread(mesh, parts, factory, eval_every, lanes)
        ready = time.perf_counter()
        states = spread.drive(report)
    else:
        _compile(parts[0], factory, eval_every, lanes)
        ready = time.perf_counter()
        states = _in_threads(parts, factory, eval_every, lanes, report)
    seconds = time.perf_counter() - ready

    def merge(*columns: Any) -> np.ndarray:
        out = np.empty((runs.step_sizes.size, *columns[0].shape[1:]), columns[0].dtype)
        for share, part in zip(shares, columns, strict=True):
            out[share] = np.asarray(part)[: len(share)]
        return out

    results = jax.tree.map(merge, *(state.results for state in states))
    return Finished(results, sum(float(s.stepped) for s in states), ready - begin, seconds)


def _in_threads(
    parts: list[Runs], factory: Factory, eval_every: int, lanes: int, report: Count | None
) -> list[Progress]:
    done = np.zeros(len(parts), int)
    lock, stop = threading.Lock(), threading.Event()

    def drive(i: int) -> Progress:
        def count(n: int) -> None:
            if stop.is_set():
                raise CancelledError
            with lock:
                done[i] = n
                if report is not None:
                    report(int(done.sum()))

        return _drive(parts[i], _compile(parts[i], factory, eval_every, lanes), count)

    with ThreadPoolExecutor(len(parts)) as pool:
        futures = [pool.submit(in_this_precision(drive), i) for i in range(len(parts))]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # an interrupt too: leaving the pool waits for the threads
            stop.set()
            raise
    return [future.result() for future in futures]


def _shares(runs: Runs, lanes: int, mesh: Mesh | None = None) -> list[np.ndarray]:
    """Deal the runs out: one share per device of a mesh, or on CPUs per core, as a small program uses one.

    Parameters that lie on several devices are raced by one thread: two programs that wait for one another's
    devices would stand still. Seeds stay whole, so that pruning sees all step sizes of a seed, and the middle
    of the grid runs first, where the fastest runs are expected.
    """
    total = runs.step_sizes.size
    spread = any(sharding_of(leaf) is not None for leaf in jax.tree.leaves(runs.problems))
    threads = 1 if spread else min(cores(), np.unique(runs.seed).size, total // lanes)
    count = mesh.size if mesh else max(1, threads)
    seed = np.asarray(runs.seed)
    steps = np.asarray(runs.step_sizes)
    rank = np.searchsorted(np.unique(steps), steps)
    order = np.argsort(np.abs(rank - rank.max() / 2), kind="stable")
    return [order[seed[order] % count == i] for i in range(count)]


def cores() -> int:
    """Return how many runs can be driven at once without a mesh."""
    return (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1


def _share(runs: Runs, share: np.ndarray, width: int) -> Runs:
    """Take some of the runs, padded to a common width so that all shares compile once."""
    padded = np.resize(share, width)
    columns = {name: getattr(runs, name) for name in ("problem", "seed", "keys", "step_sizes", "targets")}
    return replace(runs, **rows(columns, padded), count=jnp.asarray(len(share)))


@jax.jit
def rows(columns: Any, index: Any) -> Any:
    """Return these rows of every leaf."""
    return jax.tree.map(lambda x: x[index], columns)


def _compile(runs: Runs, factory: Factory, eval_every: int, lanes: int) -> tuple:
    """Return (start, advance), compiled for these shapes by running them once for no iterations."""
    begin = functools.partial(runner.start, factory=factory, lanes=lanes)
    move = functools.partial(runner.advance, factory=factory, lanes=lanes, eval_every=eval_every)
    jax.block_until_ready(move(begin(runs), runs, jnp.asarray(0)))
    return begin, move


def _drive(runs: Runs, compiled: tuple, count: Count) -> Progress:
    """Advance until all runs are done, visiting the host about twice a second."""
    begin, move = compiled
    state, iterations = begin(runs), FIRST
    total = int(runs.count)
    while True:
        clock = time.perf_counter()
        state = move(state, runs, jnp.asarray(iterations))
        done = int(state.done)
        count(done)
        if done >= total:
            return jax.block_until_ready(state)
        iterations = paced(iterations, time.perf_counter() - clock)


_PROBED: dict[Any, int] = {}


def probe(runs: Runs, factory: Factory, eval_every: int, memory: float | None = None) -> int:
    """Choose between map (one lane) and vmap (many) by timing both briefly; remembered per problem.

    Args:
      runs: what is to be raced.
      factory: the optimizer to time.
      eval_every: steps between evaluations.
      memory: bytes that the lanes may take; a quarter of the machine's or the device's by default.
    """
    signature = (
        jax.tree.structure((runs.problems, runs.sample, runs.eval_args)),
        tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves((runs.problems, runs.eval_args))),
        memory,
        runs.ends,
    )
    share = len(_shares(runs, 1)[0])
    many = min(WIDEST, 1 << max(share // TURNS, 1).bit_length() - 1)
    if many == 1:
        return 1
    if (many, signature) not in _PROBED:
        speed = {1: 0.0}
        if _fits(runs, factory, eval_every, many, memory):
            speed = {n: _seconds_per_step(runs, factory, eval_every, n) for n in (1, many)}
        _PROBED[many, signature] = min(speed, key=speed.__getitem__)
    return _PROBED[many, signature]


def _fits(runs: Runs, factory: Factory, eval_every: int, lanes: int, memory: float | None) -> bool:
    """Tell whether the compiled program stays within the memory; small ones are not asked."""
    if memory is None:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(runs.problems.params)) // runs.best.size
        if size < SMALL:
            return True
        memory = _quarter()
    shares = _shares(runs, lanes)
    part = _share(runs, shares[0], len(shares[0]))
    first = runner.start(part, factory=factory, lanes=lanes)
    lowered = runner.advance.lower(
        first, part, jnp.asarray(1), factory=factory, lanes=lanes, eval_every=eval_every
    )
    asked = lowered.compile().memory_analysis()
    lane = first.lanes
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((lane.problem, lane.state, lane.judged)))
    return asked is None or len(shares) * (asked.temp_size_in_bytes + held) <= memory


def _quarter() -> float:
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] / 4
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4


def _seconds_per_step(runs: Runs, factory: Factory, eval_every: int, lanes: int) -> float:
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
