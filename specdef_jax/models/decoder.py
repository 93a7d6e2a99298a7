"""The decoder that Llama and GPT-OSS share: pre-norm attention and feed-forward layers on a residual stream.

Layers run in a Python loop, or in one lax.scan if they are stacked (models.stacking), with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from specdef_jax.attacks.adjacent import AdjacentPair
from specdef_jax.errors import ConfigError, ProblemError
from specdef_jax.models import stacking
from specdef_jax.models.attention import KeyValues, attend, attend_fused, causal_mask, remember, rms_norm
from specdef_jax.models.linear import linear
from specdef_jax.models.rope import Rope, rotate, tables

Params = dict[str, Any]
FeedForward = Callable[[Params, Array, bool], Array]
_EVERYWHERE = 2**30  # a window that hides nothing


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What the configs of both models say, under its names in config.json.

    Hashable, so that a config can be a static argument of jit.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    attention_bias: bool
    tie_word_embeddings: bool = False

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many keys each layer sees, None for all before."""
        return (None,) * self.num_hidden_layers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far.

    Attributes:
      layers: (keys, values) of each layer, (batch, length, groups, head_dim), or one pair with an axis over
        layers in front if the network's layers are stacked.
      used: how many of `length` positions are filled.
    """

    layers: Any
    used: Int[Array, ""]

    def check_room(self, more: int) -> None:
        """Refuse more tokens than there is room for; inside jit only a single input can be too long.

        Raises:
          ProblemError: the cache is too short.
        """
        length = jax.tree.leaves(self.layers)[0].shape[-3]
        used = 0 if isinstance(self.used, Tracer) else int(self.used)
        if used + more > length:
            raise ProblemError(
                f"the cache holds {length} tokens, {used} of them used, and {more} more come; make it longer."
            )


def init_cache(
    config: DecoderConfig, batch: int, length: int, dtype: Any = jnp.float32, *, stacked: bool = False
) -> Cache:
    """Return an empty cache for `length` tokens; `stacked` for a network whose layers are."""
    shape = (batch, length, config.num_key_value_heads, config.head_dim)
    if stacked:
        shape = (config.num_hidden_layers, *shape)
        return Cache((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), jnp.int32(0))
    pairs = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_hidden_layers)]
    return Cache(pairs, jnp.int32(0))


def run(
    config: DecoderConfig,
    params: Params,
    tokens: Int[Array, "batch time"],
    cache: Cache | None,
    *,
    feed_forward: FeedForward,
    scale_wide: bool,
    remat: bool,
    fused: bool = False,
) -> tuple[Float[Array, "batch time vocab"], Cache | None]:
    """Return the logits of every position and the cache with this input added to it.

    Args:
      config: sizes.
      params: the network.
      tokens: follow those in the cache.
      cache: None to compute without one.
      feed_forward: feed_forward(layer, h, with a cache), the second half of a layer.
      scale_wide: see rms_norm.
      remat: recompute the inside of each layer in the backward pass instead of keeping it.
      fused: see attend_fused; for layers without sinks and windows.

    Raises:
      ProblemError: the cache is too short; fused attention cannot run here, or is asked for with a cache.
    """
    if fused and cache is not None:
        raise ProblemError("fused attention reads no cache; leave out one of `fused` and `cache`.")
    if cache is not None:
        cache.check_room(tokens.shape[1])
    h = jnp.asarray(params["model.embed_tokens.weight"])[tokens]
    start = jnp.int32(0) if cache is None else cache.used
    positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    cos, sin = tables(config.rope, config.head_dim, positions, h.dtype)
    norm = {"eps": config.rms_norm_eps, "scale_wide": scale_wide}

    def layer_step(
        layer: Params, h: Array, held: KeyValues | None, window: Any
    ) -> tuple[Array, KeyValues | None]:
        x = rms_norm(h, layer["input_layernorm.weight"], **norm)
        q, k, v = (_heads(layer, name, x, config.head_dim) for name in ("q_proj", "k_proj", "v_proj"))
        k, v, kept = remember(held, rotate(k, cos, sin), v, start)
        if fused:
            mixed = attend_fused(rotate(q, cos, sin), k, v)
        else:
            keys = jnp.arange(k.shape[1], dtype=jnp.int32)
            mask = causal_mask(positions, keys, window)
            mixed = attend(rotate(q, cos, sin), k, v, mask, layer.get("self_attn.sinks"))
        h = h + linear(mixed, layer["self_attn.o_proj.weight"], layer.get("self_attn.o_proj.bias"))
        x = rms_norm(h, layer["post_attention_layernorm.weight"], **norm)
        return h + feed_forward(layer, x, held is not None), kept

    step = jax.checkpoint(layer_step) if remat else layer_step
    held = None if cache is None else cache.layers
    run_layers = _scan if stacking.is_stacked(params) else _loop
    h, kept = run_layers(config, params, h, held, step)
    h = rms_norm(h, params["model.norm.weight"], **norm)
    after = None if cache is None else Cache(kept, start + jnp.int32(tokens.shape[1]))
    return _logits(config, params, h), after


def _heads(layer: Params, name: str, x: Array, head_dim: int) -> Float[Array, "batch time heads d"]:
    out = linear(x, layer[f"self_attn.{name}.weight"], layer.get(f"self_attn.{name}.bias"))
    return out.reshape(*out.shape[:-1], -1, head_dim)


def _loop(config: DecoderConfig, params: Params, h: Array, held: Any, step: Any) -> tuple[Array, Any]:
    kept = []
    for i, window in enumerate(config.windows):
        h, pair = step(stacking.layer_of(params, i), h, None if held is None else held[i], window)
        kept.append(pair)
    return h, kept


def _scan(config: DecoderConfig, params: Params, h: Array, held: Any, step: Any) -> tuple[Array, Any]:
    layers = stacking.stacked_layers(params)
    windows = jnp.asarray([_EVERYWHERE if w is None else w for w in config.windows], jnp.int32)
    everywhere = all(w is None for w in config.windows)

    def body(h: Array, inputs: Any) -> tuple[Array, Any]:
        layer, pair, window = inputs
        layer = {name: stacking.one_layer(leaf) for name, leaf in layer.items()}
        return step(layer, h, pair, None if everywhere else window)

    return jax.lax.scan(body, h, (layers, held, windows))


def _logits(config: DecoderConfig, params: Params, h: Array) -> Float[Array, "batch time vocab"]:
    if config.tie_word_embeddings:
        return linear(h, params["model.embed_tokens.weight"].T)
    return linear(h, params["lm_head.weight"])


def cross_entropy(
    logits: Float[Array, "batch time vocab"], tokens: Int[Array, "batch time"]
) -> Float[Array, ""]:
    """Return the mean loss in nats of each token after the first, given those before it."""
    wide = logits[:, :-1].astype(jnp.promote_types(logits.dtype, jnp.float32))
    found = jnp.take_along_axis(wide, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(wide, axis=-1) - found)


def attention_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of what one layer holds apart from its feed-forward half."""
    n, q = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    sizes = {"q_proj": (n, q), "k_proj": (n, kv), "v_proj": (n, kv), "o_proj": (q, n)}
    found: dict[str, tuple[int, ...]] = {f"self_attn.{name}.weight": shape for name, shape in sizes.items()}
    if config.attention_bias:
        found |= {f"self_attn.{name}.bias": shape[1:] for name, shape in sizes.items()}
    return found | {"input_layernorm.weight": (n,), "post_attention_layernorm.weight": (n,)}


def model_shapes(config: DecoderConfig, layer: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of a whole model whose layers hold `layer`, kernels (in, out)."""
    n, vocab = config.hidden_size, config.vocab_size
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, n)}
    for i in range(config.num_hidden_layers):
        found |= {f"{stacking.PREFIX}{i}.{name}": shape for name, shape in layer.items()}
    found["model.norm.weight"] = (n,)
    return found if config.tie_word_embeddings else found | {"lm_head.weight": (n, vocab)}


def layout(name: str, rank: int) -> tuple[int, ...]:
    """Return the permutation of axes that turns a stored tensor into ours: (out, in) into (in, out)."""
    linear_map = name.endswith(("_proj.weight", "router.weight")) or name == "lm_head.weight"
    return (1, 0) if linear_map and rank == 2 else tuple(range(rank))


def gauge_pairs(config: DecoderConfig) -> tuple[AdjacentPair, ...]:
    """Return the value and output projection of every layer, between which attention is linear."""
    prefixes = [f"{stacking.PREFIX}{i}.self_attn." for i in range(config.num_hidden_layers)]
    return tuple(
        AdjacentPair(
            f"{prefix}v_proj.weight",
            f"{prefix}o_proj.weight",
            f"{prefix}v_proj.bias" if config.attention_bias else None,
            config.num_key_value_heads,
        )
        for prefix in prefixes
    )


def check_heads(config: DecoderConfig) -> None:
    """Refuse numbers of heads that no attention can have.

    Raises:
      ConfigError: query heads are no multiple of key-value heads, or heads have an odd number of features.
    """
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"num_attention_heads {config.num_attention_heads} must be a multiple of num_key_value_heads "
            f"{config.num_key_value_heads}."
        )
    if config.head_dim % 2:
        raise ConfigError(
            f"head_dim {config.head_dim} must be even: rotary embeddings turn pairs of features."
        )


def init(
    shapes: dict[str, tuple[int, ...]], key: PRNGKeyArray, dtype: Any = jnp.float32, scale: float = 0.02
) -> Params:
    """Return random parameters: norms 1, biases 0, all else normal with standard deviation `scale`."""
    params: Params = {}
    for one, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True):
        if name.endswith("norm.weight"):
            params[name] = jnp.ones(shape, dtype)
        elif name.endswith("bias"):
            params[name] = jnp.zeros(shape, dtype)
        else:
            params[name] = (scale * jax.random.normal(one, shape)).astype(dtype)
    return params
