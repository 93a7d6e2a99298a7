"""Directions that tell an attacker least, from a batch of activations (THEORY.md 3.3 (iv)).

At step c / alpha^2 an attacker can train y -> y + B z with z = U^T x alone, x the outputs of the layer. To
second order what that gains is the information z carries linearly about the residual g of the attacker's
loss, I_U = tr(E[g z^T] E[z z^T]^-1 E[z g^T]), a Rayleigh quotient of the pencil (N, M) with
N = E[x g^T] E[g x^T] and M = E[x x^T]. The k smallest generalized eigenvectors minimise it.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from specdef_jax.errors import SpecError
from specdef_jax.parametrization import full_precision_matmul as matmul

ENERGY = 1e-4


def resistant_directions(
    activations: Float[Array, "..."],
    k: int,
    *,
    residuals: Float[Array, "..."] | None = None,
    energy: float = ENERGY,
) -> Float[Array, "..."]:
    """Return k orthonormal directions whose activations say least about the attacker's residual.

    Without residuals the attacker's task is unknown: the residual is then taken to be an isotropic linear
    function of the centred activations, so N = Cov(x)^2. Directions with less than `energy` times the
    largest second moment are left out: they need an alpha beyond any dtype to reach a given sharpness, as
    that grows as alpha^2 E[z^2].

    Args:
      activations: (*stack, samples, d), outputs of the layer before its bias, one row per sample and
        position.
      k: number of directions, 1 <= k <= the number of directions with enough energy.
      residuals: (*stack, samples, r), gradient of a proxy of the attacker's loss in those outputs, if one
        is known.
      energy: smallest second moment E[z^2] of a direction, as a share of the largest; in (0, 1].

    Returns:
      (*stack, d, k) in float64, ascending in information.

    Raises:
      SpecError: too few samples or directions, entries that are not finite, or shapes that do not fit.

    Example:
      >>> x = jnp.array([[3.0, 1.0], [-3.0, 1.0], [3.0, 1.0], [-3.0, 1.0]])  # the second one is constant
      >>> [abs(round(float(u), 3)) for u in resistant_directions(x, 1)[:, 0]]
      [0.0, 1.0]
    """
    with jax.enable_x64(True):
        x = jnp.asarray(activations).astype(jnp.float64)
        g = None if residuals is None else jnp.asarray(residuals).astype(jnp.float64)
        _check(x, g, k, energy)
        directions, kept = _least_information(x, g, k, energy)
        if not isinstance(kept, Tracer) and int(np.min(kept)) < k:
            raise SpecError(
                f"only {int(np.min(kept))} directions carry {energy:g} of the largest activation energy, "
                f"fewer than k = {k}; choose a smaller k or energy."
            )
        return directions


@partial(jax.jit, static_argnames="k")
def _least_information(x: Array, g: Array | None, k: int, energy: float) -> tuple[Array, Array]:
    """Solve the pencil in the eigenbasis of M; what has too little energy is moved behind all else."""
    samples = x.shape[-2]
    moment = matmul(_transpose(x), x) / samples
    centred = x - x.mean(axis=-2, keepdims=True)
    cross = matmul(_transpose(x), centred if g is None else g) / samples  # E[x (x - mean)^T] = Cov(x)
    values, vectors = jnp.linalg.eigh(moment)
    enough = values >= energy * values[..., -1:]
    whitened = vectors * jnp.where(enough, 1 / jnp.sqrt(jnp.where(enough, values, 1)), 0)[..., None, :]
    rows = matmul(_transpose(whitened), cross)
    information = matmul(rows, _transpose(rows))
    beyond = 2 * jnp.linalg.norm(information, axis=(-2, -1))[..., None] + 1
    shift = jnp.where(enough, 0, beyond)[..., None] * jnp.eye(x.shape[-1])
    _, coefficients = jnp.linalg.eigh(information + shift)
    directions, _ = jnp.linalg.qr(matmul(whitened, coefficients[..., :k]))
    return directions, jnp.sum(enough, axis=-1)


def _check(x: Array, g: Array | None, k: int, energy: float) -> None:
    if x.ndim < 2 or x.shape[-2] < 2:
        raise SpecError(f"activations have shape {x.shape}: give (samples, features), two samples at least.")
    if not 1 <= k <= x.shape[-1]:
        raise SpecError(f"k = {k}: must lie between 1 and the {x.shape[-1]} features of the activations.")
    if not 0 < energy <= 1:
        raise SpecError(f"energy = {energy}: must lie in (0, 1].")
    if g is not None and g.shape[:-1] != x.shape[:-1]:
        raise SpecError(f"residuals have shape {g.shape}, activations {x.shape}: one row each per sample.")
    if not isinstance(x, Tracer) and not all(bool(jnp.isfinite(v).all()) for v in (x, g) if v is not None):
        raise SpecError("activations or residuals hold NaN or Inf; drop those samples.")


def _transpose(a: Array) -> Array:
    return jnp.swapaxes(a, -1, -2)
