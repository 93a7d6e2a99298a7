"""What a restarted Krylov run is asked, knows and decides, for eigenvalues and singular values alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specdef_jax.curvature.result import Progress, Status
from specdef_jax.errors import ProblemError

Which = Literal["LM", "LA", "SA"]


@dataclass(frozen=True)
class Setting:
    """What is fixed while a run is compiled: k pairs wanted, a basis of m vectors, which end."""

    k: int
    m: int
    which: Which
    whole: bool  # the basis spans the whole space: one cycle is everything there is
    narrowest: str
    price: int = 1  # products that one step, or measuring one pair, costs
    in_place: bool = False  # vectors are raveled, on one device: a basis can be rotated where it is

    @property
    def cycle(self) -> int:
        """Products of a cycle from a new seed: the steps, and a look at the true residuals."""
        return self.price * self.m

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

    The basis V, m + 1 orthonormal vectors of which the first kept + 1 count, is carried beside it. For
    singular values `projection` is U^T A V.
    """

    projection: Float[Array, "m m"]  # T = V^T A V, or U^T A V
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


def stepped(
    setting: Setting,
    state: State,
    entries: Float[Array, "m m"],
    j: Array,
    beta: Array,
    norm: Array,
    defect: Array,
    finite: Array,
) -> State:
    """Return the state after step j, which measured column j of the projection and coupled on by beta."""
    vacant = beta <= 10 * jnp.finfo(beta.dtype).eps * norm  # an invariant subspace: what is left is rounding
    beta = jnp.where(vacant, 0, beta)
    return replace(
        state,
        projection=entries.at[j, j + 1].set(beta, mode="drop"),  # predicted; the next step measures it
        beta=beta,
        raw=vacant,
        vacant=vacant,
        matvecs=state.matvecs + setting.price,
        norm=norm,
        asymmetry=jnp.where(state.reseeded, state.asymmetry, jnp.maximum(state.asymmetry, defect)),
        finite=finite,
    )


def rotated(
    setting: Setting, state: State, values: Float[Array, " m"], coupling: Float[Array, " m"]
) -> State:
    """Return the state once the basis holds the leading Ritz vectors.

    Args:
      setting: of the run.
      state: before.
      values: Ritz values, the best first.
      coupling: of each Ritz vector to the vector that follows the basis.
    """
    k, m, kept = setting.k, setting.m, setting.kept
    entries = jnp.zeros((m, m), values.dtype).at[jnp.arange(kept), jnp.arange(kept)].set(values[:kept])
    if kept < m:
        entries = entries.at[:kept, kept].set(coupling[:kept])
    beyond = jnp.zeros((), values.dtype)
    if k < m:
        ranks, estimate = setting.rank(values), jnp.abs(coupling[k])
        beyond = jnp.where(estimate > ranks[k - 1] - ranks[k], estimate, 0)
    return replace(
        state,
        projection=entries,
        kept=jnp.full_like(state.kept, kept),
        estimates=jnp.abs(coupling[:k]),
        beyond=beyond,
    )


class View(NamedTuple):
    """What the recurrence says after a cycle.

    Attributes:
      small: its residuals meet what is asked.
      ruled_out: no search for repeated values is under way, or it found nothing beyond pair k.
      asymmetric: the product is not the transpose of itself, or of the one given as its transpose.
      last: there is no further cycle.
    """

    small: Array
    ruled_out: Array
    asymmetric: Array
    last: Array

    @property
    def judge(self) -> Array:
        """Whether it is time to look at the true residuals."""
        return (self.small & self.ruled_out) | self.last


def look(setting: Setting, state: State, tol: Array, max_matvecs: Array) -> View:
    """Compare what the recurrence believes with tol, with rounding and with the budget."""
    eps = jnp.finfo(state.beta.dtype).eps
    # half of tol leaves room for what a new seed drops; below rounding, which shows as asymmetry,
    # estimates say nothing and may not fall further
    goal = jnp.maximum(tol, 4 * eps) * state.norm / 2
    goal = jnp.maximum(goal, state.asymmetry)
    asymmetric = state.asymmetry > jnp.finfo(setting.narrowest).eps ** 0.5 * state.norm
    following = setting.price * (setting.m - setting.kept + setting.k)
    return View(
        small=jnp.max(state.estimates) <= goal,
        ruled_out=~state.searching | (state.beyond <= goal),
        asymmetric=asymmetric,
        last=~state.finite | asymmetric | setting.whole | (state.matvecs + following > max_matvecs),
    )


def decide(
    setting: Setting,
    state: State,
    tol: Array,
    view: View,
    max_matvecs: Array,
) -> State:
    """Name the outcome, and prepare a cycle from a new seed in case there is none yet.

    The recurrence may converge where the true residuals do not. If putting the residuals into the basis does
    not halve them, nothing will.
    """
    k = setting.k
    worst, target = jnp.max(state.residuals), tol * state.norm
    met = worst <= target
    rounding = 4 * jnp.finfo(worst.dtype).eps * state.norm
    stalled = view.small & ~met & ((worst <= rounding) | (worst > state.best / 2) | setting.whole)
    settled = met | stalled
    ranks = setting.rank(state.values)
    unchanged = jnp.all(jnp.abs(ranks - state.reference) <= jnp.maximum(target, worst))
    searched = state.searched | (settled & state.searching & view.ruled_out & unchanged)
    code = jnp.select(
        [~state.finite, view.asymmetric, met & searched, settled & searched],
        [Status.NOT_FINITE, Status.NOT_SYMMETRIC, Status.CONVERGED, Status.FLOOR],
        Status.NOT_CONVERGED,
    ).astype(state.code.dtype)
    search = settled & ~searched
    spent = state.matvecs + setting.cycle > max_matvecs
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
        done=view.last | spent | (settled & searched),
    )


def tell(progress: Progress | None, state: State) -> None:
    """Call progress(matvecs, residual) on the host; the residual is what the recurrence believes."""
    if progress is not None:
        norm = jnp.where(state.norm > 0, state.norm, 1)
        jax.debug.callback(progress, state.matvecs, jnp.max(state.estimates) / norm)


def check(n: int, k: int, tol: float, max_matvecs: int, krylov: int | None, price: int = 1) -> int:
    """Return the number of basis vectors.

    Raises:
      ProblemError: an argument has no meaning for an operator of n columns.
    """
    if not 1 <= k <= n:
        raise ProblemError(f"k = {k} pairs of an operator of size {n}; give 1 <= k <= {n}.")
    if not tol >= 0:
        raise ProblemError(f"tol = {tol}; give a relative residual >= 0, e.g. 1e-6.")
    m = min(n, max(20, 2 * k + 10) if krylov is None else krylov)
    if m < min(n, k + 2):
        raise ProblemError(f"krylov = {krylov} is too small for k = {k}; give at least {k + 2}.")
    if max_matvecs < price * (m + k):
        raise ProblemError(
            f"max_matvecs = {max_matvecs} does not pay for a cycle and its residuals; "
            f"give at least {price * (m + k)}."
        )
    return m
