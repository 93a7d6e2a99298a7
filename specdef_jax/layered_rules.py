"""How each JAX primitive acts on a kernel that exists only as two factors.

A `View` is an array that is never formed: K[..., j] = sum_i weight[..., i] comp[i, j]. Primitives
that only rearrange axes give another View; dot_general and convolution consume one as two products
in the order of the released network (THEORY.md 0). Everything else is refused, never merged in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from specdef_jax.errors import LayeredUnsupported
from specdef_jax.parametrization import Deformed

MERGE = "Evaluate sd.merge(deformed) for this computation"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """A virtual kernel.

    Attributes:
      weight: the deformed weight, in the shape and dtype of the virtual kernel.
      comp: (*stack, d, d), multiplying from the right over the flattened feature axes.
      features: axes of the kernel that form the d features, in the order comp counts them (static).
      stack: for each leading axis of comp, the axis of the kernel it runs along (static).
      path: where the deformed leaf stands in the parameters (static).
    """

    weight: jax.Array
    comp: jax.Array
    features: tuple[int, ...] = field(metadata={"static": True})
    stack: tuple[int, ...] = field(metadata={"static": True})
    path: str = field(metadata={"static": True})


def view_of(leaf: Deformed, path: str) -> View:
    """Return the kernel that a Deformed leaf stands for, both factors in its dtype."""
    dtype = jnp.result_type(leaf.weight, leaf.comp)
    comp = leaf.comp if leaf.side == "output" else jnp.swapaxes(leaf.comp, -1, -2)
    return View(
        leaf.weight.astype(dtype), comp.astype(dtype), leaf.axes.features(leaf.side), leaf.axes.stack, path
    )


def refuse(primitive: str, operands: Sequence[Any], remedy: str) -> NoReturn:
    """Raise LayeredUnsupported for the first View among the operands."""
    raise LayeredUnsupported(primitive, next(x.path for x in operands if isinstance(x, View)), remedy)


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluate one equation as it stands, in the context it was traced in."""
    found = eqn.primitive.get_bind_params(eqn.params)
    functions, params = found if isinstance(found, tuple) else ((), found)  # a pair up to jax 0.9
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*functions, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


# Products


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
    comp = comp.reshape(*comp.shape[:-2], *group, *group)
    rows = range(len(stack), len(stack) + len(group))
    out = _dot(h, comp, ((features, rows), (stack, range(len(stack)))), dtype)
    order = [*stack, *(i for i in range(h.ndim) if i not in (*features, *stack)), *features]
    return jnp.transpose(out, sorted(range(h.ndim), key=order.__getitem__))


def _dot(a: Any, b: Any, dims: Any, dtype: Any) -> jax.Array:
    """One layer of the released network: full-precision products, stored as `dtype` (THEORY.md 1.2)."""
    common = jnp.result_type(a, b)
    (a_summed, b_summed), (a_batch, b_batch) = dims
    product = lax.dot_general(
        jnp.asarray(a, common),
        jnp.asarray(b, common),
        ((tuple(a_summed), tuple(b_summed)), (tuple(a_batch), tuple(b_batch))),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=_accumulator(dtype, common),
    )
    return product.astype(dtype)


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


# Rearrangements: the primitive acts on the weight as it is; comp and the axes follow.


def _axes(view: View, new_axis: Callable[[int], int]) -> dict[str, Any]:
    features, stack = ([int(new_axis(i)) for i in axes] for axes in (view.features, view.stack))
    return {"features": tuple(features), "stack": tuple(stack)}


def _transpose(eqn: Any, view: View) -> dict[str, Any]:
    return _axes(view, eqn.params["permutation"].index)


def _reshape(eqn: Any, view: View) -> dict[str, Any]:
    """Follow axes that are split or joined among the features, or among axes that comp does not see."""
    name, old, new = eqn.primitive.name, view.weight.shape, eqn.outvars[0].aval.shape
    if eqn.params.get("dimensions") is not None and name == "reshape":
        refuse(name, [view], f"It permutes axes at once. Use jnp.transpose, then reshape; or: {MERGE}.")
    ascending = tuple(sorted(view.features))
    comp = _reorder(view, ascending)
    features: list[int] = []
    stack: dict[int, int] = {}
    for before, after in _segments(old, new):
        if set(before) <= set(ascending):
            features += after
        elif set(before) & set(view.stack) and len(before) == len(after) == 1:
            stack[before[0]] = after[0]
        elif set(before) & {*ascending, *view.stack}:
            refuse(name, [view], f"It joins or splits deformed features with other axes. {MERGE}.")
    dropped = [n for n, i in enumerate(view.stack) if i not in stack]
    return {
        "comp": jnp.squeeze(comp, dropped),
        "features": tuple(features),
        "stack": tuple(stack[i] for i in view.stack if i in stack),
    }


def _reorder(view: View, features: tuple[int, ...]) -> jax.Array:
    """Return comp with its features counted in another order of the axes."""
    if features == view.features:
        return view.comp
    group, n, g = [view.weight.shape[i] for i in view.features], len(view.stack), len(features)
    order = [view.features.index(i) for i in features]
    split = view.comp.reshape(*view.comp.shape[:-2], *group, *group)
    rows, columns = [n + i for i in order], [n + g + i for i in order]
    return split.transpose(*range(n), *rows, *columns).reshape(view.comp.shape)


def _segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the shortest runs of axes, longer than 1, that a reshape takes into one another."""
    sources, targets = ([i for i, n in enumerate(shape) if n != 1] for shape in (old, new))
    segments = []
    while sources:
        before, after = [sources.pop(0)], [targets.pop(0)]
        while (have := math.prod(old[i] for i in before)) != (want := math.prod(new[i] for i in after)):
            (before if have < want else after).append((sources if have < want else targets).pop(0))
        segments.append((before, after))
    return segments


def _broadcast_in_dim(eqn: Any, view: View) -> dict[str, Any]:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if any(view.weight.shape[i] != shape[dims[i]] for i in (*view.features, *view.stack)):
        refuse("broadcast_in_dim", [view], f"It repeats deformed features. {MERGE}.")
    return _axes(view, dims.__getitem__)


def _convert_element_type(eqn: Any, view: View) -> dict[str, Any]:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        refuse("convert_element_type", [view], f"{dtype} cannot hold the factors. {MERGE}.")
    return {"comp": view.comp.astype(dtype)}


def _both_factors(eqn: Any, view: View) -> dict[str, Any]:
    return {"comp": bind(eqn, [view.comp])[0]}


def _weight_only(eqn: Any, view: View) -> dict[str, Any]:
    return {}


def _rev(eqn: Any, view: View) -> dict[str, Any]:
    if set(eqn.params["dimensions"]) & {*view.features, *view.stack}:
        refuse("rev", [view], f"It reverses deformed features. {MERGE}.")
    return {}


def _slice(eqn: Any, view: View) -> dict[str, Any]:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(start)
    if any((start[i], limit[i], strides[i]) != (0, view.weight.shape[i], 1) for i in view.features):
        refuse("slice", [view], f"It cuts deformed features. {MERGE}, or slice the activations.")
    comp = view.comp
    for axis, i in enumerate(view.stack):
        comp = lax.slice_in_dim(comp, start[i], limit[i], strides[i], axis)
    return {"comp": comp}


def _dynamic_slice(eqn: Any, view: View, *starts: Any) -> dict[str, Any]:
    sizes, comp = eqn.params["slice_sizes"], view.comp
    if any(sizes[i] != view.weight.shape[i] for i in view.features):
        refuse("dynamic_slice", [view], f"It cuts deformed features. {MERGE}, or slice the activations.")
    for axis, i in enumerate(view.stack):
        comp = lax.dynamic_slice_in_dim(comp, starts[i], sizes[i], axis)
    return {"comp": comp}


REARRANGE: dict[str, Callable[..., dict[str, Any]]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "convert_element_type": _convert_element_type,
    "copy": _both_factors,
    "name": _both_factors,
    "stop_gradient": _both_factors,
    "sharding_constraint": _weight_only,
    "rev": _rev,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
}


def rearrange(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Apply a primitive that gives another View of the same two factors."""
    view, *others = operands
    if not isinstance(view, View) or any(isinstance(x, View) for x in others):
        refuse(eqn.primitive.name, operands, f"{MERGE}.")
    changes = REARRANGE[eqn.primitive.name](eqn, view, *others)
    return [replace(view, weight=bind(eqn, [view.weight, *others])[0], **changes)]
