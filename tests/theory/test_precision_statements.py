"""Statements 1.1 to 1.5: bound functions against exact arithmetic, and planted errors that are caught."""

from __future__ import annotations

import doctest
import inspect
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.bounds import rounding_limits
from specdef_jax.pair import build_pair
from specdef_jax.precision import alpha_max, as_format, norm_growth, pair_error_bound
from theory import (
    bit_layers,
    s1_1_preservation,
    s1_2_rounding,
    s1_3_bit_identity,
    s1_4_alpha_max,
    s1_5_frozen_rest,
)
from theory.instances.networks import mlp_instance
from theory.sizes import Size

KEY = jax.random.key(5)
SMALL = Size.SMALL


def fails(certificates):
    return [c.claim for c in certificates if c.fails]


def test_the_examples_of_the_bound_functions_run():
    names = [name for name in vars(rounding_limits) if name in bounds.__all__]
    assert len(names) == 6
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for name in names:
        function = getattr(rounding_limits, name)
        assert getattr(bounds, name) is function
        (test,) = finder.find(inspect.unwrap(function), name, globs={**vars(rounding_limits), "jnp": jnp})
        assert runner.run(test).attempted >= 1
    assert runner.failures == 0


# 1.1


def exact(x):
    return np.vectorize(Fraction, otypes=[object])(np.asarray(x, float))


def test_the_defect_against_rational_arithmetic():
    rng = np.random.default_rng(0)
    W, U = rng.standard_normal((4, 3)), rng.standard_normal((4, 2))
    alpha, eye = Fraction(7), exact(np.eye(4))
    P = exact(U) @ exact(U).T
    expected = (eye + (1 / alpha - 1) * P) @ (eye + (alpha - 1) * P) @ exact(W) - exact(W)
    found = bounds.pair_defect(jnp.asarray(W), jnp.asarray(U), 7.0)
    np.testing.assert_allclose(found, expected.astype(float), rtol=1e-13)
    both = jax.jit(jax.vmap(bounds.pair_defect, in_axes=(None, None, 0)))(W, U, jnp.array([7.0, 1.0]))
    np.testing.assert_allclose(both[0], found, rtol=1e-13)
    assert not both[1].any()


@pytest.mark.parametrize("factor", [-1.0, 1.1])
def test_a_wrong_defect_is_caught(monkeypatch, factor):
    real = bounds.pair_defect
    assert fails(s1_1_preservation._defect(KEY, SMALL)) == []
    monkeypatch.setattr(bounds, "pair_defect", lambda *args: factor * real(*args))
    assert fails(s1_1_preservation._defect(KEY, SMALL)) == ["T(1/a) T(a) W - W = -((a - 1)^2 / a) U E U^T W"]


def test_a_wrong_pair_is_caught_over_the_rationals(monkeypatch):
    real = s1_1_preservation._T
    assert fails(s1_1_preservation._rational(KEY, SMALL)) == []
    monkeypatch.setattr(s1_1_preservation, "_T", lambda alpha, U: real(alpha + Fraction(1, 10**30), U))
    assert len(fails(s1_1_preservation._rational(KEY, SMALL))) == 3  # symmetric, axis, defect


def test_a_network_that_is_not_preserved_is_caught(monkeypatch):
    instance = mlp_instance(KEY)
    plan = sd.plan(instance.params, sd.SpecDef(alpha=9.0), where=instance.where, key=KEY)
    apply, x = instance.network.apply, instance.args[0]

    def found():
        return s1_1_preservation.on_network(apply, instance.params, plan, x, name="")

    assert fails(found()) == []
    real = sd.apply_plan
    monkeypatch.setattr(
        sd, "apply_plan", lambda tree, plan: jax.tree.map(lambda x: x * (1 + 1e-9), real(tree, plan))
    )
    assert len(fails(found())) == 2


# 1.2


@pytest.mark.parametrize("name", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_ten_percent_of_the_rounding_bound_is_seen(monkeypatch, name, factor):
    assert s1_2_rounding._one_product(name).holds
    monkeypatch.setattr(s1_2_rounding, "pair_error_bound", lambda *args: factor * pair_error_bound(*args))
    assert s1_2_rounding._one_product(name).fails


def test_a_bound_that_forgets_the_sums_or_the_storage_is_seen(monkeypatch):
    def one_term(h, first, second, plain, form):
        scale = form.product_error(1) ** 2 + 2 * form.product_error(1)
        return scale * np.abs(h) @ np.abs(first) @ np.abs(second)

    assert s1_2_rounding._left_to_right().holds
    assert fails(s1_2_rounding._storage_and_flushing()) == []
    monkeypatch.setattr(s1_2_rounding, "pair_error_bound", one_term)
    assert s1_2_rounding._left_to_right().fails
    assert len(fails(s1_2_rounding._storage_and_flushing())) == 2


def test_one_layer_of_ones_own():
    form = as_format("bfloat16")
    arrays = [
        np.asarray(x, ml_dtypes.bfloat16).astype(float)
        for x in np.random.default_rng(1).normal(size=(3, 4, 4))
    ]
    h, A, B = arrays
    good = h @ A @ B
    (held,) = s1_2_rounding.on_layer(h, A, B, A @ B, good, form, name="")
    assert held.holds
    (failed,) = s1_2_rounding.on_layer(h, A, B, A @ B, 1.1 * good, form, name="")
    assert failed.fails
    (outside,) = s1_2_rounding.on_layer(h, A, B, A @ B, good * np.inf, form, name="")
    assert "no overflow" in outside.violated


# 1.3


def test_an_alpha_that_is_nearly_a_power_of_two_is_caught(monkeypatch):
    def nearly(matrix, U, alpha, basis, side):
        return build_pair(matrix, U, alpha * (1 + 2.0**-20), basis, side)

    monkeypatch.setattr(bit_layers, "LARGEST", {"float32": 30, "bfloat16": 30})
    assert fails(bit_layers.layers("axis", KEY, SMALL)) == []
    monkeypatch.setattr(bit_layers, "build_pair", nearly)
    found = fails(bit_layers.layers("axis", KEY, SMALL))
    assert len(found) == 1  # float32; bfloat16 does not hold the difference


def test_bits_on_ones_own_network():
    instance = mlp_instance(KEY)
    apply, params, x = instance.network.apply, instance.params, instance.args[0]

    def found(alpha, basis, dtype="float32", p=params):
        plan = s1_3_bit_identity._plan(instance, basis, alpha, KEY)
        (certificate,) = s1_3_bit_identity.on_network(apply, p, plan, x, dtype=dtype, name="")
        return certificate

    assert found(2.0**10, "axis").holds
    assert found(2.0**10, "rotated").holds
    assert "power of two" in found(1000.0, "axis").violated
    assert "axis or rotated" in found(4.0, "symmetric").violated
    assert "normal range" in found(2.0**15, "axis", "float16").violated
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    assert not found(2.0**10, "axis", p=broken).holds


# 1.4


def test_the_exact_range_by_hand():
    one = jnp.ones(2, jnp.float16)
    assert float(bounds.exact_alpha_range(one, one, jnp.float16)) == 2.0**14  # 1 / smallest normal
    assert float(bounds.exact_alpha_range(8 * one, one, jnp.float16)) == 65504 / 8
    assert float(bounds.exact_alpha_range(one, 0.25 * one, jnp.float16)) == 2.0**12
    with_zero = jnp.array([0.0, -0.5])
    assert float(bounds.exact_alpha_range(with_zero, with_zero, jnp.float16)) == 2.0**13
    assert float(bounds.exact_alpha_range(jnp.zeros(2), jnp.zeros(2), jnp.float32)) == np.inf
    assert float(bounds.exact_alpha_range(jnp.ones(1), jnp.ones(1), jnp.float32)) == 2.0**126
    stacked = jax.jit(jax.vmap(lambda g: bounds.exact_alpha_range(g, g, jnp.float16)))(
        jnp.array([[1.0], [16.0]])
    )
    np.testing.assert_array_equal(stacked, [2.0**14, 65504 / 16])


@pytest.mark.parametrize("basis", ["axis", "rotated"])
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_ten_percent_of_the_range_is_seen(monkeypatch, basis, factor):
    real = bounds.exact_alpha_range
    assert fails(s1_4_alpha_max._range(basis, KEY, SMALL)) == []
    monkeypatch.setattr(bounds, "exact_alpha_range", lambda *args: factor * real(*args))
    found = set(fails(s1_4_alpha_max._range(basis, KEY, SMALL)))
    assert {
        "2^p beyond the range does not" if factor < 1 else "2^p up to the range keeps factors normal"
    } <= found


def largest_entry(basis, m, alpha):
    """Search the largest |Wt| over directions u, W = signs, by a grid over u_1 and equal other entries."""
    best = 0.0
    for p in np.linspace(0, 1, 2001):
        u = np.full(m, np.sqrt((1 - p) / (m - 1)))
        u[0] = np.sqrt(p)
        rows = np.eye(m) + (alpha - 1) * np.outer(u, u) if basis == "symmetric" else alpha * u[None]
        best = max(best, np.abs(rows).sum(axis=1).max())
    return best


@pytest.mark.parametrize("m", [2, 9])
@pytest.mark.parametrize("alpha", [1.0, 6.0])
@pytest.mark.parametrize("basis", ["symmetric", "rotated"])
def test_entry_growth_against_a_search(basis, m, alpha):
    found = float(bounds.entry_growth(alpha, m, basis))
    searched = largest_entry(basis, m, alpha)
    assert searched <= found * (1 + 1e-12)
    assert searched >= found * (1 - 1e-5)
    assert float(bounds.entry_growth(alpha, m, "axis")) == alpha


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_five_percent_of_the_entry_growth_is_seen(monkeypatch, factor):
    real = bounds.entry_growth
    assert fails(s1_4_alpha_max._growth(KEY, SMALL)) == []
    monkeypatch.setattr(bounds, "entry_growth", lambda *args: factor * real(*args))
    assert len(fails(s1_4_alpha_max._growth(KEY, SMALL))) >= 3


def test_a_wrong_alpha_max_is_seen(monkeypatch):
    assert fails(s1_4_alpha_max._rule(KEY, SMALL)) == []
    monkeypatch.setattr(s1_4_alpha_max, "alpha_max", lambda *args, **kwargs: 1.1 * alpha_max(*args, **kwargs))
    assert fails(s1_4_alpha_max._rule(KEY, SMALL)) == ["u ||T(alpha_max) W|| / ||W|| = b"]
    monkeypatch.setattr(s1_4_alpha_max, "alpha_max", alpha_max)
    monkeypatch.setattr(s1_4_alpha_max, "norm_growth", lambda alpha, energy: norm_growth(alpha, energy**2))
    assert fails(s1_4_alpha_max._rule(KEY, SMALL)) == ["||T(a) W|| = ||W|| sqrt(1 + (a^2 - 1) e^2)"]


def test_what_the_library_refuses_is_outside_the_assumptions():
    kernel = jnp.ones((4, 3), jnp.float16)
    (found,) = s1_4_alpha_max.on_layer(kernel, sd.SpecDef(alpha=1e6, basis="axis"), key=KEY, name="")
    assert "alpha_max" in found.violated
    (found,) = s1_4_alpha_max.on_layer(kernel, sd.SpecDef(alpha=8.0, basis="axis"), key=KEY, name="")
    assert found.holds


# 1.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_thresholds_are_half_the_gaps(dtype):
    rng = np.random.default_rng(2)
    x = np.concatenate(
        [
            rng.standard_normal(50) * 2.0 ** rng.integers(-20, 20, 50),
            2.0 ** np.arange(-9, 9),
            -(2.0 ** np.arange(-9, 9)),
        ]
    )
    x = x.astype(dtype)
    size = np.abs(x)
    towards, away = bounds.lost_update_threshold(jnp.asarray(x))
    np.testing.assert_array_equal(away, (np.nextafter(size, dtype(np.inf)).astype(float) - size) / 2)
    np.testing.assert_array_equal(towards, (size.astype(float) - np.nextafter(size, dtype(0))) / 2)


def test_the_edges_of_the_thresholds():
    least = np.float16(2.0**-24)
    x = jnp.array([0.0, least, 2.0**-14, 65504.0], jnp.float16)
    towards, away = bounds.lost_update_threshold(x)
    np.testing.assert_array_equal(away, [2.0**-25, 2.0**-25, 2.0**-25, 16.0])
    np.testing.assert_array_equal(towards, [2.0**-25, 2.0**-25, 2.0**-25, 16.0])
    lost = bounds.update_is_lost(jnp.zeros(3, jnp.float16), jnp.array([2.0**-26, 2.0**-25, -(2.0**-24)]))
    np.testing.assert_array_equal(lost, [True, True, False])  # the tie goes to zero, which is even


def nearest_even(x, dtype):
    """Round a rational number to a 16-bit format, from its neighbours alone."""
    low = dtype(float(x))
    candidates = [low, np.nextafter(low, dtype(np.inf)), np.nextafter(low, dtype(-np.inf))]
    distances = [abs(Fraction(float(c)) - x) for c in candidates]
    nearest = [c for c, d in zip(candidates, distances, strict=True) if d == min(distances)]
    return next(c for c in nearest if len(nearest) == 1 or c.view(np.uint16) % 2 == 0)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_lost_updates_against_rational_rounding(dtype):
    rng = np.random.default_rng(4)
    u = as_format(np.dtype(dtype)).unit
    found = {True: 0, False: 0}
    for _ in range(200):
        x = dtype(rng.choice([-1, 1]) * 2.0 ** rng.integers(-5, 5) * rng.choice([1.0, rng.uniform(1, 2)]))
        d = rng.choice([-1, 1]) * abs(float(x)) * u * rng.choice([0.25, 0.5, 1.0, rng.uniform(0, 2)])
        lost = nearest_even(Fraction(float(x)) + Fraction(d), dtype) == x
        assert bool(bounds.update_is_lost(jnp.asarray(x), jnp.asarray(d))) == lost
        found[bool(lost)] += 1
    assert min(found.values()) > 40


def test_lost_updates_without_float64_and_under_jit():
    x, d = jnp.array([1.75, 1.75, 1.0], jnp.bfloat16), jnp.array([0.0039, 0.005, -0.0019], jnp.bfloat16)
    expected = np.asarray(x + d == x)
    np.testing.assert_array_equal(expected, [True, False, True])
    with jax.enable_x64(False):
        np.testing.assert_array_equal(jax.jit(bounds.update_is_lost)(x, d), expected)
        assert bounds.lost_update_threshold(x)[0].dtype == jnp.float32
    np.testing.assert_array_equal(jax.vmap(bounds.update_is_lost)(x, d), expected)


@pytest.mark.parametrize(
    "planted",
    [
        lambda x, d: jnp.abs(d) < jnp.where(x * d > 0, *bounds.lost_update_threshold(x)[::-1]),  # ties
        lambda x, d: jnp.abs(d) <= jnp.where(x * d > 0, *bounds.lost_update_threshold(x)[::-1]),
        lambda x, d: jnp.abs(d) < bounds.lost_update_threshold(x)[1],  # one side for both
        lambda x, d: jnp.abs(d) < 2.0**-8 * jnp.abs(x),  # the constant of THEORY.md
    ],
)
def test_a_wrong_predicate_is_caught(monkeypatch, planted):
    monkeypatch.setattr(bounds, "update_is_lost", planted)
    assert any("lost if and only if" in claim for claim in fails(s1_5_frozen_rest._every_number()))


@pytest.mark.parametrize("factors", [(1.1, 1.0), (1.0, 1.1), (0.9, 0.9)])
def test_a_wrong_threshold_is_caught(monkeypatch, factors):
    real = bounds.lost_update_threshold
    assert fails([*s1_5_frozen_rest._every_number(), *s1_5_frozen_rest._interval()]) == []
    monkeypatch.setattr(
        bounds, "lost_update_threshold", lambda x: tuple(f * h for f, h in zip(factors, real(x), strict=True))
    )
    assert len(fails(s1_5_frozen_rest._every_number())) == 2
    assert fails(s1_5_frozen_rest._interval())


def test_a_step_of_ones_own_network():
    loss = lambda params, x: jnp.sum((params["w"] * x) ** 2)  # noqa: E731
    params = {"w": jnp.array([1.0, 100.0], jnp.bfloat16)}
    x = jnp.array([0.01, 1.0], jnp.bfloat16)
    (found,) = s1_5_frozen_rest.on_network(loss, params, x, step_size=0.01, name="")
    assert found.holds
    assert found.note == "1 of 2 entries stay"
    (found,) = s1_5_frozen_rest.on_network(loss, params, x * jnp.inf, step_size=0.01, name="")
    assert "finite" in found.violated
