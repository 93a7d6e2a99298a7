"""Inject: freeze the pair and add a plain matrix beside it (THEORY.md 5.3, the linear-size limit).

y = layer(h) + B h with B = 0 at the start. For optimizers whose updates depend on gradients and
their own state alone, (W + B_t, rest_t) is fine-tuning of the original network, step for step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from specdef_jax import trees
from specdef_jax.attacks.bill import Attack, carry_out
from specdef_jax.attacks.released import pairs_of, plain_problem
from specdef_jax.parametrization import Deformed, Problem, is_structured


def inject(loss: Callable[..., Array], deformed: PyTree, *args: Any) -> Attack:
    """Return the attack that trains a zero-initialised matrix beside each frozen pair.

    Args:
      loss: loss(params, *args) of the plain network.
      deformed: the deformed tree.
      args: data of one step, for the bill.

    Raises:
      ProblemError: nothing is deformed.
    """
    convert = functools.partial(_problem, loss, deformed)
    return carry_out("inject", convert, plain_problem(loss, deformed), *args)


def _problem(loss: Callable[..., Array], deformed: PyTree) -> Problem:
    pairs = pairs_of(deformed)
    params = jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf.weight) if isinstance(leaf, Deformed) else leaf,
        deformed,
        is_leaf=is_structured,
    )
    as_partial = loss if isinstance(loss, Partial) else Partial(loss)
    return Problem(params, Partial(_injected_loss, as_partial, pairs), Partial(_read_injected, pairs))


def _injected_loss(loss: Partial, pairs: dict[str, Deformed], params: PyTree, *args: Any) -> Array:
    return loss(_read_injected(pairs, params), *args)


def _read_injected(pairs: dict[str, Deformed], params: PyTree) -> PyTree:
    """Return the plain network: a layer is linear, so layer(h) + B h is (C Wt + B) h."""
    return trees.map_named(
        lambda name, leaf: pairs[name].materialize() + leaf if name in pairs else leaf, params
    )
