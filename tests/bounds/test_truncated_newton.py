"""The relative stopping rule, block by block, and counts of conjugate gradients (THEORY.md 4.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax import bounds
from specdef_jax.optim.conjugate_gradient import truncated_cg

RNG = np.random.default_rng(4)
ORDER = np.array([1.0, 0.0, -1.0, 1.0, 0.0])


@pytest.fixture
def problem():
    root = RNG.standard_normal((5, 5))
    return root @ root.T + 0.1 * np.eye(5), RNG.standard_normal(5)


@pytest.mark.parametrize("alpha", [2.0, 50.0])
def test_what_the_fast_block_leaves(problem, alpha):
    H, g = problem
    s = alpha**ORDER
    left, whole = jax.jit(bounds.fast_alone_residual)(jnp.asarray(H), jnp.asarray(g), jnp.asarray(s))
    fast = [0, 3]
    p = np.zeros(5)
    p[fast] = -np.linalg.solve(H[np.ix_(fast, fast)], g[fast])
    H_a = s[:, None] * H * s
    assert float(left) == pytest.approx(np.linalg.norm(H_a @ (p / s) + s * g), rel=1e-10)
    assert float(whole) == pytest.approx(np.linalg.norm(s * g), rel=1e-12)


def test_rules_differ_as_they_should():
    s, g = jnp.asarray(10.0**ORDER), jnp.ones(5)
    residual = jnp.asarray([1e-3, 0.9, 1e-3, 1e-3, 0.9])
    assert float(jnp.linalg.norm(s * residual)) < 0.5 * float(
        jnp.linalg.norm(s * g)
    )  # the rule for the whole
    assert not bool(bounds.blocks_solved(s * residual, s * g, s, 0.5))
    assert not bool(bounds.blocks_solved(residual, g, s, 0.5))  # the same before and after phi
    assert bool(bounds.blocks_solved(s * residual, s * g, s, 0.95))
    for i in range(3):  # each block by itself is looked at, at small alphas too
        one, mild = jnp.zeros(5).at[i].set(1.5), jnp.asarray(1.5**ORDER)
        assert not bool(bounds.blocks_solved(one, g, mild, 1.0))
        assert bool(bounds.blocks_solved(one, g, mild, 1.6))


def test_counts_by_hand():
    few = jnp.array([0.01])
    assert float(bounds.cg_iterations(2, few, 1.0, 1.0, 1e-9)) == 4
    assert float(bounds.cg_iterations(0, jnp.zeros(0), 1.0, 3.0, 0.1)) == np.ceil(
        np.arccosh(10.0) / np.arccosh(2.0)
    )
    M = (3 / 0.5 - 1) * (3 / 0.1 - 1)
    want = 5 + 2 + np.ceil(np.arccosh(M / 0.15) / np.arccosh(2.0))
    assert float(bounds.cg_iterations(5, jnp.array([0.5, 0.1]), 1.0, 3.0, 0.15)) == want == 13
    assert float(bounds.cg_iterations(5, jnp.array([0.5, 0.1]), 1.0, 3.0, 0.0254)) == 15
    assert float(bounds.cg_iterations(0, jnp.zeros(0), 1.0, 1000.0, 2.0)) == 1  # nothing left to reduce
    assert float(bounds.cg_iterations(1, jnp.zeros(0), 1.0, 3.0, 2.0)) == 2  # one of the interval at least


@pytest.mark.parametrize("alpha", [1.0, 5.0, 20.0])
def test_conjugate_gradients_keep_the_count(alpha):
    above, below = alpha**2 * np.array([4.0, 3.0]), alpha**-2 * np.array([0.4])
    values = jnp.asarray(np.r_[above, np.linspace(1, 2.5, 9), below])
    b = jnp.sqrt(values) * RNG.standard_normal(12)  # an error of equal size in each energy direction
    tol = 1e-3
    count = int(bounds.cg_iterations(2, jnp.asarray(below), 1.0, 2.5, tol))
    p = truncated_cg(lambda v: values * v, b, 0.0, count).step
    error = jnp.sqrt(jnp.sum(values * (p - b / values) ** 2)) / jnp.sqrt(jnp.sum(b**2 / values))
    assert float(error) <= tol


def test_outer_steps():
    assert float(bounds.outer_steps(1024.0, 1.0, 0.5)) == 10
    assert float(bounds.outer_steps(1024.0, 2.0, 0.5)) == 9
    assert float(bounds.outer_steps(0.5, 1.0, 0.5)) == 0
    more = bounds.outer_steps(1e6 * 1000.0, 1.0, 0.1) - bounds.outer_steps(1000.0, 1.0, 0.1)
    assert float(more) == 6  # a factor 1e6 in alpha costs log(1e6) / log(10) steps
