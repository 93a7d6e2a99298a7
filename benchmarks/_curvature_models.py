"""The three networks of the curvature benchmark, 1 to 5 million parameters, and their data.

Parameters are flat dictionaries name -> array; benchmarks/_torch_peers.py has the same forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Params = dict[str, Array]


@dataclass(frozen=True)
class Model:
    params: Params
    loss: Callable[..., Array]
    args: tuple[Array, ...]
    heads: int = 0


def models() -> dict[str, Model]:
    return {"mlp": _mlp(), "vit": _vit(), "transformer": _language()}


def mlp_loss(params: Params, x: Array, y: Array) -> Array:
    for i in range(3):
        x = x @ params[f"{i}.w"] + params[f"{i}.b"]
        x = jnp.tanh(x) if i < 2 else x
    return _cross_entropy(x, y)


def vit_loss(heads: int, params: Params, x: Array, y: Array) -> Array:
    h = x @ params["embed"] + params["position"]
    h = _blocks(params, h, heads, causal=False)
    return _cross_entropy(h.mean(axis=1) @ params["head"], y)


def language_loss(heads: int, params: Params, x: Array, y: Array) -> Array:
    h = params["embed"][x] + params["position"]
    h = _blocks(params, h, heads, causal=True)
    return _cross_entropy(h @ params["head"], y)


def _cross_entropy(logits: Array, y: Array) -> Array:
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], -1)
    return -jnp.mean(picked)


def _blocks(params: Params, h: Array, heads: int, causal: bool) -> Array:
    depth = sum(name.endswith("qkv") for name in params)
    for i in range(depth):
        h = h + _attention(_norm(h), params[f"{i}.qkv"], params[f"{i}.out"], heads, causal)
        h = h + jax.nn.gelu(_norm(h) @ params[f"{i}.up"]) @ params[f"{i}.down"]
    return _norm(h)


def _attention(h: Array, qkv: Array, out: Array, heads: int, causal: bool) -> Array:
    b, t, d = h.shape
    q, k, v = ((h @ qkv).reshape(b, t, 3, heads, d // heads)[:, :, i] for i in range(3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(d // heads)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(b, t, d) @ out


def _norm(h: Array) -> Array:
    centred = h - h.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) / math.sqrt(shape[0])).astype(np.float32)


def _digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images[:count] / 16).astype(np.float32), labels[:count].astype(np.int32)


def _mlp() -> Model:
    rng, widths = np.random.default_rng(0), (64, 1024, 1024, 10)
    params = {}
    for i in range(3):
        params[f"{i}.w"] = _normal(rng, *widths[i : i + 2])
        params[f"{i}.b"] = np.zeros(widths[i + 1], np.float32)
    return _model(params, mlp_loss, _digits(256))


def _stack(rng: np.random.Generator, depth: int, dim: int) -> dict[str, np.ndarray]:
    params = {}
    for i in range(depth):
        params[f"{i}.qkv"] = _normal(rng, dim, 3 * dim)
        params[f"{i}.out"] = _normal(rng, dim, dim)
        params[f"{i}.up"] = _normal(rng, dim, 4 * dim)
        params[f"{i}.down"] = _normal(rng, 4 * dim, dim)
    return params


def _vit(depth: int = 4, dim: int = 192, heads: int = 4, count: int = 64) -> Model:
    rng = np.random.default_rng(1)
    images, labels = _digits(count)
    patches = images.reshape(count, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(count, 16, 4)
    params = {"embed": _normal(rng, 4, dim), "position": 0.02 * _normal(rng, 16, dim) * 4}
    params |= _stack(rng, depth, dim) | {"head": _normal(rng, dim, 10)}
    return _model(params, partial(vit_loss, heads), (patches, labels), heads)


def _language(depth: int = 4, dim: int = 256, heads: int = 4, count: int = 8, length: int = 64) -> Model:
    import argparse

    rng = np.random.default_rng(2)
    text = (
        np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8)[: count * (length + 1)]
        .reshape(count, -1)
        .astype(np.int32)
    )
    params = {"embed": _normal(rng, 256, dim) * 16, "position": 0.02 * _normal(rng, length, dim) * 8}
    params |= _stack(rng, depth, dim) | {"head": _normal(rng, dim, 256)}
    return _model(params, partial(language_loss, heads), (text[:, :-1], text[:, 1:]), heads)


def _model(
    params: dict[str, np.ndarray], loss: Callable[..., Array], args: tuple[np.ndarray, ...], heads: int = 0
) -> Model:
    on_device = {name: jnp.asarray(value) for name, value in params.items()}
    return Model(on_device, loss, tuple(map(jnp.asarray, args)), heads)
