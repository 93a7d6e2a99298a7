"""Counter-reparametrizations: what undoes a deformation, and at what price (THEORY.md 5)."""

from specdef_jax.attacks.bill import Attack, Bill, Knowledge, gradient_flops
from specdef_jax.attacks.freeze import freeze
from specdef_jax.attacks.fuse import fuse
from specdef_jax.attacks.inject import inject

__all__ = ["Attack", "Bill", "Knowledge", "freeze", "fuse", "gradient_flops", "inject"]
