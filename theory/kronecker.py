"""K-FAC written out on a four-layer perceptron with a deformed pair inside: W_0, Wt, C, W_2 (for 4.4).

x -> u = Wt tanh(W_0 x) -> W_2 tanh(C u), squared loss, no biases (a bias is one more column, on which T acts
as 1). The factors are those of the Fisher matrix of Gaussian outputs, that is of Gauss-Newton.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from theory.instances.matrices import orthonormal

Weights = tuple[Array, Array, Array, Array]
LAYERS = ("W_0", "Wt", "C", "W_2")
SHAPES = ((5, 4), (4, 5), (4, 4), (3, 4))


class Net(NamedTuple):
    """Weights of the identity-inserted network, data, and the directions of the deformation.

    Attributes:
      weights: W_0 (5, 4), W (4, 5), C = I (4, 4), W_2 (3, 4).
      x: inputs (examples, 4).
      y: targets (examples, 3).
      U: (4, k).
    """

    weights: Weights
    x: Float[Array, "examples 4"]
    y: Float[Array, "examples 3"]
    U: Float[Array, "4 k"]

    def T(self, alpha: Array | float) -> Array:
        """Return I + (alpha - 1) U U^T."""
        return jnp.eye(4) + (alpha - 1) * self.U @ self.U.T

    def deformed(self, alpha: Array | float) -> Weights:
        """Return the weights at alpha."""
        return phi(self, self.weights, alpha)


class Factors(NamedTuple):
    """What K-FAC knows of one layer.

    Attributes:
      A: E[a a^T], a the layer's inputs.
      G: E[d d^T] summed over outputs, d the derivatives of the network's outputs by the layer's.
      gradient: of the loss.
    """

    A: Array
    G: Array
    gradient: Array


def network(key: PRNGKeyArray, k: int = 2, examples: int = 40) -> Net:
    """Draw a network, its data and random directions."""
    keys = jax.random.split(key, 7)
    first, pair, _, last = (
        jax.random.normal(key, shape) / shape[1] ** 0.5 for key, shape in zip(keys[:4], SHAPES, strict=True)
    )
    x, y = jax.random.normal(keys[4], (examples, 4)), jax.random.normal(keys[5], (examples, 3))
    return Net((first, pair, jnp.eye(4), last), x, y, orthonormal(keys[6], 4, k))


def phi(net: Net, weights: Weights, alpha: Array | float) -> Weights:
    """Map weights or steps of the inserted network to the deformed one."""
    first, pair, comp, last = weights
    return first, net.T(alpha) @ pair, comp @ net.T(1 / alpha), last


def outputs(weights: Weights, x: Array, shifts: tuple[Array, ...] | None = None) -> tuple[Array, list[Array]]:
    """Return one example's outputs and the inputs of every layer; shifts are added to the layers' outputs."""
    first, pair, comp, last = weights
    s = shifts or tuple(jnp.zeros(len(w)) for w in weights)
    h = jnp.tanh(first @ x + s[0])
    u = pair @ h + s[1]
    v = jnp.tanh(comp @ u + s[2])
    return last @ v + s[3], [x, h, u, v]


def loss(weights: Weights, x: Array, y: Array) -> Array:
    """Return half the mean squared error."""
    found = jax.vmap(lambda one: outputs(weights, one)[0])(x)
    return 0.5 * jnp.mean(jnp.sum((found - y) ** 2, axis=1))


def factors(weights: Weights, x: Array, y: Array) -> list[Factors]:
    """Return the Kronecker factors and gradients of every layer."""
    zeros = tuple(jnp.zeros(len(w)) for w in weights)
    inputs = jax.vmap(lambda one: outputs(weights, one)[1])(x)
    jacobians = jax.vmap(lambda one: jax.jacrev(lambda s: outputs(weights, one, s)[0])(zeros))(x)
    gradients = jax.grad(loss)(weights, x, y)
    count = len(x)
    return [
        Factors(a.T @ a / count, jnp.einsum("noi,noj->ij", d, d) / count, g)
        for a, d, g in zip(inputs, jacobians, gradients, strict=True)
    ]


def tikhonov(layer: Factors, damping: Array | float) -> tuple[Array, Array]:
    """Return what is added to A and to G: pi sqrt(lambda) and sqrt(lambda) / pi (Martens and Grosse)."""
    pi = jnp.sqrt((jnp.trace(layer.A) / len(layer.A)) / (jnp.trace(layer.G) / len(layer.G)))
    root = jnp.sqrt(damping)
    return pi * root, root / pi


def step(layer: Factors, to_A: Array | float = 0.0, to_G: Array | float = 0.0) -> Array:
    """Return -(G + to_G)^-1 gradient (A + to_A)^-1; numbers are multiples of the identity."""
    A, G = (
        M + (d if jnp.ndim(d) == 2 else d * jnp.eye(len(M))) for M, d in ((layer.A, to_A), (layer.G, to_G))
    )
    return -jnp.linalg.solve(A, jnp.linalg.solve(G, layer.gradient).T).T


def steps(weights: Weights, x: Array, y: Array, damping: Array | float) -> Weights:
    """Return K-FAC's steps with factored Tikhonov damping; damping 0 is none."""
    first, pair, comp, last = (step(layer, *tikhonov(layer, damping)) for layer in factors(weights, x, y))
    return first, pair, comp, last


def jacobian(weights: Weights, x: Array) -> Float[Array, "outputs n"]:
    """Return the derivatives of all outputs by all weights, rows scaled by 1/sqrt(examples): F = J^T J."""
    leaves = jax.jacrev(lambda w: jax.vmap(lambda one: outputs(w, one)[0])(x).ravel())(weights)
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1) / len(x) ** 0.5
