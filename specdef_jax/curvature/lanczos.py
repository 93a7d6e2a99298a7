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
faster than a tree of many leaves; on several they keep the tree and its sharding. Memory: a basis of (m + 1)
vectors and a temporary of half that while it is rotated; a step costs one product and four passes over the
basis.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import PRNGKeyArray, PyTree

from specdef_jax.curvature import basis as bs
from specdef_jax.curvature import thick_restart as tr
from specdef_jax.curvature.narrow import narrowest_float
from specdef_jax.curvature.operators import Operator, flattened, unflatten_vector
from specdef_jax.curvature.result import Eigen
from specdef_jax.errors import ProblemError


def eigsh(
    op: Operator,
    k: int = 1,
    which: tr.Which = "LM",
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
    setting = tr.Setting(k, m, which, whole=m == op.size, narrowest=_narrowest(op))
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


@partial(jax.jit, static_argnames="setting")
def _solve(setting: tr.Setting, op: Operator, key: PRNGKeyArray, tol: Any, max_matvecs: Any) -> Eigen:
    dtype = jnp.promote_types(op.dtype, jnp.float32)
    k, m, kept = setting.k, setting.m, setting.kept
    product = bs.in_dtype(op.mv, dtype)
    tol = jnp.asarray(tol, dtype)

    def body(carry: tuple[tr.State, PyTree]) -> tuple[tr.State, PyTree]:
        state, basis = tr.rotate(setting, *tr.extend(setting, product, key, *carry))
        # half of tol leaves room for what a new seed drops; below rounding, which shows as asymmetry,
        # estimates say nothing and may not fall further
        goal = jnp.maximum(tol, 4 * jnp.finfo(dtype).eps) * state.norm / 2
        goal = jnp.maximum(goal, state.asymmetry)
        small = jnp.max(state.estimates) <= goal
        ruled_out = ~state.searching | (state.beyond <= goal)
        asymmetric = state.asymmetry > jnp.finfo(setting.narrowest).eps ** 0.5 * state.norm
        last = ~state.finite | asymmetric | setting.whole | (state.matvecs + m - kept + k > max_matvecs)

        def judge(state: tr.State) -> tuple[tr.State, PyTree]:
            state, defect = tr.measure(setting, product, state, basis, tol)
            return tr.decide(setting, state, tol, small, ruled_out, asymmetric, last, max_matvecs), defect

        def carry_on(state: tr.State) -> tuple[tr.State, PyTree]:
            return state, bs.row(basis, kept)

        # only one vector leaves the branches: a basis would be copied
        state, seed = jax.lax.cond((small & ruled_out) | last, judge, carry_on, state)
        return state, bs.set_row(basis, state.kept, seed)

    start = tr.start(setting, dtype), bs.zeros(m + 1, op.template, dtype)
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
