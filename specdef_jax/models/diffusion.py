"""Noise schedules and deterministic samplers for models that predict the noise: DDIM, and Euler's method.

A noisy sample is x = sqrt(a) x0 + sqrt(1 - a) noise with a = alphas_cumprod[timestep]. Both samplers are
linear in the sample and the predicted noise, so a sampler is a table of coefficients and denoising one
compiled loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from specdef_jax.errors import ProblemError

Spacing = Literal["leading", "linspace", "trailing"]
# model(params, sample, timestep, encoder_hidden_states) -> predicted noise
Model = Callable[..., Array]


def alphas_cumprod(
    steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Float[np.ndarray, " steps"]:
    """Return the share of signal at each timestep, for betas linear in their square roots ("scaled_linear").

    The defaults are those of Stable Diffusion 1.x. float64.
    """
    betas = np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
    return np.cumprod(1 - betas)


def add_noise(
    alphas: Float[Array | np.ndarray, " steps"],
    latents: Float[Array, "batch *shape"],
    noise: Float[Array, "batch *shape"],
    timestep: Int[Array, "..."] | int,
) -> Float[Array, "batch *shape"]:
    """Return sqrt(a) latents + sqrt(1 - a) noise; timestep is one for all, or (batch,)."""
    wide = jnp.promote_types(latents.dtype, jnp.float32)
    a = jnp.asarray(alphas, wide)[timestep]
    a = a.reshape(a.shape + (1,) * (latents.ndim - 1)) if a.ndim else a
    return (jnp.sqrt(a) * latents + jnp.sqrt(1 - a) * noise).astype(latents.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampler:
    """A deterministic sampler: x <- keep x + push model(scale x, timestep), step by step.

    Attributes:
      timesteps: what the model is told, decreasing.
      scale: of the sample before the model sees it.
      keep: of the sample.
      push: of the predicted noise.
      start: standard deviation of the pure noise to begin with.
    """

    timesteps: Float[Array, " n"]
    scale: Float[Array, " n"]
    keep: Float[Array, " n"]
    push: Float[Array, " n"]
    start: Float[Array, ""]


def ddim(
    n: int,
    alphas: Float[np.ndarray, " steps"] | None = None,
    *,
    spacing: Spacing = "leading",
    offset: int = 1,
    to_one: bool = False,
) -> Sampler:
    """Return DDIM with eta = 0.

    Args:
      n: number of steps.
      alphas: alphas_cumprod of the model's training; None for Stable Diffusion 1.x.
      spacing: of the timesteps, as diffusers calls it.
      offset: added to every timestep with spacing "leading" (steps_offset).
      to_one: the last step ends at a = 1 (set_alpha_to_one), not at a = alphas[0].

    Raises:
      ProblemError: more steps than the model was trained on, or an offset beyond them.

    Source: Song, Meng, Ermon, Denoising diffusion implicit models, 2020, equation 12.
    """
    alphas = alphas_cumprod() if alphas is None else alphas
    timesteps = _timesteps(n, len(alphas), spacing, offset).round().astype(int)
    before = timesteps - len(alphas) // n
    a = alphas[timesteps]
    next_a = np.where(before >= 0, alphas[np.maximum(before, 0)], 1.0 if to_one else alphas[0])
    keep = np.sqrt(next_a / a)
    push = np.sqrt(1 - next_a) - keep * np.sqrt(1 - a)
    return _sampler(timesteps, np.ones(n), keep, push, 1.0)


def euler(
    n: int,
    alphas: Float[np.ndarray, " steps"] | None = None,
    *,
    spacing: Spacing = "linspace",
    offset: int = 1,
) -> Sampler:
    """Return Euler's method in sigma = sqrt((1 - a) / a), the noise over the signal (EulerDiscreteScheduler).

    Its samples are x / sqrt(a), and begin with the standard deviation `start`. Arguments and errors are those
    of `ddim`; timesteps between two of the training's are interpolated.

    Source: Karras, Aittala, Aila, Laine, Elucidating the design space of diffusion models, 2022, algorithm 1.
    """
    alphas = alphas_cumprod() if alphas is None else alphas
    timesteps = _timesteps(n, len(alphas), spacing, offset)
    sigmas = np.interp(timesteps, np.arange(len(alphas)), np.sqrt((1 - alphas) / alphas))
    scale = 1 / np.sqrt(sigmas**2 + 1)
    start = sigmas.max() if spacing != "leading" else 1 / scale[0]
    return _sampler(timesteps, scale, np.ones(n), np.append(sigmas[1:], 0.0) - sigmas, start)


def denoise(
    model: Model,
    params: PyTree,
    noise: Float[Array, "batch *shape"],
    encoder_hidden_states: Float[Array, "batch tokens e"],
    sampler: Sampler,
    *,
    guidance: Float[Array, ""] | float | None = None,
    unconditional: Float[Array, "batch tokens e"] | None = None,
) -> Float[Array, "batch *shape"]:
    """Return what the sampler makes of standard normal noise, in one compiled loop.

    Args:
      model: static (models.unet.bound(config)).
      params: of the model.
      noise: standard normal; multiplied by sampler.start. Between the steps samples are kept in its dtype,
        or in float32 if that is wider.
      encoder_hidden_states: of the prompt.
      sampler: ddim(n) or euler(n).
      guidance: of classifier-free guidance: the prediction is moved this many times from the unconditional
        one to that of the prompt. None for the latter alone.
      unconditional: states of the empty prompt; needed with guidance.

    Raises:
      ProblemError: guidance without unconditional states, or these without guidance.

    Source: Ho, Salimans, Classifier-free diffusion guidance, 2022.
    """
    if (guidance is None) != (unconditional is None):
        raise ProblemError(
            f"guidance is {guidance!r} and unconditional states are "
            f"{'absent' if unconditional is None else 'given'}; give both, or neither."
        )
    return _denoise(model, params, noise, encoder_hidden_states, sampler, guidance, unconditional)


def _denoise_loop(
    model: Model,
    params: PyTree,
    noise: Array,
    states: Array,
    sampler: Sampler,
    guidance: Any,
    unconditional: Array | None,
) -> Array:
    dtype = jnp.promote_types(noise.dtype, jnp.float32)
    table = jax.tree.map(lambda x: x.astype(dtype), sampler)
    if unconditional is not None:
        states = jnp.concatenate([unconditional, states])

    def step(i: Array, x: Array) -> Array:
        seen = (table.scale[i] * x).astype(noise.dtype)
        if unconditional is None:
            predicted = model(params, seen, sampler.timesteps[i], states).astype(dtype)
        else:
            both = model(params, jnp.concatenate([seen, seen]), sampler.timesteps[i], states).astype(dtype)
            plain, told = jnp.split(both, 2)
            predicted = plain + guidance * (told - plain)
        return (table.keep[i] * x + table.push[i] * predicted).astype(dtype)

    found = lax.fori_loop(0, len(sampler.timesteps), step, table.start * noise.astype(dtype))
    return found.astype(noise.dtype)


_denoise = jax.jit(_denoise_loop, static_argnums=0)


def _sampler(
    timesteps: np.ndarray, scale: np.ndarray, keep: np.ndarray, push: np.ndarray, start: float
) -> Sampler:
    return Sampler(*(jnp.asarray(x, jnp.result_type(float)) for x in (timesteps, scale, keep, push, start)))


def _timesteps(n: int, steps: int, spacing: Spacing, offset: int) -> np.ndarray:
    """Return n decreasing timesteps, as diffusers spaces them."""
    if not 1 <= n <= steps:
        raise ProblemError(f"{n} steps of a model that was trained on {steps}: give 1 to {steps}.")
    if spacing not in get_args(Spacing):
        raise ProblemError(f"spacing {spacing!r}: must be one of {', '.join(get_args(Spacing))}.")
    if spacing == "linspace":
        return np.linspace(0, steps - 1, n)[::-1]
    if spacing == "trailing":
        return np.round(steps - np.arange(n) * (steps / n)) - 1
    found = np.arange(n)[::-1] * (steps // n) + offset
    if found[0] >= steps or offset < 0:
        raise ProblemError(
            f"offset {offset} takes timestep {found[0]} beyond the {steps} of training; take a smaller one."
        )
    return found.astype(float)
