"""Three ways to compute a mixture of experts, of one function; all can be differentiated any number of times.

`said(stack, h)` is what experts say, for a stack of them that reads h (tokens, n) or each its own (experts,
tokens, n). A token t hears expert chosen[t, i] with weight shares[t, i].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specdef_jax.models.linear import take

Said = Callable[[dict[str, Any], Array], Array]
_ROWS = 8  # of the smallest block


def every_expert(
    said: Said,
    stack: dict[str, Any],
    h: Float[Array, "tokens n"],
    chosen: Int[Array, "tokens k"],
    shares: Float[Array, "tokens k"],
) -> Float[Array, "tokens n"]:
    """Let every expert read every token, and weight what was not chosen by zero."""
    heard = said(stack, h)
    rows = jnp.arange(len(h))[:, None]
    mixing = jnp.zeros((len(h), heard.shape[0]), h.dtype).at[rows, chosen].set(shares)
    return jnp.einsum("te,etn->tn", mixing, heard)


def chosen_alone(
    said: Said,
    stack: dict[str, Any],
    h: Float[Array, "tokens n"],
    chosen: Int[Array, "tokens k"],
    shares: Float[Array, "tokens k"],
) -> Float[Array, "tokens n"]:
    """Copy the chosen experts for each token: for so few that less is read of the weights that way."""
    mine = {name: take(leaf, chosen) for name, leaf in stack.items()}
    return jnp.einsum("tk,tkn->tn", shares, said(mine, h[:, None, None])[..., 0, :])


def sorted_by_expert(
    said: Said,
    stack: dict[str, Any],
    h: Float[Array, "tokens n"],
    chosen: Int[Array, "tokens k"],
    shares: Float[Array, "tokens k"],
) -> Float[Array, "tokens n"]:
    """Sort tokens by expert into blocks that one expert reads each.

    At most one and a half times the products that were asked for, instead of experts / k times; the weights
    are copied once for each block, of which there are at most three per expert. No token is dropped.
    """
    count = stack["down_proj_bias"].shape[0]
    asked = chosen.size
    rows = max(_ROWS, -(-asked // (2 * count)))
    blocks = asked // rows + count  # each expert fills up one block at most
    order = jnp.argsort(chosen.ravel(), stable=True)
    expert, token = chosen.ravel()[order], order // chosen.shape[1]
    loads = jnp.bincount(chosen.ravel(), length=count)
    filled = -(-loads // rows)  # blocks of each expert
    ends = jnp.cumsum(filled)
    place = (ends - filled)[expert] * rows + jnp.arange(asked) - (jnp.cumsum(loads) - loads)[expert]
    reader = jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks), side="right"), count - 1)
    read = jnp.zeros((blocks * rows, h.shape[1]), h.dtype).at[place].set(h[token])
    mine = {name: take(leaf, reader) for name, leaf in stack.items()}
    heard = said(mine, read.reshape(blocks, rows, -1)).reshape(blocks * rows, -1)[place]
    return jnp.zeros_like(h).at[token].add(heard * shares.ravel()[order][:, None])
