"""Least informative directions against SciPy's eigenvectors, and through plan (THEORY.md 3.3 (iv))."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import specdef_jax as sd
from specdef_jax.errors import SpecError
from specdef_jax.tasks import networks

KEY = jax.random.key(11)
SAMPLES, D = 40, 5


@pytest.fixture(scope="module")
def data():
    x_key, g_key = jax.random.split(KEY)
    mix = jax.random.normal(KEY, (D, D))
    x = jax.random.normal(x_key, (SAMPLES, D)) @ mix + 0.5
    return x, x[:, ::-1] + jax.random.normal(g_key, (SAMPLES, D))  # E[x g^T] has full rank


def pencil(x, g=None):
    x = np.asarray(x, np.float64)
    g = x - x.mean(0) if g is None else np.asarray(g, np.float64)
    cross = x.T @ g / len(x)
    return cross @ cross.T, x.T @ x / len(x)


def cosine(U, V):
    """Smallest cosine of the principal angles between two spans."""
    return np.linalg.svd(np.linalg.qr(U)[0].T @ np.linalg.qr(V)[0], compute_uv=False)[-1]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_against_generalized_eigenvectors(data, known, k):
    x, g = data
    found = sd.resistant_directions(x, k, residuals=g if known else None, energy=1e-12)
    N, M = pencil(x, g if known else None)
    _, vectors = scipy.linalg.eigh(N, M)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found.T @ found, np.eye(k), atol=1e-12)
    assert cosine(np.asarray(found), vectors[:, :k]) == pytest.approx(1, abs=1e-9)


def test_known_residuals_change_the_answer(data):
    x, g = data
    blind, informed = (sd.resistant_directions(x, 1, residuals=r, energy=1e-12) for r in (None, g))
    assert cosine(np.asarray(blind), np.asarray(informed)) < 0.99


def test_a_constant_feature_tells_nothing():
    x = jnp.array([[3.0, 1.0], [-3.0, 1.0], [1.0, 1.0], [-1.0, 1.0]])
    np.testing.assert_allclose(np.abs(sd.resistant_directions(x, 1)[:, 0]), [0, 1], atol=1e-12)


def test_energy_leaves_out_what_is_too_small(data):
    x, _ = data
    x = x.at[:, 0].multiply(1e-4)
    second = pencil(x)[1]
    largest = np.linalg.eigvalsh(second)[-1]
    for energy in (1e-12, 1e-4, 1e-2, 1.0):
        u = np.asarray(sd.resistant_directions(x, 1, energy=energy))[:, 0]
        assert u @ second @ u >= energy * largest * (1 - 1e-9)
    small = np.asarray(sd.resistant_directions(x, 1, energy=1e-12))[:, 0]
    assert small @ second @ small < 1e-4 * largest, "energy did nothing: the test is empty"


def test_float32_and_stacks_and_jit(data):
    x, _ = data
    stack = jnp.stack([x, x[:, ::-1]]).astype(jnp.float32)
    with jax.enable_x64(False):
        found = sd.resistant_directions(stack, 2)
    assert found.shape == (2, D, 2)
    for one, part in zip(found, stack, strict=True):
        assert cosine(np.asarray(one), np.asarray(sd.resistant_directions(part, 2))) == pytest.approx(1)
    under = jax.jit(lambda x: sd.resistant_directions(x, 2))(x)
    np.testing.assert_allclose(jnp.abs(under), jnp.abs(sd.resistant_directions(x, 2)), atol=1e-9)


def test_bad_input(data):
    x, g = data
    for k in (0, D + 1):
        with pytest.raises(SpecError, match=f"k = {k}: must lie between 1 and the 5 features"):
            sd.resistant_directions(x, k)
    with pytest.raises(SpecError, match="energy = 0"):
        sd.resistant_directions(x, 1, energy=0.0)
    with pytest.raises(SpecError, match="two samples at least"):
        sd.resistant_directions(x[:1], 1)
    with pytest.raises(SpecError, match="NaN or Inf"):
        sd.resistant_directions(x.at[0, 0].set(jnp.nan), 1)
    with pytest.raises(SpecError, match="one row each per sample"):
        sd.resistant_directions(x, 1, residuals=g[1:])
    with pytest.raises(SpecError, match="only 1 directions carry"):
        sd.resistant_directions(jnp.outer(jnp.arange(1.0, 7.0), jnp.arange(1.0, 4.0)), 2)


@pytest.fixture(scope="module")
def network():
    made = networks.mlp((6, 5, 4, 3))
    return made, made.init(KEY), jax.random.normal(KEY, (30, 6))


def test_through_plan(network):
    made, params, x = network
    acts = sd.activations(made.apply, params, x, where="layer_1/w")
    hidden = jnp.tanh(x @ params["layer_0"]["w"] + params["layer_0"]["b"])
    np.testing.assert_allclose(acts["layer_1/w"], hidden @ params["layer_1"]["w"], rtol=1e-12)
    spec = sd.SpecDef(alpha=8.0, k=2, directions="resistant")
    layer = sd.plan(params, spec, where="layer_1/w", key=KEY, activations=acts)["layer_1/w"]
    assert layer.side == "output"
    want = sd.resistant_directions(acts["layer_1/w"], 2)
    assert cosine(np.asarray(layer.U), np.asarray(want)) == pytest.approx(1)
    deformed = sd.deform(params, spec, where="layer_1/w", key=KEY, activations=acts)
    np.testing.assert_allclose(sd.layered(made.apply)(deformed, x), made.apply(params, x), atol=1e-12)
    for other in ("top", "bottom", "random"):
        spec = sd.SpecDef(alpha=8.0, k=2, side="output", directions=other)
        U = sd.plan(params, spec, where="layer_1/w", key=KEY)["layer_1/w"].U
        assert cosine(np.asarray(U), np.asarray(want)) < 0.999


def test_plan_says_what_is_missing(network):
    _, params, _ = network
    spec = sd.SpecDef(alpha=8.0, directions="resistant")
    with pytest.raises(SpecError, match=r"'layer_1/w': directions 'resistant' need a batch.*sd\.activations"):
        sd.plan(params, spec, where="layer_1/w", key=KEY)
    with pytest.raises(SpecError, match=r"its activations have shape \(30, 5\)"):
        sd.plan(params, spec, where="layer_1/w", key=KEY, activations={"layer_1/w": jnp.ones((30, 5))})
    for wrong in ({"side": "input"}, {"basis": "axis"}):
        with pytest.raises(SpecError, match="stand on the output side and are no columns of the identity"):
            sd.SpecDef(directions="resistant", **wrong)
