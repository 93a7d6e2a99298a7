"""Identity injection: freeze the pair and train a square matrix after it (THEORY.md 5.3, the variant).

y = S layer(h) with S = I at the start: m^2 parameters instead of the m n of inject. It is another path than
fine-tuning: gradient descent on S moves W by the gradient times W^T W, so that W_t keeps to the row space of
W and moves fastest along its large singular values. Nothing of alpha is left in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from specdef_jax.attacks.bill import Attack, carry_out
from specdef_jax.attacks.released import in_place, kernels_in_place, through
from specdef_jax.parametrization import Deformed, Problem, full_precision_matmul


def identity(loss: Callable[..., Array], deformed: PyTree, *args: Any) -> Attack:
    """Return the attack that trains an identity-initialised S on the outputs of each frozen pair.

    S multiplies outputs, before the bias, whichever side was deformed: (*stack, m, m) in the place of a
    pair, in the layout of kernels, h @ kernel @ S.

    Args:
      loss: loss(params, *args) of the plain network.
      deformed: the deformed tree.
      args: data of one step, for the bill.

    Raises:
      ProblemError: nothing is deformed.
    """
    convert = functools.partial(_problem, loss, deformed)
    return carry_out("identity", convert, loss, deformed, *args)


def _problem(loss: Callable[..., Array], deformed: PyTree) -> Problem:
    params, pairs = in_place(deformed, _identity, lambda pair: pair)
    return through(loss, params, Partial(_read_multiplied, pairs))


def _identity(pair: Deformed) -> Float[Array, "*stack m m"]:
    shape = pair.weight.shape
    m, stack = pair.axes.dim(shape, "output"), tuple(shape[i] for i in pair.axes.stack)
    return jnp.broadcast_to(jnp.eye(m, dtype=pair.weight.dtype), (*stack, m, m))


def _read_multiplied(pairs: PyTree, params: PyTree) -> PyTree:
    return kernels_in_place(pairs, params, _multiplied)


def _multiplied(pair: Deformed, S: Array) -> Array:
    kernel = pair.materialize()
    product = full_precision_matmul(pair.axes.to_matrix(kernel, "output"), S)
    return pair.axes.from_matrix(product, kernel.shape, "output")
