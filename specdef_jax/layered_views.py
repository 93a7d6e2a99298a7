"""A kernel that exists only as two factors, and what rearranging its axes does to them.

A `View` is an array that is never formed: K[..., j] = sum_i weight[..., i] comp[i, j]. Primitives
that only rearrange axes act on the weight as they stand; comp and the axes follow.
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

Tap = Callable[[str, jax.Array], None]
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
      tap: called with (path, h) for each h that comp multiplies, (*stack, samples, d); None in a network
        that is only evaluated (static).
    """

    weight: jax.Array
    comp: jax.Array
    features: tuple[int, ...] = field(metadata={"static": True})
    stack: tuple[int, ...] = field(metadata={"static": True})
    path: str = field(metadata={"static": True})
    tap: Tap | None = field(default=None, metadata={"static": True})


def view_of(leaf: Deformed, path: str, tap: Tap | None = None) -> View:
    """Return the kernel that a Deformed leaf stands for, both factors in its dtype."""
    dtype = jnp.result_type(leaf.weight, leaf.comp)
    comp = leaf.comp if leaf.side == "output" else jnp.swapaxes(leaf.comp, -1, -2)
    return View(
        leaf.weight.astype(dtype),
        comp.astype(dtype),
        leaf.axes.features(leaf.side),
        leaf.axes.stack,
        path,
        tap,
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
