"""Inject: freeze the pair and add a plain matrix beside it (THEORY.md 5.3, the linear-size limit).

y = layer(h) + B h with B = 0 at the start. For optimizers whose updates depend on gradients and
their own state alone, (W + B_t, rest_t) is fine-tuning of the original network, step for step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from specdef_jax.attacks.bill import Attack, carry_out
from specdef_jax.attacks.released import in_place, kernels_in_place, through
from specdef_jax.parametrization import Problem


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
    return carry_out("inject", convert, loss, deformed, *args)


def _problem(loss: Callable[..., Array], deformed: PyTree) -> Problem:
    params, pairs = in_place(deformed, lambda pair: jnp.zeros_like(pair.weight), lambda pair: pair)
    return through(loss, params, Partial(_read_injected, pairs))


def _read_injected(pairs: PyTree, params: PyTree) -> PyTree:
    """Return the plain network: a layer is linear, so layer(h) + B h is (C Wt + B) h."""
    return kernels_in_place(pairs, params, lambda pair, B: pair.materialize() + B)
