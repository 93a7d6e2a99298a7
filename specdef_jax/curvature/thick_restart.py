"""One cycle of thick-restart Lanczos: extend the basis, rotate it, measure (see lanczos.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from specdef_jax.curvature import basis as bs
from specdef_jax.curvature.restart import Setting, State, rotated, stepped


def extend(
    setting: Setting,
    product: Callable[[PyTree], PyTree],
    key: PRNGKeyArray,
    state: State,
    basis: PyTree,
) -> tuple[State, PyTree]:
    """Take Lanczos steps from vector `kept` to the last one."""
    m = setting.m

    def step(carry: tuple[Array, State, PyTree]) -> tuple[Array, State, PyTree]:
        j, state, basis = carry
        index = jnp.arange(m + 1)
        sub = jax.random.fold_in(key, state.matvecs)
        vector = bs.renewed(bs.row(basis, j), basis, index < j, state.vacant, state.raw, sub)
        basis = bs.set_row(basis, j, vector)
        image = product(vector)
        norm = jnp.maximum(state.norm, bs.normalize(image)[1])
        rest, column = bs.orthogonalize(image, basis, index <= j)
        following, beta = bs.normalize(rest)
        finite = jnp.isfinite(beta + jnp.sum(column))
        column, entries = column[:m], state.projection
        defect = jnp.max(jnp.where(jnp.arange(m) < j, jnp.abs(column - entries[:, j]), 0))
        entries = entries.at[:, j].set(column).at[j, :].set(column)
        state = stepped(setting, state, entries, j, beta, norm, defect, finite)
        return j + 1, state, bs.set_row(basis, j + 1, following)

    def unfinished(carry: tuple[Array, State, PyTree]) -> Array:
        return (carry[0] < m) & carry[1].finite

    _, state, basis = jax.lax.while_loop(unfinished, step, (state.kept, state, basis))
    return state, basis


def rotate(setting: Setting, state: State, basis: PyTree) -> tuple[State, PyTree]:
    """Replace the basis by its best Ritz vectors and the vector that follows them."""
    m, kept = setting.m, setting.kept
    theta, vectors = jnp.linalg.eigh(jnp.where(state.finite, state.projection, 0))
    order = jnp.argsort(setting.rank(theta), descending=True)
    theta, vectors = theta[order], vectors[:, order]
    coupling = state.beta * vectors[m - 1] * (not setting.whole)
    weights = jnp.pad(vectors[:, :kept].T, ((0, 0), (0, 1)))
    basis = bs.rotated(basis, weights, setting.in_place)
    basis = bs.set_row(basis, kept, bs.row(basis, m))  # from the new basis: reading the old one would copy it
    return rotated(setting, state, theta, coupling), basis


def measure(
    setting: Setting, product: Callable[[PyTree], PyTree], state: State, basis: PyTree, tol: Array
) -> tuple[State, PyTree]:
    """Measure the true residuals; return with them the sum of those that miss tol."""

    def pair(total: PyTree, i: Array) -> tuple[PyTree, tuple[Array, Array]]:
        vector = bs.row(basis, i)
        image = product(vector)
        square = bs.dot(vector, vector)
        value = bs.dot(vector, image) / square
        residual, size = bs.normalize(jax.tree.map(lambda z, v: z - value * v, image, vector))
        size = size / jnp.sqrt(square)
        share = jnp.where(size > tol * state.norm, size / jnp.where(state.norm > 0, state.norm, 1), 0)
        return jax.tree.map(lambda t, r: t + share * r, total, residual), (value, size)

    nothing = jax.tree.map(jnp.zeros_like, bs.row(basis, 0))
    total, (values, residuals) = jax.lax.scan(pair, nothing, jnp.arange(setting.k))
    finite = state.finite & jnp.all(jnp.isfinite(values + residuals))
    matvecs = state.matvecs + setting.k
    return replace(state, values=values, residuals=residuals, finite=finite, matvecs=matvecs), total
