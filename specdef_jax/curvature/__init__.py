"""Curvature of a loss: operators, and numbers about them that can be trusted.

An operator (hessian, gauss_newton, fisher, block, ..., or linear and from_matrix for anything else) goes into
eigsh for its extreme eigenpairs, svds for singular triplets, density for the whole spectrum, or into dense
when it is small. Status says how a run ended and what to do.
"""

from specdef_jax.curvature.blocks import block, restricted
from specdef_jax.curvature.dense import Dense, dense, eigvals
from specdef_jax.curvature.density import Density, density
from specdef_jax.curvature.estimators import Estimate, diagonal, trace
from specdef_jax.curvature.kinks import Kink, kinks
from specdef_jax.curvature.lanczos import eigsh
from specdef_jax.curvature.layers import by_leaf
from specdef_jax.curvature.losses import empirical_fisher, fisher, gauss_newton, hessian
from specdef_jax.curvature.narrow import NarrowFloat, narrow_floats, narrowest_float
from specdef_jax.curvature.operators import Operator, from_matrix, linear
from specdef_jax.curvature.preconditioning import adam_diagonal, preconditioned
from specdef_jax.curvature.result import Eigen, Singular, Status
from specdef_jax.curvature.singular import svds
from specdef_jax.curvature.streaming import stacked, streamed

__all__ = [
    "Dense",
    "Density",
    "Eigen",
    "Estimate",
    "Kink",
    "NarrowFloat",
    "Operator",
    "Singular",
    "Status",
    "adam_diagonal",
    "block",
    "by_leaf",
    "dense",
    "density",
    "diagonal",
    "eigsh",
    "eigvals",
    "empirical_fisher",
    "fisher",
    "from_matrix",
    "gauss_newton",
    "hessian",
    "kinks",
    "linear",
    "narrow_floats",
    "narrowest_float",
    "preconditioned",
    "restricted",
    "stacked",
    "streamed",
    "svds",
    "trace",
]
