"""Cubic-regularized Newton (ARC), its model minimized exactly in a Krylov space of the gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from specdef_jax import trees
from specdef_jax.optim.arguments import Product, check_positive, gain_ratio, like, needed


class CubicState(NamedTuple):
    """State of cubic_newton.

    Attributes:
      steps: steps taken.
      sigma: regularization of the next step.
      ratio: actual over predicted decrease of the last step.
      products: Hessian products of the last step.
      values: losses that it evaluated.
    """

    steps: Int[Array, ""]
    sigma: Float[Array, ""]
    ratio: Float[Array, ""]
    products: Int[Array, ""]
    values: Int[Array, ""]


def cubic_newton(
    sigma: float | Array = 1.0, *, adapt: bool = True, krylov: int = 20, smallest: float = 1e-12
) -> optax.GradientTransformationExtraArgs:
    """Return the minimizer of <g, p> + <p, H p> / 2 + sigma ||p||^3 / 3 over a Krylov space.

    Needs hvp and, to adapt, params, value and value_fn: sigma is halved where the loss fell by more than 0.9
    of what the model predicted, doubled where by less than 0.1; a step that raises the loss is not taken. On
    a deformed network the regularization is sigma ||phi s||^3 in the original parameters (THEORY.md 4.1).

    Args:
      sigma: regularization at the start.
      adapt: whether to adapt it and to refuse steps that raise the loss.
      krylov: Hessian products in a step, the dimension of the space.
      smallest: of sigma.

    Raises:
      SpecError: an argument is not positive.
      ProblemError: (in update) an extra argument is missing.

    Source: Cartis, Gould and Toint, Math. Program. 127 (2011) 245; Nesterov and Polyak (2006).
    """
    check_positive(sigma=sigma, krylov=krylov, smallest=smallest)  # type: ignore[arg-type]

    def init(params: PyTree) -> CubicState:
        dtype = trees.result_dtype(params)
        none = jnp.array(0)
        return CubicState(none, jnp.asarray(sigma, dtype), jnp.ones((), dtype), none, none)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, CubicState]:
        (hvp,) = needed(extra, "cubic_newton", "hvp")
        m = min(krylov, trees.size(updates))
        step, predicted = cubic_step(hvp, updates, state.sigma, m)
        count, products = state.steps + 1, jnp.array(m)
        if not adapt:
            return like(updates, step), CubicState(count, state.sigma, state.ratio, products, jnp.array(0))
        ratio = gain_ratio(extra, params, step, predicted, "cubic_newton")
        factor = jnp.where(ratio > 0.9, 0.5, jnp.where(ratio < 0.1, 2.0, 1.0))
        following = jnp.maximum(state.sigma * factor, smallest).astype(state.sigma.dtype)
        step = jax.tree.map(lambda p: jnp.where(ratio > 0, p, 0), step)
        ratio = ratio.astype(following.dtype)
        return like(updates, step), CubicState(count, following, ratio, products, jnp.array(1))

    return optax.GradientTransformationExtraArgs(init, update)


def cubic_step(
    hvp: Product, gradient: PyTree, sigma: Float[Array, ""] | float, krylov: int
) -> tuple[PyTree, Float[Array, ""]]:
    """Return the minimizer p of the cubic model in the Krylov space of the gradient, and minus its value.

    Args:
      hvp: Hessian product.
      gradient: g.
      sigma: regularization, positive.
      krylov: dimension, at most the number of entries.
    """
    norm = trees.norm(gradient)
    safe = jnp.where(norm > 0, norm, 1)
    basis, matrix = _lanczos(hvp, trees.scale(1 / safe, gradient), krylov)
    values, vectors = jnp.linalg.eigh(matrix)
    right = norm * vectors[0]  # g in the eigenbasis of the projected Hessian
    y = _secular(values, right, jnp.asarray(sigma, values.dtype))
    size = jnp.sqrt(jnp.sum(y**2))
    model = jnp.dot(right, y) + jnp.sum(values * y**2) / 2 + sigma * size**3 / 3
    weights = vectors @ y
    step = jax.tree.map(lambda b: jnp.tensordot(weights, b, axes=1, precision="highest"), basis)
    return step, -model


def _secular(values: Array, right: Array, sigma: Array) -> Array:
    """Return y = -(values + sigma r)^-1 right with r = ||y||; values are ascending.

    Solved for mu = values[0] + sigma r >= 0 and not for r, as the shifted values then do not cancel near the
    hard case (right orthogonal to the lowest eigenvector), which an unreduced Krylov space cannot reach.
    Bisection in log mu: ||y|| falls with mu, r grows.
    """
    info = jnp.finfo(values.dtype)
    above = values - values[0]
    total = jnp.sqrt(jnp.sum(right**2))
    largest = jnp.maximum(values[0], 0) + jnp.sqrt(total * sigma) + above[-1] * info.eps + info.tiny
    smallest = jnp.maximum(largest * info.eps**2, info.tiny)

    def solution(mu: Array) -> Array:
        return -right / (above + mu)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = jnp.sqrt(low) * jnp.sqrt(high)
        longer = jnp.sqrt(jnp.sum(solution(middle) ** 2)) > (middle - values[0]) / sigma
        return jnp.where(longer, middle, low), jnp.where(longer, high, middle)

    low, high = jax.lax.fori_loop(0, 2 * info.nmant, halve, (smallest, largest))
    return solution(jnp.sqrt(low) * jnp.sqrt(high))


def _lanczos(hvp: Product, start: PyTree, m: int) -> tuple[PyTree, Float[Array, "m m"]]:
    """Return m orthonormal Krylov vectors and the projected Hessian; zero vectors after a breakdown."""
    basis = jax.tree.map(lambda x: jnp.zeros((m + 1, *x.shape), x.dtype).at[0].set(x), start)
    dtype = trees.result_dtype(start)
    eps = jnp.finfo(dtype).eps

    def step(j: Array, carry: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
        basis, matrix = carry
        image = hvp(jax.tree.map(lambda b: b[j], basis))
        size = trees.norm(image)
        found = jnp.zeros(m + 1, dtype)
        for _ in range(2):
            parts = jax.tree.map(lambda b, x: jnp.sum(b * x, axis=tuple(range(1, b.ndim))), basis, image)
            weights = jax.tree.reduce(jnp.add, parts)
            image = jax.tree.map(
                lambda x, b, w=weights: x - jnp.tensordot(w, b, axes=1, precision="highest"), image, basis
            )
            found += weights
        beta = trees.norm(image)
        alive = beta > 10 * eps * size
        following = jax.tree.map(lambda x: jnp.where(alive, x / jnp.where(alive, beta, 1), 0), image)
        basis = jax.tree.map(lambda b, x: b.at[j + 1].set(x), basis, following)
        beta = jnp.where(alive, beta, 0)
        matrix = matrix.at[j, j].set(found[j])
        matrix = matrix.at[j, j + 1].set(beta, mode="drop").at[j + 1, j].set(beta, mode="drop")
        return basis, matrix

    basis, matrix = jax.lax.fori_loop(0, m, step, (basis, jnp.zeros((m, m), dtype)))
    return jax.tree.map(lambda b: b[:m], basis), matrix
