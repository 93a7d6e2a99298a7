"""A checkpoint directory as a model that runs: config.json and tensors in, parameters and functions out.

Kernels are transposed to (in, out) on the way, MXFP4 experts become plain ones, and inserted pairs Deformed
leaves. Tensors are mapped into memory, so a process that holds a part of a sharded array reads that part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from specdef_jax import models
from specdef_jax.errors import SpecError, StructureError
from specdef_jax.hub.fusing import inserted, stock_config
from specdef_jax.hub.quantized import dequantize, find_quantized, plain_shape
from specdef_jax.hub.safetensors_file import COMP
from specdef_jax.hub.shards import Shards, open_shards
from specdef_jax.models.sharding import beside
from specdef_jax.parametrization import Deformed, KernelAxes

Place = Callable[[str, tuple[int, ...]], Sharding]
_NOT_PARAMETERS = ("rotary_emb.inv_freq",)  # older checkpoints hold what the config says


@dataclass(frozen=True)
class Model:
    """A model of a checkpoint.

    Attributes:
      params: name -> array, or Deformed leaf where a compensation was inserted; kernels are (in, out).
      apply: of a text model apply(params, tokens) -> logits.
      config: what config.json says about the function.
      loss: of a text model loss(params, tokens), the cross-entropy of next tokens.
      generate: of a text model generate(params, tokens, steps, ...); else None.
    """

    params: dict[str, Any]
    apply: Callable[..., Any]
    config: Any
    loss: Callable[..., Any]
    generate: Callable[..., Any] | None


def load(directory: Path | str, dtype: Any = None, *, place: Place | None = None) -> Model:
    """Load a directory of config.json and safetensors files.

    Args:
      directory: stock or deformed.
      dtype: of every parameter; None keeps what is stored, and turns MXFP4 into that of the embeddings.
        A deformed pair is not stored narrower than it was, as that would cost the function its accuracy.
      place: place(name, shape) -> sharding of each parameter (models.sharding.placement); None puts them on
        the default device.

    Raises:
      FileError: the directory is no checkpoint, or is damaged.
      ConfigError: the config asks for an architecture that is not implemented.
      StructureError: a tensor is missing, is not expected, or has another shape than the config says.
      SpecError: dtype is no floating type.

    Example:
      >>> model = load("tests/data/llama_tiny")  # doctest: +SKIP
      >>> model.apply(model.params, jnp.asarray([[1, 2, 3]])).shape  # doctest: +SKIP
      (1, 3, 256)
    """
    _check_dtype(dtype)
    shards = open_shards(directory)
    found = stock_config(shards.config)
    model = models.architecture(found)
    config = model.read_config(found)
    expected = model.shapes(config)
    records, quantized = inserted(shards), find_quantized(shards)
    held = _names(shards, set(records), quantized)
    _check_names(shards, set(expected), held)
    params = {}
    for name, shape in expected.items():
        to = _stored_dtype(shards, name, quantized)
        if dtype is not None:  # a rounding of a pair is amplified by alpha (THEORY.md 1.2)
            to = jnp.promote_types(to, dtype) if name in records else dtype
        stored = _stored(shards, name, to, quantized)
        order = model.layout(name, len(stored.shape))
        if tuple(stored.shape[i] for i in order) != shape:
            raise StructureError(
                f"{shards.path}: '{name}' has shape {stored.shape}, the config asks for {shape}, its axes in "
                f"the order {order}; get the config that belongs to these weights."
            )
        leaf = _put(stored, name, shape, order, to, place)
        params[name] = _paired(shards, name, leaf, order, records[name], to) if name in records else leaf
    generate = None if model.generate is None else functools.partial(model.generate, config)
    return Model(params, functools.partial(model.apply, config), config, model.loss(config), generate)


@dataclass(frozen=True)
class _Stored:
    """A stored tensor: its shape, and part(index), which reads that part, of MXFP4 tensors whole experts."""

    shape: tuple[int, ...]
    part: Callable[[tuple[slice, ...]], np.ndarray]


def _stored(shards: Shards, name: str, dtype: Any, quantized: dict[str, tuple[str, str]]) -> _Stored:
    if name not in quantized:
        return _Stored(shards.info(name).shape, lambda index: shards.view(name)[index])
    blocks, scales = quantized[name]

    @functools.cache  # devices that hold parts of the same experts
    def some(start: int | None, stop: int | None) -> np.ndarray:
        return dequantize(shards, blocks, scales, np.dtype(dtype), slice(start, stop))

    shape = plain_shape(shards, blocks, scales)
    return _Stored(shape, lambda index: some(index[0].start, index[0].stop)[:, *index[1:]])


def _put(
    stored: _Stored,
    name: str,
    shape: tuple[int, ...],
    order: tuple[int, ...],
    dtype: Any,
    place: Place | None,
) -> jax.Array:
    def part(index: Any) -> np.ndarray:
        here = tuple(index[order.index(i)] for i in range(len(order)))
        return np.ascontiguousarray(stored.part(here).transpose(order)).astype(dtype)

    with jax.enable_x64(True):  # so that a float64 leaf stays float64
        if place is None:
            return jnp.asarray(part((slice(None),) * len(shape)))
        return jax.make_array_from_callback(shape, place(name, shape), part)


def _paired(
    shards: Shards, name: str, weight: jax.Array, order: tuple[int, ...], entry: dict[str, Any], dtype: Any
) -> Deformed:
    """Return a stored pair in our layout; a compensation is stored in it already."""

    def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(order.index(i) for i in axes)

    old = entry["axes"]
    axes = KernelAxes(moved(old.inputs), moved(old.outputs), moved(old.window), moved(old.stack))
    with jax.enable_x64(True):
        comp = jnp.asarray(shards.read(name + COMP).astype(dtype))
        pair = Deformed(weight, comp, entry["side"], axes)
        if isinstance(weight.sharding, jax.sharding.NamedSharding):
            comp = jax.device_put(comp, beside(weight.sharding, pair))
    return Deformed(weight, comp, entry["side"], axes)


def _names(shards: Shards, records: set[str], quantized: dict[str, tuple[str, str]]) -> set[str]:
    """Return the names of the parameters of a checkpoint, as a network sees them."""
    parts = {part for pair in quantized.values() for part in pair} | {name + COMP for name in records}
    return {name for name in shards if name not in parts} | set(quantized)


def _check_names(shards: Shards, expected: set[str], held: set[str]) -> None:
    if missing := sorted(expected - held):
        raise StructureError(
            f"{shards.path} lacks {len(missing)} tensors that its config asks for, '{missing[0]}' first; get "
            "the checkpoint again, all of it."
        )
    tied = "lm_head.weight"  # stored beside the embeddings by some tools, and never read
    for name in sorted(held - expected - {tied}):
        if not name.endswith(_NOT_PARAMETERS):
            raise StructureError(
                f"{shards.path}: '{name}' is no parameter of the model that config.json describes; get the "
                "config that belongs to these weights."
            )


def _stored_dtype(shards: Shards, name: str, quantized: dict[str, tuple[str, str]]) -> np.dtype:
    return shards.info("model.embed_tokens.weight" if name in quantized else name).dtype


def _check_dtype(dtype: Any) -> None:
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise SpecError(f"dtype {dtype}: parameters are floating; use bfloat16, float32 or the like.")
