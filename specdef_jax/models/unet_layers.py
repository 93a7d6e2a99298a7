"""Convolutions, normalizations and the ResNet block of a UNet, channels last."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from specdef_jax.convolution import Padding, by_windows
from specdef_jax.errors import StructureError
from specdef_jax.models.linear import linear
from specdef_jax.parametrization import Deformed, KernelAxes, full_precision_matmul, is_structured

if TYPE_CHECKING:
    Params = dict[str, Any]
else:
    Params = dict

HWIO = KernelAxes(inputs=(2,), outputs=(3,), window=(0, 1))
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}
SAME: Padding = ((1, 1), (1, 1))
NONE: Padding = ((0, 0), (0, 0))


def part(params: Params, prefix: str) -> Params:
    """Return the leaves under a prefix, without it."""
    start = f"{prefix}."
    return {name[len(start) :]: leaf for name, leaf in params.items() if name.startswith(start)}


def activate(name: str, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Apply the activation that a config calls by this name."""
    return _ACTIVATIONS[name](x)


def convolve(
    x: Float[Array, "batch height width n"],
    w: Any,
    b: Float[Array, " m"],
    *,
    stride: int = 1,
    padding: Padding = SAME,
) -> Float[Array, "batch _ _ m"]:
    """Return x * w + b for a kernel HWIO, whatever stands for it.

    The compensation of a Deformed pair acts on channels alone, before or after the convolution, both at full
    precision. Of a structured weight the result has the dtype of x, as `linear` has it.

    Raises:
      StructureError: the axes of a Deformed leaf are not HWIO.
    """
    if isinstance(w, Deformed):
        if w.axes != HWIO:
            raise StructureError(f"a deformed kernel has axes {w.axes}; a convolution reads {HWIO}.")
        wide = jnp.result_type(x, w.weight, jnp.float32)
        kernel, h = w.weight.astype(wide), x
        if w.side == "input":
            h = full_precision_matmul(h, w.comp)
        h = _convolve(h.astype(wide), kernel, stride, padding, lax.Precision.HIGHEST)
        h = h.astype(jnp.result_type(x, w.weight))
        if w.side == "output":
            h = full_precision_matmul(h, w.comp)
        return h.astype(x.dtype) + b
    if is_structured(w):
        kernel = w.materialize()
        return _convolve(x.astype(kernel.dtype), kernel, stride, padding, None).astype(x.dtype) + b
    return _convolve(x, w, stride, padding, None) + b


def _convolve(
    x: Array, kernel: Array, stride: int, padding: Padding, precision: lax.Precision | None
) -> Array:
    height, width, n, m = kernel.shape
    if (height, width, stride) == (1, 1, 1):
        return jnp.matmul(x, kernel.reshape(n, m), precision=precision)
    if x.dtype == jnp.float64 or jax.default_backend() == "cpu":
        return by_windows(x, kernel, stride, padding, precision)
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )


def group_norm(
    x: Float[Array, "batch *space c"],
    weight: Float[Array, " c"],
    bias: Float[Array, " c"],
    *,
    groups: int,
    eps: float,
) -> Float[Array, "batch *space c"]:
    """Normalize each group of channels over positions, in float32 or wider; the result has x's dtype."""
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    grouped = grouped.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(grouped, axis=(1, 3), keepdims=True)
    centred = grouped - mean
    variance = jnp.mean(centred**2, axis=(1, 3), keepdims=True)
    normal = (centred * lax.rsqrt(variance + eps)).reshape(x.shape)
    return (normal * weight + bias).astype(x.dtype)


def resnet(
    params: Params,
    x: Float[Array, "batch height width n"],
    time: Float[Array, "batch t"],
    *,
    groups: int,
    eps: float,
    act_fn: str,
    scale: float,
) -> Float[Array, "batch height width m"]:
    """Two convolutions with the timestep between them, beside a shortcut."""
    h = group_norm(x, params["norm1.weight"], params["norm1.bias"], groups=groups, eps=eps)
    h = convolve(activate(act_fn, h), params["conv1.weight"], params["conv1.bias"])
    shift = linear(activate(act_fn, time), params["time_emb_proj.weight"], params["time_emb_proj.bias"])
    h = h + shift[:, None, None]
    h = group_norm(h, params["norm2.weight"], params["norm2.bias"], groups=groups, eps=eps)
    h = convolve(activate(act_fn, h), params["conv2.weight"], params["conv2.bias"])
    if "conv_shortcut.weight" in params:
        x = convolve(
            x, params["conv_shortcut.weight"], params["conv_shortcut.bias"], padding=((0, 0), (0, 0))
        )
    return (x + h) / scale if scale != 1 else x + h


def downsample(
    params: Params, x: Float[Array, "batch height width c"], padding: int
) -> Float[Array, "batch _ _ c"]:
    """Halve the sides by a convolution of stride 2; without padding, zeros are added at the end only."""
    around = (padding, padding) if padding else (0, 1)
    return convolve(x, params["conv.weight"], params["conv.bias"], stride=2, padding=(around, around))


def upsample(
    params: Params, x: Float[Array, "batch height width c"], size: tuple[int, ...]
) -> Float[Array, "batch _ _ c"]:
    """Bring the sides to `size`, those of the skip connection that follows, by repetition, and convolve."""
    for axis, (old, new) in enumerate(zip(x.shape[1:3], size, strict=True), start=1):
        if new == 2 * old:
            x = jnp.repeat(x, 2, axis=axis)
        elif new != old:
            x = jnp.take(x, jnp.arange(new) * old // new, axis=axis)
    return convolve(x, params["conv.weight"], params["conv.bias"])
