"""Run a flat list of runs: one thread per core on CPUs, a probe for the number of lanes."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specdef_jax.race import runner

Report = Callable[[int, int], None]  # report(done, total), over all optimizers
Count = Callable[[int], None]  # count(done), of one optimizer

VISIT_SECONDS = 0.5
LANES = (1, 16)


def race_one(
    runs: runner.Runs,
    factory: runner.Factory,
    eval_every: int,
    lanes: int,
    report: Count | None,
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


def probe(runs: runner.Runs, factory: runner.Factory, eval_every: int) -> int:
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
