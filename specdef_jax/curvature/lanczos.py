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
meet it. All of it is one compiled while_loop, in which the product stands once: a Hessian's takes long to
compile. On one device vectors are raveled, which compiles several times
faster than a tree of many leaves; on several they keep the tree and its sharding. Memory: a basis of m + 1
vectors, the k returned, and a few more; on several devices a temporary of half the basis while it is rotated.
A step costs one product and four passes over the basis. Converged pairs stay in the basis, locked there
without further products.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from specdef_jax.curvature import basis as bs
from specdef_jax.curvature import thick_restart as tr
from specdef_jax.curvature.narrow import narrowest_of
from specdef_jax.curvature.operators import Operator, check_choice, flattened, is_spread, unravel
from specdef_jax.curvature.restart import Setting, State, Which, check, decide, look, start, tell
from specdef_jax.curvature.result import Eigen, Progress
from specdef_jax.errors import ProblemError


def eigsh(
    op: Operator,
    k: int = 1,
    which: Which = "LM",
    tol: float = 1e-6,
    *,
    key: PRNGKeyArray,
    max_matvecs: int = 2000,
    krylov: int | None = None,
    progress: Progress | None = None,
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
      progress: called on the host after every cycle with the products spent and the largest relative residual
        as the recurrence believes it; keep one function, or every call compiles again.

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
    if not op.symmetric:
        raise ProblemError(f"eigsh needs a symmetric operator, this {op.kind} is not; use svds.")
    check_choice("which", which, ("LM", "LA", "SA"))
    m = check(op.size, k, tol, max_matvecs, krylov)
    spread = is_spread(op)
    setting = Setting(k, m, which, whole=m == op.size, narrowest=narrowest_of(op), in_place=not spread)
    if spread:
        return _solve(setting, op, key, tol, max_matvecs, progress)
    found = _solve(setting, flattened(op), key, tol, max_matvecs, progress)
    return replace(found, vectors=unravel(op.template, found.vectors))


@partial(jax.jit, static_argnames=("setting", "progress"))
def _solve(
    setting: Setting, op: Operator, key: PRNGKeyArray, tol: Any, max_matvecs: Any, progress: Any
) -> Eigen:
    dtype = jnp.promote_types(op.dtype, jnp.float32)
    k, m = setting.k, setting.m
    product = bs.in_dtype(op.mv, dtype)
    tol = jnp.asarray(tol, dtype)

    def body(carry: tuple[State, PyTree]) -> tuple[State, PyTree]:
        empty = carry[0].matvecs == 0  # there is nothing to rotate yet, and rotating zeros changes nothing
        turned, basis = tr.rotate(setting, *carry)
        state = jax.tree.map(partial(jnp.where, empty), carry[0], turned)
        jax.lax.cond(empty, lambda: None, lambda: tell(progress, state))
        view = look(setting, state, tol, max_matvecs)
        judged = tr.Judged(
            due=view.judge & ~empty,
            tol=tol,
            decide=lambda state: decide(setting, state, tol, view, max_matvecs),
        )
        return tr.multiply(setting, product, key, state, basis, judged)

    begin = start(setting, dtype), bs.zeros(m + 1, op.template, dtype)
    state, basis = jax.lax.while_loop(lambda carry: ~carry[0].done, body, begin)
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
