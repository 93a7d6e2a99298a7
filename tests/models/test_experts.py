"""Mixtures of experts: three ways to compute one function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax.models import experts
from specdef_jax.models.linear import linear
from tests.models.helpers_models import logits_of, small, tokens

KEY = jax.random.key(0)
WAYS = [experts.every_expert, experts.chosen_alone, experts.sorted_by_expert]


def said(stack, h):
    return linear(jnp.tanh(linear(h, stack["up_proj"])), stack["down_proj"], stack["down_proj_bias"])


def mixture(count: int, k: int, number: int, load: str):
    keys = jax.random.split(KEY, 6)
    stack = {
        "up_proj": jax.random.normal(keys[0], (count, 5, 7)),
        "down_proj": jax.random.normal(keys[1], (count, 7, 5)),
        "down_proj_bias": jax.random.normal(keys[2], (count, 5)),
    }
    h = jax.random.normal(keys[3], (number, 5))
    scores = jax.random.normal(keys[4], (number, count))
    if load == "one":  # every token asks for the same experts
        scores = scores * 0 + jnp.arange(count)
    top, chosen = jax.lax.top_k(scores, k)
    return stack, h, chosen, jax.nn.softmax(top)


@pytest.mark.parametrize("load", ["even", "one"])
@pytest.mark.parametrize(
    ("count", "k", "number"), [(4, 2, 9), (5, 1, 40), (3, 3, 20), (8, 2, 100), (6, 2, 1)]
)
def test_each_way_is_the_sum_token_by_token(count, k, number, load):
    stack, h, chosen, shares = mixture(count, k, number, load)
    want = np.zeros((number, 5))
    for t in range(number):
        for e, share in zip(np.asarray(chosen[t]), np.asarray(shares[t]), strict=True):
            hidden = np.tanh(np.asarray(h[t]) @ np.asarray(stack["up_proj"][e]))
            want[t] += share * (
                hidden @ np.asarray(stack["down_proj"][e]) + np.asarray(stack["down_proj_bias"][e])
            )
    for way in WAYS:
        found = jax.jit(functools.partial(way, said))(stack, h, chosen, shares)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-12, err_msg=way.__name__)


@pytest.mark.parametrize("way", WAYS[1:])
def test_gradients_and_curvature_are_those_of_the_plain_way(way):
    stack, h, chosen, shares = mixture(4, 2, 30, "even")

    def value(way, stack, h, shares):
        return jnp.sum(jnp.sin(way(said, stack, h, chosen, shares)))

    def slopes(way):
        return jax.grad(functools.partial(value, way), argnums=(0, 1, 2))

    given = (stack, h, shares)
    direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), given)
    pairs = [jax.jit(lambda g, d, w=w: jax.jvp(slopes(w), g, d))(given, direction) for w in (WAYS[0], way)]
    for a, b in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("side", ["output", "input"])
def test_pairs_stay_pairs_in_every_way(side):
    stack, h, chosen, shares = mixture(6, 2, 4, "even")
    spec = sd.SpecDef(alpha=8.0, side=side)
    deformed = sd.deform(stack, spec, where=("up_proj", "down_proj"), key=KEY, stacked=True)
    for way in WAYS:
        want, found = (way(said, s, h, chosen, shares) for s in (stack, deformed))
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-11)
        text = str(jax.make_jaxpr(functools.partial(way, said))(deformed, h, chosen, shares))
        assert text.count("HIGHEST, Precision.HIGHEST") == 4


def test_a_grouped_model_is_the_same_model():
    module, config, params = small("gpt_oss")
    want = logits_of(module, config, params, tokens(3, 20))
    found = jax.jit(functools.partial(module.apply, config, grouped=True))(params, tokens(3, 20))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)
    slopes = [jax.jit(jax.grad(module.loss(config, grouped=g)))(params, tokens(3, 20)) for g in (False, True)]
    for path, leaf in slopes[0].items():
        np.testing.assert_allclose(slopes[1][path], leaf, rtol=0, atol=1e-13, err_msg=path)
