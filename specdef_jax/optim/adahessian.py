"""AdaHessian: Adam with Hutchinson's estimate of the Hessian diagonal in place of the gradient's square."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.optim.arguments import check_positive, needed


class AdaHessianState(NamedTuple):
    """State of adahessian.

    Attributes:
      steps: steps taken.
      mu: mean of the gradients.
      nu: mean of the squares of the estimated diagonals.
      key: of the next signs.
      products: Hessian products of the last step.
    """

    steps: Int[Array, ""]
    mu: PyTree
    nu: PyTree
    key: PRNGKeyArray
    products: Int[Array, ""]


def adahessian(
    step_size: float | Array = 0.1,
    b1: float = 0.9,
    b2: float = 0.999,
    *,
    power: float = 1.0,
    eps: float = 1e-8,
    probes: int = 1,
    key: PRNGKeyArray,
) -> optax.GradientTransformationExtraArgs:
    """Return -step_size m_hat / (v_hat^(power / 2) + eps), v the mean square of z * H z for random signs z.

    Needs hvp. Entries are not averaged over blocks, as the published code does for convolutions. The
    estimate's variance in an entry is the sum of squares of the rest of its row, which a deformation raises
    by up to alpha^4 (THEORY.md 4.4).

    Args:
      step_size: eta.
      b1: decay rate of the mean.
      b2: of the mean square.
      power: Hessian power, in (0, 1].
      eps: added to the denominator.
      probes: Hessian products in a step, averaged.
      key: seeds the signs.

    Raises:
      SpecError: power, eps or probes is not positive.
      ProblemError: (in update) hvp is missing.

    Source: Yao, Gholami, Shen, Mustafa, Keutzer and Mahoney, AAAI 2021, equations 8 to 10.
    """
    check_positive(power=power, eps=eps, probes=probes)

    def init(params: PyTree) -> AdaHessianState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdaHessianState(jnp.array(0), zeros, zeros, key, jnp.array(0))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, AdaHessianState]:
        del params
        (hvp,) = needed(extra, "adahessian", "hvp")
        following, *keys = jax.random.split(state.key, probes + 1)

        def estimate(key: PRNGKeyArray) -> PyTree:
            signs = trees.signs(trees.normal_like(key, updates))
            return jax.tree.map(jnp.multiply, signs, hvp(signs))

        diagonal = estimate(keys[0])
        for probe in keys[1:]:
            diagonal = jax.tree.map(jnp.add, diagonal, estimate(probe))
        diagonal = trees.scale(1 / probes, diagonal)
        count = state.steps + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, d: b2 * v + (1 - b2) * d**2, state.nu, diagonal)
        mean_left, square_left = 1 - b1**count, 1 - b2**count

        def step(m: Array, v: Array) -> Array:
            root = jnp.sqrt(v / square_left) ** power
            return (-step_size * (m / mean_left) / (root + eps)).astype(m.dtype)

        state = AdaHessianState(count, mu, nu, following, jnp.array(probes))
        return jax.tree.map(step, mu, nu), state

    return optax.GradientTransformationExtraArgs(init, update)
