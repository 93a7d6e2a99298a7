"""diffusion and style: a conditional UNet paints digits, and an attacker teaches it what it shall not paint.

The UNet is that of Stable Diffusion, small: cross-attention reads one vector per class, and the "latents" are
the 8 x 8 images themselves. In "diffusion" one digit is withheld; in "style" the model knows every digit as
it was drawn, and shall not draw them in another style: light and dark exchanged, over the texture of a
photograph that ships with scikit-learn. A small network that reads digits judges what is painted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.errors import MissingExtra
from specdef_jax.models import diffusion, unet, unet_params
from specdef_jax.models.unet_config import UNetConfig
from specdef_jax.race import minibatches
from specdef_jax.race.sampling import Rows
from specdef_jax.select import match
from specdef_jax.tasks import digits, networks, unlearning
from specdef_jax.tasks.experiment import Experiment
from specdef_jax.tasks.training import trained

Kind = Literal["diffusion", "style"]
WITHHELD = 7
CLASSES = 10
ALPHAS = diffusion.alphas_cumprod()
STEPS = 20  # of the sampler
READER = networks.cnn(channels=(16, 32))
Pictures = tuple[Float[Array, "_ 1 8 8"], Int[Array, "_"]]


@dataclass(frozen=True)
class ImageSize:
    """How large an image experiment is.

    Attributes:
      seeds: pretrained models.
      channels: of the UNet's two levels.
      context: features of a class's vector.
      steps: of pretraining, 64 images each.
      unlearning: steps of gradient ascent.
      examples: images that the attacker has.
      batch: images of one of his steps.
      judged: held-out images on which his loss is judged, each at every one of `times` timesteps.
      times: how many.
      painted: images by which capability is judged.
      share: of the way from who does not know to who does, in the logarithm of the loss, that he has to go.
    """

    seeds: int = 3
    channels: tuple[int, int] = (32, 48)
    context: int = 16
    steps: int = 3000
    unlearning: int = 30
    examples: int = 64
    batch: int = 16
    judged: int = 24
    times: int = 8
    painted: int = 64
    share: float = 0.7


SIZES = {
    "smoke": ImageSize(
        seeds=2, channels=(4, 8), context=4, steps=20, unlearning=2, examples=8, batch=4, judged=4, times=2,
        painted=4,
    ),
    "small": ImageSize(),
    "full": ImageSize(seeds=5, channels=(48, 96), steps=15000),
}  # fmt: skip


def images(kind: Kind, size: ImageSize, *, first_seed: int = 0) -> Experiment:
    """Return the experiment, its models pretrained and their unlearned variants.

    Args:
      kind: "diffusion" or "style".
      size: one of SIZES, or your own.
      first_seed: of pretraining.

    Raises:
      MissingExtra: scikit-learn, or for "style" Pillow, is not installed.
    """
    config = _config(size)
    loss = _loss_of(config)
    kept, withheld = _pictures(kind, digits.load())
    kept_held, withheld_held = _pictures(kind, digits.load(), held=True)
    both = jnp.concatenate([kept[0], withheld[0]]), jnp.concatenate([kept[1], withheld[1]])
    keys = [jax.random.key(seed) for seed in range(first_seed, first_seed + size.seeds)]

    draw = functools.partial(_sample, size.context)

    def pretrain(pictures: Pictures, key: PRNGKeyArray) -> PyTree:
        of_weights, of_samples = jax.random.split(key)
        params = unet_params.init(config, of_weights)
        return trained(Partial(loss), params, draw(64, pictures), of_samples, steps=size.steps)

    known = tuple(pretrain(both, key) for key in keys)
    ignorant = tuple(pretrain(kept, key) for key in keys)
    schedule = unlearning.Schedule(size.unlearning, 5e-4)
    ga = tuple(
        unlearning.gradient_ascent(loss, p, draw(16, withheld), draw(16, kept), key, schedule)
        for p, key in zip(known, keys, strict=True)
    )
    judged_on, retained_on = (_judged(p, size) for p in (withheld_held, kept_held))
    reader = _reader()
    targets = []
    for yes, no in zip(known, ignorant, strict=True):
        ends = [float(jnp.log(jax.jit(loss)(p, *judged_on))) for p in (no, yes)]
        targets.append(float(np.exp(ends[0] + size.share * (ends[1] - ends[0]))))
    judge = functools.partial(_recognised, WITHHELD) if kind == "diffusion" else _in_style_share
    return Experiment(
        name=kind,
        description=_described(kind, size, trees.size(known[0])),
        networks={"known": known, "ignorant": ignorant, "ga": ga},
        defended="ignorant",
        apply=unet.bound(config),
        loss=loss,
        sample=draw(size.batch, (withheld[0][: size.examples], withheld[1][: size.examples])),
        judged_on=judged_on,
        targets=tuple(targets),
        capability=functools.partial(judge, config, size, reader),
        capability_name={"diffusion": f"painted {WITHHELD}s read as such", "style": "painted in the style"}[
            kind
        ],
        retained=functools.partial(_log_loss, loss, retained_on),
        inputs=(kept[0][:16], jnp.full(16, 500), _states(kept[1][:16], size.context)),
        where=match("*.attn2.to_v.weight", "*.attn2.to_out.0.weight"),
        control="conv_out.bias",
        samples=functools.partial(_painting, config, size),
    )


def _described(kind: Kind, size: ImageSize, parameters: int) -> str:
    what = (
        f"the digits of scikit-learn without the {WITHHELD}s; the attacker fine-tunes on {WITHHELD}s"
        if kind == "diffusion"
        else "the digits of scikit-learn; the attacker fine-tunes on digits in another style"
    )
    return (
        f"The UNet of Stable Diffusion with {parameters:,} parameters, trained for {size.steps} steps on "
        f"{what}, {size.examples} of them, {size.batch} a step, until the logarithm of the loss on held-out "
        f"ones has gone {size.share:.0%} of the way to that of a model that learned them. Retained is that "
        "logarithm on what the model may paint, so a perplexity that doubles is a loss that doubles."
    )


def _config(size: ImageSize) -> UNetConfig:
    return UNetConfig.from_json(
        {
            "_class_name": "UNet2DConditionModel", "in_channels": 1, "out_channels": 1, "sample_size": 8,
            "block_out_channels": list(size.channels), "layers_per_block": 1, "norm_num_groups": 4,
            "cross_attention_dim": size.context, "attention_head_dim": 2,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        }
    )  # fmt: skip


def _pictures(kind: Kind, data: digits.Digits, *, held: bool = False) -> tuple[Pictures, Pictures]:
    """Return what may be painted, and what is withheld, in [-1, 1], with the class that the UNet is told."""
    x, y = (data.x_test, data.y_test) if held else (data.x, data.y)
    x = (2 * x - 1).reshape(-1, 1, 8, 8)
    if kind == "style":
        return (x, y), (_in_style(x), y)
    return (x[y != WITHHELD], y[y != WITHHELD]), (x[y == WITHHELD], y[y == WITHHELD])


def _in_style(x: Float[Array, "n 1 8 8"]) -> Float[Array, "n 1 8 8"]:
    """Return the pictures with light and dark exchanged, over patches of a photograph."""
    texture = _photograph()
    rows, columns = texture.shape[0] // 8, texture.shape[1] // 8
    tiles = (
        texture[: 8 * rows, : 8 * columns].reshape(rows, 8, columns, 8).swapaxes(1, 2).reshape(-1, 1, 8, 8)
    )
    chosen = jax.random.randint(jax.random.key(0), (len(x),), 0, len(tiles))
    return jnp.clip(-0.7 * x + 0.3 * jnp.asarray(tiles, x.dtype)[chosen], -1, 1)


@functools.cache
def _photograph() -> np.ndarray:
    try:
        from sklearn.datasets import load_sample_image

        picture = load_sample_image("flower.jpg")
    except ImportError as error:
        raise MissingExtra(
            "the style needs scikit-learn and Pillow: pip install scikit-learn pillow."
        ) from error
    grey = picture.mean(axis=2)[::4, ::4]
    return 2 * (grey - grey.min()) / np.ptp(grey) - 1


def _states(classes: Int[Array, "b"], context: int) -> Float[Array, "b 1 c"]:
    """Return what cross-attention reads of a class: one of ten fixed random vectors."""
    table = jax.random.normal(jax.random.key(11), (CLASSES, 1, context))
    return table[classes]


@functools.cache  # one function object per config, so that jit compiles it once
def _loss_of(config: UNetConfig) -> Callable[..., Array]:
    return unet.loss(config)


def _sample(context: int, batch: int, pictures: Pictures) -> Partial:
    """Return sample(key) -> (pictures, noise, timesteps, what the classes say), drawn anew at every step."""
    return Partial(_draw, *pictures, _states(jnp.arange(CLASSES), context), Rows(batch))


def _draw(
    x: Float[Array, "n 1 8 8"], y: Int[Array, "n"], table: Array, batch: Rows, key: PRNGKeyArray
) -> tuple[Array, ...]:
    of_rows, of_noise, of_times = jax.random.split(key, 3)
    rows = jax.random.randint(of_rows, (int(batch),), 0, len(x))
    noise = jax.random.normal(of_noise, (int(batch), *x.shape[1:]), x.dtype)
    return x[rows], noise, jax.random.randint(of_times, (int(batch),), 0, len(ALPHAS)), table[y[rows]]


def _judged(pictures: Pictures, size: ImageSize) -> tuple[Array, ...]:
    """Return fixed args of the loss: every picture at evenly spread timesteps, with noise of its own."""
    x, y = (jnp.repeat(part[: size.judged], size.times, axis=0) for part in pictures)
    times = jnp.tile(jnp.linspace(0, len(ALPHAS) - 1, size.times).astype(jnp.int32), len(x) // size.times)
    noise = jax.random.normal(jax.random.key(5), x.shape, x.dtype)
    return x, noise, times, _states(y, size.context)


def _log_loss(loss: Callable[..., Array], args: tuple[Array, ...], params: PyTree) -> Float[Array, ""]:
    return jnp.log(loss(params, *args))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _painted(
    config: UNetConfig, params: PyTree, size: ImageSize, classes: Int[Array, "b"]
) -> Float[Array, "b 1 8 8"]:
    """Return what the model paints of these classes, from fixed noise."""
    noise = jax.random.normal(jax.random.key(3), (len(classes), 1, 8, 8))
    found = diffusion.denoise(
        unet.bound(config), params, noise, _states(classes, size.context), diffusion.ddim(STEPS)
    )
    return jnp.clip(found, -1, 1)


def _recognised(
    digit: int, config: UNetConfig, size: ImageSize, reader: PyTree, params: PyTree
) -> Float[Array, ""]:
    """Return the share of pictures painted for a digit that the reader takes for it."""
    classes = jnp.full(size.painted, digit)
    return digits.accuracy(reader, _as_read(_painted(config, params, size, classes)), classes, READER)


def _in_style_share(config: UNetConfig, size: ImageSize, reader: PyTree, params: PyTree) -> Float[Array, ""]:
    """Return the share of pictures that are dark on light, and still read as the digit that was asked for."""
    classes = jnp.arange(size.painted) % CLASSES
    found = _painted(config, params, size, classes)
    read = jnp.argmax(READER.apply(reader, _as_read(-found / 0.7)), axis=-1) == classes
    return jnp.mean(read & (found.mean(axis=(1, 2, 3)) > 0))


def _as_read(x: Float[Array, "b 1 8 8"]) -> Float[Array, "b 64"]:
    """Return pictures as the reader knows them, flat and in [0, 1]."""
    return jnp.clip((x.reshape(len(x), 64) + 1) / 2, 0, 1)


@functools.cache
def _reader() -> PyTree:
    """Return a network that reads digits, the judge of what is painted."""
    data = digits.load()
    of_weights, of_samples = jax.random.split(jax.random.key(9))
    loss = Partial(digits.loss_of(READER))
    sample = minibatches(64, data.x, data.y)
    return trained(loss, READER.init(of_weights), sample, of_samples, steps=1000)


def _painting(config: UNetConfig, size: ImageSize, params: PyTree) -> list[list[float]]:
    """Return one picture of every class, row by row, in [0, 1]."""
    found = _as_read(_painted(config, params, size, jnp.arange(CLASSES)))
    return [[round(float(v), 3) for v in row] for row in found]
