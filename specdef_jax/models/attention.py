"""Attention with grouped queries, masks, sinks and a cache; and RMSNorm.

Softmax and norms are computed in float32, or wider if the activations are, whatever the dtype of the network.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specdef_jax.errors import ProblemError

KeyValues = tuple[Array, Array]  # of one layer, each (batch, length, groups, head_dim)


def rms_norm(
    h: Float[Array, "*batch d"], weight: Float[Array, " d"], eps: float, *, scale_wide: bool
) -> Float[Array, "*batch d"]:
    """Return h over its root mean square, times the weight.

    Args:
      h: activations.
      weight: one factor per feature.
      eps: added to the mean square.
      scale_wide: multiply before the result is cast back to the dtype of h (GPT-OSS), or after (Llama).
    """
    wide = h.astype(jnp.promote_types(h.dtype, jnp.float32))
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (weight * wide).astype(h.dtype) if scale_wide else weight * wide.astype(h.dtype)


def causal_mask(
    queries: Int[Array, " time"], keys: Int[Array, " length"], window: int | Int[Array, ""] | None
) -> Bool[Array, "time length"]:
    """Tell which keys a query may see: itself and those before it, of a window its last `window`."""
    distance = queries[:, None] - keys[None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def attend(
    q: Float[Array, "batch time heads d"],
    k: Float[Array, "batch length groups d"],
    v: Float[Array, "batch length groups d"],
    mask: Bool[Array, "time length"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch time features"]:
    """Mix values by softmax(q k^T / sqrt(d)); head i reads group i // (heads / groups).

    Args:
      q: queries.
      k: keys.
      v: values, their mixture has the dtype of these.
      mask: which keys a query sees; None for all.
      sinks: one more logit per head, which takes part in the normalisation and has no value.
    """
    batch, time, heads, d = q.shape
    groups = k.shape[2]
    shared = heads // groups
    # jax.nn.dot_product_attention has its softmax in float32 always, which is too coarse for float64.
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # The queries of all heads that share keys are rows of one product.
    q = jnp.moveaxis(q.reshape(batch, time, groups, shared, d), 1, 3) * d**-0.5
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    rows = q.reshape(batch, groups, shared * time, d)
    scores = jnp.einsum("bgtd,bgsd->bgts", rows, k, preferred_element_type=wide)
    if mask is not None:
        scores = jnp.where(jnp.tile(mask, (shared, 1)), scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    resting: float | Array = -jnp.inf  # without a sink there is one that takes no part
    if sinks is not None:
        resting = jnp.repeat(sinks.astype(wide).reshape(groups, shared), time, axis=1)[..., None]
    top = jax.lax.stop_gradient(jnp.maximum(top, resting))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(resting - top)
    # Divided once mixed: a pass over (time, d) instead of one over (time, length), here and in derivatives.
    mixed = jnp.einsum("bgts,bgsd->bgtd", weights.astype(v.dtype), v) / total
    mixed = mixed.astype(v.dtype).reshape(batch, groups, shared, time, d)
    return jnp.moveaxis(mixed, 3, 1).reshape(batch, time, heads * d)


def attend_fused(
    q: Float[Array, "batch time heads d"],
    k: Float[Array, "batch time groups d"],
    v: Float[Array, "batch time groups d"],
) -> Float[Array, "batch time features"]:
    """Return attend(q, k, v, causal mask, no sinks) by cuDNN's fused kernel, which stores no scores.

    It has first derivatives only.

    Raises:
      ProblemError: there is no NVIDIA GPU, or the dtype is not a half precision.
    """
    if jax.default_backend() != "gpu" or q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ProblemError(
            f"fused attention runs on NVIDIA GPUs in bfloat16 or float16, this is {q.dtype} on "
            f"{jax.default_backend()}; leave out `fused`."
        )
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return mixed.reshape(*q.shape[:2], -1)


def remember(
    held: KeyValues | None, k: Array, v: Array, position: Any
) -> tuple[Array, Array, KeyValues | None]:
    """Return all keys and values there are to see, and the cache with the new ones written at `position`."""
    if held is None:
        return k, v, None
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), position, axis=1)
        for old, new in zip(held, (k, v), strict=True)
    )
    return keys, values, (keys, values)
