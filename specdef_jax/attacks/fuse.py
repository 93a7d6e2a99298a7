"""Fuse: multiply every pair out and train the plain network again (THEORY.md 5.1)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PyTree

from specdef_jax.attacks.bill import Attack, Knowledge, plain_problem, price
from specdef_jax.attacks.freeze import split_pairs


def fuse(loss: Callable[..., Array], deformed: PyTree, *args: Any) -> Attack:
    """Return the attack that replaces C Wt by their product; nothing is added.

    Args:
      loss: loss(params, *args) of the plain network.
      deformed: the deformed tree.
      args: data of one step, for the bill.

    Raises:
      ProblemError: nothing is deformed.
    """
    split_pairs(deformed)
    begin = time.perf_counter()
    task = jax.block_until_ready(plain_problem(loss, deformed))
    seconds = time.perf_counter() - begin
    return price("fuse", task, task, *args, knowledge=Knowledge.WHICH_LAYERS, conversion_seconds=seconds)
