"""What the activations along a subspace tell about a loss, and the floor that follows (THEORY.md 3.3 (iv)).

The fast set of a deformed layer is y -> y + B z, z = U^T x with x the layer's outputs. Its first-order gain
is governed by the information that z carries linearly about the gradient g of the loss in y.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from specdef_jax.parametrization import full_precision_matmul as matmul


def linear_information(
    activations: Float[Array, "samples k"], residuals: Float[Array, "samples r"]
) -> Float[Array, ""]:
    """Return I_U = tr(E[g z^T] E[z z^T]^+ E[z g^T]), the energy of g explained linearly by z.

    Zero iff no linear function of z correlates with g; it depends on the span of U alone. E is the mean.

    Args:
      activations: z = U^T x, one row per sample.
      residuals: g, the gradient of a sample's loss in the layer's outputs.

    Source: THEORY.md 3.3 (iv).

    Example:
      >>> z = jnp.array([[1.0], [-1.0]])
      >>> float(linear_information(z, 3 * z))
      9.0
    """
    n = len(activations)
    # In an orthonormal basis of the span of z, I_U is the squared norm of the projection of g, over n.
    U, s, _ = jnp.linalg.svd(activations, full_matrices=False)
    kept = s > n * jnp.finfo(s.dtype).eps * jnp.max(s)
    along = jnp.where(kept[:, None], matmul(U.T, residuals), 0)
    return jnp.sum(jnp.square(along)) / n


def floor_interval(
    start: Float[Array, ""] | float,
    information: Float[Array, ""] | float,
    *,
    smoothness: Float[Array, ""] | float,
    convexity: Float[Array, ""] | float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return (lower, upper) bounds on the floor L*_U = inf_B L(W + B U^T W).

    Where each sample's loss has a Hessian in y between `convexity` and `smoothness` everywhere,
    start - I_U / (2 convexity) <= L*_U <= start - I_U / (2 smoothness); equal for squared loss.

    Args:
      start: L at B = 0.
      information: I_U.
      smoothness: rho > 0, largest eigenvalue of a sample's Hessian in y; 1/2 for softmax cross-entropy.
      convexity: beta >= 0, the smallest one; at 0 the lower bound is -inf, unless I_U = 0.

    Source: THEORY.md 3.3 (iv).
    """
    start, information = jnp.asarray(start), jnp.asarray(information)
    beta = jnp.asarray(convexity, information.dtype)
    gain = jnp.where(beta > 0, information / (2 * jnp.where(beta > 0, beta, 1)), jnp.inf)
    gain = jnp.where(information == 0, 0.0, gain)
    return start - gain, start - information / (2 * smoothness)


def least_information(
    activations: Float[Array, "samples d"], residuals: Float[Array, "samples r"], k: int
) -> Float[Array, ""]:
    """Return the smallest I_U over all subspaces of k directions: k smallest eigenvalues of a pencil.

    The pencil is (E[x g^T] E[g x^T], E[x x^T]), with E[x x^T] invertible. No choice of U has less, so for
    squared loss no choice has a higher floor; the generalized eigenvectors attain it
    (specdef_jax.resistant_directions).

    Args:
      activations: x, the layer's outputs, more samples than features.
      residuals: g.
      k: number of directions.

    Source: THEORY.md 3.3 (iv); Ky Fan's minimum principle for a definite pencil.
    """
    n, d = activations.shape
    U, _, _ = jnp.linalg.svd(activations, full_matrices=False)
    along = matmul(U.T, residuals)
    spectrum = jnp.linalg.svd(along, compute_uv=False) ** 2 / n
    padded = jnp.concatenate([spectrum, jnp.zeros(max(0, d - len(spectrum)), spectrum.dtype)])
    return jnp.sum(jnp.sort(padded)[:k])
