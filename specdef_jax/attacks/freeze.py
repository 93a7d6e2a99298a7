"""Freeze: keep every compensation fixed and train all else (THEORY.md 5.2).

phi^-1 is a contraction on the deformed weight, so the sharpness of the trained block is at most its
undeformed value; only k output directions of the layer stay slow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from specdef_jax import trees
from specdef_jax.attacks.bill import Attack, carry_out
from specdef_jax.attacks.released import pairs_of
from specdef_jax.parametrization import Deformed, Problem, is_structured, loss_on, merge


def freeze(loss: Callable[..., Array], deformed: PyTree, *args: Any) -> Attack:
    """Return the attack that trains the deformed weights and the rest, compensations frozen.

    Args:
      loss: loss(params, *args) of the plain network.
      deformed: the deformed tree.
      args: data of one step, for the bill.

    Raises:
      ProblemError: nothing is deformed.
    """
    convert = functools.partial(_problem, loss, deformed, *args)
    return carry_out("freeze", convert, loss, deformed, *args)


def _problem(loss: Callable[..., Array], deformed: PyTree, *args: Any) -> Problem:
    """Return the trainable tree (plain leaves in place of pairs) with the compensations as data."""
    # The weights are trained: held once, in params.
    pairs = {name: replace(pair, weight=None) for name, pair in pairs_of(deformed).items()}
    params = jax.tree.map(
        lambda leaf: leaf.weight if isinstance(leaf, Deformed) else leaf, deformed, is_leaf=is_structured
    )
    as_partial = loss_on(loss, deformed, *args)
    return Problem(params, Partial(_frozen_loss, as_partial, pairs), Partial(_read_frozen, pairs))


def _frozen_loss(loss: Partial, pairs: dict[str, Deformed], params: PyTree, *args: Any) -> Array:
    return loss(_with_comps(pairs, params), *args)


def _read_frozen(pairs: dict[str, Deformed], params: PyTree) -> PyTree:
    return merge(_with_comps(pairs, params))


def _with_comps(pairs: dict[str, Deformed], params: PyTree) -> PyTree:
    return trees.map_named(
        lambda name, leaf: replace(pairs[name], weight=leaf) if name in pairs else leaf, params
    )
