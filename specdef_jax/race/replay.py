"""One run again, for its parameters after any number of steps: a race keeps at most those it ended with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, PRNGKeyArray, PyTree

from specdef_jax.parametrization import Problem
from specdef_jax.race.runner import step
from specdef_jax.race.runs import Factory


def replay(
    task: Problem,
    factory: Factory,
    step_size: float,
    steps: int,
    *,
    sample: Callable[[PRNGKeyArray], Sequence[Any]],
    key: PRNGKeyArray,
) -> PyTree:
    """Return the parameters after so many steps of one run, as a race takes them.

    Args:
      task: what was raced.
      factory: the optimizer.
      step_size: of the run.
      steps: how many.
      sample: as in the race.
      key: of the run's data order: jax.random.split(race's key, orders)[order].
    """
    as_partial = sample if isinstance(sample, Partial) else Partial(sample)
    rate = jnp.asarray(step_size, jnp.result_type(*jax.tree.leaves(task.params)))
    return _replayed(task, as_partial, rate, jnp.asarray(steps), key, factory=factory)


@functools.partial(jax.jit, static_argnames="factory")
def _replayed(
    task: Problem, sample: Partial, step_size: Array, steps: Array, key: PRNGKeyArray, *, factory: Factory
) -> PyTree:
    optimizer = optax.with_extra_args_support(factory(step_size))

    def body(t: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        args = sample(jax.random.fold_in(key, t))
        return step(optimizer, task.loss, *carry, args)[:2]

    return jax.lax.fori_loop(0, steps, body, (task.params, optimizer.init(task.params)))[0]
