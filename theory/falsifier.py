"""Look for counterexamples: random search, then gradient descent on the slack from the worst points.

A statement hands over slack(point, key) >= 0, normalised so that its size means something. Surviving is
evidence and no proof.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from theory.certificate import Search

Slack = Callable[[PyTree], Float[Array, ""]]


class Found(NamedTuple):
    """What a search ended with: the evidence, and the point of smallest slack."""

    search: Search
    point: PyTree


def falsify(
    slack: Slack,
    sample: Callable[[PRNGKeyArray], PyTree],
    key: PRNGKeyArray,
    *,
    tried: int = 10_000,
    climbed: int = 128,
    steps: int = 200,
    step_size: float = 0.03,
) -> Found:
    """Minimise the slack.

    Args:
      slack: point -> normalised slack; a statement claims that it is never negative. A point where it is
        not finite is passed over.
      sample: key -> random point, a tree of floats.
      key: seeds the search.
      tried: random points.
      climbed: how many of the worst are improved by gradient descent (Adam, best point kept).
      steps: descent steps from each.
      step_size: of Adam, in the units of the points.
    """
    worst, point = _search(slack, sample, key, step_size, tried, climbed, steps)
    return Found(Search(tried, climbed, steps, float(worst)), point)


@partial(jax.jit, static_argnames=("slack", "sample", "tried", "climbed", "steps"))
def _search(
    slack: Slack,
    sample: Callable[[PRNGKeyArray], PyTree],
    key: PRNGKeyArray,
    step_size: float,
    tried: int,
    climbed: int,
    steps: int,
) -> tuple[Array, PyTree]:
    def measure(point: PyTree) -> Array:
        value = slack(point)
        return jnp.where(jnp.isfinite(value), value, jnp.inf)

    points = jax.vmap(sample)(jax.random.split(key, tried))
    values = jax.vmap(measure)(points)
    _, chosen = jax.lax.top_k(-values, min(climbed, tried))
    optimizer = optax.adam(step_size)

    def descend(point: PyTree) -> tuple[Array, PyTree]:
        def step(carry: tuple, _: None) -> tuple[tuple, None]:
            here, state, best, best_value = carry
            value, gradient = jax.value_and_grad(slack)(here)
            better = jnp.isfinite(value) & (value < best_value)
            best = jax.tree.map(lambda a, b: jnp.where(better, a, b), here, best)
            gradient = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), gradient)
            updates, state = optimizer.update(gradient, state)
            carry = optax.apply_updates(here, updates), state, best, jnp.where(better, value, best_value)
            return carry, None

        start = point, optimizer.init(point), point, measure(point)
        (last, _, best, best_value), _ = jax.lax.scan(step, start, None, length=steps)
        value = measure(last)
        better = value < best_value
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), last, best)
        return jnp.minimum(value, best_value), best

    ends, best = jax.vmap(descend)(jax.tree.map(lambda x: x[chosen], points))
    winner = jnp.argmin(ends)
    return ends[winner], jax.tree.map(lambda x: x[winner], best)
