"""SVD chain: freeze the compensation and train the deformed weight as a product of p factors (THEORY.md 5.4).

Wt = F_1 ... F_p with the singular values of Wt to the power 1/p in each, so that no factor is larger than
(a sigma)^(1/p). A measured negative result: the compensation stands outside the chain, and curvature grows as
a^(2 (p - 1) / p) all the same. p = 1 is freeze.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from specdef_jax.attacks.bill import Attack, carry_out
from specdef_jax.attacks.released import in_place, kernels_in_place, through
from specdef_jax.errors import SpecError
from specdef_jax.parametrization import Deformed, KernelAxes, Problem, Side
from specdef_jax.parametrization import full_precision_matmul as matmul

Factors = tuple[Float[Array, "*stack _ _"], ...]


def svd_chain(loss: Callable[..., Array], deformed: PyTree, *args: Any, factors: int = 2) -> Attack:
    """Return the attack that trains p factors in the place of each deformed weight, compensations frozen.

    The factors of M = Wt^T, (*stack, rest, d) as in KernelAxes.to_matrix, in the order of M = F_1 ... F_p:
    (rest, r), p - 2 times (r, r), (r, d), with r = min(rest, d).

    Args:
      loss: loss(params, *args) of the plain network.
      deformed: the deformed tree.
      args: data of one step, for the bill.
      factors: p.

    Raises:
      ProblemError: nothing is deformed.
      SpecError: fewer than one factor.
    """
    if factors < 1:
        raise SpecError(f"factors = {factors}: a chain has at least one.")
    convert = functools.partial(_problem, loss, deformed, factors)
    return carry_out(f"svd_chain, p = {factors}", convert, loss, deformed, *args)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Compensation:
    """What is frozen of a pair, and how its kernel is laid out."""

    comp: Float[Array, "*stack d d"]
    shape: tuple[int, ...] = field(metadata={"static": True})
    side: Side = field(metadata={"static": True})
    axes: KernelAxes = field(metadata={"static": True})


def _problem(loss: Callable[..., Array], deformed: PyTree, p: int) -> Problem:
    params, held = in_place(
        deformed,
        lambda pair: _split(pair, p),
        lambda pair: _Compensation(pair.comp, pair.weight.shape, pair.side, pair.axes),
    )
    return through(loss, params, Partial(_read_chained, held))


def _split(pair: Deformed, p: int) -> Factors:
    """Return F_1, ..., F_p of one weight."""
    dtype, matrix = pair.weight.dtype, pair.axes.to_matrix(pair.weight, pair.side)
    if p == 1:
        return (matrix,)
    with jax.enable_x64(True):
        left, values, right = jnp.linalg.svd(matrix.astype(jnp.float64), full_matrices=False)
        root = values ** (1 / p)
        middle = root[..., None] * jnp.eye(root.shape[-1])
        made = left * root[..., None, :], *[middle] * (p - 2), root[..., None] * right
        return tuple(factor.astype(dtype) for factor in made)


def _read_chained(held: PyTree, params: PyTree) -> PyTree:
    return kernels_in_place(held, params, _chained, _Compensation)


def _chained(held: _Compensation, factors: Factors) -> Array:
    right = held.comp if held.side == "output" else jnp.swapaxes(held.comp, -1, -2)
    matrix = functools.reduce(matmul, (*factors, right))
    return held.axes.from_matrix(matrix, held.shape, held.side)
