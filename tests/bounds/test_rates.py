"""Rates on a quadratic against optax, a loop and numpy.roots (THEORY.md 3.4)."""

import doctest
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specdef_jax import bounds
from specdef_jax.bounds import rates
from specdef_jax.errors import SpecError

CURVATURE = jnp.array([0.2, 0.9, 3.1])


def follow(optimizer, steps):
    """Return x_0 ... x_steps of optax on sum_i CURVATURE_i x_i^2 / 2 from ones."""
    x = jnp.ones(3)
    state, path = optimizer.init(x), [x]
    for _ in range(steps):
        updates, state = optimizer.update(CURVATURE * x, state, x)
        x = optax.apply_updates(x, updates)
        path.append(x)
    return np.array(path)


def test_gradient_descent_coordinate_by_coordinate():
    path = follow(optax.sgd(0.3), 20)
    for steps in (0, 1, 5, 20):
        np.testing.assert_allclose(bounds.decay_factor(0.3, CURVATURE, steps), path[steps], rtol=1e-12)
        loss = float(np.sum(CURVATURE * path[steps] ** 2) / 2)
        assert float(bounds.quadratic_loss(0.3, CURVATURE, jnp.ones(3), steps)) == pytest.approx(
            loss, rel=1e-12
        )
    over = jax.jit(jax.vmap(lambda t: bounds.decay_factor(0.3, CURVATURE, t)))(jnp.arange(21))
    np.testing.assert_allclose(over, path, rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.6, 0.95])
def test_heavy_ball_coordinate_by_coordinate(momentum):
    path = follow(optax.sgd(0.3, momentum=momentum), 20)
    for steps in (0, 1, 2, 20):
        found = [bounds.heavy_ball_factor(0.3, c, steps, momentum=momentum) for c in CURVATURE]
        np.testing.assert_allclose(found, path[steps], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
def test_the_rate_of_heavy_ball_is_the_largest_root(momentum):
    s = np.linspace(-0.5, 5, 45)
    found = bounds.heavy_ball_rate(1.0, s, momentum=momentum)
    want = [np.abs(np.roots([1, -(1 + momentum - x), momentum])).max() for x in s]
    np.testing.assert_allclose(found, want, rtol=1e-7)
    assert (np.asarray(found) >= math.sqrt(momentum) * (1 - 1e-15)).all()


def test_steps_to_reduce_against_counting():
    for rate, fraction in ((0.5, 0.1), (0.5, 0.25), (-0.5, 0.25), (0.1, 1e-3), (0.999, 0.5), (0.3, 0.9)):
        left, count = 1.0, 0
        while left > fraction * (1 + 1e-12):
            left, count = left * abs(rate), count + 1
        assert float(bounds.steps_to_reduce(1.0, 1 - rate, fraction)) == count


@pytest.mark.parametrize(
    ("curvature", "fraction", "steps"),
    [
        (1.0, 0.5, 1.0),  # gone in one step
        (0.0, 0.5, math.inf),
        (2.0, 0.5, math.inf),
        (2.5, 0.5, math.inf),
        (-0.1, 0.5, math.inf),
        (2.5, 1.0, 0.0),
        (0.5, 2.0, 0.0),
    ],
)
def test_steps_to_reduce_at_the_edges(curvature, fraction, steps):
    assert float(bounds.steps_to_reduce(1.0, curvature, fraction)) == steps


def test_the_best_step_and_its_rate():
    low, high = 0.5, 20.0
    step, rate = float(bounds.best_step(low, high)), float(bounds.best_rate(high / low))
    grid = np.linspace(0, 2 / high, 2001)
    worst = np.maximum(abs(1 - grid * low), abs(1 - grid * high))
    assert rate == pytest.approx(worst.min(), rel=1e-3)
    assert step == pytest.approx(grid[worst.argmin()], rel=1e-3)
    assert float(bounds.best_rate(1.0)) == 0


def test_the_best_heavy_ball_is_the_best_on_a_grid():
    low, high = 0.5, 20.0
    step, momentum, rate = map(float, bounds.best_heavy_ball(low, high))
    assert rate == pytest.approx((math.sqrt(40) - 1) / (math.sqrt(40) + 1))
    assert momentum == pytest.approx(rate**2)
    at_ends = [bounds.heavy_ball_rate(step, end, momentum=momentum) for end in (low, high)]
    np.testing.assert_allclose(at_ends, rate, rtol=1e-7)
    steps = np.linspace(0.5, 1.5, 41) * step
    for b in np.linspace(0.02, 0.98, 49):
        worst = np.maximum(*(bounds.heavy_ball_rate(steps, end, momentum=float(b)) for end in (low, high)))
        assert worst.min() >= rate - 1e-9


def test_bad_input():
    for momentum in (-0.1, 1.0, math.nan):
        with pytest.raises(SpecError, match="momentum = "):
            bounds.heavy_ball_rate(0.1, 1.0, momentum=momentum)
        with pytest.raises(SpecError, match="momentum = "):
            bounds.heavy_ball_factor(0.1, 1.0, 3, momentum=momentum)
    with pytest.raises(SpecError, match="steps = -1: must not be negative"):
        bounds.heavy_ball_factor(0.1, 1.0, -1)


def test_the_examples_run():
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    names = [name for name in vars(rates) if name in bounds.__all__ and name != "BestHeavyBall"]
    assert len(names) == 8
    for name in names:
        (test,) = finder.find(inspect.unwrap(getattr(rates, name)), name, globs=dict(vars(rates)))
        assert runner.run(test).attempted >= 1
    assert runner.failures == 0
