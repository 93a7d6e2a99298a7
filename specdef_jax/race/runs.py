"""What the compiled race works on: the runs to do, the lanes they are done on, and what is known of each."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from specdef_jax.parametrization import Problem

Factory = Callable[..., optax.GradientTransformation]  # of a step size, maybe traced


class Outcome(enum.IntEnum):
    """How one run ended."""

    CENSORED = 0
    REACHED = 1
    DIVERGED = 2
    DOMINATED = 3  # stopped: another step size of the same seed had arrived in fewer steps
    ABSENT = 4  # not run: the grid of this optimizer has fewer step sizes than another's


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
      targets: losses whose crossing is told, one row per run, descending; a run stops at its last.
      count: how many of the runs are real; the rest is padding.
      steps: the cap on steps.
      evaluations: the cap on gradient evaluations.
      record_at: steps at which the loss is recorded, ascending.
      best: fewest steps in which each seed has arrived so far; runs beyond it stop as dominated.
        Never lowered when `prune` is false.
      prune: whether to stop dominated runs.
      ends: whether to keep the parameters that each run was judged by last (static).
    """

    problems: Problem
    sample: Partial
    eval_args: PyTree
    problem: Int[Array, "runs"]
    seed: Int[Array, "runs"]
    keys: Shaped[PRNGKeyArray, "runs"]
    step_sizes: Float[Array, "runs"]
    targets: Float[Array, "runs targets"]
    count: Int[Array, ""]
    steps: Int[Array, ""]
    evaluations: Float[Array, ""]
    record_at: Int[Array, "records"]
    best: Float[Array, "seeds"]
    prune: Bool[Array, ""]
    ends: bool = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Results:
    """What is known of each run: steps and gradient evaluations to each target, NaN unless reached.

    `ends` has the structure of the parameters, its leaves with runs in front, or is None where none are kept.
    """

    steps: Float[Array, "runs targets"]
    evaluations: Float[Array, "runs targets"]
    spent: Float[Array, "runs"]
    outcome: Int[Array, "runs"]
    last: Float[Array, "runs"]
    peak: Float[Array, "runs"]
    trace: Float[Array, "runs records"]
    ends: PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lane:
    """One run in flight.

    `run` is its index, or the number of runs when the lane is idle; `slot` is where in `trace` the next
    recorded loss belongs; `judged` the parameters of the last evaluation, or None where they are not kept.
    """

    run: Int[Array, "*lanes"]
    seed: Int[Array, "*lanes"]
    problem: Problem
    state: PyTree
    key: PRNGKeyArray
    step_size: Float[Array, "*lanes"]
    targets: Float[Array, "*lanes targets"]
    t: Int[Array, "*lanes"]
    spent: Float[Array, "*lanes"]
    metric: Float[Array, "*lanes"]
    peak: Float[Array, "*lanes"]
    outcome: Int[Array, "*lanes"]
    reached: Float[Array, "*lanes targets"]
    paid: Float[Array, "*lanes targets"]
    finished: Bool[Array, "*lanes"]
    trace: Float[Array, "*lanes records"]
    slot: Int[Array, "*lanes"]
    judged: PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """The state of a race between two visits to the host."""

    lanes: Lane
    results: Results
    best: Float[Array, "seeds"]
    next_run: Int[Array, ""]
    done: Int[Array, ""]
    stepped: Float[Array, ""]  # steps taken by runs that are done
