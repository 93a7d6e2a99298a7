"""Products with a kernel that exists only as two factors (see layered_views.py).

dot_general and convolution consume a View as two products in the order of the released network
(THEORY.md 0); what cannot be done that way is refused, never merged in silence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from specdef_jax.layered_views import MERGE, View, refuse
from specdef_jax.parametrization import full_precision


def dot_general(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """X . K as (x . weight) . comp when the features stay, as (x . comp) . weight when they are summed."""
    lhs, rhs = operands
    if isinstance(lhs, View) and isinstance(rhs, View):
        refuse("dot_general", operands, f"Both operands are deformed weights. {MERGE}.")
    _refuse_out_sharding(eqn, operands)
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    left = isinstance(lhs, View)
    view, x = (lhs, rhs) if left else (rhs, lhs)
    summed, batch = (lhs_sum, lhs_batch) if left else (rhs_sum, rhs_batch)
    x_summed, x_batch = (rhs_sum, rhs_batch) if left else (lhs_sum, lhs_batch)
    dtype = eqn.outvars[0].aval.dtype

    shared = set(view.features) & set(summed)
    if set(view.features) & set(batch) or 0 < len(shared) < len(view.features):
        refuse(
            "dot_general",
            operands,
            "Only a part of the deformed features is summed, or they are a batch axis. "
            f"{MERGE}, or deform the other side of this layer.",
        )
    free = [i for i in range(view.weight.ndim) if i not in (*summed, *batch)]
    first_free = len(batch) + (0 if left else x.ndim - len(x_summed) - len(x_batch))
    position = {i: n for n, i in enumerate(batch)} | {i: first_free + n for n, i in enumerate(free)}

    def multiply(x: Any, x_summed: Sequence[int], x_batch: Sequence[int], batch: Sequence[int]) -> jax.Array:
        if left:
            return _dot(view.weight, x, ((summed, x_summed), (batch, x_batch)), dtype)
        return _dot(x, view.weight, ((x_summed, summed), (x_batch, batch)), dtype)

    if not shared:
        if set(view.stack) & set(summed):
            refuse("dot_general", operands, f"A sum runs over a stack of output-deformed layers. {MERGE}.")
        out = multiply(x, x_summed, x_batch, batch)
        features, stack = [position[i] for i in view.features], [position[i] for i in view.stack]
        return [_compensate(out, view, view.comp, features, stack, dtype)]

    # Stacked layers that all read the same x: comp differs from layer to layer, so x gets their axes.
    loose = [i for i in view.stack if i not in (*summed, *batch)]
    n = len(loose)
    x = jnp.broadcast_to(x, (*(view.weight.shape[i] for i in loose), *x.shape))
    x_summed, x_batch = [i + n for i in x_summed], [*range(n), *(i + n for i in x_batch)]
    batch = (*loose, *batch)
    partner = dict(zip((*summed, *batch), (*x_summed, *x_batch), strict=True))
    features, stack = [partner[i] for i in view.features], [partner[i] for i in view.stack]
    x = _compensate(x, view, jnp.swapaxes(view.comp, -1, -2), features, stack, dtype)
    out = multiply(x, x_summed, x_batch, batch)
    return [jnp.moveaxis(out, range(n), [position[i] for i in loose])]


def conv_general_dilated(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """A convolution whose kernel is a View, comp acting on the channels alone."""
    name, (x, view), params = "conv_general_dilated", operands, eqn.params
    if isinstance(x, View):
        refuse(name, operands, f"A deformed weight stands where the activations belong. {MERGE}.")
    if params["batch_group_count"] > 1:
        refuse(name, operands, f"batch_group_count is {params['batch_group_count']}. {MERGE}.")
    _refuse_out_sharding(eqn, operands)
    (_, x_channels, *_), (out_axis, in_axis, *_), (_, channels, *_) = params["dimension_numbers"]
    groups, dtype = params["feature_group_count"], eqn.outvars[0].aval.dtype
    if view.stack or view.features not in ((out_axis,), (in_axis,)):
        refuse(name, operands, f"The deformed features are not one channel axis of the kernel. {MERGE}.")

    if view.features == (out_axis,):
        if groups > 1:
            # An output channel of K reads its own group only; comp would mix in channels of the others.
            refuse(
                name,
                operands,
                f"feature_group_count is {groups} and comp would mix the groups. Deform the input side, or "
                "use sd.merge(deformed).",
            )
        return [_compensate(_conv(x, view.weight, params, dtype), view, view.comp, [channels], [], dtype)]
    split = (*x.shape[:x_channels], groups, x.shape[x_channels] // groups, *x.shape[x_channels + 1 :])
    mixed = _compensate(
        x.reshape(split), view, jnp.swapaxes(view.comp, -1, -2), [x_channels + 1], [], dtype
    ).reshape(x.shape)
    return [_conv(mixed, view.weight, params, dtype)]


def _refuse_out_sharding(eqn: Any, operands: Sequence[Any]) -> None:
    if eqn.params["out_sharding"] is not None:
        refuse(eqn.primitive.name, operands, f"An out_sharding is asked for. {MERGE}, or drop it.")


def _compensate(
    h: jax.Array, view: View, comp: jax.Array, features: Sequence[int], stack: Sequence[int], dtype: Any
) -> jax.Array:
    """Return sum_i h[..., i] comp[i, j], i and j over the named axes of h, the axes left in their places."""
    group = tuple(view.weight.shape[i] for i in view.features)
    if view.tap is not None:
        rows = jnp.moveaxis(h, (*stack, *features), (*range(len(stack)), *range(-len(features), 0)))
        view.tap(view.path, rows.reshape(*rows.shape[: len(stack)], -1, math.prod(group)))
    comp = comp.reshape(*comp.shape[:-2], *group, *group)
    rows = range(len(stack), len(stack) + len(group))
    out = _dot(h, comp, ((features, rows), (stack, range(len(stack)))), dtype)
    order = [*stack, *(i for i in range(h.ndim) if i not in (*features, *stack)), *features]
    return jnp.transpose(out, sorted(range(h.ndim), key=order.__getitem__))


def _dot(a: Any, b: Any, dims: Any, dtype: Any) -> jax.Array:
    """One layer of the released network: full-precision products, stored as `dtype` (THEORY.md 1.2)."""
    (a_summed, b_summed), (a_batch, b_batch) = dims
    numbers = ((tuple(a_summed), tuple(b_summed)), (tuple(a_batch), tuple(b_batch)))
    return full_precision(partial(lax.dot_general, dimension_numbers=numbers), dtype, a, b)


def _conv(x: Any, kernel: jax.Array, params: dict[str, Any], dtype: Any) -> jax.Array:
    # The operands are widened, since JAX cannot transpose a convolution that accumulates in a wider type.
    wide = _accumulator(dtype, jnp.result_type(x, kernel))
    settings = {
        key: value for key, value in params.items() if key not in ("precision", "preferred_element_type")
    }
    out = lax.conv_general_dilated_p.bind(
        jnp.asarray(x, wide),
        kernel.astype(wide),
        precision=(lax.Precision.HIGHEST, lax.Precision.HIGHEST),
        preferred_element_type=jnp.dtype(wide),
        **settings,
    )
    return out.astype(dtype)


def _accumulator(*dtypes: Any) -> Any:
    return jnp.result_type(*dtypes, jnp.float32)
