"""SpecDef: deform the spectrum of linear maps without changing the function (THEORY.md 0).

`plan` looks at the weights and decides the subspaces (iterative, on the host); `apply_plan` is a
pure function of parameters and plan, so it runs under jit, vmap over alpha and any sharding;
`deform` is both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray, PyTree

from specdef_jax import select, subspace, trees
from specdef_jax.choice import check_dtype, choose_kernels
from specdef_jax.errors import LeafError, SpecError, StructureError
from specdef_jax.layout import AxesLike, axes_of
from specdef_jax.pair import build_pair
from specdef_jax.parametrization import Deformed, KernelAxes, Side, is_structured
from specdef_jax.precision import check_budget
from specdef_jax.resistant import resistant_directions
from specdef_jax.spec import Layer, Plan, SpecDef


def plan(
    params: PyTree,
    spec: SpecDef,
    *,
    where: select.Selector | str | Sequence[str] | None = None,
    key: PRNGKeyArray,
    axes: AxesLike | Mapping[str, AxesLike] | None = None,
    stacked: bool = False,
    activations: Mapping[str, Array] | None = None,
) -> Plan:
    """Choose the layers and their directions.

    Args:
      params: tree of arrays (raw dict, Linen params, NNX state, ...).
      spec: how to deform.
      where: selector, glob or globs; None selects every matrix that is not an embedding.
      key: for randomized subspaces and selectors.
      axes: (input axes, output axes) of the selected kernels, or a mapping from glob to that; axes
        not named are stacked layers. Needed for DenseGeneral kernels.
      stacked: the first axis of each selected kernel runs over layers (nn.scan).
      activations: path -> outputs of that kernel before the bias, (*stack, samples, features), for
        directions "resistant"; sd.activations takes them from a batch.

    Returns:
      A Plan: path -> Layer.

    Raises:
      SelectionError: nothing selected, or only leaves that are no matrices.
      LeafError: a selected leaf cannot be deformed (dtype, rank, values, already deformed).
      SpecError: k or directions do not fit a selected kernel.
      BudgetError: alpha costs more than spec.budget in the leaf's dtype, or overflows it.
    """
    select_key, subspace_key = jax.random.split(key)
    selector = select.as_selector(where)
    leaves = dict(trees.named_leaves(params, is_leaf=is_structured))
    chosen = choose_kernels(leaves, selector, select_key)
    layers = {}
    for index, name in enumerate(chosen):
        kernel = leaves[name]
        kernel_axes = axes_of(name, kernel.shape, axes, stacked)
        leaf_key = jax.random.fold_in(subspace_key, index)
        layers[name] = _plan_leaf(name, kernel, kernel_axes, spec, leaf_key, activations)
    return Plan(layers)


def apply_plan(params: PyTree, plan: Plan) -> PyTree:
    """Replace every planned kernel by its Deformed pair.

    Pure: works under jit, vmap (for instance over plan.with_alpha) and any sharding, which the
    weights keep (under the caller's jit, its out_shardings decide). The pair is built in float64 and
    rounded once to the kernel's dtype.

    Raises:
      StructureError: the plan names a leaf that `params` does not have, or with other features.
      LeafError: a planned leaf is deformed already, or of a dtype that cannot be deformed.
    """

    def visit(name: str, leaf: Any, layer: Layer) -> Deformed:
        if is_structured(leaf):
            raise LeafError(f"'{name}' is deformed already; merge it first (sd.merge).")
        return _deform_leaf(name, leaf, layer)

    return map_planned(visit, params, plan)


def map_planned(fn: Callable[[str, Any, Layer], Any], tree: PyTree, plan: Plan) -> PyTree:
    """Replace every planned leaf by fn(name, leaf, layer).

    Raises:
      StructureError: the plan names a leaf that the tree does not have.
    """
    missing = set(plan.layers)

    def visit(name: str, leaf: Any) -> Any:
        if name not in plan.layers:
            return leaf
        missing.discard(name)
        return fn(name, leaf, plan[name])

    found = trees.map_named(visit, tree, is_leaf=is_structured)
    if missing:
        raise StructureError(
            f"the plan names {sorted(missing)}, which the tree lacks; plan on the same tree."
        )
    return found


def deform(
    params: PyTree,
    spec: SpecDef,
    *,
    where: select.Selector | str | Sequence[str] | None = None,
    key: PRNGKeyArray,
    axes: AxesLike | Mapping[str, AxesLike] | None = None,
    stacked: bool = False,
    activations: Mapping[str, Array] | None = None,
) -> PyTree:
    """Plan and apply: return the deformed tree, which computes the same function.

    Arguments and errors are those of `plan`.

    Example:
      >>> params = {"w": jnp.eye(3)}
      >>> deformed = deform(params, SpecDef(alpha=4.0), where="w", key=jax.random.key(0))
    """
    made = plan(params, spec, where=where, key=key, axes=axes, stacked=stacked, activations=activations)
    return apply_plan(params, made)


def _plan_leaf(
    name: str,
    kernel: Any,
    axes: KernelAxes,
    spec: SpecDef,
    key: PRNGKeyArray,
    activations: Mapping[str, Array] | None,
) -> Layer:
    shape = tuple(kernel.shape)
    if not math.prod(shape):
        raise LeafError(f"'{name}' has shape {shape}, which holds no entries; select another leaf.")
    sides: tuple[Side, Side] = ("output", "input")
    resistant = isinstance(spec.directions, str) and spec.directions == "resistant"
    side = spec.side
    if side == "auto":
        side = "output" if resistant else min(sides, key=lambda s: axes.dim(shape, s))
    with jax.enable_x64(True):  # so that a float64 leaf stays float64
        matrix = axes.to_sided(jnp.asarray(kernel), side)
        norms, largest = _look(matrix)
    if spec.k > min(matrix.shape[-2:]):
        raise SpecError(
            f"'{name}': k = {spec.k} exceeds min(m, n) = {min(matrix.shape[-2:])} of its shape {shape}; "
            "choose a smaller k."
        )
    if not math.isfinite(float(largest)):
        raise LeafError(f"'{name}' holds NaN or Inf; repair the checkpoint before deforming it.")
    if resistant:
        spec = replace(spec, directions=_resistant(name, matrix, spec.k, activations))
    found = _subspace(name, matrix, side, spec, key)
    share = np.linalg.norm(np.asarray(found.singular_values, float), axis=-1) / np.maximum(
        np.asarray(norms), np.finfo(float).tiny
    )
    check_budget(
        name,
        matrix.dtype,
        spec.basis,
        spec.alpha,
        spec.budget,
        energy=min(float(np.max(share)), 1.0),
        largest=float(largest),
        features=axes.dim(shape, side),
    )
    return Layer(
        U=found.U,
        alpha=jnp.asarray(spec.alpha, jnp.result_type(float)),
        singular_values=found.singular_values,
        residual=found.residual,
        status=found.status,
        side=side,
        basis=spec.basis,
        axes=axes,
    )


def _resistant(name: str, matrix: Array, k: int, activations: Mapping[str, Array] | None) -> Array:
    """Return the least informative directions of one kernel, or of each of a stack (output side)."""
    if activations is None or name not in activations:
        raise SpecError(
            f"'{name}': directions 'resistant' need a batch of its outputs; pass "
            "activations=sd.activations(apply, params, *inputs, where=...)."
        )
    found, want = jnp.shape(activations[name]), (*matrix.shape[:-2], matrix.shape[-1])
    if (*found[:-2], *found[-1:]) != want:
        raise SpecError(
            f"'{name}': its activations have shape {found}; give (*stack, samples, features) with "
            f"(*stack, features) = {want}."
        )
    return resistant_directions(activations[name], k)


def _subspace(name: str, matrix: Array, side: Side, spec: SpecDef, key: PRNGKeyArray) -> subspace.Subspace:
    """Find the directions of one matrix, or of each matrix of a stack."""
    stack = matrix.shape[:-2]
    features = matrix.shape[-1 if side == "output" else -2]
    given = None
    if not isinstance(spec.directions, str):
        expected, shape = (features, spec.k), spec.directions.shape
        if shape not in (expected, (*stack, *expected)):
            raise SpecError(
                f"'{name}': directions have shape {shape}, give an array (features, k) = {expected}"
                + (f", or {(*stack, *expected)} for one per layer." if stack else ".")
            )
        given = jnp.broadcast_to(spec.directions, (*stack, *expected))
    if not stack:
        return _directions(matrix, side, spec, given, key)
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    chosen = [None] * len(flat) if given is None else list(given.reshape(-1, *given.shape[-2:]))
    keys = jax.random.split(key, len(flat))
    found = [
        _directions(one, side, spec, directions, one_key)
        for one, directions, one_key in zip(flat, chosen, keys, strict=True)
    ]
    return jax.tree.map(lambda *parts: jnp.stack(parts).reshape(*stack, *parts[0].shape), *found)


def _directions(
    matrix: Array, side: Side, spec: SpecDef, given: Array | None, key: PRNGKeyArray
) -> subspace.Subspace:
    features = matrix.shape[-1 if side == "output" else -2]
    transposed = side == "input"
    if given is not None:
        return subspace.given_subspace(matrix, given, transposed=transposed)
    if spec.basis == "axis":
        if spec.directions == "random":
            chosen = jax.random.choice(key, features, (spec.k,), replace=False)
            axes = jnp.eye(features, dtype=matrix.dtype)[:, chosen]
            return subspace.given_subspace(matrix, axes, transposed=transposed)
        bottom = spec.directions == "bottom"
        return subspace.axis_subspace(matrix, spec.k, bottom=bottom, transposed=transposed)
    if spec.directions == "random":
        return subspace.random_subspace(matrix, spec.k, key=key, transposed=transposed)
    find = subspace.top_subspace if spec.directions == "top" else subspace.bottom_subspace
    return find(matrix, spec.k, tol=spec.tol, key=key, transposed=transposed)


@jax.jit
def _look(matrix: Array) -> tuple[Array, Array]:
    """Return the Frobenius norm(s) of a matrix or stack, and its largest magnitude (NaN if any is)."""
    largest = jnp.max(jnp.abs(matrix))
    unit = jnp.where(largest > 0, largest, 1)
    scaled = (matrix / unit).astype(jnp.promote_types(matrix.dtype, jnp.float32))
    return unit * jnp.sqrt(jnp.sum(jnp.square(scaled), axis=(-2, -1))), largest


def _deform_leaf(name: str, kernel: Array, layer: Layer) -> Deformed:
    """Check that a kernel is the one planned for, and replace it by its pair."""
    axes, side = layer.axes, layer.side
    shape = tuple(np.shape(kernel))
    check_dtype(name, kernel.dtype)
    d, stack = layer.U.shape[-2], layer.U.shape[:-2]
    if len(shape) != len(axes.stack + axes.window + axes.inputs + axes.outputs) or (
        axes.dim(shape, side) != d or tuple(shape[i] for i in axes.stack) != stack
    ):
        raise StructureError(
            f"'{name}' has shape {shape}, but was planned with {d} features on the {side} side and "
            f"stack {stack}; plan on the same tree."
        )
    with jax.enable_x64(True):
        weight, comp = _pair_of(jnp.asarray(kernel), layer)
        concrete = isinstance(kernel, jax.Array) and not isinstance(weight, Tracer)
        if concrete and not weight.sharding.is_equivalent_to(kernel.sharding, kernel.ndim):
            # XLA may have gathered what a rotation mixes; the pair is stored as the kernel was.
            weight = jax.device_put(weight, kernel.sharding)
    return Deformed(weight, comp, side, axes)


@jax.jit
def _pair_of(kernel: Array, layer: Layer) -> tuple[Array, Array]:
    """Build the pair in float64 and round it once to the kernel's dtype."""
    axes, side = layer.axes, layer.side

    weight, comp = build_pair(axes.to_sided(kernel, side), layer.U, layer.alpha, layer.basis, side)
    weight = axes.from_sided(weight, kernel.shape, side)
    return weight.astype(kernel.dtype), comp.astype(kernel.dtype)
