"""How many steps of gradient descent lie below the floor of the fast set (THEORY.md 3.3 (vi)).

Within a neighbourhood N of the start the fast parameters alone cannot bring the loss below its infimum over
their ball; what is missing must come from the slow ones, which move by step times their gradient. For a tanh
perceptron with its last kernel deformed on the output side everything that enters is known in closed form.
Kernels are (in, out); the pair starts at M T(a), T(1/a); the fast parameters are f = U^T comp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Number = Float[Array, "..."] | float


def below_floor_steps(gap: Number, gradient: Number, step: Number, radius: Number) -> Float[Array, "..."]:
    """Return a lower bound on the steps of gradient descent to a loss of at most floor - gap.

    The slow parameters must travel gap / G, or leave the ball in which G is known; a step moves them by
    step * G at most. Valid while the fast parameters stay in theirs, for every schedule of steps <= step.

    Args:
      gap: how far below the floor, >= 0.
      gradient: G, the largest norm of the slow gradient on N; of minibatch gradients, if those are used.
      step: the largest step size.
      radius: R, of the slow ball.

    Source: THEORY.md 3.3 (vi).

    Example:
      >>> float(below_floor_steps(0.5, 2.0, 1e-3, 10.0))
      125.0
    """
    return jnp.minimum(jnp.asarray(gap) / gradient, radius) / (jnp.asarray(step) * gradient)


class Floor(NamedTuple):
    """The infimum of a convex loss over a ball, from both sides.

    Attributes:
      lower: certified by convexity, whatever became of the minimization.
      upper: the loss at `point`.
      point: in the ball, where the minimization ended.
    """

    lower: Float[Array, ""]
    upper: Float[Array, ""]
    point: Float[Array, "..."]


def ball_floor(
    loss: Callable[[Float[Array, "..."]], Float[Array, ""]],
    centre: Float[Array, "..."],
    radius: Number,
    *,
    smoothness: Number,
    steps: int = 300,
) -> Floor:
    """Return the infimum of a convex loss over |x - centre| <= radius, enclosed.

    At any point L >= L(x) + <g, y - x>, whose minimum over y in the ball is L(x) - <g, x - centre> - radius
    |g|: at the minimizer that is L(x), on the sphere too. Minimized by projected accelerated gradient; the
    best certificate met is returned.

    Args:
      loss: convex; this is the caller's to know.
      centre: of the ball, any shape, where the minimization starts.
      radius: Euclidean.
      smoothness: of the gradient; a value too small makes the enclosure wide, never wrong.
      steps: of the minimization.

    Source: Frank and Wolfe 1956 (the gap); Beck and Teboulle 2009.
    """
    value_and_grad = jax.value_and_grad(loss)

    def project(x: Array) -> Array:
        norm = jnp.linalg.norm((x - centre).ravel())
        return centre + (x - centre) * jnp.minimum(1.0, radius / jnp.where(norm > 0, norm, 1.0))

    def certificate(x: Array) -> tuple[Array, Array]:
        value, g = value_and_grad(x)
        return value - jnp.sum(g * (x - centre)) - radius * jnp.linalg.norm(g.ravel()), g

    def advance(carry: tuple, _: None) -> tuple[tuple, None]:
        x, ahead, t, lower = carry
        found, g = certificate(ahead)
        new = project(ahead - g / smoothness)
        later = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        # Both ends of the segment are in the ball, the extrapolated point may not be: the certificate
        # holds for a gradient taken anywhere.
        return (new, new + (t - 1) / later * (new - x), later, jnp.maximum(lower, found)), None

    one = jnp.ones((), centre.dtype)
    carry = (centre, centre, one, -jnp.inf * one)
    (x, _, _, lower), _ = jax.lax.scan(advance, carry, None, length=steps)
    return Floor(jnp.maximum(lower, certificate(x)[0]), loss(x), x)


class SlowConstants(NamedTuple):
    """Constants on N of a perceptron, none of which grows with alpha.

    Attributes:
      logits: J >= |d logits / d slow| of every input.
      gradient: G >= |dL / d slow|, of every batch: sqrt(2) J.
      features: D >= |dz / d slow|, z = h weight U / alpha the features of the fast set.
      smoothness: beta >= the largest eigenvalue of the Hessian in B = alpha f.
      lipschitz: l >= |d (dL/dB) / d slow|.
    """

    logits: Float[Array, "..."]
    gradient: Float[Array, "..."]
    features: Float[Array, "..."]
    smoothness: Float[Array, "..."]
    lipschitz: Float[Array, "..."]


def slow_constants(
    kernels: Sequence[Float[Array, "_ _"]],
    U: Float[Array, "m k"],
    inputs: Number,
    *,
    alpha: Number,
    fast_radius: Number,
    radius: Number,
) -> SlowConstants:
    """Return constants of a tanh perceptron with biases under softmax cross-entropy, last kernel deformed.

    They hold where |f - f_0| <= fast_radius / alpha and all other parameters together, in Euclidean norm, are
    within radius of their start. With M the last kernel, H = sqrt(width) >= |h| and K the compensation:
    |K| <= 1 + sqrt(radius^2 + (fast_radius / alpha)^2), and the product of the pair is M + M U B^T + (terms
    in the slow displacement), bounded by q below.

    Args:
      kernels: plain, (in, out), in the order of the forward pass; at least one.
      U: orthonormal directions of the last kernel's outputs, symmetric basis (the rotated one differs by an
        orthogonal change of parameters).
      inputs: largest norm of an input.
      alpha: >= 1.
      fast_radius: rho.
      radius: R.

    Source: THEORY.md 3.3 (vi).
    """
    *hidden, last = kernels
    rho, R = jnp.asarray(fast_radius), jnp.asarray(radius)
    fast, rest = last @ U, last - (last @ U) @ U.T
    size, fast_size, rest_size = _spectral(last), _spectral(fast), _spectral(rest)
    before = [jnp.asarray(inputs), *(jnp.sqrt(float(kernel.shape[1])) for kernel in hidden)]
    H = before[-1]
    # |dh / d slow|^2: a sum over the layers below, each behind the kernels that follow it; |tanh'| <= 1.
    behind, below = jnp.ones(()), jnp.zeros(())
    for kernel, norm in zip(reversed(hidden), reversed(before[:-1]), strict=True):
        below += (1 + norm**2) * behind**2
        behind *= _spectral(kernel) + R
    hidden_slope = jnp.sqrt(below)
    f_size = (1 + rho) / alpha
    q = size + rho * fast_size + R * jnp.sqrt(f_size**2 + 1 + rest_size**2) + R**2 / 2
    comp = 1 + jnp.sqrt(R**2 + (rho / alpha) ** 2)
    logits = jnp.sqrt(1 + H**2 * (comp**2 + (rest_size + R) ** 2) + q**2 * below)
    along = fast_size + R / alpha
    features = H / alpha + along * hidden_slope
    z = H * along
    return SlowConstants(
        logits, jnp.sqrt(2.0) * logits, features, z**2 / 2, jnp.sqrt(2.0) * features + z * logits / 2
    )


def fast_convexity(
    features: Float[Array, "N k"],
    logits: Float[Array, "N m"],
    constants: SlowConstants,
    *,
    fast_radius: Number,
    radius: Number,
) -> Float[Array, ""]:
    """Return mu, a lower bound on N of the Hessian in B across the shift of all logits; 0 if none is known.

    diag p - p p^T >= (min p) across 1, and a change d of the logits lowers p by exp(-sqrt(2) |d|) at most.
    The run never moves B along the shift, whose gradient is zero.

    Args:
      features: z = h M U at the start, without alpha.
      logits: at the start.
      constants: for the same radii.
      fast_radius: rho.
      radius: R.

    Source: THEORY.md 3.3 (vi).
    """
    moved = fast_radius * jnp.linalg.norm(features, axis=1) + constants.logits * radius
    weights = jax.nn.softmax(logits).min(axis=1) * jnp.exp(-jnp.sqrt(2.0) * moved)
    least = jnp.linalg.svd(jnp.sqrt(weights / len(features))[:, None] * features, compute_uv=False)[-1]
    least = jnp.where(len(features) < features.shape[1], 0.0, least)
    return jnp.square(jnp.maximum(0.0, least - jnp.sqrt(weights.max()) * constants.features * radius))


def confined_steps(slack: Number, step: Number, drift: Number, noise: Number = 0.0) -> Float[Array, "..."]:
    """Return for how many steps the fast parameters surely stay within `slack` of where they would.

    Gradient descent on a convex function with step c <= 2 / beta moves no two points apart, so the distance
    of B from a point B^ grows by at most c (noise + drift j) in step j: after T steps by c noise T + c drift
    T^2 / 2.

    Args:
      slack: rho - 2 |B^ - B_0|, > 0.
      step: c = alpha^2 times the step size.
      drift: l times the slow displacement of a step, l c G / alpha^2.
      noise: |dL/dB| at B^ and the start of the slow parameters.

    Source: THEORY.md 3.3 (vi).
    """
    linear = step * jnp.asarray(noise)
    return 2 * slack / (linear + jnp.sqrt(linear**2 + 2 * step * jnp.asarray(drift) * slack))


def _spectral(matrix: Float[Array, "_ _"]) -> Float[Array, ""]:
    return jnp.linalg.norm(matrix, 2)
