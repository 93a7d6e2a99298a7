"""Networks small enough for dense Hessians: perceptrons, a CNN, a transformer block, shared weights.

Each is a loss(params, *args) on plain parameters, with data that it does not fit, away from kinks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from specdef_jax.tasks.networks import Network, cnn, mlp, transformer
from theory.sizes import Size

Risk = Literal["cross-entropy", "squared"]


@dataclass(frozen=True)
class Instance:
    """A network, its data and its loss.

    Attributes:
      name: as tables call it.
      network: the architecture.
      loss: loss(params, *args) -> scalar; one object per architecture and risk.
      params: plain parameters.
      args: (inputs, targets).
      where: the kernel that statements about one layer deform; hidden, and applied once per position.
      positions: how often that kernel is applied in one forward pass of one example.
    """

    name: str
    network: Network
    loss: Callable[..., Array]
    params: PyTree
    args: tuple[Any, ...]
    where: str
    positions: int = 1


@functools.cache
def loss_of(network: Network, risk: Risk) -> Callable[..., Array]:
    """Return the mean loss of a network on integer labels; squared loss against one-hot targets, halved."""

    def cross_entropy(params: PyTree, x: Array, y: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(network.apply(params, x), y).mean()

    def squared(params: PyTree, x: Array, y: Array) -> Array:
        logits = network.apply(params, x)
        return 0.5 * jnp.mean(jnp.sum((logits - jax.nn.one_hot(y, logits.shape[-1])) ** 2, axis=-1))

    return {"cross-entropy": cross_entropy, "squared": squared}[risk]


@functools.cache
def tokens_mlp(tokens: int, features: int, hidden: int, classes: int) -> Network:
    """Return a perceptron applied to every token with the same weights, averaged over tokens.

    THEORY 2.2 with t, s: each kernel is read at every position.
    """
    inner = mlp((features, hidden, hidden, classes))

    def apply(params: PyTree, x: Array) -> Array:
        return jnp.tanh(inner.apply(params, x.reshape(-1, tokens, features)).sum(1)) * 2

    return Network("shared perceptron", inner.init, apply, inner.kernels)


def _make(
    network: Network,
    risk: Risk,
    where: str,
    inputs: tuple[int, ...],
    classes: int,
    key: PRNGKeyArray,
    examples: int,
    positions: int = 1,
) -> Instance:
    init_key, bias_key, x_key, y_key = jax.random.split(key, 4)
    params = network.init(init_key)
    keys = jax.random.split(bias_key, len(params))
    params = {
        name: {**layer, "b": layer["b"] + 0.3 * jax.random.normal(k, layer["b"].shape)}
        for (name, layer), k in zip(params.items(), keys, strict=True)
    }
    x = jax.random.normal(x_key, (examples, *inputs))
    y = jax.random.randint(y_key, (examples,), 0, classes)
    name = f"{network.name}, {risk}"
    return Instance(name, network, loss_of(network, risk), params, (x, y), where, positions)


def mlp_instance(key: PRNGKeyArray, activation: Any = "tanh", risk: Risk = "cross-entropy") -> Instance:
    """A perceptron 4-5-4-3 on ten examples."""
    return _make(mlp((4, 5, 4, 3), activation), risk, "layer_1/w", (4,), 3, key, 10)


def linear_tail_instance(key: PRNGKeyArray, risk: Risk = "squared") -> Instance:
    """A perceptron whose deformed layer is the last: the map behind it is linear."""
    return _make(mlp((4, 5, 3)), risk, "layer_1/w", (4,), 3, key, 14)


def cnn_instance(key: PRNGKeyArray, risk: Risk = "cross-entropy") -> Instance:
    """Two convolutions on 4 x 4 images; the second is deformed."""
    network = cnn((4, 4, 1), (3, 3), classes=3, window=2)
    return _make(network, risk, "conv_1/w", (16,), 3, key, 8, positions=4)


def transformer_instance(key: PRNGKeyArray, risk: Risk = "cross-entropy") -> Instance:
    """One block, three tokens; the value projection is deformed."""
    network = transformer(tokens=3, features=3, dim=4, heads=2, hidden=5, classes=3)
    return _make(network, risk, "block_0_v/w", (9,), 3, key, 8, positions=3)


def shared_instance(key: PRNGKeyArray, risk: Risk = "cross-entropy") -> Instance:
    """A perceptron whose weights are shared over three tokens."""
    return _make(tokens_mlp(3, 3, 4, 3), risk, "layer_1/w", (9,), 3, key, 8, positions=3)


BUILDERS: dict[str, Callable[[PRNGKeyArray], Instance]] = {
    "mlp": mlp_instance,
    "relu": functools.partial(mlp_instance, activation="relu"),
    "gelu squared": functools.partial(mlp_instance, activation="gelu", risk="squared"),
    "tanh squared": functools.partial(mlp_instance, risk="squared"),
    "linear tail": linear_tail_instance,
    "shared": shared_instance,
    "cnn": cnn_instance,
    "transformer": transformer_instance,
    "transformer squared": functools.partial(transformer_instance, risk="squared"),
}


def networks(
    size: Size, key: PRNGKeyArray, *, smooth: str = "mlp", hard: str = "transformer"
) -> list[Instance]:
    """Return one smooth instance (small), with a hard one (default), or every one (full).

    Args:
      size: how many.
      key: of the parameters and data.
      smooth: name of the smooth one in BUILDERS.
      hard: name of the hard one.
    """
    names = {Size.SMALL: [smooth], Size.DEFAULT: [smooth, hard], Size.FULL: list(BUILDERS)}[size]
    order = list(BUILDERS)
    return [BUILDERS[name](jax.random.fold_in(key, order.index(name))) for name in names]
