"""What an eigenvalue computation returns, and what its status tells the user to do."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Float, Int, PyTree


class Status(enum.IntEnum):
    """How an iterative computation ended."""

    CONVERGED = 0
    NOT_CONVERGED = 1
    FLOOR = 2
    NOT_SYMMETRIC = 3
    NOT_FINITE = 4

    @property
    def advice(self) -> str:
        """What the status means and what to do about it."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "Every true residual meets tol.",
    Status.NOT_CONVERGED: (
        "max_matvecs was spent before the true residuals met tol, or before a search from a fresh random "
        "vector ruled out repeated eigenvalues. The largest value is still a lower bound on lambda_max. "
        "Raise max_matvecs or krylov, or loosen tol."
    ),
    Status.FLOOR: (
        "The recurrence converged but the true residuals stay above tol: rounding (or noise) in the product "
        "sets this level, and no more products will lower it. Accept the residuals as reported, or use a "
        "wider dtype; `narrowest` names the narrowest float in the product."
    ),
    Status.NOT_SYMMETRIC: (
        "<u, A v> and <A u, v> differ by more than rounding (see `asymmetry`): the values mean nothing. "
        "Check that the product is deterministic and the transpose of itself; use svds for an operator that "
        "is not symmetric."
    ),
    Status.NOT_FINITE: (
        "The product returned NaN or Inf. Look at the loss and its gradient at these parameters, at overflow "
        "in a narrow dtype, and at functions without a second derivative there, such as sqrt or norm at 0."
    ),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Eigen:
    """Eigenpairs of a symmetric operator A; every residual is measured, not inferred.

    Attributes:
      values: (k,) Rayleigh quotients <v, A v>, in the order asked for ("LM": by magnitude, "LA" and "SA":
        from that end). Up to rounding the largest is a rigorous lower bound on lambda_max, and within
        residuals[i] of values[i] lies an eigenvalue.
      vectors: tree of orthonormal eigenvectors, leading axis k.
      residuals: (k,) true residuals ||A v - value v||, one extra product each, in units of A.
      estimates: (k,) residuals as the recurrence believes them, |beta s|; they cost nothing and are no
        certificate: far below the floor they keep falling while the true residual does not.
      norm: largest ||A v|| / ||v|| seen, a lower bound on ||A||; tol is relative to it.
      floor: eps ||A||, with eps that of `narrowest`: the rounding level of a residual.
      asymmetry: largest |<u, A v> - <A u, v>| over the unit vectors of the first cycles, in units of A.
      matvecs: products spent, those for true residuals included.
      code: the status as an integer array; read `status`.
      narrowest: narrowest float found in the product's jaxpr (static); results through a narrower float
        than asked are never "proved" or "checked".
    """

    values: Float[Array, " k"]
    vectors: PyTree
    residuals: Float[Array, " k"]
    estimates: Float[Array, " k"]
    norm: Float[Array, ""]
    floor: Float[Array, ""]
    asymmetry: Float[Array, ""]
    matvecs: Int[Array, ""]
    code: Int[Array, ""]
    narrowest: str = field(metadata={"static": True})

    @property
    def status(self) -> Status:
        """The status; reads the value from the device, so not available under jit."""
        return Status(int(self.code))
