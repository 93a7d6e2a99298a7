"""Llama: RMSNorm, rotary grouped-query attention, gated feed-forward; parameters as Hugging Face names them.

Example:
  >>> import jax
  >>> config = Config.from_json(
  ...     {"model_type": "llama", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16,
  ...      "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
  ... )
  >>> params = init(config, jax.random.key(0))
  >>> tokens = jax.numpy.asarray([[3, 1, 4, 1, 5]])
  >>> apply(config, params, tokens).shape
  (1, 5, 32)
  >>> value, slope = jax.value_and_grad(loss(config))(params, tokens)
  >>> generate(config, params, tokens, 3).shape
  (1, 8)

Source: the PyTorch implementation in transformers; Touvron et al. 2023, arXiv 2302.13971.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from specdef_jax.models import decoder, generation
from specdef_jax.models.decoder import Cache, Params, init_cache, layout
from specdef_jax.models.fields import Fields
from specdef_jax.models.linear import linear
from specdef_jax.models.rope import read_rope

__all__ = ["Config", "apply", "generate", "init", "init_cache", "layout", "loss", "shapes"]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclass(frozen=True, kw_only=True)
class Config(decoder.DecoderConfig):
    """What config.json says about the function.

    Attributes:
      hidden_act: activation of the gate.
      mlp_bias: whether the feed-forward maps have biases.
    """

    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Config:
        """Read config.json, in its newer or older form.

        Raises:
          ConfigError: a size is absent or has no meaning, or a field asks for what is not implemented.
        """
        fields = Fields(found, "Llama")
        fields.one_of("model_type", ("llama",), "llama")
        hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
        head_dim = fields.get("head_dim")
        if head_dim is None and hidden % heads:
            raise fields.error("head_dim", None, f"is needed: {heads} heads do not divide {hidden} features")
        config = cls(
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.size("intermediate_size"),
            num_hidden_layers=fields.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=fields.size("num_key_value_heads", heads),
            head_dim=Fields({"head_dim": head_dim}, "Llama").size("head_dim", hidden // heads),
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope=read_rope(fields, theta=10_000.0),
            hidden_act=fields.one_of("hidden_act", _ACTIVATIONS, "silu"),
            attention_bias=fields.flag("attention_bias", False),
            mlp_bias=fields.flag("mlp_bias", False),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )
        fields.finish()
        decoder.check_heads(config)
        return config


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every parameter, kernels (in, out)."""
    n, m = config.hidden_size, config.intermediate_size
    kernels = {"gate_proj": (n, m), "up_proj": (n, m), "down_proj": (m, n)}
    layer = decoder.attention_shapes(config)
    layer |= {f"mlp.{name}.weight": shape for name, shape in kernels.items()}
    if config.mlp_bias:
        layer |= {f"mlp.{name}.bias": shape[1:] for name, shape in kernels.items()}
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
    fused: bool = False,
) -> Any:
    """Return the logits (batch, time, vocab) in the dtype of the parameters.

    Args:
      config: of the model.
      params: name -> array or structured weight; layers one by one or stacked (models.stacking).
      tokens: every row is read from its first token on; there is no padding.
      cache: of the tokens before these (init_cache); with one, (logits, cache) is returned.
      remat: recompute the inside of each layer in the backward pass instead of keeping it.
      fused: attention by cuDNN's kernel, on NVIDIA GPUs in half precision, without a cache. It stores no
        scores and has first derivatives only: for training and reading, not for curvature.

    Raises:
      ProblemError: the cache is too short; fused attention cannot run here.
    """
    feed_forward = functools.partial(_feed_forward, config)
    logits, after = decoder.run(
        config, params, tokens, cache, feed_forward=feed_forward, scale_wide=False, remat=remat, fused=fused
    )
    return logits if cache is None else (logits, after)


def loss(config: Config, *, remat: bool = False, fused: bool = False) -> Callable[..., Float[Array, ""]]:
    """Return the mean cross-entropy of each next token, in nats, as a function (params, tokens)."""
    return functools.partial(_loss, config, remat, fused)


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
    config: Config, remat: bool, fused: bool, params: Params, tokens: Int[Array, "batch time"]
) -> Float[Array, ""]:
    return decoder.cross_entropy(apply(config, params, tokens, remat=remat, fused=fused), tokens)


def _feed_forward(config: Config, layer: Params, x: Array, _: bool) -> Array:
    def project(name: str, h: Array) -> Array:
        return linear(h, layer[f"mlp.{name}.weight"], layer.get(f"mlp.{name}.bias"))

    gated = _ACTIVATIONS[config.hidden_act](project("gate_proj", x)) * project("up_proj", x)
    return project("down_proj", gated)
