"""The fields of a UNet's config.json: defaults, what is refused, and lists with an entry for each level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdef_jax.errors import ConfigError

# Fields that leave the function as it is: sizes of the input, what only training in PyTorch reads (dropout),
# words about the file, and what speaks of parts that are absent.
_NO_EFFECT = {
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "architectures",
    "dropout",
    "dtype",
    "model_type",
    "projection_class_embeddings_input_dim",
    "sample_size",
    "torch_dtype",
    "upcast_attention",  # scores and softmax are in float32 or wider here with or without it
}
# What other architectures set, and the one value that means Stable Diffusion's.
_ONLY: dict[str, Any] = {
    "addition_embed_type": None,
    "attention_type": "default",
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_class_embeds": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
_DEFAULTS: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "center_input_sample": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 1280,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,  # only other mid blocks read it
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "reverse_transformer_layers_per_block": None,
    "time_embedding_dim": None,
    "transformer_layers_per_block": 1,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "use_linear_projection": False,
}
_CROSS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}


def known(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every field that is read, defaults filled in."""
    name = str(config.get("_class_name", "UNet2DConditionModel"))
    if not name.endswith("UNet2DConditionModel"):
        raise ConfigError(f"the config is of a {name}; give that of a UNet2DConditionModel.")
    for field, value in config.items():
        if field in _ONLY and value != _ONLY[field]:
            raise ConfigError(
                f"{field} = {value!r} makes another architecture than Stable Diffusion's, for which it is "
                f"{_ONLY[field]!r}; such checkpoints can be deformed as files (specdef deform), not run here."
            )
        unknown = not field.startswith("_") and field not in {*_NO_EFFECT, *_ONLY, *_DEFAULTS}
        if unknown and value is not None:
            raise ConfigError(
                f"the config has a field that is not known here, {field} = {value!r}, and it may change the "
                "network; remove it from config.json if it does not."
            )
    return _DEFAULTS | {field: value for field, value in config.items() if field in _DEFAULTS}


def types(told: dict[str, Any], field: str, n: int) -> tuple[bool, ...]:
    """Tell of each level whether it has attention."""
    way = "Up" if field.startswith("up") else "Down"
    known = [kind for kind in _CROSS if way in kind]
    kinds = told[field]
    if not isinstance(kinds, (list, tuple)) or len(kinds) != n:
        raise ConfigError(f"{field} = {kinds!r}: give one for each of {n} block_out_channels.")
    for kind in kinds:
        if kind not in known:
            raise ConfigError(f"{field} has {kind!r}; here are {' and '.join(known)}.")
    return tuple(_CROSS[kind] for kind in kinds)


def per_level(told: dict[str, Any], field: str, n: int, kind: type = int) -> tuple[Any, ...]:
    """Return the entry of each level, of a list or of one value for all."""
    value = told[field]
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * n
    if len(values) != n or any(type(v) is not kind or (kind is int and v < 1) for v in values):
        what = "true or false" if kind is bool else "a positive number"
        raise ConfigError(f"{field} = {value!r}: give {what}, or {n} of them, one for each level.")
    return values


def depths(told: dict[str, Any], field: str, n: int) -> tuple[Any, ...]:
    """Return the numbers of transformer blocks of each level: one for all of its layers, or one for each."""
    value = told[field]
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * n
    if len(values) != n:
        raise ConfigError(f"{field} = {value!r}: give a number, or one for each of {n} levels.")
    return tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in values)


def numbers(told: dict[str, Any], field: str) -> tuple[int, ...]:
    """Return a list of positive numbers."""
    value = told[field]
    if not isinstance(value, (list, tuple)) or not value or any(type(v) is not int or v < 1 for v in value):
        raise ConfigError(f"{field} = {value!r}: give a list of positive numbers.")
    return tuple(value)


def positive(told: dict[str, Any], field: str) -> int:
    """Return a positive number."""
    value = told[field]
    if type(value) is not int or value < 1:
        raise ConfigError(f"{field} = {value!r}: must be a positive number.")
    return value


def one_of(told: dict[str, Any], field: str, known: tuple[Any, ...]) -> Any:
    """Return one of the known values."""
    if told[field] not in known:
        raise ConfigError(f"{field} = {told[field]!r}: must be one of {', '.join(map(str, known))}.")
    return told[field]
