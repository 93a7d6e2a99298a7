"""The type checker that the tests put on specdef_jax: beartype, reading annotations as JAX does."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype

# An annotation says what a caller may pass. Under jit a float arrives as a traced scalar, and JAX takes
# a NumPy array wherever it takes its own. Shapes and dtypes are held to the letter all the same.
_AS_JAX_READS_THEM = FrozenDict(
    {
        float: float | int | np.number | jax.Array,
        int: int | np.integer | jax.Array,
        jax.Array: jax.Array | np.ndarray,
    }
)
_beartype = beartype(conf=BeartypeConf(hint_overrides=_AS_JAX_READS_THEM))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with its annotations checked at every call.

    The constructors of dataclasses stay unchecked: JAX rebuilds a pytree node around whatever a
    transformation puts in its leaves (vmap axes, shardings, shape structs, masks), not arrays only.
    """
    return function if function.__name__ == "__init__" else _beartype(function)
