"""One small network of every kind of layer that can be deformed, with biases."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

import specdef_jax as sd
from specdef_jax.attacks import AdjacentPair
from specdef_jax.parametrization import KernelAxes
from specdef_jax.tasks.networks import cnn, mlp
from theory.instances.adjacent import grouped_attention

KEY = jax.random.key(11)
PAIR = AdjacentPair("first/w", "second/w", "first/b", groups=2)


@dataclass(frozen=True)
class Kind:
    """A network and how it is deformed.

    Attributes:
      loss: loss(params, *args) of the plain network.
      params: plain parameters.
      args: data.
      deform: alpha -> deformed tree.
      where: deformed kernel, or the first of two adjacent ones.
      pairs: adjacent kernels that were deformed in their places; none where a pair was inserted.
    """

    loss: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    deform: Callable[[float], Any]
    where: str
    pairs: tuple[AdjacentPair, ...] = ()


def cross_entropy(apply):
    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

    return loss


def _inserted(apply, params, args, where, spec, **more):
    def deform(alpha):
        return sd.deform(params, spec(alpha), where=where, key=KEY, **more)

    return Kind(cross_entropy(apply), params, args, deform, where)


def _spec(side):
    return lambda alpha: sd.SpecDef(alpha=alpha, k=2, side=side)


def dense(side="output"):
    """Return a perceptron; its kernel (6, 5) is deformed."""
    return _inserted(MLP.apply, with_biases(MLP.init(KEY)), data(12, 8), "layer_1/w", _spec(side))


def convolution():
    """Return two convolutions; the second, (2, 2, 3, 4), is deformed."""
    net = cnn((4, 4, 1), (3, 4), classes=3, window=2)
    return _inserted(net.apply, with_biases(net.init(KEY)), data(12, 16), "conv_1/w", _spec("output"))


def experts():
    """Return a mixture of three dense experts: kernel (3, 5, 4), the first axis over experts."""
    keys = jax.random.split(KEY, 3)
    params = {
        "experts": {"w": jax.random.normal(keys[0], (3, 5, 4)) / 2, "b": jax.random.normal(keys[1], (3, 4))},
        "head": {"w": jax.random.normal(keys[2], (4, 3)), "b": jnp.ones(3) / 3},
    }

    def apply(params, x):
        gates = jax.nn.softmax(x[:, :3])
        h = jnp.tanh(jnp.einsum("bi,eio->beo", x, params["experts"]["w"]) + params["experts"]["b"])
        return jnp.einsum("be,beo->bo", gates, h) @ params["head"]["w"] + params["head"]["b"]

    return _inserted(apply, params, data(12, 5), "experts/w", _spec("output"), stacked=True)


def attention():
    """Return grouped-query attention with a pair in each group: kernel (5, groups, 3)."""
    net = grouped_attention(KEY)
    first = net.params["first"]
    params = {**net.params, "first": {**first, "w": first["w"].reshape(5, 2, 3)}}
    axes = {"first/w": KernelAxes((0,), (2,), stack=(1,))}

    def apply(params, x):
        first = params["first"]
        flat = {**params, "first": {**first, "w": first["w"].reshape(5, 6)}}
        return net.apply(flat, x).mean(1)

    args = net.x, jnp.arange(3)
    return _inserted(apply, params, args, "first/w", _spec("output"), axes=axes)


def gauge():
    """Return the same attention, deformed in its place: nothing is inserted."""
    net = grouped_attention(KEY)
    first, second = net.params["first"], net.params["second"]

    def deform(alpha):
        made = sd.deform_pair(
            first["w"], second["w"], sd.SpecDef(alpha=alpha, k=2), key=KEY, bias=first["b"], groups=2
        )
        return {
            **net.params,
            "first": {"w": made.first, "b": made.bias},
            "second": {**second, "w": made.second},
        }

    loss = cross_entropy(lambda params, x: net.apply(params, x).mean(1))
    return Kind(loss, net.params, (net.x, jnp.arange(3)), deform, "first/w", (PAIR,))


def with_biases(params):
    """Return parameters with biases that are not zero."""
    return {
        name: {**layer, "b": layer["b"] + 0.1 * jnp.arange(1.0, 1 + layer["b"].shape[-1])}
        for name, layer in params.items()
    }


def data(examples, features):
    """Return Gaussian inputs and three classes."""
    return jax.random.normal(jax.random.fold_in(KEY, 1), (examples, features)), jnp.arange(examples) % 3


MLP = mlp((8, 6, 5, 3))
KINDS = {
    "dense": dense,
    "dense, input side": lambda: dense("input"),
    "convolution": convolution,
    "experts": experts,
    "grouped attention": attention,
    "gauge": gauge,
}
