"""The compiled race: many (step size, seed) pairs share a few lanes.

A lane trains one pair until it reaches its last target, runs out of steps or turns non-finite; then
its result is written down and the next pair takes its place. So the work in flight stays dense
whatever the pairs do, and everything is compiled once per optimizer. One lane is a plain loop over
pairs (map), many lanes are a vmap. What a lane computes depends on its pair alone, so the results are
the same whatever else runs beside it. The loop returns to the host every now and then, for progress
and interrupts only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from specdef_jax.optim.work import work
from specdef_jax.race.runs import Factory, Lane, Outcome, Progress, Results, Runs
from specdef_jax.sharding import placed, sharding_of


@functools.partial(jax.jit, static_argnames=("factory", "lanes"))
def start(runs: Runs, *, factory: Factory, lanes: int) -> Progress:
    """Put the first runs on the lanes."""
    first = jnp.arange(lanes)
    total, dtype = runs.step_sizes.size, runs.targets.dtype
    unknown, unreached = jnp.full(total, jnp.nan, dtype), jnp.full(runs.targets.shape, jnp.nan, dtype)
    results = Results(
        steps=unreached,
        evaluations=unreached,
        spent=unknown,
        outcome=jnp.zeros(total, jnp.int32),
        last=unknown,
        peak=unknown,
        trace=jnp.full((total, runs.record_at.size), jnp.nan, dtype),
        ends=jax.tree.map(functools.partial(_room, total), _kept(runs, runs.problems.params)),
    )
    fresh = _over_lanes(functools.partial(_enter, runs, factory), lanes)(first)
    # Not weakly typed, as `advance` returns them: else its second call would compile it again.
    next_run, done = jnp.asarray(lanes, int), jnp.asarray(0, int)
    return Progress(fresh, results, runs.best, next_run, done, jnp.zeros((), dtype))


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

    def train(carry: tuple[Array, Progress]) -> tuple[Array, Progress]:
        """Train until a run is over: a loop of its own, as a branch inside it would copy every parameter."""
        iterate = functools.partial(_iterate, runs, factory, eval_every, lanes == 1, carry[1].best)
        if lanes > 1:
            iterate = jax.vmap(iterate)

        def go_on(carry: tuple[Array, Lane]) -> Array:
            return (carry[0] < iterations) & ~jnp.any(carry[1].finished)

        def body(carry: tuple[Array, Lane]) -> tuple[Array, Lane]:
            return carry[0] + 1, iterate(carry[1])

        i, moved = jax.lax.while_loop(go_on, body, (carry[0], _without_axis(carry[1].lanes, lanes)))
        return i, _refill(runs, factory, lanes, replace(carry[1], lanes=_with_axis(moved, lanes)))

    def unfinished(carry: tuple[Array, Progress]) -> Array:
        i, progress = carry
        return (i < iterations) & (progress.done < runs.count)

    return jax.lax.while_loop(unfinished, train, (jnp.zeros_like(iterations), progress))[1]


def _kept(runs: Runs, params: PyTree) -> PyTree:
    """Return the parameters of a race that keeps them, else None: nothing of it is compiled."""
    return params if runs.ends else None


def _room(count: int, stacked: Array) -> Array:
    """Return room for so many of what is stacked, with its sharding."""
    return placed(jnp.zeros((count, *stacked.shape[1:]), stacked.dtype), sharding_of(stacked))


def _without_axis(tree: PyTree, lanes: int) -> PyTree:
    """Return a single lane without its axis: not batched, it is faster than a batch of one."""
    return jax.tree.map(lambda x: x[0], tree) if lanes == 1 else tree


def _with_axis(tree: PyTree, lanes: int) -> PyTree:
    return jax.tree.map(lambda x: x[None], tree) if lanes == 1 else tree


def _over_lanes(fn: Callable[[Any], Any], lanes: int) -> Callable[[Any], Any]:
    if lanes > 1:
        return jax.vmap(fn)
    return lambda x: _with_axis(fn(_without_axis(x, lanes)), lanes)


def _enter(runs: Runs, factory: Factory, run: Array) -> Lane:
    """Return a lane at the start of a run; an index beyond the last run makes it idle."""
    index = jnp.minimum(run, runs.count - 1)
    task = jax.tree.map(lambda x: x[runs.problem[index]], runs.problems)
    dtype = runs.targets.dtype
    unreached = jnp.full(runs.targets.shape[1:], jnp.nan, dtype)
    return Lane(
        run=jnp.minimum(run, runs.step_sizes.size),
        seed=runs.seed[index],
        problem=task,
        state=factory(runs.step_sizes[index]).init(task.params),
        key=runs.keys[index],
        step_size=runs.step_sizes[index],
        targets=runs.targets[index],
        t=jnp.zeros((), jnp.int32),
        spent=jnp.zeros((), dtype),
        metric=jnp.full((), jnp.inf, dtype),
        peak=jnp.full((), -jnp.inf, dtype),
        outcome=jnp.zeros((), jnp.int32),
        reached=unreached,
        paid=unreached,
        finished=jnp.zeros((), bool),
        trace=jnp.full(runs.record_at.shape, jnp.nan, dtype),
        slot=jnp.zeros((), jnp.int32),
        judged=_kept(runs, task.params),
    )


def _iterate(runs: Runs, factory: Factory, eval_every: int, alone: bool, best: Array, lane: Lane) -> Lane:
    """Evaluate one lane, then train it for eval_every steps unless it is finished.

    A lane beside others trains on with them, and what it does after its end is thrown away; one that is
    `alone` stops. The steps are one loop where they can be: every copy of a step in it is compiled again.
    """
    optimizer = optax.with_extra_args_support(factory(lane.step_size))
    loss = lane.problem.loss

    def train(
        i: Array | int, carry: tuple[PyTree, PyTree, Array]
    ) -> tuple[tuple[PyTree, PyTree, Array], Array]:
        params, state, spent = carry
        args = runs.sample(jax.random.fold_in(lane.key, lane.t + i))
        params, state, value = step(optimizer, loss, params, state, args)
        return (params, state, spent + work(state).astype(spent.dtype)), value

    carry, taken = (lane.problem.params, lane.state, lane.spent), 0
    if runs.eval_args is None:  # the loss of the step itself, which is taken to know it
        (carry, value), taken = train(0, carry), 1
    else:
        value = loss(lane.problem.params, *runs.eval_args)
    evaluated = _evaluate(runs, eval_every, best, lane, value.astype(lane.metric.dtype))
    if eval_every > taken:
        until = jnp.where(evaluated.finished, taken, eval_every) if alone else eval_every
        carry = jax.lax.fori_loop(taken, until, lambda i, c: train(i, c)[0], carry)
    params, state, spent = carry
    return replace(
        evaluated,
        problem=replace(lane.problem, params=params),
        state=state,
        t=lane.t + eval_every,
        spent=jnp.where(evaluated.finished, lane.spent, spent),
        judged=_kept(runs, lane.problem.params),
    )


def step(
    optimizer: optax.GradientTransformationExtraArgs,
    loss: Callable[..., Array],
    params: PyTree,
    state: PyTree,
    args: Sequence[Any],
) -> tuple[PyTree, PyTree, Array]:
    """Take one step with all that an optimizer may ask for; return params, state and the loss before it."""
    value, grad = jax.value_and_grad(loss)(params, *args)

    def value_fn(p: PyTree) -> Array:
        return loss(p, *args)

    def hvp(tangent: PyTree) -> PyTree:
        return jax.jvp(jax.grad(value_fn), (params,), (tangent,))[1]

    # obj_fn is what optax's Hutchinson estimator calls value_fn
    more = {"value": value, "grad": grad, "value_fn": value_fn, "obj_fn": value_fn, "hvp": hvp}
    updates, state = optimizer.update(grad, state, params, **more)
    return optax.apply_updates(params, updates), state, value


def _evaluate(runs: Runs, eval_every: int, best: Array, lane: Lane, value: Array) -> Lane:
    """Judge the loss at step t: reached, non-finite, dominated, out of steps, or going on."""
    diverged = ~jnp.isfinite(value)
    crossed = ~diverged & (value <= lane.targets) & jnp.isnan(lane.reached)
    # Linear interpolation between two evaluations; exact hits keep the step itself.
    share = jnp.clip((lane.metric - lane.targets) / (lane.metric - value), 0, 1)
    crossing = jnp.where(jnp.isfinite(share), lane.t - eval_every * (1 - share), lane.t)
    reached = crossed[-1]
    due = runs.record_at[lane.slot] == lane.t
    active = lane.run < runs.count
    dominated = lane.t >= best[lane.seed]
    spent_up = (lane.t + eval_every > runs.steps) | (lane.spent >= runs.evaluations)
    return replace(
        lane,
        metric=value,
        peak=jnp.fmax(lane.peak, value),
        outcome=jnp.select(
            [reached, diverged, dominated],
            [jnp.int32(x) for x in (Outcome.REACHED, Outcome.DIVERGED, Outcome.DOMINATED)],
            jnp.int32(Outcome.CENSORED),
        ),
        reached=jnp.where(crossed, crossing.astype(value.dtype), lane.reached),
        paid=jnp.where(crossed, lane.spent, lane.paid),
        finished=active & (reached | diverged | dominated | spent_up),
        trace=lane.trace.at[lane.slot].set(jnp.where(due, value, lane.trace[lane.slot])),
        slot=jnp.minimum(lane.slot + due, runs.record_at.size - 1),
    )


def _refill(runs: Runs, factory: Factory, lanes: int, progress: Progress) -> Progress:
    """Write down finished lanes and put the next runs on them."""
    lane, results = progress.lanes, progress.results
    finished = lane.finished
    where = jnp.where(finished, lane.run, runs.step_sizes.size)  # out of range: dropped

    def write(old: Array, new: Array) -> Array:
        if lanes > 1:
            return old.at[where].set(new, mode="drop")
        # a slice: a scatter is a loop, and one per leaf takes a quarter of the time to compile
        at = jnp.minimum(lane.run[0], runs.step_sizes.size - 1)
        kept = jax.lax.dynamic_index_in_dim(old, at, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(old, jnp.where(finished[0], new[0], kept), at, 0)

    results = Results(
        steps=write(results.steps, lane.reached),
        evaluations=write(results.evaluations, lane.paid),
        spent=write(results.spent, lane.spent),
        outcome=write(results.outcome, lane.outcome),
        last=write(results.last, lane.metric),
        peak=write(results.peak, lane.peak),
        trace=write(results.trace, lane.trace),
        ends=jax.tree.map(write, results.ends, lane.judged),
    )
    rank = jnp.cumsum(finished) - 1
    entering = jnp.where(finished, progress.next_run + rank, lane.run)
    entering = jnp.where(entering < runs.count, entering, runs.step_sizes.size)
    fresh = _over_lanes(functools.partial(_enter, runs, factory), lanes)(entering)

    def choose(new: Array, old: Array) -> Array:
        shape = finished.shape + (1,) * (new.ndim - 1)
        return jnp.where(finished.reshape(shape), new, old)

    arrived = jnp.where(finished & runs.prune, lane.reached[:, -1], jnp.inf)
    return Progress(
        lanes=jax.tree.map(choose, fresh, lane),
        results=results,
        best=progress.best.at[lane.seed].min(jnp.where(jnp.isnan(arrived), jnp.inf, arrived)),
        next_run=progress.next_run + jnp.sum(finished),
        done=progress.done + jnp.sum(finished),
        stepped=progress.stepped + jnp.sum(jnp.where(finished, lane.t, 0)),
    )
