"""One cycle of thick-restart Lanczos: rotate the basis, measure, extend it (see lanczos.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from specdef_jax.curvature import basis as bs
from specdef_jax.curvature.restart import Setting, State, rotated, stepped

Carry = tuple[Array, Array, State, PyTree, PyTree]  # pairs measured, next vector, state, basis, residuals


class Judged(NamedTuple):
    """Whether and how the pairs in front of the basis are judged.

    Attributes:
      due: whether it is time to.
      tol: of their true residuals.
      decide: the state that knows these -> what to do next.
    """

    due: Array
    tol: Array
    decide: Callable[[State], State]


def multiply(
    setting: Setting,
    product: Callable[[PyTree], PyTree],
    key: PRNGKeyArray,
    state: State,
    basis: PyTree,
    judged: Judged,
) -> tuple[State, PyTree]:
    """Measure the pairs if it is time to, then take Lanczos steps from vector `kept` to the last one.

    One loop for both, so that the product, which is most of the program, is compiled once. A measured pair
    stays where it is, and the sum of the residuals that miss tol becomes the next seed.
    """
    k, m = setting.k, setting.m

    def multiply_one(carry: Carry) -> Carry:
        i, j, state, basis, total = carry
        judging = i < k

        def next_vector() -> PyTree:
            mask, sub = jnp.arange(m + 1) < j, jax.random.fold_in(key, state.matvecs)
            return bs.renewed(bs.row(basis, j), basis, mask, state.vacant, state.raw, sub)

        vector = jax.lax.cond(judging, lambda: bs.row(basis, i), next_vector)
        basis = bs.set_row(basis, jnp.where(judging, i, j), vector)
        image = product(vector)

        def measured() -> tuple[State, PyTree, PyTree, Array]:
            found, added = _measured(judged.tol, state, i, vector, image, total)
            last = i == k - 1
            found = jax.lax.cond(last, judged.decide, lambda s: s, found)
            seed = jax.tree.map(lambda t, v: jnp.where(last, t, v), added, vector)
            return found, added, seed, jnp.where(last, k, i)

        def stepped_on() -> tuple[State, PyTree, PyTree, Array]:
            found, following = _stepped(setting, state, basis, j, image)
            return found, total, following, j + 1

        # one vector leaves the branches for the basis: a basis would be copied
        state, total, following, at = jax.lax.cond(judging, measured, stepped_on)
        basis = bs.set_row(basis, at, following)
        return i + judging, jnp.where(judging, state.kept, j + 1), state, basis, total

    def unfinished(carry: Carry) -> Array:
        i, j, state, _, _ = carry
        return (i < k) | ((j < m) & state.finite & ~state.done)

    nothing = jax.tree.map(jnp.zeros_like, bs.row(basis, 0))
    first = jnp.where(judged.due, 0, k)
    _, _, state, basis, _ = jax.lax.while_loop(
        unfinished, multiply_one, (first, state.kept, state, basis, nothing)
    )
    return state, basis


def _stepped(setting: Setting, state: State, basis: PyTree, j: Array, image: PyTree) -> tuple[State, PyTree]:
    """Return the state after Lanczos step j, and the vector that follows."""
    m = setting.m
    norm = jnp.maximum(state.norm, bs.normalize(image)[1])
    rest, column = bs.orthogonalize(image, basis, jnp.arange(m + 1) <= j)
    following, beta = bs.normalize(rest)
    finite = jnp.isfinite(beta + jnp.sum(column))
    column, entries = column[:m], state.projection
    defect = jnp.max(jnp.where(jnp.arange(m) < j, jnp.abs(column - entries[:, j]), 0))
    entries = entries.at[:, j].set(column).at[j, :].set(column)
    return stepped(setting, state, entries, j, beta, norm, defect, finite), following


def _measured(
    tol: Array, state: State, i: Array, vector: PyTree, image: PyTree, total: PyTree
) -> tuple[State, PyTree]:
    """Return the state that knows pair i and its true residual, and the sum of those that miss tol."""
    square = bs.dot(vector, vector)
    value = bs.dot(vector, image) / square
    residual, size = bs.normalize(jax.tree.map(lambda z, v: z - value * v, image, vector))
    size = size / jnp.sqrt(square)
    share = jnp.where(size > tol * state.norm, size / jnp.where(state.norm > 0, state.norm, 1), 0)
    found = replace(
        state,
        values=state.values.at[i].set(value),
        residuals=state.residuals.at[i].set(size),
        finite=state.finite & jnp.isfinite(value + size),
        matvecs=state.matvecs + 1,
    )
    return found, jax.tree.map(lambda t, r: t + share * r, total, residual)


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
