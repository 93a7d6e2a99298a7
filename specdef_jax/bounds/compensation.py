"""The block of the Hessian on the compensation's fast directions, and what it leaves open (THEORY.md 2.2).

In y = C Wt h only C is amplified: on dC = E U^T the Hessian of the deformed network is alpha^2 K_U with

    K_U = E[z z^T (x) G],    z = U^T W h,    G = d2L/dy2,

as long as the layer's input does not depend on its own C. On the input side y = Wt C h, dC = V F^T, and

    K_V = E[h h^T (x) (W V)^T G (W V)].

Everything else in the Hessian moves its largest |eigenvalue| by no more than a constant.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specdef_jax.errors import ProblemError
from specdef_jax.parametrization import full_precision_matmul as matmul


class FastBlocks(NamedTuple):
    """Norms of the blocks of a symmetric H on a subspace F and its orthogonal complement.

    Attributes:
      fast: ||F^T H F||.
      coupling: ||(I - F F^T) H F||.
      rest: ||(I - F F^T) H (I - F F^T)||.
    """

    fast: Float[Array, ""]
    coupling: Float[Array, ""]
    rest: Float[Array, ""]


def compensation_block(
    z: Float[Array, "examples k"], G: Float[Array, "examples m m"]
) -> Float[Array, "k*m k*m"]:
    """Return K = E[z z^T (x) G], the mean over examples, for a layer applied once per example.

    Output side: z = U^T W h and G = d2L/dy2 give K_U. Input side: z = h and (W V)^T G (W V) give K_V.

    Args:
      z: (examples, k), what the fast directions see of each example.
      G: (examples, m, m), Hessian of each example's loss in the layer's outputs.

    Returns:
      (k m, k m), symmetric; row i m + a belongs to entry (a, i) of E in dC = E U^T. alpha is not in it:
      the deformed network has alpha^2 K. Units of the loss; the dtype of the arguments.

    Raises:
      ProblemError: the shapes do not fit.

    Source: THEORY.md 2.2.

    Example:
      >>> compensation_block(jnp.array([[2.0]]), jnp.array([[[3.0]]])).tolist()
      [[12.0]]
    """
    if z.ndim != 2 or G.ndim != 3:
        raise ProblemError(
            f"z has shape {z.shape} and G {G.shape}: give (examples, k) and (examples, m, m), "
            "or use compensation_block_shared for weights shared over positions."
        )
    return compensation_block_shared(z[:, None], G[:, None, :, None])


def compensation_block_shared(
    z: Float[Array, "examples positions k"], G: Float[Array, "examples positions m positions m"]
) -> Float[Array, "k*m k*m"]:
    """Return K = E[sum_ts z_t z_s^T (x) G_ts] for weights shared over the positions of an example.

    Tokens, or the places of a convolution; z_t may not depend on the compensation itself.

    Args:
      z: (examples, positions, k).
      G: (examples, positions, m, positions, m), Hessian of each example's loss in all outputs y_t.

    Returns:
      (k m, k m), ordered as in compensation_block. Units of the loss; the dtype of the arguments.

    Raises:
      ProblemError: the shapes do not fit.

    Source: THEORY.md 2.2.

    Example:
      >>> z = jnp.array([[[1.0], [2.0]]])
      >>> compensation_block_shared(z, jnp.ones((1, 2, 1, 2, 1))).tolist()
      [[9.0]]
    """
    if z.ndim != 3 or G.ndim != 5 or G.shape != (*z.shape[:2], G.shape[2], z.shape[1], G.shape[2]):
        raise ProblemError(
            f"z has shape {z.shape} and G {G.shape}: give (examples, positions, k) and "
            "(examples, positions, m, positions, m)."
        )
    block = jnp.einsum("eti,etasb,esj->iajb", z, G, z, precision=jax.lax.Precision.HIGHEST)
    size = z.shape[2] * G.shape[2]
    return block.reshape(size, size) / z.shape[0]


def fast_blocks(H: Float[Array, "n n"], F: Float[Array, "n p"]) -> FastBlocks:
    """Return the spectral norms of the blocks of H on the subspace F and beside it.

    With H = H_1, the Hessian of the identity-inserted network, and F the directions dC = E U^T they bound the
    sharpness of the deformed network at every alpha: see sharpness_upper.

    Args:
      H: (n, n), symmetric.
      F: (n, p), orthonormal columns.

    Source: THEORY.md 2.2.

    Example:
      >>> blocks = fast_blocks(jnp.array([[3.0, 1.0], [1.0, 2.0]]), jnp.array([[1.0], [0.0]]))
      >>> [float(norm) for norm in blocks]
      [3.0, 1.0, 2.0]
    """
    along = matmul(matmul(H, F), F.T)
    fast = matmul(F, matmul(F.T, along))
    beside = H - along
    rest = beside - matmul(F, matmul(F.T, beside))
    # All three as n x n matrices, so that one batched decomposition gives their norms.
    return FastBlocks(*jnp.linalg.norm(jnp.stack([fast, along - fast, rest]), 2, axis=(1, 2)))


def sharpness_upper(alpha: Float[Array, "..."] | float, blocks: FastBlocks) -> Float[Array, "..."]:
    """Return an upper bound on sigma_1(H_a): the larger eigenvalue of [[a^2 fast, a coupling], [.., rest]].

    Attained by matrices with one entry in each block. For large alpha it is far below alpha^2 sigma_1(H_1):
    where fast > 0 it exceeds the lower bound alpha^2 fast by at most sharpness_remainder; where fast = 0 it
    is at most alpha coupling + rest, so growth is then linear.

    Args:
      alpha: the factor, >= 1; below 1 the bound does not hold.
      blocks: of H_1, from fast_blocks.

    Source: THEORY.md 2.2.

    Example:
      >>> float(sharpness_upper(2.0, FastBlocks(*map(jnp.asarray, (3.0, 0.0, 1.0)))))
      12.0
    """
    grown = jnp.square(alpha) * blocks.fast
    mean, half = (grown + blocks.rest) / 2, (grown - blocks.rest) / 2
    return mean + jnp.hypot(half, alpha * blocks.coupling)


def sharpness_remainder(blocks: FastBlocks) -> Float[Array, ""]:
    """Return the constant in sigma_1(H_a) <= alpha^2 ||K_U|| + constant, for every alpha >= 1.

    It is rest + coupling^2 / fast; infinite or NaN where fast = ||K_U|| is zero, where growth need not be
    quadratic.

    Source: THEORY.md 2.2.

    Example:
      >>> float(sharpness_remainder(FastBlocks(*map(jnp.asarray, (2.0, 4.0, 1.0)))))
      9.0
    """
    return blocks.rest + jnp.square(blocks.coupling) / blocks.fast
