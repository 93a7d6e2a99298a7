"""Rebalance: give both of two adjacent matrices the same singular values, and train on (THEORY.md 5.5).

Which two matrices are adjacent is all that must be known, and the architecture tells it: not which of them
compensates, not which layers were deformed, not alpha, k or U. Nothing is added. The balanced factors of a
product do not depend on how it had been split, so nothing of the deformation is left in them; but they train
along a path of their own, not along that of the original.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from specdef_jax import trees
from specdef_jax.attacks.adjacent import (
    AdjacentPair,
    check_disjoint,
    factors_of,
    kernels_of,
    put_factors,
    put_kernels,
)
from specdef_jax.attacks.bill import Attack, Knowledge, carry_out
from specdef_jax.attacks.released import pairs_of
from specdef_jax.errors import ProblemError
from specdef_jax.gauge import balance
from specdef_jax.parametrization import Deformed, Problem, is_structured, loss_on, problem


def rebalance(
    loss: Callable[..., Array], deformed: PyTree, *args: Any, pairs: Sequence[AdjacentPair] = ()
) -> Attack:
    """Return the attack that trains balanced factors in the place of adjacent ones.

    Both factors of every Deformed leaf are balanced against one another, and every pair of kernels that
    is named. The factors stay in their places, shapes and dtypes: an inserted pair stays a pair, and what
    the bill adds is what had been inserted. A pair that was not deformed may be named as well.

    Args:
      loss: loss(params, *args) of the plain network.
      deformed: the released tree.
      args: data of one step, for the bill, and to see that the network is still the same.
      pairs: adjacent kernels of the architecture (gauge placement), each kernel in one pair at most.

    Raises:
      ProblemError: there is no pair, a name is wrong, a kernel is named twice, a factor is not finite, or the
        loss is another one afterwards, as something nonlinear stands between.
      StructureError: the shapes of a pair do not fit together.
    """
    if not pairs:
        pairs_of(deformed)
    check_disjoint(pairs)
    convert = functools.partial(_problem, loss, deformed, tuple(pairs), *args)
    attack = carry_out("rebalance", convert, loss, deformed, *args, knowledge=Knowledge.WEIGHTS)
    check_same(loss_on(loss, deformed, *args), deformed, attack.problem.params, *args)
    return attack


def balanced(
    params: PyTree, pairs: Sequence[AdjacentPair] = (), only: Collection[str] | None = None
) -> PyTree:
    """Return the tree with the factors of Deformed leaves, and of the pairs, balanced; float64 throughout.

    Args:
      params: a tree.
      pairs: adjacent kernels.
      only: names of the Deformed leaves to balance; None takes all.
    """

    def visit(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Deformed) or (only is not None and name not in only):
            return leaf
        return put_factors(leaf, *_balance_each(name, *factors_of(leaf)))

    found = trees.map_named(visit, params, is_leaf=is_structured)
    for pair in pairs:
        leaves = dict(trees.named_leaves(found, is_leaf=is_structured))
        found = put_kernels(found, pair, *_balance_each(pair.name, *kernels_of(leaves, pair)))
    return found


def _problem(
    loss: Callable[..., Array], deformed: PyTree, pairs: tuple[AdjacentPair, ...], *args: Any
) -> Problem:
    with jax.enable_x64(True):  # so that a float64 leaf stays float64
        params = balanced(deformed, pairs)
    return problem(loss, params, *args)


def _balance_each(name: str, X: Array, Y: Array) -> tuple[Array, Array]:
    """Balance every pair of a stack; one after another, as a batch of decompositions is no faster."""
    found = jax.lax.map(lambda pair: balance(*pair), (X, Y))
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in found):
        raise ProblemError(f"'{name}' holds NaN or Inf, or overflows when balanced; repair the checkpoint.")
    return found


def check_same(loss: Callable[..., Array], before: PyTree, after: PyTree, *args: Any) -> None:
    """Raise ProblemError unless two trees have the same loss, to what rounding may leave of it."""
    here, there = float(loss(before, *args)), float(loss(after, *args))
    # A deformed layer is exact to alpha times the unit roundoff only (THEORY.md 1.2), and eps^(1/4) leaves
    # room for every alpha that a dtype bears; a nonlinear map between changes the loss by much more.
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(before) if _is_float(x))
    if not abs(there - here) <= eps**0.25 * (1 + abs(here)):
        raise ProblemError(
            f"the loss is {there:.6g} after rebalancing and was {here:.6g}: two of these matrices are not "
            "adjacent (a norm or an activation between, a bias or groups not named); leave that pair out."
        )


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
