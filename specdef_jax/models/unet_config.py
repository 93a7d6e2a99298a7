"""The block layout of a UNet2DConditionModel, read from the config.json of diffusers.

A field that is absent has the default of diffusers, as it has there: the config of Stable Diffusion 1.x has
no mid_block_type. A field that would change the architecture into one that is not here is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specdef_jax.errors import ConfigError
from specdef_jax.models.unet_fields import depths, known, numbers, one_of, per_level, positive, types

_MID = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False}
ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")


@dataclass(frozen=True)
class Block:
    """One level of the way down or up, or the middle.

    Attributes:
      name: prefix of its tensors.
      channels: of its output.
      inputs: input channels of each ResNet block, skip connections counted.
      depths: transformer blocks behind each ResNet block that has any; empty without attention.
      heads: attention heads.
      context: features of the encoder's states.
      only_cross: the first attention of a transformer block reads the encoder's states too.
      resampled: a downsampler or upsampler ends it.
      scale: ResNet blocks divide their output by it.
    """

    name: str
    channels: int
    inputs: tuple[int, ...]
    depths: tuple[int, ...] = ()
    heads: int = 1
    context: int = 0
    only_cross: bool = False
    resampled: bool = False
    scale: float = 1.0

    @property
    def inner(self) -> int:
        """Features inside the transformer: all heads together."""
        return self.heads * (self.channels // self.heads)


@dataclass(frozen=True)
class UNetConfig:
    """What a forward pass needs to know; hashable, so that it can be a static argument of jit.

    Attributes:
      in_channels: of the sample.
      out_channels: of the prediction.
      width: channels after the first convolution, and of the sinusoidal embedding.
      time_features: of the timestep's embedding.
      down: blocks on the way down, in order.
      mid: the middle block, or None.
      up: blocks on the way up, in order.
      groups: of every group normalization.
      norm_eps: of the group normalizations outside the transformers.
      act_fn: between convolutions.
      center_input_sample: the sample is taken from [0, 1] to [-1, 1].
      flip_sin_to_cos: cosines come first in the embedding of the timestep.
      freq_shift: of its frequencies.
      downsample_padding: 1, or 0 for one row and column at the end.
      conv_in_kernel: window of the first convolution.
      conv_out_kernel: window of the last one.
      use_linear_projection: the transformers are entered and left by linear maps, not 1x1 convolutions.
    """

    in_channels: int
    out_channels: int
    width: int
    time_features: int
    down: tuple[Block, ...]
    mid: Block | None
    up: tuple[Block, ...]
    groups: int
    norm_eps: float
    act_fn: str
    center_input_sample: bool
    flip_sin_to_cos: bool
    freq_shift: float
    downsample_padding: int
    conv_in_kernel: int
    conv_out_kernel: int
    use_linear_projection: bool

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in the order of the forward pass."""
        return (*self.down, *((self.mid,) if self.mid else ()), *self.up)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read a config.json of diffusers.

        attention_head_dim means the number of heads: it was misnamed when diffusers began, and checkpoints
        keep the name. A num_attention_heads, where it is given, goes before.

        Raises:
          ConfigError: a field asks for another architecture, is unknown, or does not fit the others.
        """
        told = known(config)
        channels = numbers(told, "block_out_channels")
        n = len(channels)
        heads = "attention_head_dim" if told["num_attention_heads"] is None else "num_attention_heads"
        levels = {
            "heads": per_level(told, heads, n),
            "layers": per_level(told, "layers_per_block", n),
            "context": per_level(told, "cross_attention_dim", n),
            "only_cross": per_level(told, "only_cross_attention", n, kind=bool),
            "depth": depths(told, "transformer_layers_per_block", n),
        }
        down = _way_down(channels, types(told, "down_block_types", n), levels)
        up = _way_up(channels, types(told, "up_block_types", n), levels, told)
        found = cls(
            in_channels=positive(told, "in_channels"),
            out_channels=positive(told, "out_channels"),
            width=channels[0],
            time_features=told["time_embedding_dim"] or 4 * channels[0],
            down=down,
            mid=_middle(channels[-1], levels, told),
            up=up,
            groups=positive(told, "norm_num_groups"),
            norm_eps=told["norm_eps"],
            act_fn=one_of(told, "act_fn", ACTIVATIONS),
            center_input_sample=told["center_input_sample"],
            flip_sin_to_cos=told["flip_sin_to_cos"],
            freq_shift=told["freq_shift"],
            downsample_padding=one_of(told, "downsample_padding", (0, 1)),
            conv_in_kernel=positive(told, "conv_in_kernel"),
            conv_out_kernel=positive(told, "conv_out_kernel"),
            use_linear_projection=told["use_linear_projection"],
        )
        _check_features(found)
        return found


def _way_down(
    channels: tuple[int, ...], cross: tuple[bool, ...], levels: dict[str, Any]
) -> tuple[Block, ...]:
    found, before = [], channels[0]
    for i, width in enumerate(channels):
        layers = levels["layers"][i]
        found.append(
            Block(
                f"down_blocks.{i}",
                width,
                (before, *[width] * (layers - 1)),
                _each(levels["depth"][i], layers, f"down_blocks.{i}") if cross[i] else (),
                levels["heads"][i],
                levels["context"][i],
                levels["only_cross"][i],
                resampled=i + 1 < len(channels),
            )
        )
        before = width
    return tuple(found)


def _way_up(
    channels: tuple[int, ...], cross: tuple[bool, ...], levels: dict[str, Any], told: dict[str, Any]
) -> tuple[Block, ...]:
    n = len(channels)
    reverse = "reverse_transformer_layers_per_block"
    depth = levels["depth"][::-1] if told[reverse] is None else depths(told, reverse, n)
    if told[reverse] is None and any(isinstance(d, tuple) for d in depth):
        raise ConfigError(
            "transformer_layers_per_block holds lists, of the way down; give "
            "reverse_transformer_layers_per_block for the way up."
        )
    found, before = [], channels[-1]
    for i in range(n):
        width, skip = channels[n - 1 - i], channels[max(n - 2 - i, 0)]
        layers = levels["layers"][n - 1 - i] + 1
        skips = (*[width] * (layers - 1), skip)
        inputs = (before, *[width] * (layers - 1))
        found.append(
            Block(
                f"up_blocks.{i}",
                width,
                tuple(a + b for a, b in zip(inputs, skips, strict=True)),
                _each(depth[i], layers, f"up_blocks.{i}") if cross[i] else (),
                levels["heads"][n - 1 - i],
                levels["context"][n - 1 - i],
                levels["only_cross"][n - 1 - i],
                resampled=i + 1 < n,
            )
        )
        before = width
    return tuple(found)


def _middle(channels: int, levels: dict[str, Any], told: dict[str, Any]) -> Block | None:
    kind, scale = told["mid_block_type"], told["mid_block_scale_factor"]
    if kind is None:
        return None
    if not _MID[one_of(told, "mid_block_type", tuple(_MID))]:
        return Block("mid_block", channels, (channels,), scale=scale)
    depth = _each(levels["depth"][-1], None, "mid_block")[:1]
    heads, context = levels["heads"][-1], levels["context"][-1]
    return Block("mid_block", channels, (channels, channels), depth, heads, context, scale=scale)


def _check_features(config: UNetConfig) -> None:
    for block in config.blocks:
        for channels in (block.channels, *block.inputs):
            if channels % config.groups:
                raise ConfigError(
                    f"{channels} channels of {block.name} cannot be split into norm_num_groups = "
                    f"{config.groups} groups; check block_out_channels."
                )
        if block.depths and block.heads > block.channels:
            raise ConfigError(
                f"{block.heads} attention heads share {block.channels} channels of {block.name}; "
                "attention_head_dim is the number of heads, check it."
            )


def _each(depth: Any, layers: int | None, name: str) -> tuple[int, ...]:
    """Return the number of transformer blocks behind each layer."""
    found = depth if isinstance(depth, tuple) else (depth,) * (layers or 1)
    if any(type(d) is not int or d < 1 for d in found) or (layers is not None and len(found) < layers):
        raise ConfigError(
            f"{depth!r} transformer layers in {name}: give a positive number, or one for each of its "
            f"{layers} layers."
        )
    return found[:layers]
