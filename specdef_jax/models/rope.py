"""Rotary position embeddings: half-split, and the scalings of their frequencies by config.

Sources: Su et al. 2021 (RoPE); Chen et al. 2023 (linear); Peng et al. 2023, arXiv 2309.00071 (YaRN);
the Llama 3.1 release (llama3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specdef_jax.errors import ConfigError
from specdef_jax.models.fields import Fields

_OF_TYPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL = {"beta_fast": 32.0, "beta_slow": 1.0}


@dataclass(frozen=True)
class Rope:
    """How positions turn queries and keys.

    Attributes:
      kind: "default", "linear", "llama3" or "yarn".
      theta: base of the wavelengths.
      factor: by which the context was extended.
      original: positions the model was first trained on (llama3, yarn).
      low_freq_factor, high_freq_factor: of llama3.
      beta_fast, beta_slow, truncate: of YaRN.
      scale: on cosines and sines; YaRN's attention factor, else 1.
    """

    kind: str
    theta: float
    factor: float = 1.0
    original: int = 1
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    scale: float = 1.0


def read_rope(fields: Fields, theta: float | None = None) -> Rope:
    """Read `rope_parameters`, or the older `rope_scaling` with `rope_theta` beside it.

    Args:
      fields: of the config.
      theta: where a config gives none; None if it must.

    Raises:
      ConfigError: an unknown kind of scaling, a field it needs is absent, or one that is not known.
    """
    new, old = fields.get("rope_parameters"), fields.get("rope_scaling")
    if new is not None and old is not None and new != old:
        raise fields.error("rope_scaling", old, f"contradicts rope_parameters {new!r}; keep one of them")
    found = new if new is not None else (old if old is not None else {})
    if not isinstance(found, dict):
        raise fields.error("rope_parameters", found, "must be an object")
    inner = Fields(found, "rope")
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind not in _OF_TYPE:
        raise fields.error("rope_type", kind, f"must be one of {', '.join(map(repr, _OF_TYPE))}")
    outer_theta = fields.get("rope_theta", theta)
    base = inner.number("rope_theta", outer_theta)
    if base <= 1:
        raise fields.error("rope_theta", base, "must be greater than 1")
    longest, outer = fields.get("max_position_embeddings"), fields.get("original_max_position_embeddings")
    for partial in (fields.get("partial_rotary_factor", 1.0), inner.get("partial_rotary_factor", 1.0)):
        if partial != 1:
            raise fields.error("partial_rotary_factor", partial, "must be 1: heads are rotated as a whole")
    told: dict[str, Any] = {name: inner.number(name) for name in _OF_TYPE[kind]}
    original = inner.get("original_max_position_embeddings")
    if kind in ("llama3", "yarn"):
        # A field beside the rope's own goes first, as in the original.
        chosen = next((x for x in (outer, original, longest) if x is not None), None)
        told["original"] = Fields({"original_max_position_embeddings": chosen}, "rope").size(
            "original_max_position_embeddings"
        )
    if kind == "yarn":
        told |= {name: inner.number(name, default) for name, default in _OPTIONAL.items()}
        told |= {"truncate": inner.flag("truncate", True), "scale": _yarn_scale(inner, told["factor"])}
    # Fields of another kind are written by some tools, and are not read by the original either.
    inner.finish({*_OF_TYPE["llama3"], *_OPTIONAL, "type", "truncate", "attention_factor"})
    if kind == "llama3" and not told["high_freq_factor"] > told["low_freq_factor"]:
        raise ConfigError(
            f"rope: high_freq_factor {told['high_freq_factor']} must exceed low_freq_factor "
            f"{told['low_freq_factor']}."
        )
    return Rope(kind, base, **told)


def _yarn_scale(inner: Fields, factor: float) -> float:
    """Return what cosines and sines are multiplied by: 0.1 ln(factor) + 1 unless it is given."""

    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = inner.get("attention_factor")
    of_all, of_some = inner.get("mscale_all_dim"), inner.get("mscale")
    if given is not None:
        return float(given)
    return growth(of_some) / growth(of_all) if of_some and of_all else growth(1.0)


def frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " half"]:
    """Return the angle per position of each pair of features, float32 as the original computes it."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = np.float32(rope.theta) ** exponents  # over 2 pi
    plain = np.float32(1) / wavelengths
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "llama3":
        turns = np.float32(rope.original) * plain / np.float32(2 * math.pi)  # over the original context
        low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return (1 - smooth) * plain / np.float32(rope.factor) + smooth * plain
    if rope.kind == "yarn":
        kept = 1 - _ramp(rope, head_dim)
        return plain / np.float32(rope.factor) * (1 - kept) + plain * kept
    return plain


def _ramp(rope: Rope, head_dim: int) -> Float[np.ndarray, " half"]:
    """Return 0 for pairs that turn fast over the original context, 1 for slow ones, linear between."""

    def pair_with(turns: float) -> float:
        return head_dim * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(ramp, 0, 1)


def tables(
    rope: Rope, head_dim: int, positions: Int[Array, " time"], dtype: Any
) -> tuple[Float[Array, "time half"], Float[Array, "time half"]]:
    """Return cosines and sines of every position; angles are formed in float32 or wider."""
    wide = jnp.promote_types(dtype, jnp.float32)
    angles = positions[:, None].astype(wide) * frequencies(rope, head_dim).astype(wide)
    scale = np.asarray(rope.scale, wide)
    return (jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype)


def rotate(
    x: Float[Array, "batch time heads d"], cos: Float[Array, "time half"], sin: Float[Array, "time half"]
) -> Float[Array, "batch time heads d"]:
    """Turn feature i and i + d / 2 of every head by the angle of its position."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
