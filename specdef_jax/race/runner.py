"""The compiled race: many (step size, seed) pairs share a few lanes.

A lane trains one pair until it reaches the target, runs out of steps or turns non-finite; then its
result is written down and the next pair takes its place. So the work in flight stays dense whatever
the pairs do, and everything is compiled once per optimizer. One lane is a plain loop over pairs
(map), many lanes are a vmap. The loop returns to the host every now and then, for progress and
interrupts only.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from specdef_jax.parametrization import Problem

Factory = Callable[[Array], optax.GradientTransformation]


class Outcome(enum.IntEnum):
    """How one run ended."""

    CENSORED = 0
    REACHED = 1
    DIVERGED = 2
    DOMINATED = 3  # stopped: another step size of the same seed had arrived in fewer steps


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Runs:
    """The pairs to run and the data they share; all of it arguments of the compiled loop.

    Attributes:
      problems: stacked over pretraining seeds.
      sample: sample(key) -> args of one step.
      eval_args: args of the evaluation, or None to read the loss of the step itself.
      problem: which problem each run trains.
      seed: which seed (problem and data order) each run belongs to.
      keys: one key per run, for its data order.
      step_sizes: one per run.
      targets: loss at which a run stops, one per run.
      count: how many of the runs are real; the rest is padding.
      steps: the cap.
      record_at: steps at which the loss is recorded, ascending.
      best: fewest steps in which each seed has arrived so far; runs beyond it stop as dominated.
        Infinite and never lowered when `prune` is false.
      prune: whether to stop dominated runs.
    """

    problems: Problem
    sample: Partial
    eval_args: PyTree
    problem: Int[Array, "runs"]
    seed: Int[Array, "runs"]
    keys: Shaped[PRNGKeyArray, "runs"]
    step_sizes: Float[Array, "runs"]
    targets: Float[Array, "runs"]
    count: Int[Array, ""]
    steps: Int[Array, ""]
    record_at: Int[Array, "records"]
    best: Float[Array, "seeds"]
    prune: Bool[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Results:
    """What is known of each run: steps to the target, NaN unless reached."""

    steps: Float[Array, "runs"]
    outcome: Int[Array, "runs"]
    last: Float[Array, "runs"]
    peak: Float[Array, "runs"]
    trace: Float[Array, "runs records"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lane:
    """One run in flight. `run` is its index, or the number of runs when the lane is idle."""

    run: Int[Array, "*lanes"]
    seed: Int[Array, "*lanes"]
    problem: Problem
    state: PyTree
    key: PRNGKeyArray
    step_size: Float[Array, "*lanes"]
    target: Float[Array, "*lanes"]
    t: Int[Array, "*lanes"]
    metric: Float[Array, "*lanes"]
    peak: Float[Array, "*lanes"]
    outcome: Int[Array, "*lanes"]
    reached: Float[Array, "*lanes"]
    finished: Bool[Array, "*lanes"]
    trace: Float[Array, "*lanes records"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """The state of a race between two visits to the host."""

    lanes: Lane
    results: Results
    best: Float[Array, "seeds"]
    next_run: Int[Array, ""]
    done: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("factory", "lanes"))
def start(runs: Runs, *, factory: Factory, lanes: int) -> Progress:
    """Put the first runs on the lanes."""
    first = jnp.arange(lanes)
    total, dtype = runs.step_sizes.size, runs.targets.dtype
    unknown = jnp.full(total, jnp.nan, dtype)
    results = Results(
        steps=unknown,
        outcome=jnp.zeros(total, jnp.int32),
        last=unknown,
        peak=unknown,
        trace=jnp.full((total, runs.record_at.size), jnp.nan, dtype),
    )
    fresh = _over_lanes(functools.partial(_enter, runs, factory), lanes)(first)
    return Progress(fresh, results, runs.best, jnp.asarray(lanes), jnp.asarray(0))


@functools.partial(jax.jit, static_argnames=("factory", "lanes", "eval_every"), donate_argnames=("progress",))
def advance(
    progress: Progress,
    runs: Runs,
    iterations: Int[Array, ""],
    *,
    factory: Factory,
    lanes: int,
    eval_every: int,
) -> Progress:
    """Advance every lane by up to `iterations` evaluations; stop early when all runs are done."""

    def unfinished(carry: tuple[Array, Progress]) -> Array:
        i, progress = carry
        return (i < iterations) & (progress.done < runs.count)

    def body(carry: tuple[Array, Progress]) -> tuple[Array, Progress]:
        i, progress = carry
        iterate = functools.partial(_iterate, runs, factory, eval_every, progress.best)
        moved = _over_lanes(iterate, lanes)(progress.lanes)
        progress = replace(progress, lanes=moved)
        progress = jax.lax.cond(
            jnp.any(moved.finished), functools.partial(_refill, runs, factory, lanes), lambda p: p, progress
        )
        return i + 1, progress

    return jax.lax.while_loop(unfinished, body, (jnp.asarray(0, iterations.dtype), progress))[1]


def _over_lanes(fn: Callable[[Any], Any], lanes: int) -> Callable[[Any], Any]:
    """Map over lanes; a single lane is not batched, which is faster than a batch of one."""
    if lanes > 1:
        return jax.vmap(fn)
    return lambda x: jax.tree.map(lambda y: y[None], fn(jax.tree.map(lambda y: y[0], x)))


def _enter(runs: Runs, factory: Factory, run: Array) -> Lane:
    """Return a lane at the start of a run; an index beyond the last run makes it idle."""
    index = jnp.minimum(run, runs.count - 1)
    task = jax.tree.map(lambda x: x[runs.problem[index]], runs.problems)
    dtype = runs.targets.dtype
    return Lane(
        run=jnp.minimum(run, runs.step_sizes.size),
        seed=runs.seed[index],
        problem=task,
        state=factory(runs.step_sizes[index]).init(task.params),
        key=runs.keys[index],
        step_size=runs.step_sizes[index],
        target=runs.targets[index],
        t=jnp.zeros((), jnp.int32),
        metric=jnp.full((), jnp.inf, dtype),
        peak=jnp.full((), -jnp.inf, dtype),
        outcome=jnp.zeros((), jnp.int32),
        reached=jnp.full((), jnp.nan, dtype),
        finished=jnp.zeros((), bool),
        trace=jnp.full(runs.record_at.shape, jnp.nan, dtype),
    )


def _iterate(runs: Runs, factory: Factory, eval_every: int, best: Array, lane: Lane) -> Lane:
    """Evaluate one lane, then train it for eval_every steps unless it is finished."""
    optimizer = optax.with_extra_args_support(factory(lane.step_size))
    loss = lane.problem.loss

    def train(i: Array | int, carry: tuple[PyTree, PyTree]) -> tuple[tuple[PyTree, PyTree], Array]:
        params, state = carry
        args = runs.sample(jax.random.fold_in(lane.key, lane.t + i))
        value, grad = jax.value_and_grad(loss)(params, *args)

        def value_fn(p: PyTree) -> Array:
            return loss(p, *args)

        def hvp(tangent: PyTree) -> PyTree:
            return jax.jvp(jax.grad(value_fn), (params,), (tangent,))[1]

        # obj_fn is what optax's Hutchinson estimator calls value_fn
        more = {"value": value, "grad": grad, "value_fn": value_fn, "obj_fn": value_fn, "hvp": hvp}
        updates, state = optimizer.update(grad, state, params, **more)
        return (optax.apply_updates(params, updates), state), value

    carry, value = train(0, (lane.problem.params, lane.state))
    if runs.eval_args is not None:
        value = loss(lane.problem.params, *runs.eval_args)
    if eval_every > 1:
        carry = jax.lax.fori_loop(1, eval_every, lambda i, c: train(i, c)[0], carry)
    evaluated = _evaluate(runs, eval_every, best, lane, value.astype(lane.metric.dtype))
    params, state = carry
    return replace(
        evaluated,
        problem=replace(lane.problem, params=params),
        state=state,
        t=lane.t + eval_every,
    )


def _evaluate(runs: Runs, eval_every: int, best: Array, lane: Lane, value: Array) -> Lane:
    """Judge the loss at step t: reached, non-finite, dominated, out of steps, or going on."""
    diverged = ~jnp.isfinite(value)
    reached = ~diverged & (value <= lane.target)
    # Linear interpolation between two evaluations; exact hits keep the step itself.
    share = jnp.clip((lane.metric - lane.target) / (lane.metric - value), 0, 1)
    crossing = jnp.where(jnp.isfinite(share), lane.t - eval_every * (1 - share), lane.t)
    slot = jnp.searchsorted(runs.record_at, lane.t)
    slot = jnp.minimum(slot, runs.record_at.size - 1)
    due = runs.record_at[slot] == lane.t
    active = lane.run < runs.count
    dominated = lane.t >= best[lane.seed]
    return replace(
        lane,
        metric=value,
        peak=jnp.fmax(lane.peak, value),
        outcome=jnp.select(
            [reached, diverged, dominated],
            [jnp.int32(x) for x in (Outcome.REACHED, Outcome.DIVERGED, Outcome.DOMINATED)],
            jnp.int32(Outcome.CENSORED),
        ),
        reached=jnp.where(reached, crossing.astype(value.dtype), jnp.nan),
        finished=active & (reached | diverged | dominated | (lane.t + eval_every > runs.steps)),
        trace=lane.trace.at[slot].set(jnp.where(due, value, lane.trace[slot])),
    )


def _refill(runs: Runs, factory: Factory, lanes: int, progress: Progress) -> Progress:
    """Write down finished lanes and put the next runs on them."""
    lane, results = progress.lanes, progress.results
    finished = lane.finished
    where = jnp.where(finished, lane.run, runs.step_sizes.size)  # out of range: dropped

    def write(old: Array, new: Array) -> Array:
        return old.at[where].set(new, mode="drop")

    results = Results(
        steps=write(results.steps, lane.reached),
        outcome=write(results.outcome, lane.outcome),
        last=write(results.last, lane.metric),
        peak=write(results.peak, lane.peak),
        trace=write(results.trace, lane.trace),
    )
    rank = jnp.cumsum(finished) - 1
    entering = jnp.where(finished, progress.next_run + rank, lane.run)
    entering = jnp.where(entering < runs.count, entering, runs.step_sizes.size)
    fresh = _over_lanes(functools.partial(_enter, runs, factory), lanes)(entering)

    def choose(new: Array, old: Array) -> Array:
        shape = finished.shape + (1,) * (new.ndim - 1)
        return jnp.where(finished.reshape(shape), new, old)

    arrived = jnp.where(finished & runs.prune, lane.reached, jnp.inf)
    return Progress(
        lanes=jax.tree.map(choose, fresh, lane),
        results=results,
        best=progress.best.at[lane.seed].min(jnp.where(jnp.isnan(arrived), jnp.inf, arrived)),
        next_run=progress.next_run + jnp.sum(finished),
        done=progress.done + jnp.sum(finished),
    )
