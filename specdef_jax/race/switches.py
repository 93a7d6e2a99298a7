"""Clipping, warmup and decay around any optimizer of a race.

They change what a race can see. Clipping bounds every step, so that step sizes beyond stability neither
explode nor throw a run onto a plateau: some that would be lost are usable, and a divergence is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from specdef_jax.errors import ProblemError, SpecError
from specdef_jax.race.runs import Factory


@dataclass(frozen=True)
class Switched:
    """An optimizer with switches; call it with a step size.

    Attributes:
      factory: step_size -> optax transformation.
      clip: largest global norm of the gradient that the optimizer sees, or None.
      warmup: steps over which the update grows linearly to its full size; 0 for none.
      decay: decoupled weight decay, decay * step_size * params taken off at each step, warmed up too.

    Raises:
      SpecError: a clip that is not positive, a negative warmup or decay.
    """

    factory: Factory
    clip: float | None = None
    warmup: int = 0
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise SpecError(f"clip = {self.clip}: give a positive norm, or None.")
        if self.warmup < 0 or self.decay < 0:
            raise SpecError(f"warmup = {self.warmup}, decay = {self.decay}: neither may be negative.")

    def __call__(self, step_size: Array | float) -> optax.GradientTransformation:
        """Return the transformation at a step size."""
        links: list[optax.GradientTransformation] = [self.factory(step_size)]
        if self.clip is not None:
            links.insert(0, optax.clip_by_global_norm(self.clip))
        if self.decay:
            links.append(_decayed(self.decay * step_size))
        if self.warmup:
            links.append(optax.scale_by_schedule(_ramp(self.warmup)))
        return optax.chain(*links) if len(links) > 1 else links[0]


def _ramp(steps: int) -> Callable[[Any], Array]:
    return lambda t: jnp.minimum((t + 1) / steps, 1.0)


def _decayed(rate: Array | float) -> optax.GradientTransformation:
    """Take rate * params off, in the dtype of the updates."""

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if params is None:
            raise ProblemError("decay needs the parameters: update(grads, state, params).")
        return jax.tree.map(lambda u, p: u - (rate * p).astype(u.dtype), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
