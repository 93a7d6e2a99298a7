"""MXFP4 tensors of GPT-OSS checkpoints, and how they are turned into plain ones.

NAME_blocks (experts, out, in / 32, 16) holds two 4-bit numbers per byte, the low one first; NAME_scales
(experts, out, in / 32) a power of two for each 32 of them. The plain tensor is NAME (experts, in, out).
Source: the OCP Microscaling Formats specification 1.0.
"""

from __future__ import annotations

import numpy as np

from specdef_jax.errors import FileError, LeafError
from specdef_jax.hub.shards import Shards

_BLOCKS, _SCALES = "_blocks", "_scales"
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_HALF, *(-x for x in _HALF)], np.float32)
_BIAS, _NAN = 127, 255


def find_quantized(shards: Shards) -> dict[str, tuple[str, str]]:
    """Return plain name -> (blocks, scales) for every MXFP4 tensor of a checkpoint."""
    found = {}
    for name in shards:
        plain = name.removesuffix(_BLOCKS)
        if plain != name and plain + _SCALES in shards:
            found[plain] = (name, plain + _SCALES)
    return found


def plain_shape(shards: Shards, blocks: str, scales: str) -> tuple[int, int, int]:
    """Return (experts, in, out) of the plain tensor.

    Raises:
      FileError: dtypes or shapes are not those of MXFP4.
    """
    b, s = shards.info(blocks), shards.info(scales)
    if b.dtype != np.uint8 or s.dtype != np.uint8 or len(b.shape) != 4 or b.shape[3] != 16:
        raise FileError(
            f"'{blocks}' {b.dtype}{b.shape} is no MXFP4 tensor (experts, out, in / 32, 16) of uint8."
        )
    if s.shape != b.shape[:3]:
        raise FileError(f"'{scales}' has shape {s.shape}, its blocks {b.shape}; get the checkpoint again.")
    return b.shape[0], b.shape[2] * 32, b.shape[1]


def dequantize(
    shards: Shards, blocks: str, scales: str, dtype: np.dtype, experts: slice = slice(None)
) -> np.ndarray:
    """Return the plain tensor (experts, in, out), every value exact, or some experts of it.

    Raises:
      LeafError: `dtype` cannot hold a value exactly.
    """
    packed, powers = shards.view(blocks)[experts], shards.view(scales)[experts]
    plain = np.empty((len(packed), *plain_shape(shards, blocks, scales)[1:]), dtype)
    for expert, (bytes_, exponents) in enumerate(zip(packed, powers, strict=True)):
        codes = np.stack([bytes_ & 15, bytes_ >> 4], axis=-1).reshape(*exponents.shape, 32)
        with np.errstate(over="ignore"):
            values = np.ldexp(_VALUES[codes], exponents[..., None].astype(np.int32) - _BIAS)
            stored = values.astype(dtype)
        if (
            (exponents == _NAN).any()
            or not np.array_equal(stored.astype(np.float32), values)
            or not np.isfinite(values).all()
        ):
            raise LeafError(
                f"'{blocks}' holds values that {np.dtype(dtype).name} cannot; dequantize to float32."
            )
        plain[expert] = stored.reshape(len(exponents), -1).T
    return plain
