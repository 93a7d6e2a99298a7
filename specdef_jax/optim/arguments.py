"""Extra arguments of an update, and what all optimizers ask of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from specdef_jax.errors import ProblemError, SpecError

Product = Callable[[PyTree], PyTree]
Value = Callable[[PyTree], Array]


def needed(extra: Mapping[str, Any], optimizer: str, *names: str) -> tuple[Any, ...]:
    """Return the named extra arguments.

    Raises:
      ProblemError: one is missing; it is named, with what it should be.
    """
    for name in names:
        if extra.get(name) is None:
            raise ProblemError(f"{optimizer} needs the extra argument {name}=: {_MEANING[name]}.")
    return tuple(extra[name] for name in names)


def need_params(params: PyTree | None, optimizer: str) -> PyTree:
    """Return the parameters, which optax lets a caller leave out.

    Raises:
      ProblemError: they were left out.
    """
    if params is None:
        raise ProblemError(f"{optimizer} needs the parameters: update(grads, state, params, ...).")
    return params


def gain_ratio(
    extra: Mapping[str, Any], params: PyTree | None, step: PyTree, predicted: Array, optimizer: str
) -> Array:
    """Return the decrease of the loss by a step over the one a model predicted; -inf where it is not finite.

    Raises:
      ProblemError: value, value_fn or the parameters are missing.
    """
    value, value_fn = needed(extra, optimizer, "value", "value_fn")
    actual = value - value_fn(jax.tree.map(jnp.add, need_params(params, optimizer), step))
    return jnp.where(jnp.isfinite(actual), actual, -jnp.inf) / jnp.where(predicted > 0, predicted, 1)


def like(updates: PyTree, step: PyTree) -> PyTree:
    """Return a step in the dtypes of the updates."""
    return jax.tree.map(lambda p, g: p.astype(g.dtype), step, updates)


def check_positive(**values: float) -> None:
    """Raise SpecError, naming it, unless every value is positive. Traced values are not looked at."""
    for name, value in values.items():
        if isinstance(value, int | float) and not value > 0:
            raise SpecError(f"{name} = {value}: give a positive number.")


_MEANING = {
    "hvp": "hvp(tree) -> tree, the Hessian product at the current parameters",
    "gnvp": "gnvp(tree) -> tree, the Gauss-Newton product at the current parameters",
    "value": "the loss at the current parameters",
    "value_fn": "value_fn(params) -> scalar, the loss on the data of this step",
}
