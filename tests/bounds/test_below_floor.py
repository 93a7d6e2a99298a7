"""Steps below the floor of the fast set: constants against autodiff, floors by SciPy (THEORY.md 3.3 (vi))."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from specdef_jax import bounds

KEY = jax.random.key(36)


def test_steps_by_hand():
    # 0.5 / 2 to travel, 0.002 a step; the ball of radius 0.1 is left before that.
    assert float(bounds.below_floor_steps(0.5, 2.0, 1e-3, 1.0)) == pytest.approx(125)
    assert float(bounds.below_floor_steps(0.5, 2.0, 1e-3, 0.1)) == pytest.approx(50)
    assert float(bounds.below_floor_steps(0.5, 1.0, 1e-3, jnp.inf)) == pytest.approx(500)
    assert bounds.below_floor_steps(jnp.array([0.0, 1.0]), 1.0, 0.1, jnp.inf).tolist() == [0.0, 10.0]


def test_confinement_by_its_sum():
    slack, c, drift, noise = 0.7, 0.3, 1e-3, 1e-2
    T = float(bounds.confined_steps(slack, c, drift, noise))
    assert c * noise * T + c * drift * T**2 / 2 == pytest.approx(slack)
    assert sum(c * (noise + drift * j) for j in range(int(T))) <= slack
    assert float(bounds.confined_steps(slack, c, drift)) == pytest.approx(np.sqrt(2 * slack / (c * drift)))


@pytest.mark.parametrize("radius", [0.3, 100.0])
def test_the_floor_of_a_ball_against_scipy(radius):
    z, target = (np.asarray(jax.random.normal(k, (7, 3))) for k in jax.random.split(KEY))

    def loss(x):
        out = jnp.asarray(z) @ x
        return jnp.mean(jnp.log1p(jnp.exp(out)) - 0.5 * out) + 0.1 * jnp.sum(
            x * jnp.asarray(target[0]) + x**2
        )

    centre = jnp.array([1.0, -2.0, 0.5])
    found = jax.jit(lambda: bounds.ball_floor(loss, centre, radius, smoothness=2.0))()
    ball = {"type": "ineq", "fun": lambda x: radius**2 - np.sum((x - np.asarray(centre)) ** 2)}
    want = scipy.optimize.minimize(
        lambda x: float(loss(x)),
        np.asarray(centre),
        jac=lambda x: np.asarray(jax.grad(loss)(jnp.asarray(x))),
        constraints=[ball],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    ).fun
    assert float(found.lower) <= want + 1e-9
    assert float(found.upper) == pytest.approx(want, abs=1e-9)
    assert float(found.upper - found.lower) < 1e-9
    assert float(jnp.linalg.norm(found.point - centre)) <= radius * (1 + 1e-12)
    # A certificate holds before the minimization has come anywhere.
    early = bounds.ball_floor(loss, centre, radius, smoothness=2.0, steps=1)
    assert float(early.lower) <= want <= float(early.upper) + 1e-12


def test_constants_do_not_grow_with_alpha():
    kernels = [jax.random.normal(k, s) for k, s in zip(jax.random.split(KEY), ((3, 4), (4, 5)), strict=True)]
    U = jnp.eye(5)[:, :2]
    found = [
        bounds.slow_constants(kernels, U, 2.0, alpha=a, fast_radius=1.0, radius=0.5)
        for a in (1.0, 10.0, 1e6, jnp.inf)
    ]
    for one, other in itertools.pairwise(found):
        assert all(float(x) >= float(y) for x, y in zip(one, other, strict=True))
    np.testing.assert_allclose(found[2], found[3], rtol=1e-5)


def test_constants_at_the_start_by_hand():
    # One layer, no displacement: |x| = 3, M = diag(2, 5), U = e_1; J^2 = 1 + 9 (1 + 25).
    found = bounds.slow_constants(
        [jnp.diag(jnp.array([2.0, 5.0]))], jnp.eye(2)[:, :1], 3.0, alpha=jnp.inf, fast_radius=0.0, radius=0.0
    )
    J = np.sqrt(1 + 9 * 26)
    np.testing.assert_allclose(found.logits, J)
    np.testing.assert_allclose(found.gradient, np.sqrt(2) * J)
    np.testing.assert_allclose(found.features, 0.0)
    np.testing.assert_allclose(found.smoothness, 18.0)
    np.testing.assert_allclose(found.lipschitz, 3 * J)


def test_a_layer_below_counts_by_hand():
    # 1 -> 1 -> 2: H = 1, |dh/ds|^2 = 1 + |x|^2; q = |M| = 5.
    found = bounds.slow_constants(
        [jnp.array([[0.7]]), jnp.array([[3.0, 4.0]])], jnp.eye(2)[:, :1], 2.0,
        alpha=jnp.inf, fast_radius=0.0, radius=0.0,
    )  # fmt: skip
    np.testing.assert_allclose(found.logits**2, 1 + (1 + 16) + 25 * 5)
    np.testing.assert_allclose(found.features, 3 * np.sqrt(5))


def test_a_lone_slow_gradient_attains_G_up_to_the_factor_of_its_norms():
    """A saturated example, one unit: all that is lost is the sum over blocks that cannot be large at once."""
    M, U = jnp.array([[0.0, 4.0]]), jnp.eye(2)[:, :1]

    def loss(A, K, b):
        out = A @ K + b
        return jax.nn.logsumexp(out) - out[0, 0]

    grads = jax.grad(loss, argnums=(0, 1, 2))(M, jnp.eye(2), jnp.array([0.0, 40.0]))
    slow = [grads[0], grads[1] - U @ (U.T @ grads[1]), grads[2]]
    size = np.sqrt(sum(float(jnp.sum(g**2)) for g in slow))
    found = bounds.slow_constants([M], U, 1.0, alpha=1.0, fast_radius=0.0, radius=0.0)
    assert size == pytest.approx(float(found.gradient), rel=1e-9)


def test_fast_convexity():
    z, logits = jnp.array([[1.0], [2.0]]), jnp.zeros((2, 3))
    none = bounds.SlowConstants(*(jnp.zeros(()) for _ in range(5)))
    # E z^2 / 3, exact: diag p - p p^T is a third of the projection across 1.
    found = bounds.fast_convexity(z, logits, none, fast_radius=0.0, radius=0.0)
    assert float(found) == pytest.approx(2.5 / 3)
    assert float(bounds.fast_convexity(z, logits, none, fast_radius=0.1, radius=0.0)) < 2.5 / 3
    some = none._replace(features=jnp.ones(()))
    shaken = bounds.fast_convexity(z, logits, some, fast_radius=0.0, radius=0.5)
    assert float(shaken) == pytest.approx((np.sqrt(2.5 / 3) - 0.5 / np.sqrt(3)) ** 2)
    assert float(bounds.fast_convexity(z, logits, some, fast_radius=0.0, radius=9.0)) == 0
    # Two directions that one example cannot tell apart.
    assert float(bounds.fast_convexity(jnp.ones((1, 2)), logits[:1], none, fast_radius=0.0, radius=0.0)) == 0
