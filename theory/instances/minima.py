"""Minima of small networks, to the precision of float64, and gradient descent from points beside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from specdef_jax.parametrization import loss_on


def minimum(loss: Callable[..., Array], params: PyTree, *args: Any) -> PyTree:
    """Return params at which the gradient vanishes and no curvature is negative, as far as float64 goes.

    Adam first, then Newton steps with |eigenvalues|, damped by the gradient's norm: they converge
    quadratically and are repelled by saddles. The caller checks what was reached.
    """
    return _train(loss_on(loss, params, *args), params, args)


@partial(jax.jit, static_argnames="steps")
def descend(
    loss: Partial, params: PyTree, step: Array, args: tuple[Any, ...], steps: int
) -> Float[Array, " steps_plus_1"]:
    """Return the loss along optax.sgd(step), from before the first step to after the last."""
    optimizer = optax.sgd(step)

    def one(carry: tuple, _: None) -> tuple[tuple, Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, *args)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    (last, _), values = jax.lax.scan(one, (params, optimizer.init(params)), None, length=steps)
    return jnp.append(values, loss(last, *args))


@jax.jit
def _train(loss: Partial, params: PyTree, args: tuple[Any, ...]) -> PyTree:
    flat, unravel = ravel_pytree(params)
    optimizer = optax.adam(0.02)

    def value(v: Array) -> Array:
        return loss(unravel(v), *args)

    def adam(carry: tuple, _: None) -> tuple[tuple, None]:
        v, state = carry
        updates, state = optimizer.update(jax.grad(value)(v), state)
        return (optax.apply_updates(v, updates), state), None

    def newton(v: Array, _: None) -> tuple[Array, None]:
        gradient = jax.grad(value)(v)
        values, vectors = jnp.linalg.eigh(jax.hessian(value)(v))
        along = (vectors.T @ gradient) / (jnp.abs(values) + jnp.linalg.norm(gradient) + 1e-300)
        return v - vectors @ along, None

    (v, _), _ = jax.lax.scan(adam, (flat, optimizer.init(flat)), None, length=2_000)
    v, _ = jax.lax.scan(newton, v, None, length=60)
    return unravel(v)
