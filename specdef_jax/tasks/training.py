"""Training a model that knows something: Adam with a cosine schedule, minibatches drawn with replacement."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import optax
from jax.tree_util import Partial
from jaxtyping import Array, PRNGKeyArray, PyTree


@functools.partial(jax.jit, static_argnames=("steps", "step_size", "batch"))
def trained(
    loss: Partial,
    params: PyTree,
    data: Sequence[Array],
    key: PRNGKeyArray,
    *,
    steps: int,
    step_size: float = 3e-3,
    batch: int = 32,
) -> PyTree:
    """Return the parameters after so many steps.

    Args:
      loss: loss(params, *examples) -> scalar.
      params: to start from.
      data: arrays of one leading length.
      key: of the minibatches.
      steps: how many.
      step_size: at the beginning; it falls to zero.
      batch: examples of a step.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(step_size, steps))

    def step(t: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        params, state = carry
        rows = jax.random.randint(jax.random.fold_in(key, t), (batch,), 0, len(data[0]))
        updates, state = optimizer.update(jax.grad(loss)(params, *(x[rows] for x in data)), state)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]
