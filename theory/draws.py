"""Many random instances at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from specdef_jax.programs import free_when_many

BATCH = 1_000  # what stays in a core's cache


def over_draws(fn: Callable[..., PyTree], key: PRNGKeyArray, draws: int, *args: Any) -> PyTree:
    """Return fn(key, *args) for `draws` keys, vmapped in batches, as NumPy arrays with a leading axis."""
    free_when_many()
    found = _map(fn, jax.random.split(key, draws), args)
    return jax.tree.map(np.asarray, found)


@partial(jax.jit, static_argnames="fn")
def _map(fn: Callable[..., PyTree], keys: PRNGKeyArray, args: tuple[Any, ...]) -> PyTree:
    return jax.lax.map(lambda key: fn(key, *args), keys, batch_size=BATCH)
