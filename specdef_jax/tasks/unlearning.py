"""Unlearning, the baselines: make a model forget a domain and keep the other, by training.

Each takes and returns parameters of any model; what they need of it is a function of its own. Steps are
Adam's, gradients clipped to norm 1. `forget` and `retain` are samples, as races take them: sample(key) gives
the args of a step, as many examples of the one as of the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from specdef_jax.parametrization import Problem, merge
from specdef_jax.race import raveled

Args = Sequence[Any]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: Adam's steps, and their size."""

    steps: int = 200
    step_size: float = 1e-3


def gradient_ascent(
    loss: Callable[..., Array],
    params: PyTree,
    forget: Partial,
    retain: Partial,
    key: PRNGKeyArray,
    schedule: Schedule,
    *,
    weight: float = 1.0,
) -> PyTree:
    """Ascend the loss of one domain, descend that of the other.

    Args:
      loss: loss(params, *args).
      params: of the model that knows both.
      forget: sample of the domain to forget.
      retain: sample of the one to keep.
      key: of the samples.
      schedule: of the training; ascent has no end of its own, so its steps decide.
      weight: of the retained loss.

    Source: Jang et al. 2023, arXiv 2210.01504; with the retained loss, Liu et al. 2022, arXiv 2203.12817.
    """
    return _trained(Partial(_ascent, Partial(loss), weight), params, forget, retain, key, schedule=schedule)


def npo(
    log_likelihood: Callable[..., Float[Array, "batch"]],
    loss: Callable[..., Array],
    params: PyTree,
    forget: Partial,
    retain: Partial,
    key: PRNGKeyArray,
    schedule: Schedule,
    *,
    beta: float = 0.1,
    weight: float = 1.0,
) -> PyTree:
    """Negative preference optimization: ascent that stops by itself where an example is unlikely enough.

    Args:
      log_likelihood: log_likelihood(params, *args), of each example.
      loss: loss(params, *args), of the domain that is kept.
      params: of the model that knows both; also the reference.
      forget: sample of the domain to forget.
      retain: sample of the one to keep.
      key: of the samples.
      schedule: of the training.
      beta: inverse temperature.
      weight: of the retained loss.

    Source: Zhang et al. 2024, arXiv 2404.05868, equation 3.
    """
    objective = Partial(_preference, Partial(log_likelihood), Partial(loss), beta, weight)
    return _trained(objective, params, forget, retain, key, schedule=schedule)


def rmu(
    hidden: Callable[..., Float[Array, "batch time n"]],
    params: PyTree,
    forget: Partial,
    retain: Partial,
    key: PRNGKeyArray,
    schedule: Schedule,
    *,
    length: float | None = None,
    weight: float = 10.0,
) -> PyTree:
    """Representation misdirection: what one domain looks like inside becomes one random direction.

    Args:
      hidden: hidden(params, *args), of some layer.
      params: of the model that knows both; its hidden states on the retained domain are kept.
      forget: sample of the domain to forget.
      retain: sample of the one to keep.
      key: of the direction and the samples.
      schedule: of the training.
      length: of the direction; that of a hidden state of unit variance by default.
      weight: of what is kept.

    Source: Li et al. 2024, arXiv 2403.03218, section 5.
    """
    objective = Partial(_misdirection, Partial(hidden), length, weight)
    return _trained(objective, params, forget, retain, key, schedule=schedule)


def _ascent(loss: Partial, weight: float, params: PyTree, old: PyTree, f: Args, r: Args, key: Any) -> Array:
    del old, key
    both = jax.tree.map(lambda *parts: jnp.stack(parts), r, f)  # one loop: the gradient is compiled once
    kept, forgotten = jax.lax.map(lambda args: loss(params, *args), both)
    return weight * kept - forgotten


def _preference(
    log_likelihood: Partial, loss: Partial, beta: float, weight: float,
    params: PyTree, old: PyTree, f: Args, r: Args, key: Any,
) -> Array:  # fmt: skip
    del key
    ratio = log_likelihood(params, *f) - log_likelihood(old, *f)
    return weight * loss(params, *r) + 2 / beta * jnp.mean(jax.nn.softplus(beta * ratio))


def _misdirection(
    hidden: Partial, length: float | None, weight: float,
    params: PyTree, old: PyTree, f: Args, r: Args, key: PRNGKeyArray,
) -> Array:  # fmt: skip
    now = hidden(params, *f)
    direction = jax.random.uniform(key, now.shape[-1:], now.dtype)
    size = now.shape[-1] ** 0.5 if length is None else length
    away = size * direction / jnp.linalg.norm(direction)
    kept = hidden(params, *r) - hidden(old, *r)
    return jnp.mean(jnp.square(now - away)) + weight * jnp.mean(jnp.square(kept))


@functools.partial(jax.jit, static_argnames="schedule")
def _trained(
    objective: Partial,
    params: PyTree,
    forget: Partial,
    retain: Partial,
    key: PRNGKeyArray,
    *,
    schedule: Schedule,
) -> PyTree:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule.step_size))
    of_the_run, of_samples = jax.random.split(key)
    one = raveled(Problem(params, objective, Partial(merge)))

    def step(t: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        now, state = carry
        of_forget, of_retain = jax.random.split(jax.random.fold_in(of_samples, t))
        drawn = forget(of_forget), retain(of_retain)
        slopes = jax.grad(one.loss)(now, params, *drawn, of_the_run)
        updates, state = optimizer.update(slopes, state)
        return optax.apply_updates(now, updates), state

    found, _ = jax.lax.fori_loop(0, schedule.steps, step, (one.params, optimizer.init(one.params)))
    return one.read_back(found)
