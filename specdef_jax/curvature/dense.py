"""A small operator as a dense array: the oracle for everything iterative."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Scalar

from specdef_jax.curvature.operators import Operator
from specdef_jax.errors import ProblemError

MAX_SIZE = 20_000  # 3.2 GB in float64


class Dense(NamedTuple):
    """A dense operator.

    Attributes:
      matrix: (n, n), rows and columns in the order of jax.flatten_util.ravel_pytree.
      asymmetry: largest |A - A^T|, in units of A; rounding level for a symmetric operator.
    """

    matrix: Float[Array, "n n"]
    asymmetry: Scalar


def dense(op: Operator, chunk: int = 64) -> Dense:
    """Return a square operator as an (n, n) array in op.dtype, by n products, `chunk` of them at a time.

    Raises:
      ProblemError: the operator has more than MAX_SIZE entries, or is not square.
    """
    if op.size > MAX_SIZE:
        raise ProblemError(
            f"a dense {op.kind} of size {op.size} needs {op.size**2 * op.dtype.itemsize / 1e9:.0f} GB, "
            f"the limit is {MAX_SIZE}; use eigsh for its extreme eigenvalues."
        )
    matrix = _columns(op, min(chunk, op.size)).T
    if matrix.shape[0] != matrix.shape[1]:
        raise ProblemError(f"dense needs a square operator, this {op.kind} is {matrix.shape}.")
    return Dense(matrix, jnp.max(jnp.abs(matrix - matrix.T)))


def eigvals(op: Operator) -> Float[Array, " n"]:
    """Return all eigenvalues of a small symmetric operator, ascending, from its symmetric part.

    Raises:
      ProblemError: the operator is too large for `dense`, or not square.
    """
    matrix = dense(op).matrix
    return jnp.linalg.eigvalsh((matrix + matrix.T) / 2)


@jax.jit(static_argnames="chunk")
def _columns(op: Operator, chunk: int) -> Float[Array, "n m"]:
    zeros = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), op.template)
    flat, unravel = ravel_pytree(zeros)

    def column(i: Array) -> Array:
        unit = jnp.zeros(flat.size, flat.dtype).at[i].set(1)
        return ravel_pytree(op.mv(unravel(unit)))[0].astype(flat.dtype)

    return jax.lax.map(column, jnp.arange(flat.size), batch_size=chunk)
