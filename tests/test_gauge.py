"""Gauge placement: the composition stays, nothing is added, to the bit where it can be (THEORY.md 0, 1.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax.errors import BudgetError, LeafError, StructureError

KEY = jax.random.key(13)


def attention(first, bias, second, h, weights, groups):
    """Values per group, mixed per head by fixed weights, projected."""
    d = first.shape[1] // groups
    heads = second.shape[0] // d
    values = (h @ first + bias).reshape(len(h), groups, d)
    values = jnp.repeat(values, heads // groups, axis=1)
    mixed = jnp.einsum("hts,shd->thd", weights, values)
    return mixed.reshape(len(h), heads * d) @ second


@pytest.fixture(scope="module")
def layer():
    keys = jax.random.split(KEY, 5)
    return {
        "first": jax.random.normal(keys[0], (6, 8)),
        "second": jax.random.normal(keys[1], (16, 5)),
        "bias": jax.random.normal(keys[2], (8,)),
        "h": jax.random.normal(keys[3], (7, 6)),
        "weights": jax.nn.softmax(jax.random.normal(keys[4], (4, 7, 7))),
    }


@pytest.mark.parametrize("basis", ["symmetric", "rotated", "axis"])
@pytest.mark.parametrize("k", [1, 3])
def test_grouped_queries_with_biases(layer, basis, k):
    spec = sd.SpecDef(alpha=64.0, k=k, basis=basis)
    pair = sd.deform_pair(layer["first"], layer["second"], spec, key=KEY, bias=layer["bias"], groups=2)
    want = attention(layer["first"], layer["bias"], layer["second"], layer["h"], layer["weights"], 2)
    got = attention(pair.first, pair.bias, pair.second, layer["h"], layer["weights"], 2)
    np.testing.assert_allclose(got, want, atol=1e-11)
    assert pair.first.shape == layer["first"].shape
    assert pair.second.shape == layer["second"].shape
    assert pair.layer.U.shape == (2, 4, k)
    assert float(jnp.abs(pair.first - layer["first"]).max()) > 1


def test_each_group_has_its_own_top_direction(layer):
    pair = sd.deform_pair(layer["first"], layer["second"], sd.SpecDef(alpha=4.0), key=KEY, groups=2)
    for g, block in enumerate(np.split(np.asarray(layer["first"]), 2, axis=1)):
        s = np.linalg.svd(block, compute_uv=False)
        assert np.linalg.svd(np.split(np.asarray(pair.first), 2, axis=1)[g], compute_uv=False)[
            0
        ] == pytest.approx(4 * s[0])
    assert pair.bias is None


def test_axis_with_a_power_of_two_is_exact_to_the_bit(layer):
    half = jax.tree.map(lambda x: x.astype(jnp.float32), layer)
    spec = sd.SpecDef(alpha=2.0**12, basis="axis")
    pair = sd.deform_pair(half["first"], half["second"], spec, key=KEY, bias=half["bias"], groups=2)
    assert pair.first.dtype == jnp.float32
    args = half["h"], half["weights"], 2
    want = attention(half["first"], half["bias"], half["second"], *args)
    np.testing.assert_array_equal(attention(pair.first, pair.bias, pair.second, *args), want)


def test_bad_input(layer):
    first, second = layer["first"], layer["second"]
    spec = sd.SpecDef(alpha=4.0)
    with pytest.raises(StructureError, match="cannot be split into 3 groups"):
        sd.deform_pair(first, second, spec, key=KEY, groups=3)
    with pytest.raises(StructureError, match="must be a multiple"):
        sd.deform_pair(first, second[:15], spec, key=KEY)
    with pytest.raises(StructureError, match="the bias has shape"):
        sd.deform_pair(first, second, spec, key=KEY, bias=layer["bias"][:3])
    with pytest.raises(LeafError, match="NaN or Inf"):
        sd.deform_pair(first.at[0, 0].set(jnp.nan), second, spec, key=KEY)
    with pytest.raises(BudgetError):
        sd.deform_pair(first.astype(jnp.float16), second.astype(jnp.float16), sd.SpecDef(alpha=1e4), key=KEY)


SHAPES = [(9, 4, 7), (3, 5, 8), (8, 5, 3), (2, 6, 3)]


def two_maps(n: int, d: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)) * np.geomspace(1, 1e4, d), rng.normal(size=(d, m))


@pytest.mark.parametrize(("n", "d", "m"), SHAPES)
def test_balanced_maps_have_the_same_product_and_equal_gram_matrices(n, d, m):
    first, second = two_maps(n, d, m)
    X, Y = map(np.asarray, sd.gauge.balance(jnp.asarray(first), jnp.asarray(second)))
    assert X.shape == first.shape
    assert Y.shape == second.shape
    product = first @ second
    np.testing.assert_allclose(X @ Y, product, rtol=0, atol=1e-13 * np.abs(product).max())
    gram = X.T @ X
    np.testing.assert_allclose(gram, Y @ Y.T, rtol=0, atol=1e-12 * np.abs(gram).max())
    nuclear = np.linalg.norm(product, ord="nuc")
    assert np.linalg.norm(X) ** 2 + np.linalg.norm(Y) ** 2 == pytest.approx(2 * nuclear, rel=1e-12)


@pytest.mark.parametrize("basis", ["symmetric", "rotated", "axis"])
def test_balancing_undoes_a_gauge_deformation_up_to_a_rotation_of_the_features(basis):
    first, second = two_maps(9, 4, 7)
    plain = sd.gauge.balance(jnp.asarray(first), jnp.asarray(second))
    pair = sd.deform_pair(jnp.asarray(first), jnp.asarray(second), sd.SpecDef(2.0**10, basis=basis), key=KEY)
    X, Y = sd.gauge.balance(pair.first, pair.second)
    np.testing.assert_allclose(X @ X.T, plain[0] @ plain[0].T, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(Y.T @ Y, plain[1].T @ plain[1], rtol=1e-7, atol=1e-7)


def test_of_all_balanced_maps_the_one_nearest_to_the_first_is_taken():
    first, second = two_maps(9, 4, 7)
    X, Y = map(np.asarray, sd.gauge.balance(jnp.asarray(first), jnp.asarray(second)))
    distance = np.linalg.norm(X - first)
    for seed in range(20):
        turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0]
        assert np.linalg.norm(X @ turn - first) > distance
    again = sd.gauge.balance(jnp.asarray(X), jnp.asarray(Y))
    np.testing.assert_allclose(again[0], X, rtol=1e-9, atol=1e-9)


def test_features_that_carry_nothing_are_balanced_to_zero():
    first, second = two_maps(9, 4, 7)
    first[:, 1], second[2] = 0, 0
    X, Y = map(np.asarray, sd.gauge.balance(jnp.asarray(first), jnp.asarray(second)))
    np.testing.assert_allclose(X @ Y, first @ second, rtol=0, atol=1e-9)
    for values in (np.linalg.svd(a, compute_uv=False) for a in (X, Y)):
        assert values[1] > 1e-3 * values[0]
        assert values[2] < 1e-6 * values[0]
    for a in sd.gauge.balance(jnp.zeros((3, 2)), jnp.ones((2, 4))):
        assert not np.asarray(a).any()


def test_maps_are_balanced_in_float64_whatever_the_caller_has_enabled():
    first, second = (x.astype(np.float32) for x in two_maps(9, 4, 7))
    with jax.enable_x64(False):
        X, Y = sd.gauge.balance(jnp.asarray(first), jnp.asarray(second))
    assert X.dtype == Y.dtype == np.float64
    product = first.astype(float) @ second.astype(float)
    np.testing.assert_allclose(
        np.asarray(X) @ np.asarray(Y), product, rtol=0, atol=1e-12 * np.abs(product).max()
    )
