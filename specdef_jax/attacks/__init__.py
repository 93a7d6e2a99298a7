"""Counter-reparametrizations: what undoes a deformation, and at what price (THEORY.md 5)."""

from specdef_jax.attacks.adjacent import AdjacentPair
from specdef_jax.attacks.bill import Attack, Bill, Knowledge, gradient_flops
from specdef_jax.attacks.detect import Compensation, Scores, compensation_of, detect
from specdef_jax.attacks.freeze import freeze
from specdef_jax.attacks.fuse import fuse
from specdef_jax.attacks.inject import inject
from specdef_jax.attacks.rebalance import rebalance
from specdef_jax.attacks.roc import Roc, roc

__all__ = [
    "AdjacentPair",
    "Attack",
    "Bill",
    "Compensation",
    "Knowledge",
    "Roc",
    "Scores",
    "compensation_of",
    "detect",
    "freeze",
    "fuse",
    "gradient_flops",
    "inject",
    "rebalance",
    "roc",
]
