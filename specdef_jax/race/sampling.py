"""What the steps of a race are taken on."""

from __future__ import annotations

from typing import Any

import jax
from jax.tree_util import Partial
from jaxtyping import Array, PRNGKeyArray

from specdef_jax.errors import SpecError
from specdef_jax.race.inputs import check_count


def full_batch(*data: Any) -> Partial:
    """Return a sample that gives all the data at every step: a deterministic problem."""
    return Partial(_all_of_it, *data)


def minibatches(size: int, *data: Array) -> Partial:
    """Return a sample of `size` examples, drawn anew at every step with replacement.

    Args:
      size: examples of a step.
      data: arrays of one leading length.

    Raises:
      SpecError: the size is no positive integer, or the lengths differ.
    """
    check_count("size", size)
    lengths = {len(x) for x in data}
    if len(lengths) != 1:
        raise SpecError(f"data of lengths {sorted(lengths)}: give arrays with one leading length.")
    return Partial(_some_of_it, *data, Rows(size))


@jax.tree_util.register_static
class Rows(int):
    """How many rows to draw; static, as it gives shapes."""


def _all_of_it(*data_and_key: Any) -> tuple[Any, ...]:
    return data_and_key[:-1]


def _some_of_it(*given: Any) -> tuple[Array, ...]:
    *data, size, key = given
    rows = _rows(key, int(size), len(data[0]))
    return tuple(x[rows] for x in data)


def _rows(key: PRNGKeyArray, size: int, total: int) -> Array:
    return jax.random.randint(key, (size,), 0, total)
