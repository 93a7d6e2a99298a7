"""A network's gradient and Hessian in orthonormal coordinates in which phi^-1 = diag(alpha^e), e = 1, 0, -1.

In them the deformed network at EVERY alpha is a scaling of one pair (g, H): laws in alpha need one Hessian.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.spec import Plan
from theory.hessians import curvature_of, linear_matrix


class Blocks(NamedTuple):
    """The identity-inserted network in phi's coordinates, or any matrix posing as one.

    Attributes:
      gradient: g_1.
      hessian: H_1.
      order: e, so that phi^-1 = diag(alpha^e): 1 on C's fast directions, -1 on the deformed directions of
        the weight, 0 on the rest.
      basis: columns, the coordinates in the order of ravel_pytree.
    """

    gradient: Float[Array, "*batch n"]
    hessian: Float[Array, "*batch n n"]
    order: Float[Array, " n"]
    basis: Float[Array, "n n"]

    def scales(self, alpha: Any) -> Array:
        """Return phi^-1 at alpha."""
        return jnp.asarray(alpha, float) ** self.order

    def sizes(self, step: Float[Array, "*batch n"]) -> dict[str, Array]:
        """Return the norms of a step's fast, rest and slow parts."""
        names = {"fast": 1, "rest": 0, "slow": -1}
        return {
            name: jnp.linalg.norm(jnp.where(self.order == e, step, 0), axis=-1) for name, e in names.items()
        }


def blocks(loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any) -> Blocks:
    """Return gradient and Hessian of the identity-inserted network in phi's coordinates.

    Args:
      loss: loss(params, *args) on plain parameters.
      params: plain parameters.
      plan: what to deform; its alphas do not matter.
      *args: data.
    """
    inserted = sd.apply_plan(params, plan.with_alpha(1.0))
    at = curvature_of(loss, inserted, *args)
    two = plan.with_alpha(2.0)
    # phi is self-adjoint with eigenvalues 1/2, 1 and 2, so its eigenvectors are orthonormal.
    values, basis = np.linalg.eigh(linear_matrix(lambda tree: bounds.phi_inverse(tree, two), inserted))
    order = jnp.asarray(np.rint(np.log2(values)))
    rotated = basis.T @ at.hessian @ basis
    return Blocks(basis.T @ at.gradient, (rotated + rotated.T) / 2, order, jnp.asarray(basis))


def stiff(key: PRNGKeyArray, sizes: tuple[int, int, int] = (2, 3, 2), spread: float = 1.0) -> Blocks:
    """Draw a positive definite Hessian and a gradient with fast, rest and slow coordinates.

    Args:
      key: of the draw.
      sizes: how many of each.
      spread: eigenvalues are e to `spread` times a normal.
    """
    n = sum(sizes)
    keys = jax.random.split(key, 3)
    Q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (n, n)))
    H = (Q * jnp.exp(spread * jax.random.normal(keys[1], (n,)))) @ Q.T
    order = jnp.repeat(jnp.array([1.0, 0.0, -1.0]), jnp.array(sizes), total_repeat_length=n)
    return Blocks(jax.random.normal(keys[2], (n,)), (H + H.T) / 2, order, jnp.eye(n))
