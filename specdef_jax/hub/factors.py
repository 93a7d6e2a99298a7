"""The two stored factors of a deformed tensor, built and multiplied out by parts.

No whole copy in float64 is ever made.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from specdef_jax.pair import Basis, compensation, deformed_weight, frame_of
from specdef_jax.parametrization import KernelAxes, Side
from specdef_jax.spec import Layer

_PART = 1 << 23  # entries in float64 at a time


def build_stored(array: np.ndarray, layer: Layer, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return (weight, comp) of a kernel, computed in float64 and rounded once.

    Args:
      array: the kernel as stored.
      layer: how it is deformed.
      dtype: of both factors.
    """
    side, axes, k = layer.side, layer.axes, layer.U.shape[-1]
    stack = layer.U.shape[:-2]
    weight = np.empty(array.shape, dtype)
    source, target = (axes.to_stack(x, side) for x in (array, weight))
    in_place = np.shares_memory(target, weight)
    comps = []
    for i, U in enumerate(layer.U.reshape(-1, *layer.U.shape[-2:])):
        frame = _frame(U, layer.basis)
        _deform(source[i], target[i], frame, k, layer.alpha, layer.basis)
        comps.append(np.asarray(_comp(frame, k, layer.alpha, layer.basis, side)).astype(dtype))
    if not in_place:
        unstacked = target.reshape(*stack, *target.shape[-2:])
        weight = np.ascontiguousarray(axes.from_matrix(unstacked, array.shape, side))
    return weight, np.stack(comps).reshape(*stack, *comps[0].shape)


def _deform(matrix: np.ndarray, out: np.ndarray, frame: Array, k: int, alpha: Array, basis: Basis) -> None:
    """Write M T(a) into `out`; a view in column order is computed as T(a) M^T, which transposes nothing."""
    side: Side = "output"
    if matrix.strides[0] < matrix.strides[1]:
        matrix, out, side = matrix.T, out.T, "input"
    rest = 1 if side == "input" else 0
    step = max(1, _PART // max(matrix.shape[1 - rest], 1))
    for start in range(0, matrix.shape[rest], step):
        part = np.s_[:, start : start + step] if rest else np.s_[start : start + step]
        # M U is taken in the precision of M: a pair in float64 asks for it throughout.
        wide = np.promote_types(matrix.dtype, out.dtype) if out.dtype == np.float64 else matrix.dtype
        out[part] = _part(
            jnp.asarray(matrix[part].astype(wide, copy=False)), frame, k, alpha, basis, side, out.dtype.name
        )


@functools.partial(jax.jit, static_argnames=("k", "basis", "side", "dtype"))
def _part(matrix: Array, frame: Array, k: int, alpha: Array, basis: Basis, side: Side, dtype: str) -> Array:
    return deformed_weight(matrix, frame, k, alpha, basis, side).astype(dtype)


_frame = jax.jit(frame_of, static_argnames="basis")
_comp = jax.jit(compensation, static_argnames=("k", "basis", "side"))


def fuse_stored(
    weight: np.ndarray, comp: np.ndarray, axes: KernelAxes, side: Side, dtype: np.dtype
) -> np.ndarray:
    """Return the kernel that two stored factors multiply to, computed in float64 and rounded once.

    Args:
      weight: the deformed kernel.
      comp: (*stack, d, d).
      axes: of the kernel.
      side: of the compensation.
      dtype: of the result.
    """
    fused = np.empty(weight.shape, dtype)
    source, target = (axes.to_stack(x, side) for x in (weight, fused))
    in_place = np.shares_memory(target, fused)
    for deformed, out, c in zip(source, target, comp.reshape(-1, *comp.shape[-2:]), strict=True):
        right = (c if side == "output" else c.T).astype(np.float64)
        diagonal = np.diagonal(right)
        sparse = np.count_nonzero(right) == np.count_nonzero(diagonal)
        step = max(1, _PART // max(deformed.shape[1], 1))
        for start in range(0, len(deformed), step):
            part = deformed[start : start + step].astype(np.float64)
            out[start : start + step] = part * diagonal if sparse else part @ right
    if not in_place:
        unstacked = target.reshape(*(weight.shape[i] for i in axes.stack), *target.shape[-2:])
        fused = np.ascontiguousarray(axes.from_matrix(unstacked, weight.shape, side))
    return fused
