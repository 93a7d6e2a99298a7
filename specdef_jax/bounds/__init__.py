"""Bounds and identities of THEORY.md as pure functions, one file per family."""

from specdef_jax.bounds.congruence import (
    condition,
    congruent_product,
    ostrowski,
    phi,
    phi_inverse,
    preconditioned,
)
from specdef_jax.bounds.fast_subspace import fast_subspace, fast_subspace_loss
from specdef_jax.bounds.product import (
    product_allowance,
    product_bound,
    product_reported,
    product_v1,
    product_v2,
    product_v2k,
)
from specdef_jax.bounds.sandwich import Sandwich, sandwich, sandwich_sides
from specdef_jax.bounds.stability import Method, max_stable_step, max_stable_step_deformed

__all__ = [
    "Method",
    "Sandwich",
    "condition",
    "congruent_product",
    "fast_subspace",
    "fast_subspace_loss",
    "max_stable_step",
    "max_stable_step_deformed",
    "ostrowski",
    "phi",
    "phi_inverse",
    "preconditioned",
    "product_allowance",
    "product_bound",
    "product_reported",
    "product_v1",
    "product_v2",
    "product_v2k",
    "sandwich",
    "sandwich_sides",
]
