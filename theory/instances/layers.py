"""One layer of a network laid open: what goes into it, and the loss as a function of what comes out.

The network's own apply is not taken apart. A layer adds a bias to its outputs, so that a shift of the outputs
that differs from position to position is a bias with one axis more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from theory.instances.networks import Instance

_SIGMA = {"tanh": jnp.tanh, "relu": jax.nn.relu, "gelu": jax.nn.gelu}


@dataclass(frozen=True)
class OpenLayer:
    """A layer y_t = W h_t + b within loss(params, *args).

    Attributes:
      name: of the network.
      loss: loss(params, *args), the mean over examples.
      params: plain parameters, the layer's as {"w": kernel, "b": bias}.
      args: (inputs, targets), leading axis over examples.
      where: path of the kernel, ending in "/w".
      inputs: inputs(params, x) -> h, (examples, positions, n), in the order of the kernel's rows.
      shifted: shifted(params, shift, x, target) -> the loss of ONE example when (positions, m) is added to
        what the layer puts out.
      positions: how often the layer is applied in one forward pass of one example.
    """

    name: str
    loss: Callable[..., Array]
    params: PyTree
    args: tuple[Any, ...]
    where: str
    inputs: Callable[..., Array]
    shifted: Callable[..., Array]
    positions: int

    @property
    def weight(self) -> Float[Array, "m n"]:
        """W: the transpose of the kernel, all its input axes in one."""
        kernel = self.params[self.where.removesuffix("/w")]["w"]
        return kernel.reshape(-1, kernel.shape[-1]).T

    def outputs_hessian(self) -> Float[Array, "examples positions m positions m"]:
        """Return the Hessian of each example's loss in the layer's outputs, by jax.hessian alone."""
        no_shift = jnp.zeros((self.positions, self.weight.shape[0]))
        return _outputs_hessian(self.shifted, self.params, no_shift, self.args)


def opened(instance: Instance) -> OpenLayer:
    """Open the layer that statements about one layer deform."""
    kind, _, rest = instance.network.name.partition(" (")
    sigma = _SIGMA[rest.rstrip(")") or "tanh"]
    inputs = {
        "MLP": partial(_after_dense, sigma),
        "shared perceptron": partial(_after_shared, instance.positions),
        "CNN": partial(_after_convolution, sigma),
        "transformer": partial(_after_embedding, instance.positions),
    }[kind]
    layer = instance.where.removesuffix("/w")
    places = (2, 2) if kind == "CNN" else (instance.positions,)
    return OpenLayer(
        instance.name, instance.loss, instance.params, instance.args, instance.where, inputs,
        partial(_shifted, instance.loss, layer, places), instance.positions,
    )  # fmt: skip


def twice(key: PRNGKeyArray) -> OpenLayer:
    """Open a layer that is applied to its own output: its second input depends on its own weight."""
    keys = jax.random.split(key, 5)
    params = {
        "in": {"w": jax.random.normal(keys[0], (3, 4)) / 2},
        "twice": {"w": jax.random.normal(keys[1], (4, 4)), "b": jax.random.normal(keys[2], (4,)) / 3},
        "out": {"w": jax.random.normal(keys[3], (4, 2))},
    }
    args = jax.random.normal(keys[4], (6, 3)), jnp.sin(jnp.arange(12.0)).reshape(6, 2)
    return OpenLayer("h -> layer(layer(h))", _loss_twice, params, args, "twice/w", _inputs_twice,
                     _shifted_twice, positions=2)  # fmt: skip


@partial(jax.jit, static_argnums=0)
def _outputs_hessian(shifted: Callable, params: PyTree, no_shift: Array, args: tuple[Any, ...]) -> Array:
    def of_example(*example: Array) -> Array:
        return jax.hessian(lambda shift: shifted(params, shift, *example))(no_shift)

    return jax.vmap(of_example)(*args)


def _shifted(
    loss: Callable, layer: str, places: tuple[int, ...], params: PyTree, shift: Array, x: Array, y: Array
) -> Array:
    """Add the shift to the layer's bias, broadcast over the one example."""
    moved = params[layer]["b"] + shift.reshape(*places, -1)
    return loss({**params, layer: {**params[layer], "b": moved}}, x[None], y[None])


def _after_dense(sigma: Callable, params: PyTree, x: Array) -> Array:
    return sigma(x @ params["layer_0"]["w"] + params["layer_0"]["b"])[:, None]


def _after_shared(positions: int, params: PyTree, x: Array) -> Array:
    return _after_dense(jnp.tanh, params, x.reshape(len(x), positions, -1))[:, 0]


def _after_convolution(sigma: Callable, params: PyTree, x: Array) -> Array:
    """Return the patches of 2 x 2 pixels that the second convolution, of stride 2, reads."""
    first = params["conv_0"]
    image = x.reshape(-1, 4, 4, 1)
    padded = jnp.pad(image, ((0, 0), (0, 1), (0, 1), (0, 0)))
    windows = [padded[:, i : i + 4, j : j + 4] @ first["w"][i, j] for i in (0, 1) for j in (0, 1)]
    h = sigma(sum(windows) + first["b"])
    patches = h.reshape(len(x), 2, 2, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(len(x), 4, -1)


def _after_embedding(positions: int, params: PyTree, x: Array) -> Array:
    """Return the normalized embeddings, which the value projection reads."""
    h = x.reshape(len(x), positions, -1) @ params["patch"]["w"] + params["patch"]["b"]
    h = h + params["position_embed"]["b"]
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)


def _loss_twice(params: PyTree, x: Array, target: Array) -> Array:
    return _squared_twice(params, jnp.zeros((2, 1)), x, target)


def _squared_twice(params: PyTree, shift: Array, x: Array, target: Array) -> Array:
    h = jnp.tanh(x @ params["in"]["w"])
    for delta in shift:
        h = jnp.tanh(h @ params["twice"]["w"] + params["twice"]["b"] + delta)
    return 0.5 * jnp.mean(jnp.sum((h @ params["out"]["w"] - target) ** 2, axis=-1))


def _inputs_twice(params: PyTree, x: Array) -> Array:
    first = jnp.tanh(x @ params["in"]["w"])
    return jnp.stack([first, jnp.tanh(first @ params["twice"]["w"] + params["twice"]["b"])], axis=1)


def _shifted_twice(params: PyTree, shift: Array, x: Array, target: Array) -> Array:
    return _squared_twice(params, shift, x[None], target[None])
