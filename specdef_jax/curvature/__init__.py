"""Curvature of a loss: operators, and eigenvalues that can be trusted.

A matrix-free operator (hessian, or linear and from_matrix for anything else) goes into eigsh for its extreme
eigenpairs, or into dense when it is small. Status says how the run ended and what to do.
"""

from specdef_jax.curvature.dense import Dense, dense, eigvals
from specdef_jax.curvature.kinks import Kink, kinks
from specdef_jax.curvature.lanczos import eigsh
from specdef_jax.curvature.narrow import NarrowFloat, narrow_floats, narrowest_float
from specdef_jax.curvature.operators import Operator, from_matrix, hessian, linear
from specdef_jax.curvature.result import Eigen, Status

__all__ = [
    "Dense",
    "Eigen",
    "Kink",
    "NarrowFloat",
    "Operator",
    "Status",
    "dense",
    "eigsh",
    "eigvals",
    "from_matrix",
    "hessian",
    "kinks",
    "linear",
    "narrow_floats",
    "narrowest_float",
]
