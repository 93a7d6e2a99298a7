"""Balanced factors, and what the pair of factors gives away (THEORY.md 5.5, 5.6).

Matrices stand as in the theory: W = C Wt, W (m, n), C (m, d), Wt (d, n), U (m, k) orthonormal. All of it is
the same for (C R^T, R Wt) with any orthogonal R, so the basis of the deformation does not matter.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = Float[Array, ""] | float


def nuclear_norm(W: Float[Array, "m n"]) -> Float[Array, ""]:
    """Return the sum of the singular values: half the least ||C||_F^2 + ||Wt||_F^2 over all C Wt = W."""
    return jnp.sum(jnp.linalg.svd(W, compute_uv=False))


def factored_sharpness_upper(reach: Scalar, sigma_1: Scalar, gradient_norm: Scalar) -> Float[Array, ""]:
    """Return max(1, reach) sigma_1(H) + ||G||, which bounds the sharpness of a network in factored form.

    Args:
      reach: ||C||^2 + ||Wt||^2 in the spectral norm, 2 ||W|| for balanced factors and 1 + ||W||^2 for an
        inserted identity; with several factored layers the largest.
      sigma_1: sharpness of the network that is not factored.
      gradient_norm: spectral norm of dL/dW; with several layers the largest.

    Example:
      >>> float(factored_sharpness_upper(4.0, 2.0, 0.5))
      8.5
    """
    return jnp.maximum(1.0, reach) * sigma_1 + gradient_norm


def imbalance(C: Float[Array, "m d"], Wt: Float[Array, "d n"]) -> Float[Array, ""]:
    """Return ||C||_F ||Wt||_F / ||C Wt||_*, at least 1, and 1 just where C^T C is a multiple of Wt Wt^T.

    Example:
      >>> round(float(imbalance(jnp.diag(jnp.array([3.0, 4.0])), jnp.eye(2))), 4)
      1.0102
    """
    return jnp.linalg.norm(C) * jnp.linalg.norm(Wt) / nuclear_norm(C @ Wt)


def inserted_imbalance(W: Float[Array, "m n"], U: Float[Array, "m k"], alpha: Scalar) -> Float[Array, ""]:
    """Return the imbalance of the deformed pair (T(1/a), T(a) W); at a = 1 it is at most sqrt(m)."""
    m, k = U.shape
    comp = m - k + k / alpha**2
    weight = jnp.sum(W**2) + (alpha**2 - 1) * jnp.sum((U.T @ W) ** 2)
    return jnp.sqrt(comp * weight) / nuclear_norm(W)


def gap_sides(
    W: Float[Array, "m n"], U: Float[Array, "m k"], alpha: Scalar
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return a sigma_k(U^T W), below sigma_k(T(a) W), and ||(I - U U^T) W||, above sigma_(k+1)(T(a) W).

    Their quotient is a lower bound on the gap at k, attained when U is spanned by left singular vectors.
    """
    along = U.T @ W
    values = jnp.linalg.svd(along, compute_uv=False)
    k = U.shape[1]
    kth = values[k - 1] if k <= values.size else jnp.zeros(())
    return alpha * kth, jnp.linalg.norm(W - U @ along, 2)


def pencil_values(X: Float[Array, "n d"], Y: Float[Array, "d m"]) -> Float[Array, " d"]:
    """Return, descending, the square roots of the eigenvalues of the pencil (X^T X, Y Y^T).

    X maps first, Y second, both of rank d (in the transpose of the theory's layout, as kernels are). All are
    1 just where the pair is balanced; T(a) multiplies k of them by a^2 if it commutes with both matrices.
    """
    R1, R2 = jnp.linalg.qr(X, mode="r"), jnp.linalg.qr(Y.T, mode="r")
    return jnp.linalg.svd(jnp.linalg.solve(R2.T, R1.T), compute_uv=False)


def pencil_gap(
    X: Float[Array, "n d"], Y: Float[Array, "d m"], U: Float[Array, "d k"], alpha: Scalar
) -> Float[Array, ""]:
    """Return a lower bound on the gap at k of the pencil of (X T(a), T(1/a) Y): a^2 q / p - 1.

    q = sigma_k(M), M = B^(1/2) U U^T A^(1/2), and p = ||B^(1/2) (I - U U^T) A^(1/2)||, A = X^T X and
    B = (Y Y^T)^-1, of the pair before the deformation.
    """
    R1, R2 = jnp.linalg.qr(X, mode="r"), jnp.linalg.qr(Y.T, mode="r")
    along = jnp.linalg.solve(R2.T, U @ U.T @ R1.T)
    q = jnp.linalg.svd(along, compute_uv=False)[U.shape[1] - 1]
    p = jnp.linalg.norm(jnp.linalg.solve(R2.T, R1.T) - along, 2)
    return alpha**2 * q / p - 1
