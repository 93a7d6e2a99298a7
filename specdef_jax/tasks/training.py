"""Training a model that knows something: Adam with a cosine schedule."""

from __future__ import annotations

import functools

import jax
import optax
from jax.tree_util import Partial
from jaxtyping import Array, PRNGKeyArray, PyTree


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

    def step(t: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        params, state = carry
        args = sample(jax.random.fold_in(key, t))
        updates, state = optimizer.update(jax.grad(loss)(params, *args), state)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]
