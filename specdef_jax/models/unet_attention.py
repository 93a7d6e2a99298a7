"""The transformers of a UNet: self-attention, attention to the encoder's states, GEGLU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from specdef_jax.models.attention import attend
from specdef_jax.models.linear import linear
from specdef_jax.models.unet_config import Block
from specdef_jax.models.unet_layers import NONE, Params, convolve, group_norm, part

_LAYER_NORM_EPS = 1e-5
_GROUP_NORM_EPS = 1e-6  # fixed, whatever norm_eps says of the ResNet blocks


def transformer(
    params: Params,
    x: Float[Array, "batch height width c"],
    context: Float[Array, "batch tokens e"],
    *,
    block: Block,
    depth: int,
    groups: int,
) -> Float[Array, "batch height width c"]:
    """Run transformer blocks over all positions, beside a shortcut (Transformer2DModel)."""
    h = group_norm(x, params["norm.weight"], params["norm.bias"], groups=groups, eps=_GROUP_NORM_EPS)
    h = _project(params, "proj_in", h).reshape(x.shape[0], -1, block.inner)
    for i in range(depth):
        h = _layer(part(params, f"transformer_blocks.{i}"), h, context, block)
    return x + _project(params, "proj_out", h.reshape(*x.shape[:3], -1))


def _project(params: Params, name: str, x: Array) -> Array:
    w, b = params[f"{name}.weight"], params[f"{name}.bias"]
    rank = getattr(w, "weight", w).ndim
    return linear(x, w, b) if rank == 2 else convolve(x, w, b, padding=NONE)


def _layer(params: Params, h: Array, context: Array, block: Block) -> Array:
    """One BasicTransformerBlock, normalizing before each of its three parts."""
    normal = layer_norm(h, params["norm1.weight"], params["norm1.bias"])
    h = h + attention(part(params, "attn1"), normal, context if block.only_cross else normal, block.heads)
    normal = layer_norm(h, params["norm2.weight"], params["norm2.bias"])
    h = h + attention(part(params, "attn2"), normal, context, block.heads)
    normal = layer_norm(h, params["norm3.weight"], params["norm3.bias"])
    return h + geglu(part(params, "ff.net"), normal)


def attention(
    params: Params, h: Float[Array, "batch n d"], context: Float[Array, "batch tokens e"], heads: int
) -> Float[Array, "batch n d"]:
    """Attend from h to the context; scores and softmax in float32 or wider."""

    def split(name: str, of: Array) -> Array:
        out = linear(of, params[f"{name}.weight"])
        return out.reshape(*out.shape[:2], heads, -1)

    mixed = attend(split("to_q", h), split("to_k", context), split("to_v", context))
    return linear(mixed, params["to_out.0.weight"], params["to_out.0.bias"])


def geglu(params: Params, h: Float[Array, "batch n d"]) -> Float[Array, "batch n d"]:
    """Feed forward: values times the exact GELU of gates, the halves of one product."""
    values, gates = jnp.split(linear(h, params["0.proj.weight"], params["0.proj.bias"]), 2, axis=-1)
    return linear(values * jax.nn.gelu(gates, approximate=False), params["2.weight"], params["2.bias"])


def layer_norm(
    x: Float[Array, "*batch d"], weight: Float[Array, " d"], bias: Float[Array, " d"]
) -> Float[Array, "*batch d"]:
    """Normalize the features of each position, in float32 or wider; the result has x's dtype."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return (centred * lax.rsqrt(variance + _LAYER_NORM_EPS) * weight + bias).astype(x.dtype)
