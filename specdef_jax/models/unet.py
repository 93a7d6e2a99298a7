"""The UNet of Stable Diffusion (UNet2DConditionModel of diffusers), as a pure function of its tensors.

    import json, pathlib, jax, safetensors.numpy, specdef_jax as sd
    from specdef_jax.models import diffusion, unet

    path = pathlib.Path("tests/data/sd_unet_tiny")  # or the folder unet/ of a Stable Diffusion 1.x
    config = unet.Config.from_json(json.loads((path / "config.json").read_text()))
    tensors = safetensors.numpy.load_file(path / "diffusion_pytorch_model.safetensors")
    params, model, key = unet.from_checkpoint(config, tensors), unet.bound(config), jax.random.key(0)
    latents, states = jax.random.normal(key, (1, 4, 8, 8)), jax.random.normal(key, (1, 5, 24))
    deformed = sd.deform(params, sd.SpecDef(alpha=64.0), where="*attn2.to_v.weight", key=key)  # same function
    outputs = [jax.jit(model)(p, latents, 7, states) for p in (params, deformed)]
    print(abs(outputs[0] - outputs[1]).max())
    gradient = jax.jit(jax.grad(unet.loss(config)))(deformed, latents, latents[..., ::-1], 7, states)
    image = diffusion.denoise(model, deformed, latents, states, diffusion.ddim(4))

Samples go in and come out as diffusers has them, (batch, channels, height, width); inside, channels are last.
Layers differ in shape from level to level, so they are not scanned over.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from specdef_jax.errors import ProblemError
from specdef_jax.models.diffusion import add_noise, alphas_cumprod
from specdef_jax.models.linear import linear
from specdef_jax.models.unet_attention import transformer
from specdef_jax.models.unet_config import Block, UNetConfig
from specdef_jax.models.unet_layers import (
    Params,
    activate,
    convolve,
    downsample,
    group_norm,
    part,
    resnet,
    upsample,
)
from specdef_jax.models.unet_params import (
    RULES,
    from_checkpoint,
    gauge_pairs,
    init,
    layout,
    shapes,
    to_checkpoint,
)

__all__ = [
    "RULES",
    "Config",
    "apply",
    "bound",
    "from_checkpoint",
    "gauge_pairs",
    "init",
    "layout",
    "loss",
    "shapes",
    "to_checkpoint",
]

Config = UNetConfig


def apply(
    config: UNetConfig,
    params: Params,
    sample: Float[Array, "batch c height width"],
    timestep: Num[Array, "..."] | float,
    encoder_hidden_states: Float[Array, "batch tokens e"] | None = None,
    *,
    remat: bool = False,
) -> Float[Array, "batch m height width"]:
    """Return the prediction for a noisy sample, in the dtype of the parameters.

    Args:
      config: static.
      params: {name in the checkpoint: leaf}, kernels (in, out) and HWIO (from_checkpoint); leaves may be
        Deformed or other structured weights.
      sample: any height and width.
      timestep: one for all, or (batch,).
      encoder_hidden_states: of the text; may be absent where no block reads it.
      remat: keep of each ResNet block and transformer its input only, and compute it again in the backward
        pass.

    Raises:
      ProblemError: the sample or the encoder's states do not fit the config.

    Source: diffusers 0.42.1, models/unets/unet_2d_condition.py.
    """
    _check(config, sample, timestep, encoder_hidden_states)
    first = params["conv_in.weight"]
    dtype = getattr(first, "weight", first).dtype
    time = _embed_time(config, params, timestep, sample.shape[0], dtype)
    x = jnp.moveaxis(sample.astype(dtype), 1, -1)
    context = x[:, 0, :1, :0] if encoder_hidden_states is None else encoder_hidden_states.astype(dtype)
    run = functools.partial(_layer, config, time, context, remat)

    if config.center_input_sample:
        x = 2 * x - 1
    x = convolve(x, first, params["conv_in.bias"], padding=_around(config.conv_in_kernel))
    skips = [x]
    for block in config.down:
        own = part(params, block.name)
        for i in range(len(block.inputs)):
            x = run(own, block, i, x)
            skips.append(x)
        if block.resampled:
            x = downsample(part(own, "downsamplers.0"), x, config.downsample_padding)
            skips.append(x)
    if config.mid:
        own = part(params, config.mid.name)
        for i in range(len(config.mid.inputs)):
            x = run(own, config.mid, i, x)
    for block in config.up:
        own = part(params, block.name)
        for i in range(len(block.inputs)):
            x = run(own, block, i, jnp.concatenate([x, skips.pop()], axis=-1))
        if block.resampled:
            x = upsample(part(own, "upsamplers.0"), x, skips[-1].shape[1:3])
    norm = params["conv_norm_out.weight"], params["conv_norm_out.bias"]
    x = activate(config.act_fn, group_norm(x, *norm, groups=config.groups, eps=config.norm_eps))
    x = convolve(
        x, params["conv_out.weight"], params["conv_out.bias"], padding=_around(config.conv_out_kernel)
    )
    return jnp.moveaxis(x, -1, 1)


@functools.cache  # one function object per config, so that jit compiles it once
def bound(config: UNetConfig, *, remat: bool = False) -> Callable[..., Array]:
    """Return apply(params, sample, timestep, encoder_hidden_states) of one config."""
    return functools.partial(apply, config, remat=remat)


def loss(
    config: UNetConfig, alphas: Float[np.ndarray, " steps"] | None = None, *, remat: bool = False
) -> Callable[..., Array]:
    """Return the mean squared error of the predicted noise.

    It is a function of (params, latents, noise, timestep, encoder_hidden_states), with latents without noise.

    Args:
      config: of the UNet.
      alphas: alphas_cumprod of the schedule; None for that of Stable Diffusion 1.x.
      remat: as `apply` takes it.

    Source: Ho, Jain, Abbeel, Denoising diffusion probabilistic models, 2020, equation 14.
    """
    table = alphas_cumprod() if alphas is None else alphas

    def of(
        params: Params,
        latents: Float[Array, "batch c height width"],
        noise: Float[Array, "batch c height width"],
        timestep: Int[Array, "..."] | int,
        encoder_hidden_states: Float[Array, "batch tokens e"] | None = None,
    ) -> Float[Array, ""]:
        noisy = add_noise(table, latents, noise, timestep)
        predicted = apply(config, params, noisy, timestep, encoder_hidden_states, remat=remat)
        wide = jnp.promote_types(predicted.dtype, jnp.float32)
        return jnp.mean((predicted.astype(wide) - noise.astype(wide)) ** 2)

    return of


def _layer(
    config: UNetConfig,
    time: Array,
    context: Array,
    remat: bool,
    params: Params,
    block: Block,
    i: int,
    x: Array,
) -> Array:
    """One ResNet block, and the transformer behind it if there is one."""
    keep = jax.checkpoint if remat else _as_it_is
    run_resnet = functools.partial(
        resnet, groups=config.groups, eps=config.norm_eps, act_fn=config.act_fn, scale=block.scale
    )
    x = keep(run_resnet)(part(params, f"resnets.{i}"), x, time)
    if i < len(block.depths):
        run_transformer = functools.partial(
            transformer, block=block, depth=block.depths[i], groups=config.groups
        )
        x = keep(run_transformer)(part(params, f"attentions.{i}"), x, context)
    return x


def _as_it_is(function: Callable[..., Array]) -> Callable[..., Array]:
    return function


def _around(kernel: int) -> tuple[tuple[int, int], tuple[int, int]]:
    side = (kernel - 1) // 2
    return ((side, side), (side, side))


def _embed_time(config: UNetConfig, params: Params, timestep: Any, batch: int, dtype: Any) -> Array:
    """Embed a timestep: sines and cosines of float32 frequencies, as in diffusers, and two linear maps."""
    half = config.width // 2
    exponent = (
        np.float32(-math.log(10000))
        * np.arange(half, dtype=np.float32)
        / np.float32(half - config.freq_shift)
    )
    wide = jnp.promote_types(dtype, jnp.float32)
    angles = jnp.broadcast_to(jnp.asarray(timestep, wide), (batch,))[:, None] * jnp.asarray(
        np.exp(exponent), wide
    )
    waves = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(waves[::-1] if config.flip_sin_to_cos else waves, axis=-1)
    embedding = jnp.pad(embedding, ((0, 0), (0, config.width % 2))).astype(dtype)
    own = part(params, "time_embedding")
    hidden = activate(config.act_fn, linear(embedding, own["linear_1.weight"], own["linear_1.bias"]))
    return linear(hidden, own["linear_2.weight"], own["linear_2.bias"])


def _check(config: UNetConfig, sample: Array, timestep: Any, states: Array | None) -> None:
    batch = sample.shape[0]
    if sample.shape[1] != config.in_channels:
        raise ProblemError(
            f"the sample has shape {sample.shape}, the config {config.in_channels} channels; give (batch, "
            "channels, height, width)."
        )
    if jnp.shape(timestep) not in ((), (1,), (batch,)):
        raise ProblemError(
            f"the timestep has shape {jnp.shape(timestep)}; give a scalar or one for each of {batch}."
        )
    wanted = sorted({block.context for block in config.blocks if block.depths})
    if not wanted:
        return
    if states is None or states.shape[0] != batch or [states.shape[-1]] != wanted:
        found = "absent" if states is None else f"of shape {states.shape}"
        raise ProblemError(
            f"encoder_hidden_states are {found}; the blocks read (batch {batch}, tokens, {wanted[0]})"
            + (f", and others {wanted[1:]} features: no states fit them all." if wanted[1:] else ".")
        )
