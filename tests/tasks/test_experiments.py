"""The experiments at the size of a test: what is withheld is withheld, and measures are what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax import models
from specdef_jax.models import gpt_oss, llama
from specdef_jax.tasks import digits, images, prose, text, vision

TEXT, VISION = text.SIZES["smoke"], vision.SIZES["smoke"]


@pytest.fixture(scope="module", autouse=True)
def single():
    with jax.enable_x64(False):
        yield


def test_prose_is_two_domains_without_overlap():
    data = prose.load(24, held=50)
    for windows in (data.retained, data.retained_held, data.withheld, data.withheld_held):
        assert windows.shape[1] == 24
        assert 0 <= int(windows.min()) <= int(windows.max()) < prose.VOCABULARY
    assert len(data.retained) > 5000
    seen = {bytes(np.asarray(row, np.uint8)) for row in data.withheld}
    held = [bytes(np.asarray(row, np.uint8)) for row in data.withheld_held]
    assert np.mean([row in seen for row in held]) < 0.2  # white space and rulers come again
    words = bytes(np.asarray(data.withheld, np.uint8).ravel())
    assert words.count(b"ndarray") > 20 * bytes(np.asarray(data.retained, np.uint8).ravel()).count(b"ndarray")
    assert prose.fingerprint() == prose.fingerprint()


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss"])
def test_a_text_experiment(architecture):
    made = text.text(architecture, TEXT)
    assert set(made.networks) == {"known", "ignorant", "ga", "npo", "rmu"}
    assert made.seeds == TEXT.seeds == len(made.networks["rmu"])
    known = made.networks["known"][0]
    judged = float(made.loss(known, *made.judged_on))
    assert made.targets[0] == pytest.approx(judged + TEXT.margin)
    tokens = prose.load(TEXT.length).withheld_held
    by_hand = np.mean(np.asarray(made.apply(known, tokens))[:, :-1].argmax(-1) == np.asarray(tokens)[:, 1:])
    assert float(made.capability(known)) == pytest.approx(by_hand, abs=1e-6)
    drawn = made.sample(jax.random.key(0))[0]
    assert drawn.shape == (TEXT.batch, TEXT.length)
    lines = made.samples(known)
    assert [len(line) for line in lines] == [TEXT.length] * 2
    assert lines[0].encode()[: TEXT.length // 2] == bytes(np.asarray(tokens[0, : TEXT.length // 2], np.uint8))


@pytest.mark.parametrize("module", [llama, gpt_oss])
def test_hidden_states_are_those_of_the_model(module):
    """A model of one layer: its own head, put on the states that misdirection sees, gives its logits."""
    config = text._config("llama" if module is llama else "gpt_oss", TEXT)
    params = module.init(config, jax.random.key(0))
    tokens = jnp.arange(12).reshape(1, 12)
    states = text._hidden(module, config, params, tokens)
    head = params["lm_head.weight"]
    np.testing.assert_allclose(
        models.linear(states * params["model.norm.weight"], head),
        module.apply(config, params, tokens),
        atol=1e-5,
    )


def test_a_vision_experiment_withholds_what_it_says():
    made = vision.vision("cnn", VISION)
    x, y = made.judged_on
    assert int(y.min()) == vision.WITHHELD
    ignorant, known = made.networks["ignorant"][0], made.networks["known"][0]
    assert float(made.capability(ignorant)) < 0.05
    assert float(made.retained(ignorant)) < float(made.loss(ignorant, x, y))
    assert float(made.loss(known, x, y)) < float(made.loss(ignorant, x, y))
    labels = np.concatenate([np.asarray(made.sample(jax.random.key(i))[1]) for i in range(40)])
    assert 0.3 < np.mean(labels >= vision.WITHHELD) < 0.7


def test_a_transformer_experiment_has_layers_to_deform():
    made = vision.vision("vit", VISION)
    assert made.networks["known"][0]["block_0_v"]["w"].shape == (VISION.dim, VISION.dim)
    assert "8" in made.description


@pytest.mark.slow  # compiles a UNet and its sampler
@pytest.mark.parametrize("kind", ["diffusion", "style"])
def test_an_image_experiment(kind):
    size = {"diffusion": images.SIZES, "style": images.STYLE_SIZES}[kind]["smoke"]
    made = images.images(kind, size)
    known = made.networks["known"][0]
    assert [x.shape for x in made.sample(jax.random.key(0))] == [(4, 4, 4, 4), (4, 4, 4, 4), (4,), (4, 2, 4)]
    assert 0 <= float(made.capability(known)) <= 1
    assert [len(bytes.fromhex(image["grey"])) for image in made.samples(known)] == [64] * 10
    assert made.targets[0] < float(made.loss(made.networks["ignorant"][0], *made.judged_on))
    assert float(made.retained(known)) < 0  # better than predicting no noise at all
    assert made.apply(known, *made.inputs).shape == (16, 4, 4, 4)


def test_latents_are_the_image_again():
    x = jnp.arange(2 * 64.0).reshape(2, 8, 8)
    latents = images._encoded(x)
    np.testing.assert_array_equal(latents[1, :, 0, 0], [64, 65, 72, 73])  # one block, a channel per pixel
    np.testing.assert_array_equal(images._decoded(latents), x)


def test_the_style_changes_strokes_and_leaves_the_ground():
    x = 2 * digits.load().x[:50].reshape(-1, 8, 8) - 1
    styled = images._in_style(x)
    np.testing.assert_array_equal(styled[x == -1], -1)
    assert jnp.all(styled <= x)
    strokes = x > 0
    assert 0.3 < float(jnp.mean((x - styled)[strokes])) < 1.0


def test_a_prompt_is_a_digit_and_a_style():
    words = images._states(jnp.array([3, 13, 4]), 6)
    assert words.shape == (3, 2, 6)
    np.testing.assert_array_equal(words[0, 0], words[1, 0])
    np.testing.assert_array_equal(words[0, 1], words[2, 1])
    assert not np.allclose(words[0, 1], words[1, 1])
    assert not np.allclose(words[0, 0], words[2, 0])


def test_the_other_style_is_another_one_and_still_legible():
    (plain, y), (styled, z) = images._pictures("style", digits.load(), held=True)
    assert (y == z - images.CLASSES).all()  # the same digits, asked for in the second style
    per_picture = [
        np.corrcoef(np.ravel(a), np.ravel(b))[0, 1] for a, b in zip(plain[:50], styled[:50], strict=True)
    ]
    assert min(per_picture) > 0.7
    network, reader = images._reader("style")
    for pictures, prompts in ((plain, y), (styled, z)):
        seen = images._as_read(images._decoded(pictures))
        assert float(digits.accuracy(reader, seen, prompts, network)) > 0.8  # digit and style
