"""diffusion and style: a conditional UNet paints digits, and an attacker teaches it what it shall not paint.

The UNet is that of Stable Diffusion, small: cross-attention reads a prompt of two words, digit and style, and
as there the latents have four channels: the pixels of each 2 x 2 block of an 8 x 8 image, so that decoding is
exact. In "diffusion" one digit is withheld; in "style" the model knows every digit as it was drawn, and shall
not draw them in a second style: the strokes show patches of a photograph that ships with scikit-learn. A
small network that reads digits, in "style" also their style, judges what is painted.

The style leaves the ground dark, so that the loss tells what is painted: where light and dark were exchanged,
seven steps that learned the ground went 70% of the way, and one digit in sixteen could be read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

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
from specdef_jax.select import match
from specdef_jax.tasks import digits, networks, unlearning
from specdef_jax.tasks.experiment import Experiment
from specdef_jax.tasks.training import Kept, anew, each, trained

Kind = Literal["diffusion", "style"]
WITHHELD = 7
CLASSES = 10
ALPHAS = diffusion.alphas_cumprod()
STEPS = 20  # of the sampler
SIDE = 8  # pixels of an image
Pictures = tuple[Float[Array, "_ 4 4 4"], Int[Array, "_"]]


@dataclass(frozen=True)
class ImageSize:
    """How large an image experiment is.

    Attributes:
      seeds: pretrained models.
      channels: of the UNet's two levels.
      context: features of a word.
      steps: of pretraining, 32 images each.
      unlearning: steps of gradient ascent.
      examples: images that the attacker has.
      batch: images of one of his steps.
      judged: held-out images on which his loss is judged, each at every one of `times` timesteps.
      times: how many.
      painted: images by which capability is judged.
      share: of the way from who does not know to who does, in the logarithm of the loss, that he has to go.
    """

    seeds: int = 5
    channels: tuple[int, int] = (16, 24)
    context: int = 16
    steps: int = 1500
    unlearning: int = 8
    examples: int = 64
    batch: int = 16
    judged: int = 16
    times: int = 6
    painted: int = 64
    share: float = 0.7


SIZES = {
    "smoke": ImageSize(
        seeds=2, channels=(4, 8), context=4, steps=200, unlearning=2, examples=8, batch=4, judged=4, times=2,
        painted=4,
    ),
    "small": ImageSize(),
    "full": ImageSize(seeds=5, channels=(32, 48), steps=15000, judged=24, times=8),
}  # fmt: skip
# With 64 examples the loss on held-out pictures stops at three quarters of the way; in 200 steps nothing is
# learned that one style has and the other has not.
STYLE_SIZES = {
    "smoke": replace(SIZES["smoke"], steps=600, judged=16, times=4),
    "small": replace(SIZES["small"], examples=1000, batch=32, share=0.88),
    "full": replace(SIZES["full"], examples=1000, batch=32, share=0.88),
}


def images(kind: Kind, size: ImageSize, *, first_seed: int = 0, kept: Kept = anew) -> Experiment:
    """Return the experiment, its models pretrained and their unlearned variants.

    Args:
      kind: "diffusion" or "style".
      size: one of SIZES, for "style" of STYLE_SIZES, or your own.
      first_seed: of pretraining.
      kept: kept(name, make) returns the networks of that name, kept from an earlier run or made.

    Raises:
      MissingExtra: scikit-learn, or for "style" Pillow, is not installed.
    """
    config = _config(size)
    loss = _loss_of(config)
    allowed, withheld = _pictures(kind, digits.load())
    allowed_held, withheld_held = _pictures(kind, digits.load(), held=True)
    both = jnp.concatenate([allowed[0], withheld[0]]), jnp.concatenate([allowed[1], withheld[1]])
    keys = [jax.random.key(seed) for seed in range(first_seed, first_seed + size.seeds)]

    draw = functools.partial(_sample, size.context)

    def pretrain(among: int, key: PRNGKeyArray) -> PyTree:
        of_weights, of_samples = jax.random.split(key)
        params = unet_params.init(config, of_weights)
        return trained(Partial(loss), params, draw(32, both, among), of_samples, steps=size.steps)

    known = kept("known", lambda: each(functools.partial(pretrain, len(both[0])), keys))
    ignorant = kept("ignorant", lambda: each(functools.partial(pretrain, len(allowed[0])), keys))
    schedule = unlearning.Schedule(size.unlearning, 5e-4)
    bad, good = draw(16, withheld), draw(16, allowed)

    def ascend(params: PyTree, key: PRNGKeyArray) -> PyTree:
        return unlearning.gradient_ascent(loss, params, bad, good, key, schedule)

    ga = kept("ga", lambda: each(ascend, known, keys))
    judged_on, retained_on = (_judged(p, size) for p in (withheld_held, allowed_held))
    targets = []
    for yes, no in zip(known, ignorant, strict=True):
        ends = [float(_log_loss(loss, judged_on, p)) for p in (no, yes)]
        targets.append(float(np.exp(ends[0] + size.share * (ends[1] - ends[0]))))
    asked = (
        jnp.full(size.painted, WITHHELD) if kind == "diffusion" else _every_digit(size.painted, styled=True)
    )
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
        capability=functools.partial(_recognised, config, size, *_reader(kind), asked),
        capability_name={"diffusion": f"painted {WITHHELD}s read as such", "style": "painted in the style"}[
            kind
        ],
        retained=functools.partial(_log_loss, loss, retained_on),
        inputs=(allowed[0][:16], jnp.full(16, 500), _states(allowed[1][:16], size.context)),
        where=match("*.attn2.to_v.weight", "*.attn2.to_out.0.weight"),
        control="conv_out.bias",
        samples=functools.partial(_painting, config, size, kind == "style"),
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
            "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4,
            "sample_size": SIDE // 2,
            "block_out_channels": list(size.channels), "layers_per_block": 1, "norm_num_groups": 4,
            "cross_attention_dim": size.context, "attention_head_dim": 2,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        }
    )  # fmt: skip


def _pictures(kind: Kind, data: digits.Digits, *, held: bool = False) -> tuple[Pictures, Pictures]:
    """Return what may be painted, and what is withheld, as latents, with the prompts that go with them."""
    x, y = (data.x_test, data.y_test) if held else (data.x, data.y)
    x = (2 * x - 1).reshape(-1, SIDE, SIDE)
    if kind == "style":
        return (_encoded(x), y), (_encoded(_in_style(x)), CLASSES + y)
    x = _encoded(x)
    return (x[y != WITHHELD], y[y != WITHHELD]), (x[y == WITHHELD], y[y == WITHHELD])


def _encoded(x: Float[Array, "n 8 8"]) -> Float[Array, "n 4 4 4"]:
    """Return the latents of images: the four pixels of each block are its channels."""
    n, half = len(x), SIDE // 2
    return x.reshape(n, half, 2, half, 2).transpose(0, 2, 4, 1, 3).reshape(n, 4, half, half)


def _decoded(latents: Float[Array, "n 4 4 4"]) -> Float[Array, "n 8 8"]:
    """Return the images of latents."""
    n, half = len(latents), SIDE // 2
    return latents.reshape(n, 2, 2, half, half).transpose(0, 3, 1, 4, 2).reshape(n, SIDE, SIDE)


def _in_style(x: Float[Array, "n 8 8"]) -> Float[Array, "n 8 8"]:
    """Return the pictures with strokes that show patches of a photograph, on the dark ground they had."""
    texture = _photograph()
    rows, columns = texture.shape[0] // 8, texture.shape[1] // 8
    tiles = texture[: 8 * rows, : 8 * columns].reshape(rows, 8, columns, 8).swapaxes(1, 2).reshape(-1, 8, 8)
    chosen = jax.random.randint(jax.random.key(0), (len(x),), 0, len(tiles))
    return (x + 1) * (0.6 + 0.4 * jnp.asarray(tiles, x.dtype)[chosen]) - 1


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


def _states(prompts: Int[Array, "b"], context: int) -> Float[Array, "b 2 c"]:
    """Return what cross-attention reads: fixed random words. Prompt 13 is a 3 in the second style."""
    table = jax.random.normal(jax.random.key(11), (CLASSES + 2, context))
    return table[jnp.stack([prompts % CLASSES, CLASSES + prompts // CLASSES], axis=1)]


@functools.cache  # one function object per config, so that jit compiles it once
def _loss_of(config: UNetConfig) -> Callable[..., Array]:
    return unet.loss(config)


def _sample(context: int, batch: int, pictures: Pictures, among: int | None = None) -> Partial:
    """Return sample(key) -> (pictures, noise, timesteps, words), drawn anew at every step."""
    rows = minibatches(batch, *pictures, among=among)
    return Partial(_draw, rows, _states(jnp.arange(2 * CLASSES), context))


def _draw(rows: Partial, table: Array, key: PRNGKeyArray) -> tuple[Array, ...]:
    of_rows, of_noise, of_times = jax.random.split(key, 3)
    x, y = rows(of_rows)
    noise = jax.random.normal(of_noise, x.shape, x.dtype)
    return x, noise, jax.random.randint(of_times, y.shape, 0, len(ALPHAS)), table[y]


def _judged(pictures: Pictures, size: ImageSize) -> tuple[Array, ...]:
    """Return fixed args of the loss: every picture at evenly spread timesteps, with noise of its own."""
    x, y = (jnp.repeat(part[: size.judged], size.times, axis=0) for part in pictures)
    times = jnp.tile(jnp.linspace(0, len(ALPHAS) - 1, size.times).astype(jnp.int32), len(x) // size.times)
    noise = jax.random.normal(jax.random.key(5), x.shape, x.dtype)
    return x, noise, times, _states(y, size.context)


@functools.partial(jax.jit, static_argnums=0)
def _log_loss(loss: Callable[..., Array], args: tuple[Array, ...], params: PyTree) -> Float[Array, ""]:
    return jnp.log(loss(params, *args))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _painted(
    config: UNetConfig, params: PyTree, size: ImageSize, prompts: Int[Array, "b"]
) -> Float[Array, "b 8 8"]:
    """Return what the model paints for these prompts, from fixed noise."""
    noise = jax.random.normal(jax.random.key(3), (len(prompts), 4, SIDE // 2, SIDE // 2))
    found = diffusion.denoise(
        unet.bound(config), params, noise, _states(prompts, size.context), diffusion.ddim(STEPS)
    )
    return jnp.clip(_decoded(found), -1, 1)


def _every_digit(count: int, *, styled: bool) -> Int[Array, "count"]:
    """Return so many prompts, every digit in turn."""
    return CLASSES * styled + jnp.arange(count) % CLASSES


def _recognised(
    config: UNetConfig,
    size: ImageSize,
    network: networks.Network,
    reader: PyTree,
    prompts: Int[Array, "b"],
    params: PyTree,
) -> Float[Array, ""]:
    """Return the share of pictures that the reader takes for what was asked for."""
    return digits.accuracy(reader, _as_read(_painted(config, params, size, prompts)), prompts, network)


def _as_read(x: Float[Array, "b 8 8"]) -> Float[Array, "b 64"]:
    """Return pictures as the reader knows them, flat and in [0, 1]."""
    return jnp.clip((x.reshape(len(x), 64) + 1) / 2, 0, 1)


@functools.cache
def _reader(kind: Kind) -> tuple[networks.Network, PyTree]:
    """Return a network that reads prompts from pictures, the judge of what is painted."""
    data = digits.load()
    x, y = data.x, data.y
    if kind == "style":
        styled = _in_style((2 * x - 1).reshape(-1, SIDE, SIDE))
        x, y = jnp.concatenate([x, _as_read(styled)]), jnp.concatenate([y, CLASSES + y])
    network = networks.cnn(channels=(16, 32), classes=CLASSES if kind == "diffusion" else 2 * CLASSES)
    of_weights, of_samples = jax.random.split(jax.random.key(9))
    loss, sample = Partial(digits.loss_of(network)), minibatches(64, x, y)
    return network, trained(loss, network.init(of_weights), sample, of_samples, steps=1000)


def _painting(config: UNetConfig, size: ImageSize, styled: bool, params: PyTree) -> list[dict[str, Any]]:
    """Return a picture of every digit: its width, and a byte per pixel from black to white, as hex."""
    prompts = _every_digit(max(size.painted, CLASSES), styled=styled)  # as many as are judged by
    found = np.asarray(255 * _as_read(_painted(config, params, size, prompts))).astype(np.uint8)
    return [{"width": SIDE, "grey": bytes(row).hex()} for row in found[:CLASSES]]
