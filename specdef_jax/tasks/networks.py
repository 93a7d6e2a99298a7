"""Small architectures, each a pair of pure functions: init(key) -> params and apply(params, x) -> logits.

Kernels are (in, out), or HWIO for convolutions, and multiply from the right: h @ w + b.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from specdef_jax.convolution import by_windows
from specdef_jax.errors import SpecError
from specdef_jax.models import attention

if TYPE_CHECKING:
    Params = dict[str, dict[str, Array]]
else:
    Params = dict

Activation = Literal["tanh", "relu", "gelu"]
_ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "gelu": jax.nn.gelu}


@dataclass(frozen=True)
class Network:
    """An architecture.

    Attributes:
      name: as tables call it.
      init: init(key) -> params, LeCun-normal kernels and zero biases, {layer: {"w": ..., "b": ...}}.
      apply: apply(params, x) -> logits (batch, classes).
      kernels: names of the kernels that multiply activations, in the order of the forward pass.
    """

    name: str
    init: Callable[[PRNGKeyArray], Params]
    apply: Callable[[Params, Array], Array]
    kernels: tuple[str, ...]


@functools.cache  # one function object per architecture, so that jit compiles it once
def mlp(widths: tuple[int, ...] = (64, 32, 32, 10), activation: Activation = "tanh") -> Network:
    """Return a multilayer perceptron with layers "layer_0", "layer_1", ...

    Args:
      widths: from inputs to logits, at least two.
      activation: between the layers.

    Raises:
      SpecError: fewer than two widths, or an unknown activation.
    """
    if len(widths) < 2:
        raise SpecError(f"widths = {widths}: give at least inputs and logits.")
    sigma = _activation(activation)
    depth = len(widths) - 1

    def init(key: PRNGKeyArray) -> Params:
        keys = jax.random.split(key, depth)
        shapes = zip(keys, widths[:-1], widths[1:], strict=True)
        return {f"layer_{i}": _dense(k, n, m) for i, (k, n, m) in enumerate(shapes)}

    def apply(params: Params, x: Float[Array, "*batch features"]) -> Float[Array, "*batch classes"]:
        for i in range(depth):
            x = _linear(params[f"layer_{i}"], x)
            x = sigma(x) if i + 1 < depth else x
        return x

    return Network(f"MLP ({activation})", init, apply, tuple(f"layer_{i}/w" for i in range(depth)))


@functools.cache
def cnn(
    image: tuple[int, int, int] = (8, 8, 1),
    channels: tuple[int, ...] = (8, 16),
    classes: int = 10,
    window: int = 3,
    activation: Activation = "tanh",
) -> Network:
    """Return convolutions "conv_0", "conv_1", ..., and a dense "head" that reads every position.

    Args:
      image: height, width and channels; a flat input is reshaped to it.
      channels: of each convolution; each after the first has stride 2.
      classes: number of logits.
      window: size of the square kernels.
      activation: after each convolution.

    Raises:
      SpecError: an unknown activation.
    """
    sigma = _activation(activation)

    def init(key: PRNGKeyArray) -> Params:
        *keys, head_key = jax.random.split(key, len(channels) + 1)
        params = {}
        for i, (k, n, m) in enumerate(zip(keys, (image[2], *channels[:-1]), channels, strict=True)):
            kernel = jax.random.normal(k, (window, window, n, m)) / math.sqrt(window * window * n)
            params[f"conv_{i}"] = {"w": kernel, "b": jnp.zeros(m)}
        positions = math.prod(-(-n // 2 ** (len(channels) - 1)) for n in image[:2])
        return {**params, "head": _dense(head_key, positions * channels[-1], classes)}

    def apply(params: Params, x: Array) -> Float[Array, "batch classes"]:
        x = x.reshape(-1, *image)
        for i in range(len(channels)):
            layer = params[f"conv_{i}"]
            x = sigma(_convolve(x, layer["w"], 1 if i == 0 else 2) + layer["b"])
        return _linear(params["head"], x.reshape(len(x), -1))

    kernels = tuple(f"conv_{i}/w" for i in range(len(channels)))
    return Network(f"CNN ({activation})", init, apply, (*kernels, "head/w"))


@functools.cache
def transformer(
    tokens: int = 8,
    features: int = 8,
    dim: int = 16,
    heads: int = 2,
    hidden: int = 32,
    blocks: int = 1,
    classes: int = 10,
) -> Network:
    """Return a pre-norm transformer encoder: "patch", then per block q, k, v, o, up and down, then "head".

    Args:
      tokens: positions; a flat input is reshaped to (tokens, features).
      features: of each token.
      dim: width, a multiple of `heads`.
      heads: attention heads.
      hidden: width of the GELU feed-forward layer.
      blocks: depth.
      classes: number of logits, read from the mean over positions.

    Raises:
      SpecError: dim is not a multiple of heads.
    """
    if dim % heads:
        raise SpecError(f"dim = {dim}: must be a multiple of heads = {heads}.")
    shapes = dict.fromkeys("qkvo", (dim, dim)) | {"up": (dim, hidden), "down": (hidden, dim)}
    layers = [(f"block_{i}_{name}", shape) for i in range(blocks) for name, shape in shapes.items()]
    layers = [("patch", (features, dim)), *layers, ("head", (dim, classes))]

    def init(key: PRNGKeyArray) -> Params:
        position_key, *keys = jax.random.split(key, len(layers) + 1)
        params = {name: _dense(k, n, m) for k, (name, (n, m)) in zip(keys, layers, strict=True)}
        params["position_embed"] = {"b": jax.random.normal(position_key, (tokens, dim)) / math.sqrt(dim)}
        return params

    def attended(params: Params, block: str, h: Array) -> Array:
        def split(name: str) -> Array:
            out = _linear(params[f"{block}_{name}"], h)
            return out.reshape(*out.shape[:-1], heads, dim // heads)

        return _linear(params[f"{block}_o"], attention.attend(split("q"), split("k"), split("v")))

    def apply(params: Params, x: Array) -> Float[Array, "batch classes"]:
        h = _linear(params["patch"], x.reshape(-1, tokens, features)) + params["position_embed"]["b"]
        for i in range(blocks):
            block = f"block_{i}"
            h = h + attended(params, block, _normalize(h))
            h = h + _linear(
                params[f"{block}_down"], jax.nn.gelu(_linear(params[f"{block}_up"], _normalize(h)))
            )
        return _linear(params["head"], _normalize(h).mean(1))

    return Network("transformer", init, apply, tuple(f"{name}/w" for name, _ in layers))


def _activation(name: str) -> Callable[[Array], Array]:
    if name not in _ACTIVATIONS:
        raise SpecError(f"activation {name!r}: must be one of {', '.join(get_args(Activation))}.")
    return _ACTIVATIONS[name]


def _dense(key: PRNGKeyArray, n: int, m: int) -> dict[str, Array]:
    return {"w": jax.random.normal(key, (n, m)) / math.sqrt(n), "b": jnp.zeros(m)}


def _linear(layer: dict[str, Array], h: Array) -> Array:
    return h @ layer["w"] + layer["b"]


def _convolve(
    x: Float[Array, "batch height width c"], kernel: Float[Array, "v v c f"], stride: int
) -> Float[Array, "batch _ _ f"]:
    """Convolve as jax.lax does with padding "SAME"."""
    v, out = kernel.shape[0], [-(-n // stride) for n in x.shape[1:3]]
    height, width = (max((m - 1) * stride + v - n, 0) for m, n in zip(out, x.shape[1:3], strict=True))
    padding = (height // 2, height - height // 2), (width // 2, width - width // 2)
    return by_windows(x, kernel, stride, padding)


def _normalize(h: Float[Array, "*batch d"], eps: float = 1e-5) -> Float[Array, "*batch d"]:
    centred = h - h.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + eps)
