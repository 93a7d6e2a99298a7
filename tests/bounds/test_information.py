"""Linear information and the floors it implies, by hand and by least squares (THEORY.md 3.3 (iv))."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from specdef_jax import bounds

KEY = jax.random.key(15)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 5)) @ rng.standard_normal((5, 5)) + 1
    return jnp.asarray(x), jnp.asarray(x[:, :3] + rng.standard_normal((30, 3)))


def explained(z, g):
    """Energy of g that a least-squares fit on z explains, per sample."""
    fitted = z @ np.linalg.lstsq(np.asarray(z), np.asarray(g), rcond=None)[0]
    return float(np.sum(np.asarray(fitted) ** 2)) / len(z)


def test_information_is_the_energy_that_least_squares_explains(data):
    x, g = data
    for k in (1, 2, 5):
        found = float(bounds.linear_information(x[:, :k], g))
        assert found == pytest.approx(explained(x[:, :k], g), rel=1e-12)


def test_information_depends_on_the_span_alone(data):
    x, g = data
    mixed = x[:, :2] @ jnp.array([[2.0, 1.0], [0.5, -1.0]])
    want = float(bounds.linear_information(x[:, :2], g))
    assert float(bounds.linear_information(mixed, g)) == pytest.approx(want, rel=1e-12)
    doubled = jnp.concatenate([x[:, :2], 3 * x[:, :1]], axis=1)  # rank two in three columns
    assert float(bounds.linear_information(doubled, g)) == pytest.approx(want, rel=1e-9)
    assert float(bounds.linear_information(x[:, :2], jnp.zeros_like(g))) == 0


def test_floor_interval():
    lower, upper = bounds.floor_interval(5.0, 3.0, smoothness=2.0, convexity=0.5)
    assert (float(lower), float(upper)) == (2.0, 4.25)
    lower, upper = bounds.floor_interval(5.0, 3.0, smoothness=2.0)
    assert (float(lower), float(upper)) == (-np.inf, 4.25)
    lower, upper = bounds.floor_interval(5.0, 0.0, smoothness=2.0)
    assert (float(lower), float(upper)) == (5.0, 5.0)


def test_the_least_information_against_scipy(data):
    x, g = data
    n = len(x)
    values = scipy.linalg.eigh(
        np.asarray(x.T @ g @ g.T @ x) / n**2, np.asarray(x.T @ x) / n, eigvals_only=True
    )
    for k in range(1, 6):
        found = float(bounds.least_information(x, g, k))
        assert found == pytest.approx(values[:k].sum(), abs=1e-12 * values[-1]), k
    # Residuals of rank three leave two directions of five that tell nothing.
    assert float(bounds.least_information(x, g, 2)) == pytest.approx(0, abs=1e-12)
    assert float(bounds.least_information(x, g, 3)) > 1e-6
    assert float(bounds.least_information(x, g, 5)) == pytest.approx(explained(x, g), rel=1e-12)


def test_every_direction_tells_where_residuals_have_as_many(data):
    x, _ = data
    g = jnp.asarray(np.random.default_rng(3).standard_normal((30, 6)))
    for k in (1, 5):
        n = len(x)
        pencil = np.asarray(x.T @ g @ g.T @ x) / n**2, np.asarray(x.T @ x) / n
        want = scipy.linalg.eigh(*pencil, eigvals_only=True)[:k].sum()
        assert float(bounds.least_information(x, g, k)) == pytest.approx(want, rel=1e-9)
