"""Adam's reach against optax, a maximization by scipy and counting (THEORY.md 3.5)."""

import doctest
import inspect
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from specdef_jax import bounds
from specdef_jax.bounds import adam
from specdef_jax.errors import SpecError

DISPLACEMENT = {False: bounds.adam_displacement, True: bounds.nadam_displacement}


def moments(t, b1, b2, nesterov):
    """Return the weights of g_i in m_hat_t and of g_i^2 in v_hat_t, by the recurrences."""
    m, v = np.zeros(t), np.zeros(t)
    for i in range(t):
        m, v = b1 * m, b2 * v
        m[i], v[i] = m[i] + 1 - b1, v[i] + 1 - b2
    ahead = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) / (1 - b1**t) * (np.arange(t) == t - 1)
    return (ahead if nesterov else m / (1 - b1**t)), v / (1 - b2**t)


@partial(jax.jit, static_argnames="optimizer")
def follow(optimizer, gradients, start):
    """Return the updates of optax on one coordinate with these gradients, and theta_1, theta_2, ..."""

    def step(carry, gradient):
        updates, state = optimizer.update(gradient, carry[1], carry[0])
        return (carry[0] + updates, state), (updates, carry[0] + updates)

    return jax.lax.scan(step, (start, optimizer.init(start)), gradients)[1]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.6, 0.5), (0.7, 0.7), (0.0, 0.5)])
def test_the_largest_ratio_over_all_gradients(b1, b2, nesterov):
    raw = optax.scale_by_adam(b1, b2, eps=0.0, nesterov=nesterov)
    for t in (1, 2, 5, 30):
        weights, squares = moments(t, b1, b2, nesterov)
        values, vectors = scipy.linalg.eigh(np.outer(weights, weights), np.diag(squares))
        want = pytest.approx(math.sqrt(values[-1]), rel=1e-10)
        assert float(DISPLACEMENT[nesterov](t, b1, b2)) == want
        assert float(bounds.weighted_displacement(jnp.asarray(weights), b2)) == want
        updates, _ = follow(raw, jnp.asarray(vectors[:, -1]), jnp.zeros(()))
        assert abs(float(updates[-1])) == pytest.approx(math.sqrt(values[-1]), rel=1e-7)


def test_known_answers():
    t = jnp.arange(1, 200)
    c, nadam = (np.asarray(form(t)) for form in DISPLACEMENT.values())
    assert (c[0], nadam[0]) == pytest.approx((1, 2.8 / 1.9), rel=1e-12)
    assert (np.diff(c) > 0).all()
    assert nadam[1] < nadam[0] < nadam[-1]
    np.testing.assert_allclose(bounds.adam_displacement(t, 0.8, 0.8), 1, rtol=1e-12)
    assert float(bounds.weighted_displacement(jnp.array([-1.0, 2.0]), 0.5)) == pytest.approx(3)
    assert float(bounds.weighted_displacement(jnp.zeros(3))) == 0
    assert math.isnan(bounds.weighted_displacement(jnp.array([1.0, math.nan])))
    old = 0.1 * 0.9 ** jnp.arange(19_999.0, -1, -1)  # b2^-20000 overflows, and 0.9^20000 underflows
    assert float(bounds.weighted_displacement(old, 0.9)) == pytest.approx(1, rel=1e-10)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.9, 0.9), (0.6, 0.5), (0.0, 0.5), (0.7, 0.491)])
def test_limit_and_supremum(b1, b2, nesterov):
    c = np.asarray(DISPLACEMENT[nesterov](jnp.arange(1, 40_000), b1, b2))
    assert float(bounds.displacement_limit(b1, b2, nesterov=nesterov)) == pytest.approx(c[-1], rel=1e-10)
    assert float(bounds.displacement_supremum(b1, b2, nesterov=nesterov)) == pytest.approx(c.max(), rel=1e-10)


def test_the_steps_looked_at_reach_to_rounding_and_no_further_than_a_power_of_two():
    assert adam._horizon(0.0) == 2
    for k in range(2, 12):
        below = -53 * math.log(2) / (2**k - 1)  # b1^(2^k - 1) is just below, or just above, rounding
        assert adam._horizon(math.exp(below * (1 + 1e-9))) == 2**k
        assert adam._horizon(math.exp(below * (1 - 1e-9))) == 2 ** (k + 1)


@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_the_reach_is_attained_in_optax_and_not_left(decay):
    sizes, start = jnp.linspace(0.3, 0.01, 25), jnp.asarray(-0.7)
    heavy = jnp.asarray(np.random.default_rng(5).standard_cauchy((200, 25)) ** 3)
    for nesterov in (False, True):
        reach = bounds.adam_reach(sizes, weight_decay=decay, start=start, nesterov=nesterov)
        schedule = partial(jnp.take, sizes)
        optimizer = optax.adamw(schedule, eps=0.0, weight_decay=decay, nesterov=nesterov)
        run = partial(follow, optimizer, start=start)
        assert (jnp.abs(jax.vmap(run)(heavy)[1] - start) <= reach * (1 + 1e-12)).all()
        if not nesterov:
            _, path = run(-((0.999 / 0.9) ** jnp.arange(25)))
            np.testing.assert_allclose(jnp.abs(path - start), reach, rtol=1e-10)
    assert bounds.adam_reach(jnp.zeros(0), weight_decay=decay).shape == (0,)


@pytest.mark.parametrize(("decay", "start"), [(0.0, 0.0), (0.5, 0.0), (0.5, -3.0)])
@pytest.mark.parametrize("nesterov", [False, True])
def test_fewest_steps_by_counting(decay, start, nesterov):
    top = float(bounds.displacement_supremum(nesterov=nesterov))
    fewest = partial(bounds.adam_min_steps, step_size=0.1, weight_decay=decay, start=start, nesterov=nesterov)
    distances = jnp.array([0.0, 0.3, 5.0, 12.0])
    for distance, found in zip(distances, jax.jit(jax.vmap(fewest))(distances), strict=True):
        moved, count = 0.0, 0
        while moved < distance:
            moved, count = moved + 0.1 * (top + decay * (abs(start) - moved)), count + 1
        assert math.ceil(found) == count
    if decay:
        edge = abs(start) + top / decay
        assert math.isfinite(fewest(edge * (1 - 1e-9)))
        assert float(fewest(edge)) == float(fewest(2 * edge)) == math.inf


def test_under_jit_and_vmap():
    t, b1 = jnp.arange(1, 6), jnp.array([0.1, 0.9])
    for form in DISPLACEMENT.values():
        np.testing.assert_allclose(jax.jit(jax.vmap(form))(t), form(t), rtol=1e-14)
        over = jax.vmap(form, (None, 0, None))(t, b1, 0.999)
        np.testing.assert_allclose(over, [form(t, float(b), 0.999) for b in b1], rtol=1e-14)
    total = np.cumsum(bounds.adam_displacement(t))
    np.testing.assert_allclose(jax.jit(bounds.adam_reach)(jnp.ones(5)), total, rtol=1e-12)


def refuses(message, function, *args, **options):
    with pytest.raises(SpecError, match=message):
        function(*args, **options)


@pytest.mark.parametrize("name", ["adam_displacement", "nadam_displacement", "displacement_limit",
                                  "displacement_supremum", "adam_reach", "adam_min_steps"])  # fmt: skip
def test_decay_rates_out_of_range(name):
    first = {"adam_reach": (jnp.ones(2),), "adam_min_steps": (1.0, 0.1)}
    args = first.get(name, () if "supremum" in name or "limit" in name else (3,))
    for b1, b2 in ((-0.1, 0.9), (1.0, 0.9), (math.nan, 0.9), (0.0, 0.0), (0.9, 1.0)):
        refuses(rf"b1 = {b1}, b2 = {b2}: decay rates lie in \[0, 1\)", getattr(bounds, name), *args, b1, b2)
    refuses(r"b2 = 0.25: needs b1\^2 < b2.*weighted_displacement", getattr(bounds, name), *args, 0.5, 0.25)


def test_bad_input():
    for form in DISPLACEMENT.values():
        refuses(r"t = \[1 0\]: steps are counted from 1", form, jnp.array([1, 0]))
    for b2 in (0.0, 1.0, math.nan):
        refuses(f"b2 = {b2}: must lie strictly", bounds.weighted_displacement, jnp.ones(2), b2)
    refuses("weights is empty", bounds.weighted_displacement, jnp.zeros(0))
    refuses("weight_decay = -0.1: must not be negative", bounds.adam_reach, jnp.ones(2), weight_decay=-0.1)
    for step in (0.0, -1.0, math.inf, math.nan):
        refuses(f"step_size = {step}: must be positive and finite", bounds.adam_min_steps, 1.0, step)
    for w in (-2.0, 2.0):
        message = rf"weight_decay = {w / 2}: must lie in \[0, 1\)"
        refuses(message, bounds.adam_min_steps, 1.0, 0.5, weight_decay=w)


def test_the_examples_run():
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    names = [name for name in vars(adam) if name in bounds.__all__ and name != "displacement_limit"]
    assert len(names) == 6
    for name in names:
        (test,) = finder.find(inspect.unwrap(getattr(adam, name)), name, globs=dict(vars(adam)))
        assert runner.run(test).attempted >= 1
    assert runner.failures == 0
