"""What the steps of a race are taken on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from specdef_jax.errors import SpecError
from specdef_jax.race.inputs import check_count


def full_batch(*data: Any) -> Partial:
    """Return a sample that gives all the data at every step: a deterministic problem."""
    return Partial(_all_of_it, *data)


def minibatches(size: int, *data: Array, among: int | None = None) -> Partial:
    """Return a sample of `size` examples, drawn anew at every step with replacement.

    Args:
      size: examples of a step.
      data: arrays of one leading length.
      among: how many of them, from the first, are drawn from; all by default. It is data: a program compiled
        for some of the examples serves for more of them.

    Raises:
      SpecError: the size is no positive integer, the lengths differ, or there are not so many examples.
    """
    check_count("size", size)
    lengths = {len(x) for x in data}
    if len(lengths) != 1:
        raise SpecError(f"data of lengths {sorted(lengths)}: give arrays with one leading length.")
    total = lengths.pop()
    if among is not None and not 1 <= among <= total:
        raise SpecError(f"among = {among} of {total} examples: give a number from 1 to {total}.")
    return Partial(_some_of_it, *data, jnp.asarray(total if among is None else among), _Rows(size))


@jax.tree_util.register_static
class _Rows(int):
    """How many rows to draw; static, as it gives shapes."""


def _all_of_it(*data_and_key: Any) -> tuple[Any, ...]:
    return data_and_key[:-1]


def _some_of_it(*given: Any) -> tuple[Array, ...]:
    *data, total, size, key = given
    rows = jax.random.randint(key, (int(size),), 0, total)
    return tuple(x[rows] for x in data)
