"""Balanced factors, gaps and pencils against numpy and scipy (THEORY.md 5.5, 5.6)."""

import doctest

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from specdef_jax import bounds
from specdef_jax.bounds import balance

RNG = np.random.default_rng(5)
W, X, Y = (RNG.standard_normal(shape) for shape in ((4, 3), (6, 4), (4, 5)))
U = np.linalg.qr(RNG.standard_normal((4, 2)))[0]
ALPHA = 30.0


def T(a):
    return np.eye(4) + (a - 1) * U @ U.T


def test_nuclear_norm_and_imbalance():
    values = np.linalg.svd(W, compute_uv=False)
    assert float(bounds.nuclear_norm(jnp.asarray(W))) == pytest.approx(values.sum())
    pair = T(1 / ALPHA), T(ALPHA) @ W
    want = np.linalg.norm(pair[0]) * np.linalg.norm(pair[1]) / values.sum()
    assert float(bounds.imbalance(*map(jnp.asarray, pair))) == pytest.approx(want)
    assert float(bounds.inserted_imbalance(jnp.asarray(W), jnp.asarray(U), ALPHA)) == pytest.approx(want)
    one = float(bounds.inserted_imbalance(jnp.asarray(W), jnp.asarray(U), 1.0))
    assert one == pytest.approx(2 * np.linalg.norm(W) / values.sum())


def test_sharpness_in_factored_form():
    assert float(bounds.factored_sharpness_upper(0.5, 3.0, 2.0)) == 5.0
    assert float(bounds.factored_sharpness_upper(4.0, 3.0, 2.0)) == 14.0


@pytest.mark.parametrize("k", [1, 2, 4])
def test_sides_of_the_gap(k):
    V = np.linalg.qr(RNG.standard_normal((4, k)))[0]
    low, high = (float(x) for x in bounds.gap_sides(jnp.asarray(W), jnp.asarray(V), ALPHA))
    along = np.linalg.svd(V.T @ W, compute_uv=False)
    assert low == pytest.approx(ALPHA * along[k - 1] if k <= 3 else 0.0)
    assert high == pytest.approx(np.linalg.norm(W - V @ V.T @ W, 2), abs=1e-14)


def test_pencil_against_scipy():
    squares = scipy.linalg.eigh(X.T @ X, Y @ Y.T, eigvals_only=True)
    found = bounds.pencil_values(jnp.asarray(X), jnp.asarray(Y))
    np.testing.assert_allclose(found, np.sqrt(squares[::-1]), rtol=1e-12)


def test_gap_of_the_pencil_by_its_definition():
    root = scipy.linalg.sqrtm(X.T @ X)
    inverse = np.linalg.inv(scipy.linalg.sqrtm(Y @ Y.T))
    q = np.linalg.svd(inverse @ U @ U.T @ root, compute_uv=False)[1]
    p = np.linalg.norm(inverse @ (np.eye(4) - U @ U.T) @ root, 2)
    found = float(bounds.pencil_gap(jnp.asarray(X), jnp.asarray(Y), jnp.asarray(U), ALPHA))
    assert found == pytest.approx(ALPHA**2 * q / p - 1)
    deformed = bounds.pencil_values(jnp.asarray(X @ T(ALPHA)), jnp.asarray(T(1 / ALPHA) @ Y))
    assert float(deformed[1] / deformed[2]) >= found


def test_examples():
    assert doctest.testmod(balance).failed == 0
