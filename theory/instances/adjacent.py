"""Small networks in which two linear maps stand next to each other, with something between or not.

Each holds a "first" and a "second" layer whose kernels sd.deform_pair takes: the first writes the features
that the second reads, one block of features per group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

Between = Literal["nothing", "norm", "quantization"]
Activation = Literal["relu", "leaky relu", "gelu"]
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "leaky relu": jax.nn.leaky_relu,
    "gelu": jax.nn.gelu,
}


@dataclass(frozen=True)
class Adjacent:
    """Two adjacent linear maps in a network.

    Attributes:
      name: as tables call it.
      apply: apply(params, x) -> outputs.
      params: {"first": {"w", maybe "b"}, "second": {"w", ...}, ...}.
      x: inputs.
      groups: blocks of features with directions of their own (key-value heads).
    """

    name: str
    apply: Callable[[PyTree, Array], Array]
    params: PyTree
    x: Array
    groups: int = 1

    @property
    def features(self) -> int:
        """Features of one group."""
        return self.params["first"]["w"].shape[1] // self.groups


def grouped_attention(key: PRNGKeyArray, between: Between = "nothing") -> Adjacent:
    """Attention with two query heads per key-value head, biases, a sink and a sliding window.

    Value projection and output projection are adjacent, unless a norm per head or a quantization of the
    mixed values stands between.
    """
    tokens, width, groups, heads, d = 4, 5, 2, 4, 3
    shapes = {"q": (width, heads * d), "k": (width, groups * d), "first": (width, groups * d)}
    params = _dense(key, {**shapes, "second": (heads * d, width)})
    x = jax.random.normal(jax.random.fold_in(key, 1), (3, tokens, width))
    return Adjacent(f"grouped attention, {between} between", _attention(between), params, x, groups)


@functools.cache
def _attention(between: Between) -> Callable[[PyTree, Array], Array]:
    def apply(params: PyTree, x: Float[Array, "batch t width"]) -> Float[Array, "batch t width"]:
        batch, t, _ = x.shape
        q = _linear(params["q"], x).reshape(batch, t, 2, 2, 3)  # groups, query heads of each, features
        k, v = (_linear(params[name], x).reshape(batch, t, 2, 3) for name in ("k", "first"))
        scores = jnp.einsum("btgid,bsgd->bgits", q, k)
        age = jnp.arange(t)[:, None] - jnp.arange(t)
        scores = jnp.where((age >= 0) & (age < 3), scores, -jnp.inf)
        sink = jnp.zeros((*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sink], -1))[..., :-1]
        mixed = _BETWEEN[between](jnp.einsum("bgits,bsgd->btgid", weights, v))
        return _linear(params["second"], mixed.reshape(batch, t, -1))

    return apply


def perceptron(key: PRNGKeyArray, activation: Activation = "relu") -> Adjacent:
    """Two layers with an activation between, positively homogeneous or not."""
    params = _dense(key, {"first": (4, 6), "second": (6, 4)})
    x = jax.random.normal(jax.random.fold_in(key, 1), (20, 4))
    return Adjacent(f"two layers, {activation} between", _perceptron(activation), params, x)


@functools.cache
def _perceptron(activation: Activation) -> Callable[[PyTree, Array], Array]:
    def apply(params: PyTree, x: Array) -> Array:
        return _linear(params["second"], _ACTIVATIONS[activation](_linear(params["first"], x)))

    return apply


def gated(key: PRNGKeyArray, clamp: float = jnp.inf) -> Adjacent:
    """Return a gated linear unit, its "up" and "down" maps first and second, "up" clamped or not."""
    params = _dense(key, {"gate": (4, 6), "first": (4, 6), "second": (6, 4)})
    x = jax.random.normal(jax.random.fold_in(key, 1), (20, 4))
    name = "GLU up and down" + (f", up clamped at {clamp:g}" if clamp < jnp.inf else "")
    return Adjacent(name, _gated(clamp), params, x)


@functools.cache
def _gated(clamp: float) -> Callable[[PyTree, Array], Array]:
    def apply(params: PyTree, x: Array) -> Array:
        up = jnp.clip(_linear(params["first"], x), -clamp, clamp)
        return _linear(params["second"], jax.nn.silu(_linear(params["gate"], x)) * up)

    return apply


def norm_gain(key: PRNGKeyArray) -> Adjacent:
    """An RMSNorm gain (the first map, one row) and its two readers (the second, side by side)."""
    params = _dense(key, {"first": (1, 6), "second": (6, 4)})
    x = jax.random.normal(jax.random.fold_in(key, 1), (20, 6))
    return Adjacent("RMSNorm gain and its readers", _gain, params, x)


def _gain(params: PyTree, x: Array) -> Array:
    # The bias of "first" is that of a LayerNorm, which stands behind the gain.
    h = (
        x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * params["first"]["w"][0]
        + params["first"]["b"]
    )
    readers = _linear(params["second"], h)
    return jnp.tanh(readers[..., :2]) + readers[..., 2:]


def _rms(h: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    return h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-5)


def _quantize(h: Array) -> Array:
    """Round to multiples of 1/8, as an activation quantized with a static scale."""
    return jnp.round(8 * h) / 8


def _nothing(h: Array) -> Array:
    return h


_BETWEEN: dict[str, Callable[[Array], Array]] = {"nothing": _nothing, "norm": _rms, "quantization": _quantize}


def _dense(key: PRNGKeyArray, shapes: dict[str, tuple[int, int]]) -> dict[str, dict[str, Array]]:
    """Draw kernels of variance 1/n, and biases, from one pool: a draw for each shape is compiled anew."""
    pool = np.asarray(jax.random.normal(key, (512,)))
    layers = {}
    for name, (n, m) in shapes.items():
        (w, b), pool = np.split(pool[: (n + 1) * m], [n * m]), pool[(n + 1) * m :]
        layers[name] = {"w": jnp.asarray(w.reshape(n, m) / n**0.5), "b": jnp.asarray(0.3 * b)}
    return layers


def _linear(layer: dict[str, Array], h: Array) -> Array:
    return h @ layer["w"] + layer["b"]
