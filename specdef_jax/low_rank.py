"""Low-rank storage of a compensation: T(1/a) = I + (1/a - 1) U U^T as U and a (THEORY.md 0).

k d numbers instead of d^2, and products with k columns instead of d. It announces itself to whoever looks at
the names of the leaves, and training U is another parametrization than training the dense compensation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from specdef_jax.errors import SpecError, StructureError
from specdef_jax.pair import frame_of
from specdef_jax.parametrization import Deformed, KernelAxes, Side, full_precision_matmul
from specdef_jax.spec import Layer, Plan
from specdef_jax.specdef import map_planned


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """One deformed kernel beside a compensation I + U diag(shift) U^T.

    U and shift are stored in float32 or the dtype of the weight, whichever is wider: they are few, and the
    component that is a times too large is taken off more exactly than by a dense compensation in the
    weight's own dtype.

    Attributes:
      weight: the deformed kernel, in the shape and dtype of the original.
      U: directions (*stack, d, k).
      shift: 1/a - 1 of each direction (k,).
      side: where the compensation stands, as for Deformed (static).
      axes: which axes of the kernel are which (static).
    """

    weight: Float[Array, "..."]
    U: Float[Array, "*stack d k"]
    shift: Float[Array, " k"]
    side: Side = field(metadata={"static": True})
    axes: KernelAxes = field(metadata={"static": True})

    def apply(self, h: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return h times the kernel, in the dtype of h: the products that models.linear takes of a pair.

        Raises:
          StructureError: it is the kernel of a convolution.
        """
        matrix = self.axes.to_linear(self.weight, self.side)
        if self.side == "output":
            return self._compensate(full_precision_matmul(h, matrix)).astype(h.dtype)
        return full_precision_matmul(self._compensate(h).astype(h.dtype), matrix).astype(h.dtype)

    def materialize(self) -> Float[Array, "..."]:
        """Return the plain kernel, in the shape and dtype of `weight`."""
        matrix = self.axes.to_matrix(self.weight, self.side)
        plain = self._compensate(matrix).astype(self.weight.dtype)
        return self.axes.from_matrix(plain, self.weight.shape, self.side)

    def _compensate(self, rows: Array) -> Array:
        """Return rows (I + U diag(shift) U^T), in the dtype of U."""
        found = full_precision_matmul(rows, self.U) * self.shift
        return rows + full_precision_matmul(found, jnp.swapaxes(self.U, -1, -2))


def compact(deformed: PyTree, plan: Plan) -> PyTree:
    """Return a deformed network with every compensation of the plan stored as directions and factors.

    Args:
      deformed: what apply_plan made of the plan.
      plan: of the symmetric or axis basis.

    Raises:
      SpecError: a layer was planned in the rotated basis, whose compensation is no small change of I.
      StructureError: the plan names a leaf that is not deformed, or not as planned.

    Example:
      >>> from specdef_jax import SpecDef, apply_plan, plan
      >>> params = {"w": jnp.eye(3)}
      >>> made = plan(params, SpecDef(alpha=4.0), where="w", key=jax.random.key(0))
      >>> compact(apply_plan(params, made), made)["w"].U.shape
      (3, 1)
    """

    def visit(name: str, leaf: Any, layer: Layer) -> LowRank:
        if layer.basis == "rotated":
            raise SpecError(
                f"'{name}' was planned in the rotated basis, whose compensation has no low-rank form; "
                "plan it in the symmetric or the axis basis."
            )
        if not isinstance(leaf, Deformed) or leaf.side != layer.side or leaf.axes != layer.axes:
            raise StructureError(f"'{name}' is not deformed as planned; pass apply_plan(params, plan).")
        with jax.enable_x64(True):
            dtype = jnp.promote_types(leaf.weight.dtype, jnp.float32)
            U = frame_of(layer.U, layer.basis)
            shift = jnp.full(U.shape[-1], 1 / layer.alpha.astype(jnp.float64) - 1)
            return LowRank(leaf.weight, U.astype(dtype), shift.astype(dtype), leaf.side, leaf.axes)

    return map_planned(visit, deformed, plan)
