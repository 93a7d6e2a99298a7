"""Limits of rounding against every 16-bit number, NumPy's arithmetic and dense pairs (THEORY.md 1)."""

import doctest
import inspect
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from specdef_jax import bounds
from specdef_jax.bounds import rounding_limits

RNG = np.random.default_rng(12)
HALF = pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])


def transform(U, alpha):
    return np.eye(len(U)) + (alpha - 1) * U @ U.T


def numbers(dtype):
    """Return zero and every positive finite number of a 16-bit dtype, ascending, as stored and in float64."""
    stored = np.arange(np.array(np.inf, dtype).view(np.uint16), dtype=np.uint16).view(dtype)
    return stored, stored.astype(float)


@pytest.mark.parametrize(("m", "n", "rank"), [(3, 5, 3), (5, 3, 3), (4, 4, 2)])
def test_the_papers_compensation_by_the_pseudoinverse(m, n, rank):
    W = RNG.standard_normal((m, rank)) @ RNG.standard_normal((rank, n))
    U, values, _ = np.linalg.svd(W)
    S = np.diag(values[:rank])
    for k in (0, 1, 2):
        grown = S * np.where(np.arange(rank) < k, 9.0, 1.0)
        C = np.asarray(bounds.paper_compensation(jnp.asarray(W), k, 9.0))
        np.testing.assert_allclose(C, U[:, :rank] @ S @ np.linalg.pinv(grown) @ U[:, :rank].T, atol=1e-13)
        np.testing.assert_allclose(C @ transform(U[:, :k], 9.0) @ W, W, atol=1e-12)
        assert np.allclose(C, transform(U[:, :k], 1 / 9)) == (rank == m)
        np.testing.assert_allclose(bounds.paper_compensation(jnp.asarray(1e12 * W), k, 9.0), C, atol=1e-13)
        projector = W @ np.linalg.pinv(W)
        np.testing.assert_allclose(C, transform(U[:, :k], 1 / 9) @ projector, atol=1e-13)


def test_what_is_zero_to_rounding_is_told_by_the_largest_value():
    W = jnp.diag(jnp.array([1e10, 1.0, 1e-8]))
    assert jnp.diagonal(bounds.paper_compensation(W, 1, 4.0)).tolist() == [0.25, 1.0, 0.0]


def test_the_papers_compensation_of_zero_and_its_dtype():
    assert not bounds.paper_compensation(jnp.zeros((2, 3)), 1, 4.0).any()
    W = jnp.asarray(RNG.standard_normal((3, 3)), jnp.float32)
    over = jax.jit(jax.vmap(bounds.paper_compensation, (None, 0, 0)))(
        W, jnp.array([1, 2]), jnp.full(2, 4.0, jnp.float32)
    )
    assert over.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.svd(over)[1], [[1, 1, 0.25], [1, 0.25, 0.25]], rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1e4])
def test_the_defect_of_directions_that_are_not_orthonormal(alpha):
    W, U = RNG.standard_normal((4, 3)), RNG.standard_normal((4, 2))
    want = transform(U, 1 / alpha) @ transform(U, alpha) @ W - W
    found = bounds.pair_defect(jnp.asarray(W), jnp.asarray(U), alpha)
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)
    exact = bounds.pair_defect(jnp.asarray(W), jnp.asarray(np.linalg.qr(U)[0]), alpha)
    assert jnp.abs(exact).max() < 1e-14 * max(1, alpha)
    over = jax.jit(jax.vmap(bounds.pair_defect, (None, None, 0)))(W, U, jnp.array([alpha, 2.0]))
    np.testing.assert_allclose(over[0], found, rtol=1e-12, atol=1e-14)


@HALF
def test_a_power_of_two_is_exact_up_to_the_range_and_not_beyond(dtype):
    tiny, largest = (float(getattr(ml_dtypes.finfo(dtype), name)) for name in ("tiny", "max"))
    for grown, shrunk in (([0.3, -5.0, 0.0], [1.0, 0.0]), ([1e-3], [-0.25, 0.7]), ([100.0], [1.0])):
        G, S = (np.array(x).astype(dtype) for x in (grown, shrunk))
        found = float(bounds.exact_alpha_range(jnp.asarray(G), jnp.asarray(S), dtype))
        powers = 2.0 ** np.arange(140)
        kept = [
            (np.abs(G.astype(float)) * a <= largest).all()
            and (np.abs(S[S != 0].astype(float)) / a >= tiny).all()
            for a in powers
        ]
        assert powers[kept].max() == 2.0 ** math.floor(math.log2(found))
    nothing = jnp.zeros((2, 1), dtype)
    assert jax.vmap(lambda x: bounds.exact_alpha_range(x, x, dtype))(nothing).tolist() == [math.inf] * 2


@pytest.mark.parametrize("basis", ["symmetric", "rotated", "axis"])
def test_no_entry_outgrows_the_bound_and_one_attains_it(basis):
    m, alpha = 5, 6.0
    bound = float(bounds.entry_growth(alpha, m, basis))

    def largest(U):  # over |W| <= 1: the largest sum of |row| of what multiplies W
        Q = np.c_[U, np.linalg.svd(U)[0][:, U.shape[1] :]]
        stretch = np.where(np.arange(m) < U.shape[1], alpha, 1.0)[:, None]
        return np.abs(transform(U, alpha) if basis == "symmetric" else stretch * Q.T).sum(1).max()

    share = (1 + 1 / math.sqrt(m)) / 2
    best = {
        "symmetric": np.r_[math.sqrt(share), np.full(m - 1, math.sqrt((1 - share) / (m - 1)))],
        "rotated": np.full(m, m**-0.5),
        "axis": np.eye(m)[0],
    }[basis]
    assert largest(best[:, None]) == pytest.approx(bound, rel=1e-12)
    for k in (1, 2, 4) if basis != "axis" else ():
        for _ in range(100):
            assert largest(np.linalg.qr(RNG.standard_normal((m, k)))[0]) <= bound * (1 + 1e-12)
    over = jax.jit(jax.vmap(lambda a: bounds.entry_growth(a, m, basis)))(jnp.array([1.0, alpha]))
    np.testing.assert_allclose(over, [bounds.entry_growth(1.0, m, basis), bound], rtol=1e-14)


@HALF
def test_half_the_gaps_of_every_number(dtype):
    stored, size = numbers(dtype)
    gaps = np.diff(size)
    for sign in (1, -1):
        towards, away = bounds.lost_update_threshold(jnp.asarray(stored * dtype(sign)))
        np.testing.assert_array_equal(away[:-1], gaps / 2)
        np.testing.assert_array_equal(towards[1:], gaps / 2)
        assert (float(away[-1]), float(towards[0])) == (gaps[-1] / 2, gaps[0] / 2)
    normal = size >= float(ml_dtypes.finfo(dtype).tiny)
    unit = float(ml_dtypes.finfo(dtype).eps) / 2
    for half in (towards, away):
        assert (half >= unit * size / 2)[normal].all()
        assert (half <= unit * size)[normal].all()


@HALF
def test_lost_updates_of_every_number(dtype):
    stored, size = numbers(dtype)
    gap = np.diff(size, append=2 * size[-1] - size[-2])
    # XLA on the CPU takes a subnormal bfloat16 for zero, which is even.
    held = (size == 0) | (size >= float(ml_dtypes.finfo(dtype).tiny)) | (dtype is np.float16)
    seen = set()
    for share in (0.0, 0.25, 0.26, 0.5, 0.51, 1.0):
        for update in (share * gap, -share * gap):
            with np.errstate(over="ignore"):
                want = (size + update).astype(dtype) == stored  # the sum is exact in float64, rounded once
            found = jax.jit(bounds.update_is_lost)(jnp.asarray(stored), jnp.asarray(update))
            np.testing.assert_array_equal(found[held], want[held])
            mirrored = jax.vmap(bounds.update_is_lost)(jnp.asarray(-stored), jnp.asarray(-update))
            np.testing.assert_array_equal(mirrored[held], want[held])
            seen.add((bool(want.any()), bool(want.all())))
    assert {(True, True), (True, False), (False, False)} <= seen
    assert not bounds.update_is_lost(jnp.ones((), dtype), jnp.asarray(jnp.nan))


def test_the_examples_run():
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    names = [name for name in vars(rounding_limits) if name in bounds.__all__]
    assert len(names) == 6
    for name in names:
        (test,) = finder.find(
            inspect.unwrap(getattr(rounding_limits, name)), name, globs=dict(vars(rounding_limits))
        )
        assert runner.run(test).attempted >= 1
    assert runner.failures == 0
