"""Extreme eigenvalues of a symmetric operator by thick-restart Lanczos on pytrees.

Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602, with what a number that others build on needs besides:

* Full reorthogonalization, two Gram-Schmidt sweeps; the projection is what the sweeps measured, so a
  product that is not symmetric shows up as a projection that is not.
* One more product per pair gives the true residual. The cheap one keeps falling below rounding level.
* One Krylov sequence finds one copy of a repeated eigenvalue. For k > 1 the search is therefore taken up
  again from a random vector orthogonal to the converged pairs, until it leaves them unchanged.

One cycle extends the basis from `kept` to m vectors, rotates it to the Ritz vectors and keeps the best. When
the estimates converge, the true residuals are measured and either the run ends or the next cycle starts from
a seed other than the recurrence's own: the residuals themselves if they miss tol, a random vector if they
meet it. All of it is one compiled while_loop. On one device vectors are raveled, which compiles several times
faster than a tree of many leaves; on several they keep the tree and its sharding. Memory: a basis of (m + 1) vectors and a temporary of half that
while it is rotated; a step costs one product and four passes over the basis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.curvature import basis as bs
from specdef_jax.curvature.narrow import narrowest_float
from specdef_jax.curvature.operators import Operator, flattened, unflatten_vector
from specdef_jax.curvature.result import Eigen, Status
from specdef_jax.errors import ProblemError

Which = Literal["LM", "LA", "SA"]


def eigsh(
    op: Operator,
    k: int = 1,
    which: Which = "LM",
    tol: float = 1e-6,
    *,
    key: PRNGKeyArray,
    max_matvecs: int = 2000,
    krylov: int | None = None,
) -> Eigen:
    """Return k extreme eigenpairs of a symmetric operator, with true residuals.

    Args:
      op: symmetric operator. It is a jit argument: other data of the same shapes does not compile again.
      k: number of pairs, 1 <= k <= op.size.
      which: "LM" largest magnitude, "LA" largest (algebraic), "SA" smallest.
      tol: converged when every true residual ||A v - theta v|| is at most tol * max ||A v||.
      key: seeds the start vector; the result is deterministic in it.
      max_matvecs: budget of products, never exceeded.
      krylov: vectors in the basis, default max(20, 2 k + 10). More memory, fewer products.

    Returns:
      Eigen, in op.dtype (at least float32). Read `status` first. A repeated or clustered eigenvalue counts as
      often as it occurs, except if the random restart misses it (for k = 1 there is nothing to miss).

    Raises:
      ProblemError: k, which, tol, krylov or max_matvecs has no meaning, or op says it is not symmetric.

    Example:
      >>> op = from_matrix(jnp.diag(jnp.array([1.0, -5.0, 3.0])))
      >>> eigsh(op, k=1, which="LM", key=jax.random.key(0)).values
      Array([-5.], dtype=float32)
    """
    m = _check(op, k, which, tol, max_matvecs, krylov)
    setting = _Setting(k, m, which, whole=m == op.size, narrowest=_narrowest(op))
    if _spread(op):
        return _solve(setting, op, key, tol, max_matvecs)
    found = _solve(setting, flattened(op), key, tol, max_matvecs)
    return replace(found, vectors=unflatten_vector(op, found.vectors))


def _spread(op: Operator) -> bool:
    """Tell whether data of the operator lies on several devices, or may: inside jit one cannot know."""
    data = [leaf for leaf in jax.tree.leaves(op) if isinstance(leaf, jax.Array)]
    return any(isinstance(x, Tracer) or len(x.devices()) > 1 for x in data)


def _check(op: Operator, k: int, which: str, tol: float, max_matvecs: int, krylov: int | None) -> int:
    n = op.size
    if not op.symmetric:
        raise ProblemError(f"eigsh needs a symmetric operator, this {op.kind} is not; use svds.")
    if not 1 <= k <= n:
        raise ProblemError(f"k = {k} eigenpairs of an operator of size {n}; give 1 <= k <= {n}.")
    if which not in ("LM", "LA", "SA"):
        raise ProblemError(f"which = {which!r} is not known; give 'LM', 'LA' or 'SA'.")
    if not tol >= 0:
        raise ProblemError(f"tol = {tol}; give a relative residual >= 0, e.g. 1e-6.")
    m = min(n, max(20, 2 * k + 10) if krylov is None else krylov)
    if m < min(n, k + 2):
        raise ProblemError(f"krylov = {krylov} is too small for k = {k}; give at least {k + 2}.")
    if max_matvecs < m + k:
        raise ProblemError(
            f"max_matvecs = {max_matvecs} does not pay for a cycle and its residuals; give at least {m + k}."
        )
    return m


def _narrowest(op: Operator) -> str:
    leaves, treedef = jax.tree.flatten(op)
    return _narrowest_in(treedef, tuple(jax.eval_shape(_identity, *leaves)))


@lru_cache(maxsize=256)  # new data of known shapes must not trace the loss again
def _narrowest_in(treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> str:
    def product(leaves: tuple[Any, ...], vector: PyTree) -> PyTree:
        return treedef.unflatten(leaves).mv(vector)

    return narrowest_float(product, leaves, treedef.unflatten(leaves).template)


@jax.jit
def _identity(*leaves: Any) -> tuple[Any, ...]:
    return leaves


@dataclass(frozen=True)
class _Setting:
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
class _State:
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


@partial(jax.jit, static_argnames="setting")
def _solve(setting: _Setting, op: Operator, key: PRNGKeyArray, tol: Any, max_matvecs: Any) -> Eigen:
    dtype = jnp.promote_types(op.dtype, jnp.float32)
    k, m, kept = setting.k, setting.m, setting.kept
    product = bs.in_dtype(op.mv, dtype)
    tol = jnp.asarray(tol, dtype)

    def body(carry: tuple[_State, PyTree]) -> tuple[_State, PyTree]:
        state, basis = _rotate(setting, *_extend(setting, product, key, *carry))
        # half of tol leaves room for what a new seed drops; below rounding, which shows as asymmetry,
        # estimates say nothing and may not fall further
        goal = jnp.maximum(tol, 4 * jnp.finfo(dtype).eps) * state.norm / 2
        goal = jnp.maximum(goal, state.asymmetry)
        small = jnp.max(state.estimates) <= goal
        ruled_out = ~state.searching | (state.beyond <= goal)
        asymmetric = state.asymmetry > jnp.finfo(setting.narrowest).eps ** 0.5 * state.norm
        last = ~state.finite | asymmetric | setting.whole | (state.matvecs + m - kept + k > max_matvecs)

        def judge(state: _State) -> tuple[_State, PyTree]:
            state, defect = _measure(setting, product, state, basis, tol)
            return _decide(setting, state, tol, small, ruled_out, asymmetric, last, max_matvecs), defect

        def carry_on(state: _State) -> tuple[_State, PyTree]:
            return state, bs.row(basis, kept)

        # only one vector leaves the branches: a basis would be copied
        state, seed = jax.lax.cond((small & ruled_out) | last, judge, carry_on, state)
        return state, bs.set_row(basis, state.kept, seed)

    start = _start(setting, dtype), bs.zeros(m + 1, op.template, dtype)
    state, basis = jax.lax.while_loop(lambda carry: ~carry[0].done, body, start)
    return Eigen(
        values=jnp.where(state.finite, state.values, jnp.nan),
        vectors=jax.tree.map(lambda b: b[:k], basis),
        residuals=jnp.where(state.finite, state.residuals, jnp.nan),
        estimates=state.estimates,
        norm=state.norm,
        floor=state.norm * jnp.finfo(setting.narrowest).eps.astype(dtype),
        asymmetry=state.asymmetry,
        matvecs=state.matvecs,
        code=state.code,
        narrowest=setting.narrowest,
    )


def _start(setting: _Setting, dtype: Any) -> _State:
    k, m = setting.k, setting.m
    zero, zeros, no = jnp.zeros((), dtype), jnp.zeros(k, dtype), jnp.array(False)
    return _State(
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


def _extend(
    setting: _Setting,
    product: Callable[[PyTree], PyTree],
    key: PRNGKeyArray,
    state: _State,
    basis: PyTree,
) -> tuple[_State, PyTree]:
    """Take Lanczos steps from vector `kept` to the last one."""
    m = setting.m
    eps = jnp.finfo(state.beta.dtype).eps

    def step(carry: tuple[Array, _State, PyTree]) -> tuple[Array, _State, PyTree]:
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

    def unfinished(carry: tuple[Array, _State, PyTree]) -> Array:
        return (carry[0] < m) & carry[1].finite

    _, state, basis = jax.lax.while_loop(unfinished, step, (state.kept, state, basis))
    return state, basis


def _rotate(setting: _Setting, state: _State, basis: PyTree) -> tuple[_State, PyTree]:
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


def _measure(
    setting: _Setting, product: Callable[[PyTree], PyTree], state: _State, basis: PyTree, tol: Array
) -> tuple[_State, PyTree]:
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


def _decide(
    setting: _Setting,
    state: _State,
    tol: Array,
    small: Array,
    ruled_out: Array,
    asymmetric: Array,
    last: Array,
    max_matvecs: Array,
) -> _State:
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
