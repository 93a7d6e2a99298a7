"""The first-order methods of THEORY 3.1 as optax has them, on quadratics: simulated, and as a linear map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

Step = Any  # a float or a traced scalar
LARGE = 1e10
Maker = Callable[..., optax.GradientTransformation]


def gd(step: Step, momentum: Step, P: Array | None = None) -> optax.GradientTransformation:
    """optax.sgd."""
    return _with(P, optax.sgd(step))


def heavy_ball(step: Step, momentum: Step, P: Array | None = None) -> optax.GradientTransformation:
    """optax.sgd with momentum: m <- g + b m, no factor 1 - b."""
    return _with(P, optax.sgd(step, momentum=momentum))


def nesterov(step: Step, momentum: Step, P: Array | None = None) -> optax.GradientTransformation:
    """optax.sgd with momentum and nesterov: the update is g + b m with the new m."""
    return _with(P, optax.sgd(step, momentum=momentum, nesterov=True))


def ema_momentum(step: Step, momentum: Step, P: Array | None = None) -> optax.GradientTransformation:
    """optax.ema without debiasing: m <- b m + (1 - b) g."""
    return optax.chain(optax.ema(momentum, debias=False), _precondition(P), optax.scale(-step))


def ema_nesterov(step: Step, momentum: Step, P: Array | None = None) -> optax.GradientTransformation:
    """The update is b m + (1 - b) g with the new m: nadam's without its bias corrections."""
    scaled = optax.chain(optax.scale(1 - momentum), optax.trace(momentum, nesterov=True))
    return optax.chain(scaled, _precondition(P), optax.scale(-step))


def debiased(step: Step, momentum: Step, P: Array | None = None) -> optax.GradientTransformation:
    """optax.ema as it comes: m / (1 - b^t) is handed on."""
    return optax.chain(optax.ema(momentum), _precondition(P), optax.scale(-step))


def frozen_adam(step: Step, momentum: Step) -> optax.GradientTransformation:
    """optax.adam with an eps so large that its preconditioner is eps I, undone in the step."""
    return optax.adam(step * LARGE, b1=momentum, b2=0.5, eps=LARGE)


def frozen_nadam(step: Step, momentum: Step) -> optax.GradientTransformation:
    """optax.nadam, frozen in the same way."""
    return optax.nadam(step * LARGE, b1=momentum, b2=0.5, eps=LARGE)


METHODS: dict[str, Maker] = {
    "gd": gd,
    "heavy_ball": heavy_ball,
    "nesterov": nesterov,
    "ema_momentum": ema_momentum,
    "ema_nesterov": ema_nesterov,
}


@partial(jax.jit, static_argnames=("make", "steps"))
def simulate(
    make: Maker, step: Array, momentum: Array, H: Float[Array, "n n"], x: Float[Array, " n"], *rest: Any,
    steps: int,
) -> Float[Array, "steps_plus_1 n"]:  # fmt: skip
    """Return x_0, x_1, ..., x_steps of make(step, momentum, *rest) on x^T H x / 2."""
    optimizer = make(step, momentum, *rest)

    def one(carry: tuple, _: None) -> tuple[tuple, Array]:
        x, state = carry
        updates, state = optimizer.update(H @ x, state, x)
        after = optax.apply_updates(x, updates)
        return (after, state), after

    _, path = jax.lax.scan(one, (x, optimizer.init(x)), None, length=steps)
    return jnp.concatenate([x[None], path])


def update_map(optimizer: optax.GradientTransformation, H: Float[Array, "n n"], count: int = 0) -> Array:
    """Return the Jacobian of one optax step on x^T H x / 2, in x and the optimizer's floats.

    Args:
      optimizer: any whose step is differentiable in its state.
      H: (n, n).
      count: how many steps it has taken, where its state counts them.
    """
    x = jnp.zeros(len(H))
    leaves, treedef = jax.tree.flatten((x, optimizer.init(x)))
    floats = {i: leaf for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    flat, unravel = ravel_pytree(floats)
    counted = [jnp.full_like(leaf, count) for leaf in leaves]

    def step(v: Array) -> Array:
        parts = unravel(v)
        x, state = treedef.unflatten(parts.get(i, leaf) for i, leaf in enumerate(counted))
        updates, state = optimizer.update(H @ x, state, x)
        after = jax.tree.leaves((optax.apply_updates(x, updates), state))
        return ravel_pytree({i: after[i] for i in floats})[0]

    return jax.jacobian(step)(jnp.zeros_like(flat))


def radii(method: str, steps: Any, momentum: Any, H: Any, P: Any) -> np.ndarray:
    """Return the spectral radius of optax's update map for every step."""
    maps = jax.vmap(lambda step: map_of(METHODS[method], step, momentum, H, P))(jnp.asarray(steps))
    return np.abs(np.linalg.eigvals(np.asarray(maps))).max(axis=-1)


@partial(jax.jit, static_argnames=("make", "count"))
def map_of(make: Any, step: Array, momentum: Array, H: Array, P: Array | None, count: int = 0) -> Array:
    """Return update_map of make(step, momentum, P), compiled once for all steps and momenta."""
    return update_map(make(step, momentum, P), jnp.asarray(H), count)


def _with(P: Array | None, method: optax.GradientTransformation) -> optax.GradientTransformation:
    """Put a fixed preconditioner in front; these methods are linear, so before and after are the same."""
    return method if P is None else optax.chain(_precondition(P), method)


def _precondition(P: Array | None) -> optax.GradientTransformation:
    def update(updates: Array, params: Any = None) -> Array:
        return updates if P is None else jnp.linalg.solve(P, updates)

    return optax.stateless(update)
