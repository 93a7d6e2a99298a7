"""Fuse: multiply every pair out and train the plain network again (THEORY.md 5.1)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, PyTree

from specdef_jax.attacks.bill import Attack, carry_out
from specdef_jax.attacks.released import pairs_of, plain_problem


def fuse(loss: Callable[..., Array], deformed: PyTree, *args: Any) -> Attack:
    """Return the attack that replaces C Wt by their product; nothing is added.

    Args:
      loss: loss(params, *args) of the plain network.
      deformed: the deformed tree.
      args: data of one step, for the bill.

    Raises:
      ProblemError: nothing is deformed.
    """
    pairs_of(deformed)
    convert = functools.partial(plain_problem, loss, deformed)
    return carry_out("fuse", convert, loss, deformed, *args)
