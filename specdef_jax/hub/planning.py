"""What is to become of one tensor of a checkpoint: its directions, and the narrowest dtype that will do."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
from jaxtyping import PRNGKeyArray

from specdef_jax.errors import BudgetError
from specdef_jax.hub.factors import build_stored
from specdef_jax.hub.measuring import is_exact_insert, measure_insert
from specdef_jax.hub.naming import literal
from specdef_jax.hub.tensors import Tensor
from specdef_jax.parametrization import KernelAxes
from specdef_jax.precision import as_format, frobenius, norm_growth, rule_of_thumb, unit_roundoff
from specdef_jax.preservation import LayerPreservation
from specdef_jax.spec import Layer, SpecDef
from specdef_jax.specdef import plan

_WIDER = (np.dtype(np.float32), np.dtype(np.float64))
_CERTAIN = 8.0  # the error is not measured beforehand where it is expected to be this much below the budget


@dataclass(frozen=True)
class PlannedTensor:
    """A kernel that will be deformed.

    Attributes:
      tensor: the kernel.
      layer: its directions.
      dtype: of both stored factors.
    """

    tensor: Tensor
    layer: Layer
    dtype: np.dtype


def plan_tensor(tensor: Tensor, axes: KernelAxes | None, spec: SpecDef, key: PRNGKeyArray) -> PlannedTensor:
    """Read a kernel, find its directions and the dtype of its factors.

    Raises:
      BudgetError: no dtype brings the error within spec.budget.
      LeafError, SpecError: as `plan`.
    """
    array = tensor.read()
    unlimited = replace(spec, budget=math.inf)
    given = None if axes is None else {literal(tensor.name): axes}
    # The range of float16 is no limit here: the factors may be stored in a wider dtype.
    seen = array.astype(np.float32) if array.dtype == np.float16 else array
    made = plan({tensor.name: seen}, unlimited, where=literal(tensor.name), key=key, axes=given)
    layer = made[tensor.name]
    return PlannedTensor(tensor, layer, _narrowest(tensor, array, layer, spec, key))


def meets(measured: LayerPreservation, exact: bool, budget: float) -> bool:
    """Tell whether a stored pair is accurate enough: within the budget, or the original to the bit."""
    return measured.error <= budget or (exact and math.isfinite(measured.error))


def dtypes_for(source: np.dtype) -> tuple[np.dtype, ...]:
    """Return the dtypes a kernel may be stored in, the narrowest first."""
    return (source, *(d for d in _WIDER if d.itemsize > source.itemsize))


def _narrowest(tensor: Tensor, array: np.ndarray, layer: Layer, spec: SpecDef, key: PRNGKeyArray) -> np.dtype:
    if math.isinf(spec.budget):
        return tensor.dtype
    total = frobenius(array)
    energy = float(np.linalg.norm(np.asarray(layer.singular_values, float))) / total if total else 0.0
    growth = norm_growth(max(spec.alpha, 1 / spec.alpha), min(energy, 1.0))
    error = math.inf
    for dtype in dtypes_for(tensor.dtype):
        if spec.basis == "symmetric":
            expected = rule_of_thumb(unit_roundoff(dtype), growth)
            if spec.alpha >= 1 and _CERTAIN * expected <= spec.budget and _in_range(array, spec, dtype):
                return dtype
            if expected > spec.budget:
                error = expected
                continue
        weight, comp = build_stored(array, layer, dtype)
        exact = spec.basis == "axis" and is_exact_insert(array, weight, comp, layer.axes, layer.side)
        form = as_format(dtype)
        measured = measure_insert(tensor.name, array, weight, comp, layer.axes, layer.side, form, key)
        if meets(measured, exact, spec.budget):
            return dtype
        error = measured.error
    raise BudgetError(
        f"'{tensor.name}': alpha = {spec.alpha:g} with basis '{spec.basis}' costs a relative error of "
        f"{error:.2g} even in float64, beyond the budget of {spec.budget:g}. Use a smaller alpha, the axis "
        "basis, or a larger budget."
    )


def _in_range(array: np.ndarray, spec: SpecDef, dtype: np.dtype) -> bool:
    """Tell whether no entry of the deformed kernel can overflow: |T| <= alpha, so |M T| <= alpha ||M||."""
    return spec.alpha * frobenius(array) < float(ml_dtypes.finfo(dtype).max)
