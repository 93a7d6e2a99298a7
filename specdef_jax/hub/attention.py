"""Which tensors are the value and output projections of one attention, and how many heads they have.

Between the two an attention is linear and acts on positions alone, so that T(a) after the first and
T(1/a) before the second cancel, per group of heads that share values (THEORY.md 0, gauge placement).
Whatever a block or a config adds to that, known here or not, is a reason to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specdef_jax.errors import StructureError
from specdef_jax.hub.shards import Shards

# (value projection, output projection, what else a block may hold)
_STYLES = (
    (
        "v_proj",
        "o_proj",
        r"(q|k|v|o)_proj\.(weight|bias)|(q|k)_norm\.(weight|bias)|sinks|rotary_emb\.inv_freq",
    ),
    ("to_v", "to_out.0", r"to_(q|k|v)\.(weight|bias)|to_out\.0\.(weight|bias)|norm_(q|k)\.(weight|bias)"),
)
# Settings under which something stands between the two projections, or several layers share one of them.
_BETWEEN = ("clip_qkv", "attn_output_gate", "num_kv_shared_layers", "attention_k_eq_v")
# Models that normalize the values without a parameter that would tell.
_NORMALIZED = re.compile(r"gemma3n|gemma4|diffusion_gemma|embedding_gemma2")


@dataclass(frozen=True)
class AttentionPair:
    """Two adjacent linear maps.

    Attributes:
      first: value projection, weight (groups * d, in).
      second: output projection, weight (out, heads * d); head i reads group i // (heads / groups).
      bias: of the first map, if it has one.
      groups: number of key-value heads.
      heads: number of query heads.
    """

    first: str
    second: str
    bias: str | None
    groups: int
    heads: int

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the pair: first, second, and the bias if there is one."""
        return (self.first, self.second, *([self.bias] if self.bias else []))


def find_pairs(shards: Shards) -> dict[str, tuple[str, str]]:
    """Return value projection -> (output projection, prefix of their block) for every attention."""
    found = {}
    for name in shards:
        for value, output, _ in _STYLES:
            prefix = name.removesuffix(f"{value}.weight")
            second = f"{prefix}{output}.weight"
            if prefix != name and prefix[-1:] in ("", ".") and second in shards:
                found[name] = (second, prefix)
    return found


def pair_at(shards: Shards, first: str) -> AttentionPair:
    """Return the pair of a value projection.

    Raises:
      StructureError: there is none of this name, the block holds a parameter that is not known to leave
        the two maps adjacent, the config says that something stands between them, or the heads do not fit
        the shapes.
    """
    pairs = find_pairs(shards)
    if first not in pairs:
        raise StructureError(f"{shards.path} has no value projection '{first}' with an output projection.")
    second, prefix = pairs[first]
    allowed = next(rest for value, _, rest in _STYLES if first.endswith(f"{prefix}{value}.weight"))
    unknown = [n for n in shards if n.startswith(prefix) and not re.fullmatch(allowed, n[len(prefix) :])]
    if unknown:
        raise StructureError(
            f"'{unknown[0]}' stands in the attention of '{first}', and may act between its two projections; "
            "use placement insert."
        )
    config = _section(shards.config, prefix)
    for key in _BETWEEN:
        if config.get(key):
            raise StructureError(
                f"the config has {key} = {config[key]!r}: the projections of '{first}' are not adjacent, "
                "or are shared; use placement insert."
            )
    for told in (shards.config.get("model_type"), config.get("model_type")):
        if _NORMALIZED.search(str(told)):
            raise StructureError(
                f"{told} normalizes values between the projections of '{first}'; use placement insert."
            )
    heads, groups = _heads(config, prefix)
    _check_shapes(shards, first, second, prefix, heads, groups)
    bias = f"{first.removesuffix('weight')}bias"
    return AttentionPair(first, second, bias if bias in shards else None, groups, heads)


def _section(config: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """Return the part of a config that speaks of a block: of a model with several, its own."""
    name = "vision_config" if "vision" in prefix else "text_config"
    inner = config.get(name)
    return inner if isinstance(inner, dict) else config


def _heads(config: Mapping[str, Any], prefix: str) -> tuple[int, int]:
    """Return the numbers of query heads and of key-value heads."""
    heads = config.get("num_attention_heads")
    if str(config.get("_class_name")).startswith("UNet") and heads is None:
        heads = config.get("attention_head_dim")  # so named there for compatibility
    heads = _of_block(heads, prefix)
    groups = config.get("num_key_value_heads")
    groups = heads if groups is None else groups
    for number in (heads, groups):
        if type(number) is not int or number < 1:
            raise StructureError(
                f"the config gives no number of heads for '{prefix}' (num_attention_heads {heads!r}, "
                f"num_key_value_heads {groups!r}); use placement insert."
            )
    return heads, groups


def _of_block(heads: Any, prefix: str) -> Any:
    """Return the entry of a list that holds a number for each down block of a UNet."""
    if not isinstance(heads, list):
        return heads
    if "mid_block." in prefix and heads:
        return heads[-1]
    found = re.search(r"(down|up)_blocks\.(\d+)\.", prefix)
    if found is None or int(found[2]) >= len(heads):
        return None
    return (heads if found[1] == "down" else heads[::-1])[int(found[2])]


def _check_shapes(shards: Shards, first: str, second: str, prefix: str, heads: int, groups: int) -> None:
    shapes = {name: shards.info(name).shape for name in (first, second)}
    told = f"'{first}' {shapes[first]} and '{second}' {shapes[second]}"
    if any(len(shape) != 2 for shape in shapes.values()):
        raise StructureError(f"{told} are no matrices; use placement insert.")
    features, read = shapes[first][0], shapes[second][1]
    if heads % groups or features % groups or read % heads or features // groups != read // heads:
        raise StructureError(f"{told} do not fit {heads} heads in {groups} groups; check the config.")
    query, key = (f"{prefix}{name}.weight" for name in ("q_proj", "k_proj"))
    if query in shards and key in shards:
        q, k = shards.info(query).shape[0], shards.info(key).shape[0]
        if q * groups != k * heads:  # a gate on the output may be computed beside the queries
            raise StructureError(
                f"'{query}' gives {q} features, '{key}' {k}: not those of {heads} and {groups} heads, so "
                "something else is computed there; use placement insert."
            )
