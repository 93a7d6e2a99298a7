"""The one way in which our models apply a linear map, whatever stands for its kernel.

A plain kernel is one product. A Deformed pair is two, weight and compensation in the order in which the
released network applies them (THEORY.md 0), at full matmul precision. Any other structured weight is applied
by its own `apply(h)` (LoRA, an injected matrix) or, if it has none, read back by `materialize()`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specdef_jax.parametrization import Deformed, KernelAxes, full_precision_matmul, is_structured


def linear(
    h: Float[Array, "*batch n"], w: Any, b: Float[Array, "..."] | None = None
) -> Float[Array, "*stacked m"]:
    """Return h w + b for a kernel (in, out), or for a stack of them (experts, in, out).

    Args:
      h: activations. With a stack of kernels (*tokens, in) without an axis over the stack is read by every
        kernel, (experts, tokens, in) by its own.
      w: an array, a Deformed leaf, or any structured weight that stands for such an array.
      b: (out,), or (experts, out) for a stack.

    Returns:
      (*batch, out), or (experts, tokens, out); of a structured weight in the dtype of h, so that a pair
      that is stored wider leaves the network in its own dtype.

    Raises:
      StructureError: the axes of a Deformed leaf are not those of a linear map.

    Example:
      >>> linear(jnp.ones(2), jnp.eye(2), jnp.ones(2)).tolist()
      [2.0, 2.0]
    """
    if isinstance(w, Deformed):
        first, second = factors(w)
        out = full_precision_matmul(full_precision_matmul(h, first), second).astype(h.dtype)
    elif is_structured(w):
        apply = getattr(w, "apply", None)
        out = jnp.asarray(apply(h) if callable(apply) else full_precision_matmul(h, w.materialize()), h.dtype)
    else:
        out = h @ w
    if b is None:
        return out
    return out + (b if b.ndim == 1 else b[..., None, :])


def factors(w: Deformed) -> tuple[Float[Array, "*stack n p"], Float[Array, "*stack p m"]]:
    """Return the two kernels that a pair applies, in that order, each (*stack, in, out).

    Raises:
      StructureError: it is the kernel of a convolution.
    """
    matrix = w.axes.to_linear(w.weight, w.side)
    return (matrix, w.comp) if w.side == "output" else (w.comp, matrix)


def take(w: Any, index: Int[Array, "*chosen"]) -> Any:
    """Return the chosen kernels of a stack (experts, ...), whatever stands for them.

    Deformed pairs are chosen from factor by factor and stay pairs, other structured weights are read back.
    """
    if isinstance(w, Deformed):
        weight, comp = w.weight[index], w.comp[index]
        grown = index.ndim - 1
        axes = KernelAxes(
            inputs=tuple(i + grown for i in w.axes.inputs),
            outputs=tuple(i + grown for i in w.axes.outputs),
            stack=tuple(range(index.ndim)),
        )
        return Deformed(weight, comp, w.side, axes)
    return jnp.take(w.materialize() if is_structured(w) else w, index, axis=0)
