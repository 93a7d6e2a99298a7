"""Dense Hessians and gradients of small networks, merged trees included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from specdef_jax.parametrization import loss_on


class Curvature(NamedTuple):
    """Gradient and Hessian in the order of ravel_pytree, by jax.hessian alone."""

    gradient: Float[Array, " n"]
    hessian: Float[Array, "n n"]


def curvature_of(loss: Callable[..., Array], params: PyTree, *args: Any) -> Curvature:
    """Return the dense gradient and Hessian of loss(params, *args), params plain or deformed."""
    return _curvature(loss_on(loss, params, *args), params, args)


@jax.jit
def _curvature(loss: Any, params: PyTree, args: tuple[Any, ...]) -> Curvature:
    flat, unravel = ravel_pytree(params)

    def on_vector(v: Array) -> Array:
        return loss(unravel(v), *args)

    return Curvature(jax.grad(on_vector)(flat), jax.hessian(on_vector)(flat))


def linear_matrix(fn: Callable[[PyTree], PyTree], like: PyTree) -> Float[Array, "n n"]:
    """Return the matrix of a linear map on trees, in the order of ravel_pytree."""
    flat, unravel = ravel_pytree(like)

    def on_vector(v: Array) -> Array:
        return ravel_pytree(fn(unravel(v)))[0]

    return jax.vmap(on_vector)(jnp.eye(flat.size, dtype=flat.dtype)).T


def eigenvalues(matrix: Float[Array, "n n"]) -> Float[Array, " n"]:
    """Return the eigenvalues of the symmetric part, ascending."""
    return jnp.linalg.eigvalsh((matrix + matrix.T) / 2)


def sigma_1(matrix: Float[Array, "n n"]) -> Float[Array, ""]:
    """Return the largest |eigenvalue|."""
    return jnp.max(jnp.abs(eigenvalues(matrix)))


def rounding(matrix: Array, multiple: float = 8.0) -> Float[Array, ""]:
    """Return multiple * n * eps * ||matrix||_F: what eigvalsh may be off by (backward stability)."""
    n = matrix.shape[-1]
    return multiple * n * jnp.finfo(matrix.dtype).eps * jnp.linalg.norm(matrix)
