"""The ceiling of gradient descent and the floor of sign descent, by simulation (THEORY.md 3.3 (v))."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax import bounds


def test_the_ceiling_by_hand_and_by_simulation():
    s, mu, p = 10.0, 1.0, 0.5
    found = float(bounds.ceiling_steps(s, mu, 4.0, 0.5, metric=p))
    assert found == pytest.approx(np.log(8) / -np.log(1 - 0.05))
    assert float(bounds.ceiling_steps(s, mu, 4.0, 0.5)) < found
    # One dimension, curvature mu = s: solved at once, within any ceiling.
    assert float(bounds.ceiling_steps(1.0, 0.999, 1.0, 1e-3)) < 1.1


def test_the_scalar_stays_within_a_factor_four():
    for s in (10.0, 1e3, 1e5):
        ceiling = float(bounds.ceiling_steps(s, 1.0, 1.0, 1e-2))
        scalar = float(bounds.stiff_scalar_steps(s, 1.0, 1.0, 1e-2))
        assert 4 <= ceiling / scalar * (1 + 2 / s) <= 4 * (1 + 3 / s)
    steps = float(bounds.stiff_scalar_steps(100.0, 1.0, 1.0, 1e-2))
    eta = 0.9999 * 2 / 100
    loss, t = 1.0, 0
    while loss > 1e-2:
        loss *= (1 - eta) ** 2
        t += 1
    assert steps <= t <= steps + 1.1


def test_the_schur_complement():
    rng = np.random.default_rng(1)
    root = rng.standard_normal((6, 6))
    H = root @ root.T
    fast, rest = [1, 4], [0, 2, 3, 5]
    S = np.asarray(bounds.slow_curvature(jnp.asarray(H), jnp.asarray(fast)))
    np.testing.assert_allclose(S, np.linalg.inv(np.linalg.inv(H)[np.ix_(rest, rest)]), rtol=1e-8)
    assert np.linalg.eigvalsh(S)[0] >= np.linalg.eigvalsh(H)[0]


@pytest.mark.parametrize("n", [1, 4, 16])
def test_sign_descent(n):
    u = jnp.ones(n) / jnp.sqrt(n)
    assert float(bounds.sign_noise_floor(0.1, 8.0, u)) == pytest.approx(0.01 * n)
    assert float(bounds.sign_min_steps(3.0, 8.0, u, 0.01)) == pytest.approx(30 * np.sqrt(n))
    # At the step of that many steps the floor is the target.
    steps = bounds.sign_min_steps(3.0, 8.0, u, 0.01)
    assert float(bounds.sign_noise_floor(3.0 / steps, 8.0, u)) == pytest.approx(0.01)


def test_the_fast_limit_by_its_sum():
    a, c, T, L, G = 5.0, 0.2, 7, 1.5, 2.0
    want = sum(G * c / a**2 * (1 + c * L) ** t for t in range(T))
    assert float(bounds.fast_limit_error(a, c, T, L, G)) == pytest.approx(want, rel=1e-12)
    batched = jax.vmap(lambda a: bounds.fast_limit_error(a, c, T, L, G))(jnp.array([5.0, 10.0]))
    assert float(batched[0] / batched[1]) == pytest.approx(4)
