"""Leading singular triplets of any operator by thick-restart Golub-Kahan-Lanczos on pytrees.

The same promises as eigsh: full reorthogonalization of both bases, true residuals on both sides, repeated
values looked for from a random vector, one compiled loop. Neither A^T A, whose rounding floor is
eps s_1^2 / s_i, nor [[0, A], [A^T, 0]], which takes twice the vectors, is formed. A transpose that is not
that of the product shows as `asymmetry`. Memory: m + 1 vectors of the domain and m of the image, the k
returned of each, and a few more; on several devices a temporary of half the larger basis.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.curvature import basis as bs
from specdef_jax.curvature import bidiagonal as bd
from specdef_jax.curvature.narrow import narrowest_of
from specdef_jax.curvature.operators import Operator, flattened, is_spread, unravel
from specdef_jax.curvature.restart import Setting, State, check, decide, look, start, tell
from specdef_jax.curvature.result import Progress, Singular


def svds(
    op: Operator,
    k: int = 1,
    tol: float = 1e-6,
    *,
    key: PRNGKeyArray,
    max_matvecs: int = 4000,
    krylov: int | None = None,
    progress: Progress | None = None,
) -> Singular:
    """Return the k largest singular triplets of an operator, with true residuals on both sides.

    Args:
      op: operator, symmetric or not, square or not; its rmv must be the transpose of its mv.
      k: number of triplets, 1 <= k <= min(op.shape).
      tol: converged when ||A v - s u|| and ||A^T u - s v|| are at most tol * max ||A v|| for every triplet.
      key: seeds the start vector; the result is deterministic in it.
      max_matvecs: budget of products, transposed ones included, never exceeded.
      krylov: vectors in each basis, default max(20, 2 k + 10).
      progress: as in eigsh.

    Returns:
      Singular, in op.dtype (at least float32). Read `status` first.

    Raises:
      ProblemError: k, tol, krylov or max_matvecs has no meaning.

    Example:
      >>> op = from_matrix(jnp.array([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]), symmetric=False)
      >>> svds(op, k=2, key=jax.random.key(0)).values
      Array([4., 3.], dtype=float32)
    """
    rows, cols = op.shape
    m = check(min(rows, cols), k, tol, max_matvecs, krylov, price=2)
    narrowest = min(narrowest_of(op), narrowest_of(op.T), key=lambda name: jnp.finfo(name).nmant)
    setting = Setting(
        k, m, "LA", whole=m == min(rows, cols), narrowest=narrowest, price=2, in_place=not is_spread(op)
    )
    if cols > rows:  # a basis that fills the domain is then the end
        return _mirrored(_found(setting, op.T, key, tol, max_matvecs, progress))
    return _found(setting, op, key, tol, max_matvecs, progress)


def _mirrored(found: Singular) -> Singular:
    return replace(
        found,
        left=found.right,
        right=found.left,
        left_residuals=found.right_residuals,
        right_residuals=found.left_residuals,
    )


def _found(
    setting: Setting, op: Operator, key: PRNGKeyArray, tol: float, max_matvecs: int, progress: Any
) -> Singular:
    if not setting.in_place:
        return _solve(setting, op, key, tol, max_matvecs, progress)
    found = _solve(setting, flattened(op), key, tol, max_matvecs, progress)
    return replace(found, right=unravel(op.template, found.right), left=unravel(op.image, found.left))


@partial(jax.jit, static_argnames=("setting", "progress"))
def _solve(
    setting: Setting, op: Operator, key: PRNGKeyArray, tol: Any, max_matvecs: Any, progress: Any
) -> Singular:
    dtype = jnp.promote_types(op.dtype, jnp.float32)
    dtype = jnp.promote_types(dtype, trees.result_dtype(op.image))
    k, m = setting.k, setting.m
    product, adjoint = bs.in_dtype(op.mv, dtype), bs.in_dtype(op.rmv, dtype)
    tol = jnp.asarray(tol, dtype)

    def body(carry: tuple[State, bd.Bases]) -> tuple[State, bd.Bases]:
        state, bases = bd.rotate(setting, *bd.extend(setting, product, adjoint, key, *carry))
        tell(progress, state)
        view = look(setting, state, tol, max_matvecs)

        def judge(state: State) -> tuple[State, Any, PyTree]:
            state, sides, defect = bd.measure(setting, product, adjoint, state, bases, tol)
            return decide(setting, state, tol, view, max_matvecs), sides, defect

        def carry_on(state: State) -> tuple[State, Any, PyTree]:
            return state, bases.sides, bs.row(bases.right, setting.kept)

        state, sides, seed = jax.lax.cond(view.judge, judge, carry_on, state)
        return state, replace(bases, right=bs.set_row(bases.right, state.kept, seed), sides=sides)

    bases = bd.Bases(
        right=bs.zeros(m + 1, op.template, dtype),
        left=bs.zeros(m, op.image, dtype),
        sides=jnp.zeros((2, k), dtype),
    )
    begin = start(setting, dtype), bases
    state, bases = jax.lax.while_loop(lambda carry: ~carry[0].done, body, begin)
    nan = jnp.where(state.finite, 0, jnp.nan).astype(dtype)
    return Singular(
        values=jnp.abs(state.values) + nan,
        left=jax.tree.map(lambda b: b[:k], bases.left),
        right=jax.tree.map(lambda b: b[:k], bases.right),
        left_residuals=bases.sides[0] + nan,
        right_residuals=bases.sides[1] + nan,
        estimates=state.estimates,
        norm=state.norm,
        floor=state.norm * jnp.finfo(setting.narrowest).eps.astype(dtype),
        asymmetry=state.asymmetry,
        matvecs=state.matvecs,
        code=state.code,
        narrowest=setting.narrowest,
    )
