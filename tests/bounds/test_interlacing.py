"""Intervals for eigenvalues of compressions against NumPy (THEORY.md 2.3)."""

import doctest
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax import bounds
from specdef_jax.bounds import interlacing
from specdef_jax.errors import ProblemError

RNG = np.random.default_rng(4)


def eigenvalues(matrix):
    return jnp.asarray(np.linalg.eigvalsh(matrix))


def symmetric(n):
    X = RNG.standard_normal((n, n))
    return X + X.T


@pytest.mark.parametrize("p", [1, 3, 6])
def test_random_compressions_stay_inside(p):
    for _ in range(200):
        H, Q = symmetric(6), np.linalg.qr(RNG.standard_normal((6, p)))[0]
        whole, block = eigenvalues(H), eigenvalues(Q.T @ H @ Q)
        low, high = bounds.compression_intervals(whole, p)
        assert (low - 1e-12 <= block).all()
        assert (block <= high + 1e-12).all()
        below, above = bounds.matrix_intervals(block, 6)
        assert (below - 1e-12 <= whole).all()
        assert (whole <= above + 1e-12).all()
        assert np.isfinite(below).sum() == np.isfinite(above).sum() == p


def test_the_intervals_are_attained():
    whole = jnp.array([-3.0, -1.0, 0.0, 2.0, 7.0])
    low, high = bounds.compression_intervals(whole, 2)
    np.testing.assert_array_equal(low, [-3, -1])  # by the eigenvectors of the two smallest
    np.testing.assert_array_equal(high, [2, 7])  # by those of the two largest
    below, above = bounds.matrix_intervals(jnp.array([-3.0, -1.0]), 5)
    np.testing.assert_array_equal(below, [-np.inf, -np.inf, -np.inf, -3, -1])
    np.testing.assert_array_equal(above, [-3, -1, np.inf, np.inf, np.inf])


def test_the_whole_matrix_is_its_own_compression():
    whole = jnp.array([1.0, 2.0])
    for low, high in (bounds.compression_intervals(whole, 2), bounds.matrix_intervals(whole, 2)):
        np.testing.assert_array_equal(low, whole)
        np.testing.assert_array_equal(high, whole)


def test_off_diagonal_blocks():
    for _ in range(200):
        H = symmetric(5)
        bound = float(bounds.off_diagonal_bound(eigenvalues(H)))
        assert np.linalg.norm(H[:2, 2:], 2) <= bound + 1e-12
        assert bound <= np.linalg.norm(H, 2) + 1e-12
    shifted = np.array([[9.0, 2.0], [2.0, 9.0]])
    assert float(bounds.off_diagonal_bound(eigenvalues(shifted))) == pytest.approx(2.0)


def test_under_jit_and_vmap():
    batch = jnp.sort(jnp.asarray(RNG.standard_normal((4, 5))))
    low, high = jax.jit(jax.vmap(lambda v: bounds.compression_intervals(v, 2)))(batch)
    np.testing.assert_array_equal(low, batch[:, :2])
    np.testing.assert_array_equal(high, batch[:, 3:])
    assert jax.vmap(bounds.off_diagonal_bound)(batch).shape == (4,)


@pytest.mark.parametrize("size", [0, 4, -1])
def test_sizes_that_no_compression_has(size):
    with pytest.raises(ProblemError, match=f"size = {size}: a compression of an 3 x 3 matrix"):
        bounds.compression_intervals(jnp.arange(3.0), size)


def test_a_matrix_smaller_than_its_block():
    with pytest.raises(
        ProblemError, match="size = 2: the matrix must be at least as large as its block of 3"
    ):
        bounds.matrix_intervals(jnp.arange(3.0), 2)
    with pytest.raises(ProblemError, match="block of 0"):
        bounds.matrix_intervals(jnp.zeros(0), 2)


def test_the_examples_run():
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    names = [name for name in vars(interlacing) if name in bounds.__all__]
    assert len(names) == 3
    for name in names:
        (test,) = finder.find(inspect.unwrap(getattr(interlacing, name)), name, globs=dict(vars(interlacing)))
        assert runner.run(test).attempted >= 1
    assert runner.failures == 0
