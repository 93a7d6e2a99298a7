"""Ratios, their intervals, and what a race's result says."""

import inspect
import itertools
import math

import numpy as np
import pytest
import scipy.stats

from specdef_jax.errors import ProblemError, SpecError
from specdef_jax.race import (
    Outcome,
    RaceResult,
    Ratio,
    bootstrap_interval,
    log_grid,
    logrank,
    ratio_of_means,
    recovery,
    survival,
)
from specdef_jax.race.grid import check_grid

NAN = math.nan


def tail(n, level=0.95):
    """Return the percentile that Hesterberg's expanded interval takes."""
    return scipy.stats.norm.cdf(scipy.stats.t.ppf((1 - level) / 2, n - 1) * math.sqrt(n / (n - 1)))


def test_interval_against_scipy():
    values = np.random.default_rng(1).standard_normal(9)
    found = bootstrap_interval(values)
    want = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=50_000, confidence_level=1 - 2 * tail(9), method="percentile", rng=3
    ).confidence_interval
    np.testing.assert_allclose(found, want, atol=0.03 * (want.high - want.low))


@pytest.mark.parametrize("n", [2, 3, 6])
def test_few_values_are_enumerated(n):
    values = np.random.default_rng(n).standard_normal(n)
    means = sorted(np.mean(draw) for draw in itertools.product(values, repeat=n))
    want = np.quantile(means, [tail(n), 1 - tail(n)])
    np.testing.assert_allclose(bootstrap_interval(values), want, rtol=1e-12)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=2)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [
        low <= 0 <= high for low, high in (bootstrap_interval(rng.standard_normal(5)) for _ in range(500))
    ]
    # 95% less what a bootstrap of five bounded means can do; the plain percentile interval covers 83%.
    assert 0.89 < np.mean(covered) < 0.98


def test_one_value_has_no_interval():
    assert all(map(math.isnan, bootstrap_interval(np.array([3.0]))))
    ratio = ratio_of_means(np.array([30.0]), np.array([10.0]), 100)
    assert ratio.value == pytest.approx(3)
    assert math.isnan(ratio.low)
    assert math.isnan(ratio.high)
    assert str(ratio) == "3"


def test_ratio_is_the_geometric_mean_of_paired_ratios():
    steps, baseline = np.array([20.0, 90.0, 40.0]), np.array([10.0, 10.0, 40.0])
    ratio = ratio_of_means(steps, baseline, 100)
    assert ratio.value == pytest.approx(18 ** (1 / 3))
    assert 1 <= ratio.low < ratio.value < ratio.high <= 9
    assert not ratio.censored
    back = ratio_of_means(baseline, steps, 100)
    assert (back.value, back.low, back.high) == pytest.approx(
        (1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
    )


def test_a_censored_ratio_is_a_lower_bound():
    known = ratio_of_means(np.array([20.0, 5000.0]), np.array([10.0, 10.0]), 100)
    ratio = ratio_of_means(np.array([20.0, NAN]), np.array([10.0, 10.0]), 100)
    assert ratio.censored
    assert ratio.value == pytest.approx(math.sqrt(2 * 10))
    assert ratio.value < known.value
    assert ratio.low <= known.low
    assert ratio.high == math.inf
    assert str(ratio) == ">=4.47 [2, inf]"
    single = ratio_of_means(np.array([NAN]), np.array([10.0]), 100)
    assert str(single) == ">=10"
    nothing = ratio_of_means(np.array([20.0, 30.0]), np.array([10.0, NAN]), 100)
    assert math.isnan(nothing.value)
    assert str(nothing) == "n/a"


def test_ratio_in_words():
    assert str(Ratio(2.0, 1.5, 2.5, False, 5)) == "2 [1.5, 2.5]"
    assert str(Ratio(1234.5, 1000.0, 2000.0, False, 5)) == "1.23e+03 [1e+03, 2e+03]"


def test_seeds_that_do_not_pair():
    with pytest.raises(ProblemError, match="steps of 3 seeds cannot be paired with a baseline of 2"):
        inspect.unwrap(ratio_of_means)(np.ones(3), np.ones(2), 10)  # past the type checker of the tests


def result(to_target, outcome=None, cap=100):
    """Return a RaceResult of one optimizer from steps (steps, seeds)."""
    to_target = np.asarray(to_target, float)[None]
    shape = to_target.shape
    return RaceResult(
        names=("sgd",),
        step_sizes=np.geomspace(0.1, 10, shape[1])[None],
        to_target=to_target,
        crossings=to_target[..., None],
        evaluations=np.ceil(to_target)[..., None],
        spent=np.where(np.isnan(to_target), cap, np.ceil(to_target)),
        outcome=np.where(np.isnan(to_target), Outcome.CENSORED, Outcome.REACHED),
        last=np.ones(shape),
        peak=np.ones(shape),
        trace=np.ones((*shape, 2)),
        targets=np.zeros((shape[2], 1)),
        record_at=np.arange(2),
        cap=cap,
        lanes=1,
        seconds=0.0,
        compile_seconds=0.0,
        step_seconds=np.ones(1),
    )


def test_survival_against_the_product_of_shares():
    found = survival(np.array([3.0, NAN, 7.0, 3.0, 20.0, NAN, 9.0, 11.0]), 12)
    # by hand: 8 at risk at 3 (2 arrive), 6 at 7, 5 at 9, 4 at 11; two are censored at 12, then 1 at 20
    np.testing.assert_array_equal(found.steps, [3, 7, 9, 11, 20])
    np.testing.assert_allclose(found.share, [6 / 8, 5 / 8, 4 / 8, 3 / 8, 0])
    assert found.median == 9
    assert found.censored == 2
    assert (found.low[:4] < found.share[:4]).all()
    assert (found.share[:4] < found.high[:4]).all()
    half = survival(np.array([5.0, NAN, NAN]), 10)
    assert math.isnan(half.median)
    np.testing.assert_allclose(half.share, [2 / 3])
    none = survival(np.array([NAN, NAN]), 10)
    assert (none.steps.size, none.censored) == (0, 2)
    assert math.isnan(none.median)


def test_survival_limits_cover_what_they_should():
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(400):
        times = rng.exponential(1.0, 30)
        found = survival(np.where(times < 1.5, times, NAN), 1.5)
        at = np.searchsorted(found.steps, 0.7) - 1  # exp(-0.7) of the runs are later
        inside.append(found.low[at] <= np.exp(-0.7) <= found.high[at])
    assert 0.92 < np.mean(inside) < 0.98


def test_logrank_tells_arms_apart():
    rng = np.random.default_rng(1)
    a, b = rng.exponential(1.0, 40), rng.exponential(4.0, 40)
    assert logrank(a, np.where(b < 5, b, NAN), 5) < 1e-4
    assert logrank(a, rng.exponential(1.0, 40), 99) > 0.05


def test_recovery_after_an_explosion_is_seen():
    assert recovery(np.array([1.3, 62.0, 1.6]))
    assert recovery(np.array([1.3, math.inf, 1.6]))
    assert recovery(np.array([1.3, 62.0, 30.0, 2.5, NAN, NAN]))
    assert not recovery(np.array([1.3, 62.0, 61.0]))
    assert not recovery(np.array([1.3, 62.0, NAN, 1.6]))
    assert not recovery(np.array([1.3, 2.5, 1.6]))
    assert recovery(np.array([1.3, 2.5, 1.6]), factor=1.5)
    assert not recovery(np.array([]))


def test_best_step_size_of_each_seed():
    found = result([[NAN, 40, NAN], [30, 20, NAN], [50, 60, NAN]])
    np.testing.assert_array_equal(found.steps("sgd"), [30, 20, NAN])
    np.testing.assert_array_equal(found.best_index("sgd"), [1, 1, -1])
    np.testing.assert_array_equal(found.censored["sgd"], [False, False, True])
    assert not found.at_edge("sgd")
    assert result([[NAN, 10], [30, 20], [50, 60]]).at_edge("sgd")
    assert result([[NAN, 40], [30, 20], [50, 6]]).at_edge("sgd")
    with pytest.raises(ProblemError, match="'adam' was not raced; raced: sgd"):
        found.steps("adam")


def test_slowdown_of_results():
    slow, fast = result([[NAN, 80], [NAN, 90]]), result([[10, 10], [20, 20]])
    ratio = slow.slowdown(fast)["sgd"]
    assert ratio.censored
    assert ratio.value == pytest.approx(math.sqrt(10 * 8))


def test_grid_spans_its_decades():
    grid = log_grid(0.02)
    assert grid[-1] / grid[0] == pytest.approx(1e7)
    assert np.sqrt(grid[0] * grid[-1]) == pytest.approx(0.02)
    assert len(grid) == 15
    np.testing.assert_allclose(grid[1:] / grid[:-1], np.sqrt(10))
    np.testing.assert_allclose(log_grid(1.0, decades=2, per_decade=1), [0.1, 1, 10])


@pytest.mark.parametrize("center", [0.0, -1.0, math.inf, NAN])
def test_grid_without_a_center(center):
    with pytest.raises(SpecError, match="center = "):
        log_grid(center)


def test_grid_without_width():
    with pytest.raises(SpecError, match="decades = 0"):
        log_grid(1.0, decades=0.0)
    with pytest.raises(SpecError, match="per_decade = 0"):
        log_grid(1.0, per_decade=0)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], r"shape \(0,\)"),
        ([[1.0, 2.0]], r"shape \(1, 2\)"),
        ([1.0, 1.0], "ascending and distinct"),
        ([2.0, 1.0], "ascending and distinct"),
        ([-1.0, 1.0], "positive and finite"),
        ([1.0, math.inf], "positive and finite"),
        (["fast"], "give a list of numbers"),
    ],
)
def test_bad_grids(grid, message):
    with pytest.raises(SpecError, match="sgd: .*" + message):
        check_grid("sgd", grid)
    assert check_grid("sgd", 0.1).tolist() == [0.1]
