"""Counter-reparametrizations: what undoes a deformation, and at what price (THEORY.md 5)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from specdef_jax.attacks.adjacent import AdjacentPair
from specdef_jax.attacks.bill import Attack, Bill, Knowledge, timed
from specdef_jax.attacks.blind import blind, suspects
from specdef_jax.attacks.detect import Compensation, Scores, compensation_of, detect
from specdef_jax.attacks.freeze import freeze
from specdef_jax.attacks.fuse import fuse
from specdef_jax.attacks.identity import identity
from specdef_jax.attacks.inject import inject
from specdef_jax.attacks.lora import adapted, lora
from specdef_jax.attacks.precondition import precondition
from specdef_jax.attacks.rebalance import rebalance
from specdef_jax.attacks.released import moved
from specdef_jax.attacks.roc import Roc, roc
from specdef_jax.attacks.svd_chain import svd_chain
from specdef_jax.attacks.two_steps import two_steps

# attack(loss, deformed, *args) -> Attack, at default settings; no two do the same.
ATTACKS: dict[str, Callable[..., Attack]] = {
    "fuse": fuse,
    "freeze": freeze,
    "two_steps": two_steps,
    "inject": inject,
    "identity": identity,
    "svd_chain_2": partial(svd_chain, factors=2),
    "svd_chain_3": partial(svd_chain, factors=3),
    "svd_chain_5": partial(svd_chain, factors=5),
    "rebalance": rebalance,
    "blind": blind,
    "precondition": precondition,
    "precondition_phi": partial(precondition, method="phi"),
    "precondition_kfac": partial(precondition, method="kfac"),
    "lora": lora,
    "lora_factors": partial(lora, on="factors"),
}

__all__ = [
    "ATTACKS",
    "AdjacentPair",
    "Attack",
    "Bill",
    "Compensation",
    "Knowledge",
    "Roc",
    "Scores",
    "adapted",
    "blind",
    "compensation_of",
    "detect",
    "freeze",
    "fuse",
    "identity",
    "inject",
    "lora",
    "moved",
    "precondition",
    "rebalance",
    "roc",
    "suspects",
    "svd_chain",
    "timed",
    "two_steps",
]
