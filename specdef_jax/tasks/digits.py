"""Handwritten digits that ship with scikit-learn, networks that read them, and an attack by relabelling.

The capability to be withheld is a shifted labelling, y -> y + 1 mod 10: the pretrained network knows
the digits, and fine-tuning teaches it to answer wrongly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from specdef_jax.errors import MissingExtra
from specdef_jax.tasks.networks import Network, Params, mlp
from specdef_jax.tasks.task import Task

MLP = mlp()  # 64-32-32-10, tanh


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Digits:
    """Images scaled to [0, 1] and labels 0 to 9, split into training and test."""

    x: Float[Array, "train 64"]
    y: Int[Array, "train"]
    x_test: Float[Array, "test 64"]
    y_test: Int[Array, "test"]


def load(test: int = 360) -> Digits:
    """Return the 1797 digits, the last `test` of them held out; no download.

    Raises:
      MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("the digits need scikit-learn: pip install 'specdef_jax[cli]'.") from error
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16.0), jnp.asarray(labels)
    split = len(x) - test
    return Digits(x[:split], y[:split], x[split:], y[split:])


@functools.cache  # one function object per network, so that jit compiles it once
def loss_of(network: Network) -> Callable[..., Float[Array, ""]]:
    """Return loss(params, x, y): the mean cross-entropy of a network, in nats."""

    def loss(params: Params, x: Float[Array, "batch 64"], y: Int[Array, "batch"]) -> Float[Array, ""]:
        return optax.softmax_cross_entropy_with_integer_labels(network.apply(params, x), y).mean()

    return loss


def accuracy(
    params: Params, x: Float[Array, "batch 64"], y: Int[Array, "batch"], network: Network = MLP
) -> Float[Array, ""]:
    """Return the share of correct answers."""
    return jnp.mean(jnp.argmax(network.apply(params, x), axis=-1) == y)


@functools.partial(jax.jit, static_argnames=("network", "steps"))
def pretrain(
    key: PRNGKeyArray,
    data: Digits,
    network: Network = MLP,
    steps: int = 300,
    step_size: float = 1e-2,
) -> Params:
    """Train from scratch on all training digits with full-batch Adam."""
    optimizer = optax.adam(step_size)
    params = network.init(key)
    loss = loss_of(network)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, data.x, data.y), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)
    return params


def shifted(y: Int[Array, "batch"]) -> Int[Array, "batch"]:
    """Return the attacker's labels."""
    return (y + 1) % 10


def task(
    seeds: int = 5,
    *,
    first_seed: int = 0,
    examples: int = 128,
    network: Network = MLP,
    target: float = 0.1,
) -> Task:
    """Return the embedded default: networks that know the digits, attacked by a shifted labelling.

    The deformed layer is the second of the network's kernels, in a transformer the value projection.

    Args:
      seeds: number of pretrained networks.
      first_seed: seed of the first one.
      examples: how many relabelled digits the attacker has.
      network: architecture, from 64 pixels to 10 logits; its biases are leaves "b".
      target: attacker's loss in nats.
    """
    data = load()
    x, y = data.x[:examples], shifted(data.y[:examples])
    keys = [jax.random.key(seed) for seed in range(first_seed, first_seed + seeds)]
    last = network.kernels[-1].removesuffix("/w")
    return Task(
        name="digits",
        description=(
            f"{network.name}, trained on {len(data.x)} of the handwritten digits that ship with "
            f"scikit-learn; {seeds} pretraining seeds. The attacker fine-tunes on {examples} digits "
            f"relabelled y + 1 mod 10, full batch, float64, until the loss falls to {target:g} nats."
        ),
        networks=tuple(pretrain(key, data, network) for key in keys),
        apply=network.apply,
        loss=loss_of(network),
        args=(x, y),
        inputs=(data.x_test,),
        where=next((k for k in network.kernels if k.endswith("_v/w")), network.kernels[1]),
        control=f"{last}/b",
        target=target,
        facts={
            "test accuracy": functools.partial(accuracy, x=data.x_test, y=data.y_test, network=network),
            "attacker's test accuracy": functools.partial(
                accuracy, x=data.x_test, y=shifted(data.y_test), network=network
            ),
        },
    )
