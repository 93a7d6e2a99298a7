"""Placeholder until the branch of K-FAC is merged."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def work(state: PyTree) -> Float[Array, ""]:
    """Return the gradient evaluations of the last step."""
    del state
    return jnp.ones(())
