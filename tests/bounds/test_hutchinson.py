"""Moments of estimated diagonals against all sign vectors and samples (THEORY.md 4.4)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from specdef_jax import bounds

RNG = np.random.default_rng(2)
ROOT = RNG.standard_normal((5, 5))
H = ROOT + ROOT.T


def all_estimates(H):
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=len(H))))
    return signs * (signs @ H)


def test_signs_against_every_vector():
    found = all_estimates(H)
    np.testing.assert_allclose(found.mean(0), np.diag(H), atol=1e-12)
    np.testing.assert_allclose(bounds.diagonal_variance(jnp.asarray(H)), found.var(0), rtol=1e-12)
    np.testing.assert_allclose(
        bounds.estimated_diagonal(jnp.asarray(H)), np.sqrt((found**2).mean(0)), rtol=1e-12
    )


def test_normals_against_a_sample():
    z = np.random.default_rng(0).standard_normal((200_000, 5))
    found = (z * (z @ H)).var(0)
    np.testing.assert_allclose(bounds.diagonal_variance(jnp.asarray(H), normal=True), found, rtol=0.03)
    more = bounds.diagonal_variance(jnp.asarray(H), normal=True) - bounds.diagonal_variance(jnp.asarray(H))
    np.testing.assert_allclose(more, 2 * np.diag(H) ** 2, rtol=1e-12)


def test_no_cancellation_in_a_nearly_diagonal_matrix():
    near = jnp.array([[1e8, 1e-3], [1e-3, 1.0]])
    np.testing.assert_allclose(bounds.diagonal_variance(near), [1e-6, 1e-6], rtol=1e-12)


def test_probes():
    found = jax.jit(bounds.probes_needed)(jnp.array([[1.0, 3.0], [3.0, 0.0]]), 0.1)
    np.testing.assert_allclose(found, [900, np.inf])
    assert float(bounds.probes_needed(jnp.eye(2), 0.5)[0]) == 0
    assert float(bounds.probes_needed(2 * jnp.eye(2), 0.5, normal=True)[0]) == 8


def test_noise_on_the_axis_basis():
    order = np.array([1.0, 1.0, 0.0, 0.0, -1.0])

    def relative(alpha):
        s = alpha**order
        H_a = jnp.asarray(s[:, None] * H * s)
        return np.sqrt(bounds.diagonal_variance(H_a)) / np.abs(np.diag(H_a))

    slopes = np.log10(relative(1e5) / relative(1e4))
    np.testing.assert_allclose(slopes, 1 - order, atol=1e-3)
