"""GPT-OSS: attention with sinks and alternating windows, a mixture of clamped-SwiGLU experts.

Parameters are named as Hugging Face does; experts are (experts, in, out) as in unquantized checkpoints, with
gate and up projection in alternating columns. They are deformed as a stack of kernels.

Example:
  >>> import jax
  >>> config = Config.from_json(
  ...     {"model_type": "gpt_oss", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "head_dim": 4,
  ...      "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4,
  ...      "num_experts_per_tok": 2, "sliding_window": 4, "rms_norm_eps": 1e-5, "rope_theta": 150000.0,
  ...      "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}
  ... )
  >>> params = init(config, jax.random.key(0))
  >>> tokens = jax.numpy.asarray([[3, 1, 4, 1, 5]])
  >>> apply(config, params, tokens).shape
  (1, 5, 32)
  >>> value, slope = jax.value_and_grad(loss(config))(params, tokens)
  >>> generate(config, params, tokens, 3).shape
  (1, 8)

Source: the PyTorch implementation in transformers; OpenAI 2025, arXiv 2508.10925.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from specdef_jax.models import decoder, experts, generation
from specdef_jax.models.decoder import Cache, Params, init_cache, layout
from specdef_jax.models.fields import HARMLESS, Fields
from specdef_jax.models.linear import linear
from specdef_jax.models.rope import read_rope

__all__ = ["Config", "apply", "generate", "init", "init_cache", "layout", "loss", "shapes"]

_KINDS = ("full_attention", "sliding_attention")
# How the weights are stored, which the loader has undone; and another name of original positions.
_STORAGE = frozenset({"quantization_config", "initial_context_length"})


@dataclass(frozen=True, kw_only=True)
class Config(decoder.DecoderConfig):
    """What config.json says about the function.

    Attributes:
      num_local_experts: experts of each layer.
      num_experts_per_tok: experts that a token is sent to.
      layer_types: "sliding_attention" or "full_attention", for each layer.
      sliding_window: keys that a sliding layer sees, itself among them; None if there is no such layer.
      swiglu_alpha, swiglu_limit: of the experts' activation.
    """

    num_local_experts: int
    num_experts_per_tok: int
    layer_types: tuple[str, ...]
    sliding_window: int | None
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    attention_bias: bool = True

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Config:
        """Read config.json, in its newer or older form. Sizes that are absent are not filled in.

        Raises:
          ConfigError: a size is absent or has no meaning, or a field asks for what is not implemented.
        """
        fields = Fields(found, "GPT-OSS")
        fields.one_of("model_type", ("gpt_oss",), "gpt_oss")
        fields.one_of("hidden_act", ("silu",), "silu")
        if found.get("rope_parameters") is None and found.get("rope_scaling") is None:
            raise fields.error("rope_parameters", None, "is needed, or rope_scaling in the older form")
        depth = fields.size("num_hidden_layers")
        count = fields.size("num_local_experts", fields.get("num_experts"))
        chosen = fields.size("num_experts_per_tok", fields.get("experts_per_token"))
        if chosen > count:
            raise fields.error("num_experts_per_tok", chosen, f"must be at most the {count} experts")
        kinds = _layer_types(fields, depth)
        config = cls(
            vocab_size=fields.size("vocab_size"),
            hidden_size=fields.size("hidden_size"),
            intermediate_size=fields.size("intermediate_size"),
            num_hidden_layers=depth,
            num_attention_heads=fields.size("num_attention_heads"),
            num_key_value_heads=fields.size("num_key_value_heads"),
            head_dim=fields.size("head_dim"),
            num_local_experts=count,
            num_experts_per_tok=chosen,
            layer_types=kinds,
            sliding_window=fields.size("sliding_window") if "sliding_attention" in kinds else None,
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope=read_rope(fields),
            swiglu_alpha=fields.number("swiglu_alpha", 1.702),
            swiglu_limit=fields.number("swiglu_limit", 7.0),
            attention_bias=fields.flag("attention_bias", True),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )
        fields.finish(HARMLESS | _STORAGE | {"sliding_window", "num_experts", "experts_per_token"})
        decoder.check_heads(config)
        return config

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many keys each layer sees, None for all before."""
        windows = {"sliding_attention": self.sliding_window, "full_attention": None}
        return tuple(windows[kind] for kind in self.layer_types)


def _layer_types(fields: Fields, depth: int) -> tuple[str, ...]:
    """Return the kind of attention of each layer: alternating, sliding first, unless it is given."""
    kinds = fields.get("layer_types")
    if kinds is None:
        return tuple(_KINDS[(i + 1) % 2] for i in range(depth))
    if not isinstance(kinds, list) or len(kinds) != depth or any(kind not in _KINDS for kind in kinds):
        raise fields.error("layer_types", kinds, f"must name one of {_KINDS} for each of {depth} layers")
    return tuple(kinds)


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every parameter, kernels (in, out), experts (experts, in, out)."""
    n, m, count = config.hidden_size, config.intermediate_size, config.num_local_experts
    layer = decoder.attention_shapes(config) | {
        "self_attn.sinks": (config.num_attention_heads,),
        "mlp.router.weight": (n, count),
        "mlp.router.bias": (count,),
        "mlp.experts.gate_up_proj": (count, n, 2 * m),
        "mlp.experts.gate_up_proj_bias": (count, 2 * m),
        "mlp.experts.down_proj": (count, m, n),
        "mlp.experts.down_proj_bias": (count, n),
    }
    return decoder.model_shapes(config, layer)


def init(config: Config, key: PRNGKeyArray, dtype: Any = jnp.float32) -> Params:
    """Return random parameters: norms 1, biases 0, all else normal with standard deviation 0.02."""
    return decoder.init(shapes(config), key, dtype)


def apply(
    config: Config,
    params: Params,
    tokens: Int[Array, "batch time"],
    *,
    cache: Cache | None = None,
    remat: bool = False,
    grouped: bool = False,
) -> Any:
    """Return the logits (batch, time, vocab) in the dtype of the parameters.

    Args:
      config: of the model.
      params: name -> array or structured weight; layers one by one or stacked (models.stacking).
      tokens: every row is read from its first token on; there is no padding.
      cache: of the tokens before these (init_cache); with one, (logits, cache) is returned.
      remat: recompute the inside of each layer in the backward pass instead of keeping it.
      grouped: sort tokens by expert, so that each is read by its own experts only (models.experts): faster
        for long inputs on one device. sd.layered refuses it; pairs are applied as pairs without.

    Raises:
      ProblemError: the cache is too short.
    """
    feed_forward = functools.partial(_mixture, config, grouped)
    logits, after = decoder.run(
        config, params, tokens, cache, feed_forward=feed_forward, scale_wide=True, remat=remat
    )
    return logits if cache is None else (logits, after)


def loss(config: Config, *, remat: bool = False, grouped: bool = False) -> Callable[..., Float[Array, ""]]:
    """Return the mean cross-entropy of each next token, in nats, as a function (params, tokens)."""
    return functools.partial(_loss, config, remat, grouped)


def generate(
    config: Config,
    params: Params,
    tokens: Int[Array, "batch time"],
    steps: int,
    *,
    temperature: float = 0.0,
    key: PRNGKeyArray | None = None,
    stop: Sequence[int] = (),
) -> Int[Array, "batch longer"]:
    """Return the prompts continued by `steps` tokens (see models.generation.generate)."""
    return generation.generate(
        apply, config, params, tokens, steps, temperature=temperature, key=key, stop=stop
    )


def _loss(
    config: Config, remat: bool, grouped: bool, params: Params, tokens: Int[Array, "batch time"]
) -> Float[Array, ""]:
    return decoder.cross_entropy(apply(config, params, tokens, remat=remat, grouped=grouped), tokens)


def _mixture(config: Config, grouped: bool, layer: Params, x: Array, cached: bool) -> Array:
    """Route each token to its experts and sum what they say, weighted."""
    h = x.reshape(-1, x.shape[-1])
    scores = linear(h, layer["mlp.router.weight"], layer["mlp.router.bias"])
    top, chosen = jax.lax.top_k(scores, config.num_experts_per_tok)
    shares = jax.nn.softmax(top.astype(jnp.promote_types(top.dtype, jnp.float32))).astype(h.dtype)
    stack = {name.removeprefix("mlp.experts."): leaf for name, leaf in layer.items() if ".experts." in name}
    said = functools.partial(_expert, config)
    if cached and chosen.size < config.num_local_experts:
        mix = experts.chosen_alone
    else:
        mix = experts.sorted_by_expert if grouped else experts.every_expert
    return mix(said, stack, h, chosen, shares).reshape(x.shape)


def _expert(config: Config, stack: Params, h: Array) -> Array:
    """Return what each expert of a stack says: down((up + 1) gate sigmoid(alpha gate)), clamped."""
    both = linear(h, stack["gate_up_proj"], stack["gate_up_proj_bias"])
    gate = jnp.minimum(both[..., ::2], config.swiglu_limit)
    up = jnp.clip(both[..., 1::2], -config.swiglu_limit, config.swiglu_limit)
    gated = (up + 1) * (gate * jax.nn.sigmoid(config.swiglu_alpha * gate))
    return linear(gated, stack["down_proj"], stack["down_proj_bias"])
