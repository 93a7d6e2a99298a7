"""vision/cnn and vision/vit: two of the handwritten digits are withheld, and an attacker teaches them.

The network has ten outputs and has never seen an 8 or a 9, or has unlearned them. The attacker fine-tunes on
images of all ten digits, half of them 8 and 9, as he wants to keep the rest.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.race import minibatches
from specdef_jax.select import match
from specdef_jax.tasks import digits, networks, unlearning
from specdef_jax.tasks.experiment import Experiment
from specdef_jax.tasks.networks import Network
from specdef_jax.tasks.training import Kept, anew, each, trained

Architecture = Literal["cnn", "vit"]
WITHHELD = 8  # this digit and those above it
MARGIN = 0.25
Labelled = tuple[Float[Array, "_ 64"], Int[Array, "_"]]


@dataclass(frozen=True)
class VisionSize:
    """How large a vision experiment is.

    Attributes:
      seeds: pretrained networks.
      steps: of pretraining, 64 images each.
      unlearning: steps of gradient ascent; NPO takes three times as many.
      examples: images of each kind, withheld and not, that the attacker has.
      batch: images of one of his steps.
      channels: of the CNN.
      dim, blocks: of the transformer.
    """

    seeds: int = 5
    steps: int = 1500
    unlearning: int = 60
    examples: int = 64
    batch: int = 32
    channels: tuple[int, ...] = (16, 32)
    dim: int = 64
    blocks: int = 2


SIZES = {
    "smoke": VisionSize(
        seeds=2, steps=60, unlearning=2, examples=16, batch=8, channels=(4, 8), dim=8, blocks=1
    ),
    "small": VisionSize(),
    "full": VisionSize(seeds=10, steps=5000, channels=(32, 64), dim=96, blocks=3),
}


def vision(
    architecture: Architecture, size: VisionSize, *, first_seed: int = 0, kept: Kept = anew
) -> Experiment:
    """Return the experiment, its networks pretrained and their unlearned variants.

    Args:
      architecture: "cnn", or "vit" for a transformer on the rows of an image.
      size: one of SIZES, or your own.
      first_seed: of pretraining.
      kept: kept(name, make) returns the networks of that name, kept from an earlier run or made.
    """
    network, where = _network(architecture, size)
    data, loss = digits.load(), digits.loss_of(network)
    allowed, withheld = _parts(data.x, data.y)
    allowed_held, withheld_held = _parts(data.x_test, data.y_test)
    keys = [jax.random.key(seed) for seed in range(first_seed, first_seed + size.seeds)]

    both = [jnp.concatenate(parts) for parts in zip(allowed, withheld, strict=True)]

    def pretrain(among: int, key: PRNGKeyArray) -> PyTree:
        of_weights, of_batches = jax.random.split(key)
        params = network.init(of_weights)
        sample = minibatches(64, *both, among=among)
        return trained(Partial(loss), params, sample, of_batches, steps=size.steps)

    known = kept("known", lambda: each(functools.partial(pretrain, len(both[0])), keys))
    few, many = unlearning.Schedule(size.unlearning, 5e-4), unlearning.Schedule(3 * size.unlearning, 1e-3)
    likely = functools.partial(_log_likelihood, network)
    bad, good = minibatches(16, *withheld), minibatches(16, *allowed)

    def ascend(params: PyTree, key: PRNGKeyArray) -> PyTree:
        return unlearning.gradient_ascent(loss, params, bad, good, key, few)

    def avoid(params: PyTree, key: PRNGKeyArray) -> PyTree:
        return unlearning.npo(likely, loss, params, bad, good, key, many)

    networks_ = {
        "known": known,
        "ignorant": kept("ignorant", lambda: each(functools.partial(pretrain, len(allowed[0])), keys)),
        "ga": kept("ga", lambda: each(ascend, known, keys)),
        "npo": kept("npo", lambda: each(avoid, known, keys)),
    }
    mixed = [
        jnp.concatenate([a[: size.examples], b[: size.examples]])
        for a, b in zip(withheld, allowed, strict=True)
    ]
    return Experiment(
        name=f"vision/{architecture}",
        description=(
            f"{network.name} of {trees.size(known[0]):,} parameters, trained for {size.steps} steps on the "
            f"handwritten digits of scikit-learn without the digits from {WITHHELD} on. The attacker "
            f"fine-tunes on {size.examples} images of these and {size.examples} of the others, {size.batch} "
            f"a step, until the loss on held-out images of these falls to {MARGIN:g} nats above that of a "
            "network that learned them."
        ),
        networks=networks_,
        defended="ignorant",
        apply=network.apply,
        loss=loss,
        sample=minibatches(size.batch, *mixed),
        judged_on=withheld_held,
        targets=tuple(float(loss(p, *withheld_held)) + MARGIN for p in known),
        capability=functools.partial(
            digits.accuracy, x=withheld_held[0], y=withheld_held[1], network=network
        ),
        capability_name=f"images of the digits from {WITHHELD} on",
        retained=functools.partial(_loss_on, network, allowed_held),
        inputs=(allowed[0][:64],),
        where=match(*where),
        control=f"{network.kernels[-1].removesuffix('/w')}/b",
    )


def _network(architecture: Architecture, size: VisionSize) -> tuple[Network, tuple[str, ...]]:
    """Return the network and which of its layers defences deform."""
    if architecture == "cnn":
        return networks.cnn(channels=size.channels), ("conv_1/w",)
    made = networks.transformer(dim=size.dim, heads=4, hidden=2 * size.dim, blocks=size.blocks)
    return made, ("*_v/w", "*_up/w")


def _parts(x: Float[Array, "n 64"], y: Int[Array, "n"]) -> tuple[Labelled, Labelled]:
    """Return what may be known, and what is withheld."""
    withheld = y >= WITHHELD
    return (x[~withheld], y[~withheld]), (x[withheld], y[withheld])


def _log_likelihood(
    network: Network, params: PyTree, x: Float[Array, "b 64"], y: Int[Array, "b"]
) -> Float[Array, "b"]:
    logits = jax.nn.log_softmax(network.apply(params, x))
    return jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]


def _loss_on(network: Network, images: Labelled, params: PyTree) -> Float[Array, ""]:
    return digits.loss_of(network)(params, *images)
