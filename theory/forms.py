"""In which forms a statement is tried on a layer: side and basis of the deformation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from jaxtyping import PRNGKeyArray

import specdef_jax as sd
from specdef_jax.pair import Basis
from specdef_jax.parametrization import Side
from specdef_jax.spec import Plan
from theory.instances.networks import Instance
from theory.sizes import Size

Form = tuple[Side, Basis]
USUAL: Form = ("output", "symmetric")
OTHER: Form = ("input", "rotated")
EVERY: tuple[Form, ...] = tuple((side, basis) for side in get_args(Side) for basis in get_args(Basis))


def forms(size: Size, default: Sequence[Form] = (USUAL, OTHER)) -> Sequence[Form]:
    """Return the first of some forms (small), those (default), or every one (full)."""
    return {Size.SMALL: default[:1], Size.DEFAULT: default, Size.FULL: EVERY}[size]


def alternating(size: Size, first: bool) -> Sequence[Form]:
    """Return one form, another than that of the first instance for the others, or every one (full)."""
    return EVERY if size is Size.FULL else [USUAL if first else OTHER]


def planned(instance: Instance, alpha: float, form: Form, key: PRNGKeyArray) -> tuple[Plan, str]:
    """Return the plan for two directions of an instance's layer, and what to call it."""
    side, basis = form
    spec = sd.SpecDef(alpha=alpha, k=2, side=side, basis=basis)
    plan = sd.plan(instance.params, spec, where=instance.where, key=key)
    return plan, f"{instance.name}, {side} side, {basis}"
