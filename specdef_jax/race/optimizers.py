"""The optimizers raced by default: step_size -> optax transformation."""

from __future__ import annotations

import optax
from jaxtyping import Array


def sgd(step_size: Array | float) -> optax.GradientTransformation:
    """Return plain gradient descent."""
    return optax.sgd(step_size)


def momentum(step_size: Array | float) -> optax.GradientTransformation:
    """Return heavy-ball momentum .9."""
    return optax.sgd(step_size, momentum=0.9)


def adam(step_size: Array | float) -> optax.GradientTransformation:
    """Return Adam with optax's defaults."""
    return optax.adam(step_size)


FIRST_ORDER = {"sgd": sgd, "momentum": momentum, "adam": adam}
