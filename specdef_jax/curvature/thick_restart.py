"""One cycle of thick-restart Lanczos: extend the basis, rotate it, measure, decide (see lanczos.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.curvature import basis as bs
from specdef_jax.curvature.result import Status

Which = Literal["LM", "LA", "SA"]


@dataclass(frozen=True)
class Setting:
    """What is fixed while a run is compiled: k pairs wanted, a basis of m vectors, which end."""

    k: int
    m: int
    which: Which
    whole: bool  # the basis spans the whole space: one cycle is everything there is
    narrowest: str

    @property
    def kept(self) -> int:
        """Ritz vectors that a cycle keeps: the wanted ones and half of the others."""
        return max(self.k, min(self.k + (self.m - self.k) // 2, self.m - 1))

    def rank(self, values: Array) -> Array:
        """Return what is largest for the values asked for."""
        return {"LM": jnp.abs, "LA": jnp.positive, "SA": jnp.negative}[self.which](values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """At the top of a cycle A V[:kept] = V[:kept + 1] T[:kept + 1, :kept], up to what a new seed drops.

    The basis V, m + 1 orthonormal vectors of which the first kept + 1 count, is carried beside it.
    """

    projection: Float[Array, "m m"]  # T = V^T A V
    kept: Int[Array, ""]
    beta: Float[Array, ""]  # coupling of the last vector but one to the last
    raw: Bool[Array, ""]  # the next vector is no unit vector orthogonal to the others yet
    vacant: Bool[Array, ""]  # there is no next vector: draw one at random, uncoupled
    matvecs: Int[Array, ""]
    norm: Float[Array, ""]  # largest ||A v|| seen
    asymmetry: Float[Array, ""]
    reseeded: Bool[Array, ""]  # T no longer predicts its own entries
    finite: Bool[Array, ""]
    values: Float[Array, " k"]
    residuals: Float[Array, " k"]
    estimates: Float[Array, " k"]
    beyond: Float[Array, ""]  # estimate of pair k + 1 that exceeds its gap to pair k, else 0
    best: Float[Array, ""]  # smallest max residual measured since the last search began
    searching: Bool[Array, ""]  # a random vector was put in to look for repeated eigenvalues
    searched: Bool[Array, ""]  # it left the pairs unchanged
    reference: Float[Array, " k"]  # ranks it must leave unchanged
    code: Int[Array, ""]
    done: Bool[Array, ""]


def start(setting: Setting, dtype: Any) -> State:
    """Return the state before the first cycle: no vector yet, the first one drawn at random."""
    k, m = setting.k, setting.m
    zero, zeros, no = jnp.zeros((), dtype), jnp.zeros(k, dtype), jnp.array(False)
    return State(
        projection=jnp.zeros((m, m), dtype),
        kept=jnp.array(0),
        beta=zero,
        raw=~no,
        vacant=~no,
        matvecs=jnp.array(0),
        norm=zero,
        asymmetry=zero,
        reseeded=no,
        finite=~no,
        values=zeros,
        residuals=zeros,
        estimates=zeros,
        beyond=zero,
        best=zero + jnp.inf,
        searching=no,
        searched=jnp.array(k == 1 or setting.whole),
        reference=zeros,
        code=jnp.array(int(Status.NOT_CONVERGED)),
        done=no,
    )


def extend(
    setting: Setting,
    product: Callable[[PyTree], PyTree],
    key: PRNGKeyArray,
    state: State,
    basis: PyTree,
) -> tuple[State, PyTree]:
    """Take Lanczos steps from vector `kept` to the last one."""
    m = setting.m
    eps = jnp.finfo(state.beta.dtype).eps

    def step(carry: tuple[Array, State, PyTree]) -> tuple[Array, State, PyTree]:
        j, state, basis = carry
        index = jnp.arange(m + 1)
        sub = jax.random.fold_in(key, state.matvecs)
        vector = bs.row(basis, j)
        vector = jax.lax.cond(state.vacant, lambda v: trees.normal_like(sub, v), lambda v: v, vector)
        vector = jax.lax.cond(
            state.raw, lambda v: bs.orthonormalize(v, basis, index < j), lambda v: v, vector
        )
        basis = bs.set_row(basis, j, vector)
        image = product(vector)
        norm = jnp.maximum(state.norm, bs.normalize(image)[1])
        rest, column = bs.orthogonalize(image, basis, index <= j)
        following, beta = bs.normalize(rest)
        finite = jnp.isfinite(beta + jnp.sum(column))
        vacant = beta <= 10 * eps * norm  # an invariant subspace: what is left is rounding
        beta = jnp.where(vacant, 0, beta)

        column, entries = column[:m], state.projection
        defect = jnp.max(jnp.where(jnp.arange(m) < j, jnp.abs(column - entries[:, j]), 0))
        entries = entries.at[:, j].set(column).at[j, :].set(column)
        entries = entries.at[j, j + 1].set(beta, mode="drop")  # predicted; the next step measures it
        state = replace(
            state,
            projection=entries,
            beta=beta,
            raw=vacant,
            vacant=vacant,
            matvecs=state.matvecs + 1,
            norm=norm,
            asymmetry=jnp.where(state.reseeded, state.asymmetry, jnp.maximum(state.asymmetry, defect)),
            finite=finite,
        )
        return j + 1, state, bs.set_row(basis, j + 1, following)

    def unfinished(carry: tuple[Array, State, PyTree]) -> Array:
        return (carry[0] < m) & carry[1].finite

    _, state, basis = jax.lax.while_loop(unfinished, step, (state.kept, state, basis))
    return state, basis


def rotate(setting: Setting, state: State, basis: PyTree) -> tuple[State, PyTree]:
    """Replace the basis by its best Ritz vectors and the vector that follows them."""
    k, m, kept = setting.k, setting.m, setting.kept
    theta, vectors = jnp.linalg.eigh(jnp.where(state.finite, state.projection, 0))
    order = jnp.argsort(setting.rank(theta), descending=True)
    theta, vectors = theta[order], vectors[:, order]
    coupling = state.beta * vectors[m - 1] * (not setting.whole)
    entries = jnp.zeros((m, m), theta.dtype).at[jnp.arange(kept), jnp.arange(kept)].set(theta[:kept])
    if kept < m:
        entries = entries.at[:kept, kept].set(coupling[:kept])
    beyond = jnp.zeros((), theta.dtype)
    if k < m:
        ranks, estimate = setting.rank(theta), jnp.abs(coupling[k])
        beyond = jnp.where(estimate > ranks[k - 1] - ranks[k], estimate, 0)

    weights = jnp.pad(vectors[:, :kept].T, ((0, 0), (0, 1)))
    ritz = bs.combine(weights, basis)
    basis = jax.tree.map(lambda b, r: jax.lax.dynamic_update_slice_in_dim(b, r, 0, 0), basis, ritz)
    basis = bs.set_row(basis, kept, bs.row(basis, m))  # from the new basis: reading the old one would copy it
    state = replace(
        state,
        projection=entries,
        kept=jnp.full_like(state.kept, kept),
        estimates=jnp.abs(coupling[:k]),
        beyond=beyond,
    )
    return state, basis


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


def decide(
    setting: Setting,
    state: State,
    tol: Array,
    small: Array,
    ruled_out: Array,
    asymmetric: Array,
    last: Array,
    max_matvecs: Array,
) -> State:
    """Name the outcome, and prepare a cycle from a new seed in case there is none yet.

    The recurrence may converge where the true residuals do not. If putting the residuals into the basis does
    not halve them, nothing will.
    """
    k, m = setting.k, setting.m
    worst, target = jnp.max(state.residuals), tol * state.norm
    met = worst <= target
    rounding = 4 * jnp.finfo(worst.dtype).eps * state.norm
    stalled = small & ~met & ((worst <= rounding) | (worst > state.best / 2) | setting.whole)
    settled = met | stalled
    ranks = setting.rank(state.values)
    unchanged = jnp.all(jnp.abs(ranks - state.reference) <= jnp.maximum(target, worst))
    searched = state.searched | (settled & state.searching & ruled_out & unchanged)
    code = jnp.select(
        [~state.finite, asymmetric, met & searched, settled & searched],
        [Status.NOT_FINITE, Status.NOT_SYMMETRIC, Status.CONVERGED, Status.FLOOR],
        Status.NOT_CONVERGED,
    ).astype(state.code.dtype)
    search = settled & ~searched
    spent = state.matvecs + (m - k) + k > max_matvecs
    diagonal = jnp.arange(k)
    return replace(
        state,
        projection=jnp.zeros_like(state.projection).at[diagonal, diagonal].set(state.values),
        kept=jnp.full_like(state.kept, k),
        raw=jnp.array(True),
        vacant=search,
        reseeded=jnp.array(True),
        best=jnp.where(search & met, jnp.inf, jnp.minimum(state.best, worst)),
        searching=search,
        searched=searched,
        reference=jnp.where(search, ranks, state.reference),
        code=code,
        done=last | spent | (settled & searched),
    )
