"""One cycle of thick-restart Golub-Kahan-Lanczos: extend both bases, rotate them, measure (see singular.py).

With right vectors V and left vectors U, at the top of a cycle A V[:kept] = U[:kept] B[:kept, :kept] and
A^T U[:kept] = V[:kept + 1] B[:kept, :kept + 1]^T. Everything is measured by two Gram-Schmidt sweeps. What the
run decides from it, in restart.py, is the same as for eigenvalues.

Source: Baglama and Reichel, SIAM J. Sci. Comput. 27 (2005) 19.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from specdef_jax.curvature import basis as bs
from specdef_jax.curvature.restart import Setting, State, rotated, stepped

Product = Callable[[PyTree], PyTree]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bases:
    """m + 1 right vectors, m left ones, and the true residuals of the k pairs: A v - s u, A^T u - s v."""

    right: PyTree
    left: PyTree
    sides: Float[Array, "2 k"]


def extend(
    setting: Setting, product: Product, adjoint: Product, key: PRNGKeyArray, state: State, bases: Bases
) -> tuple[State, Bases]:
    """Take steps from right vector `kept` to the last one."""
    m = setting.m
    eps = jnp.finfo(state.beta.dtype).eps
    rows, cols = jnp.arange(m), jnp.arange(m + 1)

    def step(carry: tuple[Array, State, Bases]) -> tuple[Array, State, Bases]:
        j, state, bases = carry
        sub = jax.random.fold_in(key, state.matvecs)
        vector = bs.renewed(bs.row(bases.right, j), bases.right, cols < j, state.vacant, state.raw, sub)
        right = bs.set_row(bases.right, j, vector)

        image = product(vector)
        norm = jnp.maximum(state.norm, bs.normalize(image)[1])
        rest, column = bs.orthogonalize(image, bases.left, rows < j)
        following, alpha = bs.normalize(rest)
        lost = alpha <= 10 * eps * norm  # the image lies in the left basis: any new direction serves
        following = bs.renewed(following, bases.left, rows < j, lost, lost, jax.random.fold_in(sub, 1))
        column = column.at[j].set(jnp.where(lost, 0, alpha))
        left = bs.set_row(bases.left, j, following)

        back = adjoint(following)
        norm = jnp.maximum(norm, bs.normalize(back)[1])
        rest, found = bs.orthogonalize(back, right, cols <= j)
        unit, beta = bs.normalize(rest)
        entries = state.projection.at[:, j].set(column)
        # <u, A v> as the image says, against <A^T u, v> as the way back does
        defect = jnp.max(jnp.where(rows <= j, jnp.abs(found[:m] - entries[j]), 0))
        finite = jnp.isfinite(beta + jnp.sum(column) + jnp.sum(found))
        state = stepped(setting, state, entries, j, beta, norm, defect, finite)
        return j + 1, state, replace(bases, right=bs.set_row(right, j + 1, unit), left=left)

    def unfinished(carry: tuple[Array, State, Bases]) -> Array:
        return (carry[0] < m) & carry[1].finite

    _, state, bases = jax.lax.while_loop(unfinished, step, (state.kept, state, bases))
    return state, bases


def rotate(setting: Setting, state: State, bases: Bases) -> tuple[State, Bases]:
    """Replace both bases by the leading Ritz vectors, and the right vector that follows them."""
    m, kept = setting.m, setting.kept
    left, values, right = jnp.linalg.svd(jnp.where(state.finite, state.projection, 0))
    coupling = state.beta * left[m - 1] * (not setting.whole)
    basis = bs.rotated(bases.right, jnp.pad(right[:kept], ((0, 0), (0, 1))), setting.in_place)
    basis = bs.set_row(basis, kept, bs.row(basis, m))
    mixed = bs.rotated(bases.left, left[:, :kept].T, setting.in_place)
    return rotated(setting, state, values, coupling), replace(bases, right=basis, left=mixed)


def measure(
    setting: Setting, product: Product, adjoint: Product, state: State, bases: Bases, tol: Array
) -> tuple[State, Array, PyTree]:
    """Measure the true residuals of both sides; return them, and the sum of the right ones that miss tol."""

    def pair(total: PyTree, i: Array) -> tuple[PyTree, tuple[Array, Array]]:
        v, u = bs.row(bases.right, i), bs.row(bases.left, i)
        image, back = product(v), adjoint(u)
        value = bs.dot(u, image) / jnp.sqrt(bs.dot(u, u) * bs.dot(v, v))
        _, of_left = bs.normalize(jax.tree.map(lambda z, x: z - value * x, image, u))
        residual, of_right = bs.normalize(jax.tree.map(lambda z, x: z - value * x, back, v))
        norm = jnp.where(state.norm > 0, state.norm, 1)
        share = jnp.where(of_right > tol * state.norm, of_right / norm, 0)
        total = jax.tree.map(lambda t, r: t + share * r, total, residual)
        return total, (value, jnp.stack([of_left, of_right]))

    nothing = jax.tree.map(jnp.zeros_like, bs.row(bases.right, 0))
    total, (values, sides) = jax.lax.scan(pair, nothing, jnp.arange(setting.k))
    finite = state.finite & jnp.all(jnp.isfinite(values + jnp.sum(sides, axis=1)))
    matvecs = state.matvecs + setting.price * setting.k
    residuals = jnp.max(sides, axis=1)
    state = replace(state, values=values, residuals=residuals, finite=finite, matvecs=matvecs)
    return state, sides.T, total
