"""Continuing prompts token by token: one pass over the prompts, then one compiled loop with a cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from specdef_jax.errors import ProblemError
from specdef_jax.models.decoder import init_cache
from specdef_jax.models.stacking import is_stacked


def generate(
    apply: Callable[..., Any],
    config: Any,
    params: dict[str, Any],
    tokens: Int[Array, "batch time"],
    steps: int,
    *,
    temperature: float = 0.0,
    key: PRNGKeyArray | None = None,
    stop: Sequence[int] = (),
) -> Int[Array, "batch longer"]:
    """Return the prompts continued by `steps` tokens, (batch, time + steps).

    Args:
      apply: of the model; apply(config, params, tokens, cache=) -> (logits, cache).
      config: of the model.
      params: the network, deformed or not.
      tokens: prompts of one length.
      steps: tokens to add.
      temperature: 0 takes the most probable token, else one is drawn from softmax(logits / temperature).
      key: for drawing.
      stop: tokens that end a row, which is filled up with the same; when all have ended, so has the loop.

    Raises:
      ProblemError: there is no prompt, a negative temperature, or one above 0 without a key.
    """
    if tokens.shape[0] < 1 or tokens.shape[1] < 1 or steps < 1:
        raise ProblemError(f"prompts of shape {tokens.shape} and {steps} steps: give at least one of each.")
    if not temperature >= 0 or (temperature > 0 and key is None):
        raise ProblemError(
            f"temperature {temperature} with key {key}: 0 needs no key, a positive temperature needs one."
        )
    drawing = None if temperature == 0 else (key, jnp.float32(temperature))
    return _generate(apply, config, steps, tuple(stop), params, tokens.astype(jnp.int32), drawing)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    apply: Callable[..., Any],
    config: Any,
    steps: int,
    stop: tuple[int, ...],
    params: dict[str, Any],
    tokens: Array,
    drawing: tuple[PRNGKeyArray, Array] | None,
) -> Array:
    batch, time = tokens.shape
    dtype = params["model.embed_tokens.weight"].dtype
    cache = init_cache(config, batch, time + steps, dtype, stacked=is_stacked(params))
    logits, cache = apply(config, params, tokens, cache=cache)
    first = _choose(logits[:, -1], drawing, 0)
    text = jnp.zeros((batch, time + steps), jnp.int32).at[:, :time].set(tokens).at[:, time].set(first)

    def unfinished(state: Any) -> Array:
        i, _, _, done = state
        return (i < steps) & ~jnp.all(done)

    def advance(state: Any) -> Any:
        i, text, cache, done = state
        last = jax.lax.dynamic_slice_in_dim(text, time + i - 1, 1, axis=1)
        logits, cache = apply(config, params, last, cache=cache)
        chosen = jnp.where(done, last[:, 0], _choose(logits[:, -1], drawing, i))
        text = jax.lax.dynamic_update_slice_in_dim(text, chosen[:, None], time + i, axis=1)
        return i + 1, text, cache, done | _ends(chosen, stop)

    start = (jnp.int32(1), text, cache, _ends(first, stop))
    reached, text, _, _ = jax.lax.while_loop(unfinished, advance, start)
    # Rows that all ended early are filled up as the loop would have filled them.
    last = jax.lax.dynamic_slice_in_dim(text, time + reached - 1, 1, axis=1)
    return jnp.where(jnp.arange(time + steps) < time + reached, text, last)


def _choose(
    logits: Float[Array, "batch vocab"], drawing: tuple[PRNGKeyArray, Array] | None, step: Any
) -> Int[Array, " batch"]:
    if drawing is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    key, temperature = drawing
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jax.random.categorical(jax.random.fold_in(key, step), wide / temperature).astype(jnp.int32)


def _ends(chosen: Int[Array, " batch"], stop: tuple[int, ...]) -> Array:
    return jnp.isin(chosen, jnp.asarray(stop, jnp.int32)) if stop else jnp.zeros(chosen.shape, bool)
