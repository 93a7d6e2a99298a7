"""Precondition: undo the congruence in the optimizer, or in coordinates (THEORY.md 2.1, 4.4).

The metric of the undeformed network comes from one of three places. "diagonal" is phi by singular values, one
number per feature: gradient descent is then that on the identity-inserted network, step for step, in
coordinates turned by an orthogonal matrix, and coordinatewise methods see the turn. "phi" is phi itself,
from C: every optimizer is the same one on the identity-inserted network, which is what is stored, so nothing
is left to do in a step. "kfac" puts K-FAC's metric in front of any optimizer, for dense layers: it knows
nothing of pairs and is equivariant undamped, so what damping spoils stays slow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from specdef_jax.attacks.bill import Attack, Knowledge, carry_out
from specdef_jax.attacks.released import check_invertible, pairs_of
from specdef_jax.attacks.rescaling import KFac, Rescaled, placed, right_of
from specdef_jax.errors import ProblemError
from specdef_jax.parametrization import Deformed, Problem, is_structured, problem
from specdef_jax.parametrization import full_precision_matmul as matmul

Method = Literal["diagonal", "phi", "kfac"]


def precondition(
    loss: Callable[..., Array],
    deformed: PyTree,
    *args: Any,
    method: Method = "diagonal",
    damping: float = 1e-3,
) -> Attack:
    """Return the attack that trains both factors in the metric of the undeformed network.

    Args:
      loss: loss(params, *args) of the plain network.
      deformed: the deformed tree.
      args: data of one step, for the bill.
      method: where the metric comes from, see the module.
      damping: of K-FAC, which takes one more gradient a step.

    Raises:
      ProblemError: nothing is deformed, a compensation is singular ("diagonal"), or K-FAC meets a deformed
        kernel that is no plain matrix.
    """
    pairs = pairs_of(deformed)
    if method == "kfac":
        if other := [name for name, pair in pairs.items() if pair.weight.ndim != 2]:
            raise ProblemError(
                f"{', '.join(map(repr, other))}: K-FAC knows dense layers only; use 'diagonal' or 'phi'."
            )
        convert, wrap = functools.partial(problem, loss, deformed, *args), functools.partial(KFac, damping)
    else:
        turn = _turned if method == "diagonal" else _reset
        convert = functools.partial(_problem, loss, deformed, turn, *args)
        wrap = Rescaled if method == "diagonal" else None
    rung = Knowledge.WEIGHTS if method == "kfac" else Knowledge.WHICH_LAYERS
    return carry_out(
        f"precondition, {method}", convert, loss, deformed, *args, knowledge=rung, wrap=wrap
    )  # fmt: skip


def _problem(
    loss: Callable[..., Array], deformed: PyTree, turn: Callable[[Deformed], Deformed], *args: Any
) -> Problem:
    if turn is _turned:
        check_invertible(deformed)
    with jax.enable_x64(True):  # so that a float64 leaf stays float64
        params = jax.tree.map(
            lambda leaf: turn(leaf) if isinstance(leaf, Deformed) else leaf, deformed, is_leaf=is_structured
        )
    return problem(loss, params, *args)


def _reset(pair: Deformed) -> Deformed:
    """Return the identity-inserted pair (W, I)."""
    one = jnp.eye(pair.comp.shape[-1], dtype=pair.comp.dtype)
    return replace(pair, weight=pair.materialize(), comp=jnp.broadcast_to(one, pair.comp.shape))


def _turned(pair: Deformed) -> Deformed:
    """Return (M P, P^T right) with right = P S R^T: rows that are orthogonal, of norm s_i."""
    matrix, right = pair.axes.to_matrix(pair.weight, pair.side), right_of(pair)
    P = jnp.linalg.svd(right, full_matrices=False)[0]
    return placed(pair, matmul(matrix, P), matmul(jnp.swapaxes(P, -1, -2), right))
