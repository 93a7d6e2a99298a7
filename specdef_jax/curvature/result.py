"""What an eigenvalue computation returns, and what its status tells the user to do."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

Progress = Callable[[Int[Array, ""], Float[Array, ""]], None]


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


class _Run:
    """What the results of a run share."""

    code: Int[Array, ""]

    @property
    def status(self) -> Status:
        """The status; reads the value from the device, so not available under jit."""
        return Status(int(self.code))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Eigen(_Run):
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
    def lower_bound(self) -> Float[Array, ""]:
        """A lower bound on ||A|| = sigma_1: the largest |value|, less its rounding (see lower_bound)."""
        size = sum(leaf[0].size for leaf in jax.tree.leaves(self.vectors))
        return lower_bound(self.values, size, self.floor, self.asymmetry)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Singular(_Run):
    """Singular triplets of an operator A, largest first; every residual is measured, not inferred.

    Attributes:
      values: (k,) <u, A v>, up to rounding a lower bound on sigma_1 for the first. Within
        sqrt((left_residuals[i]^2 + right_residuals[i]^2) / 2) of values[i] lies a singular value.
      left: tree of orthonormal left vectors u, in the image, leading axis k.
      right: tree of orthonormal right vectors v, in the domain, leading axis k.
      left_residuals: (k,) true residuals ||A v - value u||.
      right_residuals: (k,) true residuals ||A^T u - value v||.
      estimates: (k,) right residuals as the recurrence believes them; no certificate.
      norm: largest ||A v|| / ||v|| or ||A^T u|| / ||u|| seen, a lower bound on ||A||; tol is relative to it.
      floor: eps ||A||, with eps that of `narrowest`: the rounding level of a residual.
      asymmetry: largest |<u, A v> - <A^T u, v>| over the unit vectors of the first cycles.
      matvecs: products spent, both kinds and those for true residuals included.
      code: the status as an integer array; read `status`.
      narrowest: narrowest float in the jaxpr of either product (static).
    """

    values: Float[Array, " k"]
    left: PyTree
    right: PyTree
    left_residuals: Float[Array, " k"]
    right_residuals: Float[Array, " k"]
    estimates: Float[Array, " k"]
    norm: Float[Array, ""]
    floor: Float[Array, ""]
    asymmetry: Float[Array, ""]
    matvecs: Int[Array, ""]
    code: Int[Array, ""]
    narrowest: str = field(metadata={"static": True})

    @property
    def lower_bound(self) -> Float[Array, ""]:
        """A lower bound on sigma_1: the largest value, less its rounding (see lower_bound)."""
        size = sum(leaf[0].size for leaf in [*jax.tree.leaves(self.left), *jax.tree.leaves(self.right)])
        return lower_bound(self.values, size, self.floor, self.asymmetry)


def lower_bound(
    values: Float[Array, " k"],
    size: int,
    floor: Float[Array, ""],
    asymmetry: Float[Array, ""],
) -> Float[Array, ""]:
    """Return max |value| less an allowance for rounding, at least 0: "checked", not "proved".

    In exact arithmetic |<u, A v>| <= sigma_1 for unit vectors, converged or not. In floating point the inner
    products err by (2 log2 n + 8) eps ||A||, as XLA sums in a tree, and A v by what the run has seen the
    products of the first cycles err, `asymmetry`, taken four times.
    """
    return jnp.maximum(jnp.max(jnp.abs(values)) - (2 * math.log2(size) + 8) * floor - 4 * asymmetry, 0)
