"""Training models that know something: Adam with a cosine schedule, several seeds at a time."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import optax
from jax.tree_util import Partial
from jaxtyping import Array, PRNGKeyArray, PyTree

from specdef_jax.parametrization import Problem, merge
from specdef_jax.programs import in_this_precision
from specdef_jax.race import raveled

Kept = Callable[[str, Callable[[], tuple[PyTree, ...]]], tuple[PyTree, ...]]  # kept(name, make) -> networks


@functools.partial(jax.jit, static_argnames=("steps", "step_size"))
def trained(
    loss: Partial, params: PyTree, sample: Partial, key: PRNGKeyArray, *, steps: int, step_size: float = 3e-3
) -> PyTree:
    """Return the parameters after so many steps.

    Args:
      loss: loss(params, *args) -> scalar.
      params: to start from.
      sample: sample(key) -> args of a step (race.minibatches).
      key: of the samples.
      steps: how many.
      step_size: at the beginning; it falls to zero.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(step_size, steps))
    one = raveled(Problem(params, loss, Partial(merge)))

    def step(t: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        params, state = carry
        args = sample(jax.random.fold_in(key, t))
        updates, state = optimizer.update(jax.grad(one.loss)(params, *args), state)
        return optax.apply_updates(params, updates), state

    found, _ = jax.lax.fori_loop(0, steps, step, (one.params, optimizer.init(one.params)))
    return one.read_back(found)


def anew(name: str, make: Callable[[], tuple[PyTree, ...]]) -> tuple[PyTree, ...]:
    """Return make(): what keeps no networks from one run to the next."""
    del name
    return make()


def each(train: Callable[..., PyTree], *columns: Iterable[Any]) -> tuple[PyTree, ...]:
    """Return train(*row) for every row, on a thread per core: small networks do not fill one.

    Args:
      train: gives a network; what it computes must not depend on what runs beside it.
      columns: its arguments, as map takes them.
    """

    def one(row: tuple[Any, ...]) -> PyTree:
        return jax.block_until_ready(train(*row))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(pool.map(in_this_precision(one), zip(*columns, strict=True)))
