"""The tensors of a checkpoint as a deformation sees them: quantized ones, on request, as plain ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from specdef_jax.hub.naming import Layout, axes_for
from specdef_jax.hub.quantized import dequantize, find_quantized, plain_shape
from specdef_jax.hub.shards import Shards
from specdef_jax.layout import is_experts
from specdef_jax.parametrization import KernelAxes


@dataclass(frozen=True)
class Tensor:
    """One tensor: what it is, and how it is read.

    Attributes:
      name: in the checkpoint.
      dtype: as stored, or as dequantized.
      shape: likewise.
      read: reads it.
      parts: the quantized tensors it stands for, none for a plain one.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    parts: tuple[str, ...] = ()

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype, for those who choose by them."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(np.prod(self.shape, dtype=np.int64))


def tensors_of(shards: Shards, dequantized: np.dtype | None = None) -> dict[str, Tensor]:
    """Return every tensor by name; with `dequantized`, plain ones of that dtype instead of MXFP4.

    Raises:
      FileError: a quantized tensor is damaged.
    """
    found: dict[str, Tensor] = {}
    quantized = find_quantized(shards) if dequantized is not None else {}
    parts = {part for pair in quantized.values() for part in pair}
    for name in shards:
        if name not in parts:
            info = shards.info(name)
            found[name] = Tensor(name, info.dtype, info.shape, lambda n=name: shards.read(n))
    for name, pair in quantized.items():
        assert dequantized is not None
        found[name] = Tensor(
            name,
            dequantized,
            plain_shape(shards, *pair),
            lambda p=pair: dequantize(shards, *p, dequantized),
            parts=pair,
        )
    return found


def kernel_axes(tensors: dict[str, Tensor], layout: Layout = "auto") -> dict[str, KernelAxes]:
    """Return the axes of each kernel by name, as sd.plan takes them.

    Experts are a stack of kernels (layout.is_experts).
    """
    found = axes_for({name: tensor.struct for name, tensor in tensors.items()}, layout)
    for name, tensor in tensors.items():
        if is_experts(name, len(tensor.shape)):
            found[name] = KernelAxes(inputs=(1,), outputs=(2,), stack=(0,))
    return found
