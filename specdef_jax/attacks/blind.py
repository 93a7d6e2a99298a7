"""Blind: look at the weights, decide which pairs were deformed, rebalance those (THEORY.md 5.5, 5.6).

Knows the weights and, by the architecture, which matrices stand next to each other. Not which of them
compensates, not whether or where anything was deformed, not alpha, k or U. A natural layer called deformed
costs seconds and nothing else: the network stays the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, PyTree

from specdef_jax.attacks.adjacent import AdjacentPair, check_disjoint
from specdef_jax.attacks.bill import Attack, Knowledge, carry_out
from specdef_jax.attacks.detect import detect
from specdef_jax.attacks.rebalance import balanced, check_same
from specdef_jax.errors import SpecError
from specdef_jax.parametrization import Problem, loss_on, problem

PAIR_SIGNS = {"compensation", "imbalance", "pencil_gap", "ratio_jump"}  # of two factors; others of one matrix


def blind(
    loss: Callable[..., Array],
    released: PyTree,
    *args: Any,
    pairs: Sequence[AdjacentPair] = (),
    alpha: float = 2.0,
) -> Attack:
    """Return the attack that balances what looks deformed, and trains everything.

    Args:
      loss: loss(params, *args) of the plain network.
      released: any tree, deformed or not; where nothing shows, it is trained as it is.
      args: data of one step, for the bill, and to see that the network is still the same.
      pairs: adjacent kernels of the architecture (gauge placement), each kernel in one pair at most.
      alpha: the smallest deformation worth undoing, see Scores.signs.

    Raises:
      ProblemError, StructureError: as rebalance; a pair that is not suspected is not looked at further.
      LeafError: a matrix holds NaN or Inf.
      SpecError: alpha is not above 1.
    """
    check_disjoint(pairs)
    convert = functools.partial(_problem, loss, released, tuple(pairs), alpha, *args)
    attack = carry_out("blind", convert, loss, released, *args, knowledge=Knowledge.WEIGHTS)
    check_same(loss_on(loss, released, *args), released, attack.problem.params, *args)
    return attack


def suspects(released: PyTree, pairs: Sequence[AdjacentPair] = (), alpha: float = 2.0) -> tuple[str, ...]:
    """Return the names of Deformed leaves and pairs that look deformed by at least alpha.

    Args:
      released: any tree.
      pairs: adjacent kernels of the architecture.
      alpha: above 1.

    Raises:
      SpecError: alpha is not above 1: everything reaches the signs of no deformation.
    """
    if not alpha > 1:
        raise SpecError(f"alpha = {alpha}: every layer looks deformed by a factor of 1; give more.")
    scores = detect(released, pairs)
    return tuple(name for name, score in scores.items() if PAIR_SIGNS.intersection(score.signs(alpha)))


def _problem(
    loss: Callable[..., Array], released: PyTree, pairs: tuple[AdjacentPair, ...], alpha: float, *args: Any
) -> Problem:
    found = suspects(released, pairs, alpha)
    with jax.enable_x64(True):  # so that a float64 leaf stays float64
        params = balanced(released, [pair for pair in pairs if pair.name in found], only=found)
    return problem(loss, params, *args)
