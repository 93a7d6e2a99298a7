"""The tensors of a UNet: their names and shapes, from a checkpoint, to one, and random ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from specdef_jax.attacks.adjacent import AdjacentPair
from specdef_jax.errors import StructureError
from specdef_jax.models.unet_config import Block, UNetConfig
from specdef_jax.models.unet_layers import Params
from specdef_jax.parametrization import Deformed, KernelAxes

Shape = tuple[int, ...]
# As PyTorch stores a tensor of each rank -> as it is here: (out, in) -> (in, out), OIHW -> HWIO.
_ORDER: dict[int, Shape] = {2: (1, 0), 4: (2, 3, 1, 0)}
_BACK: dict[int, Shape] = {2: (1, 0), 4: (3, 2, 0, 1)}

# What the axes of a leaf count, for laying it out on a mesh: between the two maps of attention, of GEGLU and
# of a ResNet block each device may hold features of its own ("heads", "mlp"); "embed" is what goes on from
# block to block. Leaves that no rule names are small.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attn[12]\.to_[qkv]\.weight", ("embed", "heads")),
    (r"attn[12]\.to_out\.0\.weight", ("heads", "embed")),
    (r"ff\.net\.0\.proj\.weight", ("embed", "mlp")),
    (r"ff\.net\.0\.proj\.bias", ("mlp",)),
    (r"ff\.net\.2\.weight", ("mlp", "embed")),
    (r"resnets\.\d+\.conv1\.weight", (None, None, "embed", "mlp")),
    (r"resnets\.\d+\.time_emb_proj\.weight", (None, "mlp")),
    (r"resnets\.\d+\.(conv1\.bias|time_emb_proj\.bias|norm2\.weight|norm2\.bias)", ("mlp",)),
    (r"resnets\.\d+\.conv2\.weight", (None, None, "mlp", "embed")),
    (r"(conv_shortcut|samplers\.0\.conv)\.weight", (None, None, None, "embed")),
)


def from_checkpoint(config: UNetConfig, tensors: Mapping[str, Any], dtype: Any = None) -> Params:
    """Return parameters from the tensors of a checkpoint, arrays or Deformed leaves in PyTorch's layout.

    Args:
      config: says which tensors there must be, of which shapes.
      tensors: name -> array or Deformed.
      dtype: to cast plain tensors to; None keeps theirs. Pairs keep the dtype they were stored in.

    Raises:
      StructureError: a tensor is missing, unknown or of another shape.
    """
    wanted = shapes(config)
    for name in wanted:
        if name not in tensors:
            raise StructureError(
                f"the checkpoint lacks '{name}', which its config asks for; check config.json."
            )
    found = {}
    for name, tensor in tensors.items():
        if name not in wanted:
            raise StructureError(
                f"the checkpoint has '{name}', which its config does not ask for; check config.json."
            )
        found[name] = _reordered(tensor, _ORDER, dtype)
        shape = tuple(getattr(found[name], "weight", found[name]).shape)
        if shape != wanted[name]:
            raise StructureError(
                f"'{name}' has shape {shape} after transposition, its config says {wanted[name]}; check "
                "config.json."
            )
    return found


def to_checkpoint(params: Params) -> dict[str, Any]:
    """Return the tensors in PyTorch's layout, as from_checkpoint takes them."""
    return {name: _reordered(leaf, _BACK, None) for name, leaf in params.items()}


def _reordered(leaf: Any, orders: dict[int, Shape], dtype: Any) -> Any:
    rank = leaf.weight.ndim if isinstance(leaf, Deformed) else leaf.ndim
    order = orders.get(rank, tuple(range(rank)))
    if isinstance(leaf, Deformed):
        moved = {
            field: tuple(order.index(i) for i in getattr(leaf.axes, field))
            for field in ("inputs", "outputs", "window", "stack")
        }
        weight = jnp.asarray(np.transpose(leaf.weight, order))
        return replace(leaf, weight=weight, comp=jnp.asarray(leaf.comp), axes=KernelAxes(**moved))
    return jnp.asarray(leaf.transpose(order), dtype)


def init(config: UNetConfig, key: PRNGKeyArray, dtype: Any = jnp.float32) -> Params:
    """Return random parameters: kernels normal over the root of their inputs, scales one, biases zero."""
    found = {}
    for i, (name, shape) in enumerate(shapes(config).items()):
        if len(shape) > 1:
            normal = jax.random.normal(jax.random.fold_in(key, i), shape, dtype)
            found[name] = normal / math.sqrt(math.prod(shape[:-1]))
        else:
            found[name] = jnp.full(shape, 1 if name.endswith("weight") else 0, dtype)
    return found


def shapes(config: UNetConfig) -> dict[str, Shape]:
    """Return the shape of every tensor by name, kernels (in, out) and HWIO."""
    return dict(_shapes(config))


def layout(name: str, rank: int) -> Shape:
    """Return the permutation of axes that turns a stored tensor of this rank into ours, whatever its name."""
    del name
    return _ORDER.get(rank, tuple(range(rank)))


def gauge_pairs(config: UNetConfig) -> tuple[AdjacentPair, ...]:
    """Return the value and output projection of every attention, between which it is linear."""
    found = []
    for block in config.blocks:
        for i, depth in enumerate(block.depths):
            for j in range(depth):
                for name in ("attn1", "attn2"):
                    prefix = f"{block.name}.attentions.{i}.transformer_blocks.{j}.{name}"
                    found.append(
                        AdjacentPair(f"{prefix}.to_v.weight", f"{prefix}.to_out.0.weight", None, block.heads)
                    )
    return tuple(found)


Named = Iterator[tuple[str, Shape]]


def _shapes(config: UNetConfig) -> Named:
    width, time = config.width, config.time_features
    yield from _conv("conv_in", config.in_channels, width, config.conv_in_kernel)
    yield from _linear("time_embedding.linear_1", width, time)
    yield from _linear("time_embedding.linear_2", time, time)
    for block in config.blocks:
        for i, inputs in enumerate(block.inputs):
            yield from _resnet(f"{block.name}.resnets.{i}", inputs, block.channels, time)
        for i, depth in enumerate(block.depths):
            yield from _transformer(
                f"{block.name}.attentions.{i}", block, depth, config.use_linear_projection
            )
        if block.resampled:
            way = "down" if block in config.down else "up"
            yield from _conv(f"{block.name}.{way}samplers.0.conv", block.channels, block.channels, 3)
    yield from _scale("conv_norm_out", width)
    yield from _conv("conv_out", width, config.out_channels, config.conv_out_kernel)


def _resnet(name: str, n: int, m: int, time: int) -> Named:
    yield from _scale(f"{name}.norm1", n)
    yield from _conv(f"{name}.conv1", n, m, 3)
    yield from _linear(f"{name}.time_emb_proj", time, m)
    yield from _scale(f"{name}.norm2", m)
    yield from _conv(f"{name}.conv2", m, m, 3)
    if n != m:
        yield from _conv(f"{name}.conv_shortcut", n, m, 1)


def _transformer(name: str, block: Block, depth: int, linear_projection: bool) -> Named:
    d = block.inner
    yield from _scale(f"{name}.norm", block.channels)
    for projection, n, m in (("proj_in", block.channels, d), ("proj_out", d, block.channels)):
        path = f"{name}.{projection}"
        yield from _linear(path, n, m) if linear_projection else _conv(path, n, m, 1)
    for i in range(depth):
        prefix = f"{name}.transformer_blocks.{i}"
        for attention, cross in (("attn1", block.only_cross), ("attn2", True)):
            n = block.context if cross else d
            yield f"{prefix}.{attention}.to_q.weight", (d, d)
            yield f"{prefix}.{attention}.to_k.weight", (n, d)
            yield f"{prefix}.{attention}.to_v.weight", (n, d)
            yield from _linear(f"{prefix}.{attention}.to_out.0", d, d)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _scale(f"{prefix}.{norm}", d)
        yield from _linear(f"{prefix}.ff.net.0.proj", d, 8 * d)
        yield from _linear(f"{prefix}.ff.net.2", 4 * d, d)


def _conv(name: str, n: int, m: int, window: int) -> Named:
    yield f"{name}.weight", (window, window, n, m)
    yield f"{name}.bias", (m,)


def _linear(name: str, n: int, m: int) -> Named:
    yield f"{name}.weight", (n, m)
    yield f"{name}.bias", (m,)


def _scale(name: str, n: int) -> Named:
    yield f"{name}.weight", (n,)
    yield f"{name}.bias", (n,)
