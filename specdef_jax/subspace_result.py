"""What a search for a singular subspace returns, and what its status tells the user to do."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, Int


class Status(enum.IntEnum):
    """How a subspace was found; `advice` says what that means for the user."""

    CONVERGED = 0
    FLAT_SPECTRUM = 1
    STALLED = 2
    RANK_DEFICIENT = 3
    EXACT = 4

    @property
    def advice(self) -> str:
        """Return what this status means and what, if anything, to do about it."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "The residual is within the tolerance; nothing to do.",
    Status.FLAT_SPECTRUM: (
        "The tolerance was missed because the singular values hardly fall off around number k, so no "
        "k directions stand out. The deformation is exact all the same and nearly as good as with the "
        "exact directions; raise max_passes, loosen tol, or choose k at a gap of the spectrum."
    ),
    Status.STALLED: (
        "The passes were used up, or rounding stopped the progress, before the tolerance was met. The "
        "deformation is exact all the same; raise max_passes, loosen tol, or pass float64."
    ),
    Status.RANK_DEFICIENT: (
        "Some of the k singular values are zero to rounding. Those directions carry no signal and "
        "give no curvature, and any orthonormal completion is as good; choose k at most the rank, or "
        "other directions."
    ),
    Status.EXACT: "The directions were given or found by a dense decomposition; nothing to do.",
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Subspace:
    """An orthonormal basis, with what the matrix does on it.

    The residual is max_i ||M^T v_i - s_i u_i|| / max_j s_j with s_i = ||M u_i||, v_i = M u_i / s_i,
    over the directions whose s_i is not negligible (at most eps sqrt(max(rest, d)) ||M||, eps that
    of `U.dtype`). It is the size of the perturbation of M that would make (s_i, u_i, v_i) exact, in
    units of the largest s_j returned: of ||M|| for "top", of a small number, hence stricter, for
    "bottom". It is evaluated with products with M itself, so it certifies what is returned.

    Attributes:
      U: orthonormal basis, (d, k), in float64 for a float64 matrix and in float32 otherwise.
      singular_values: ||M u_i||, (k,), in descending order for "top", ascending for "bottom".
      residual: see above, scalar.
      status: a Status, as an int32 scalar.
      passes: steps of the iteration, int32 scalar; 0 where nothing was iterated.
    """

    U: Float[Array, "*stack d k"]
    singular_values: Float[Array, "*stack k"]
    residual: Float[Array, "*stack"]
    status: Int[Array, "*stack"]
    passes: Int[Array, "*stack"]
