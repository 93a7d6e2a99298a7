"""Class bounds against hand values, runs that meet them, and their powers of alpha (THEORY.md 3.6)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax import bounds
from specdef_jax.bounds import complexity


def test_by_hand():
    assert float(bounds.first_order_upper(3.0, 8.0, 0.5)) == pytest.approx(2 * 3 * 8 / 0.25)
    assert float(bounds.second_order_upper(3.0, 4.0, 0.25)) == pytest.approx(12 * 3 * 2 / 0.125)
    assert float(bounds.first_order_lower(12 * 152 * 7.5, 1.0, 1.0)) == 7
    assert float(bounds.first_order_lower(12 * 152 * 7.5, 2.0, 1.0)) == 15
    assert float(bounds.first_order_lower(12 * 152 * 7.5, 1.0, 0.5)) == 30
    assert float(bounds.second_order_lower(12 * np.sqrt(2100.0) * 7.5, 1.0, 1.0)) == 7
    assert float(bounds.second_order_lower(12 * np.sqrt(2100.0) * 7.5, 4.0, 0.25)) == 120
    assert (complexity.CHAIN_GAP, complexity.CHAIN_L1, complexity.CHAIN_L2) == (12, 152, 2100)


def test_gradient_descent_needs_no_more_and_half_at_worst():
    eps, L, gap = 0.2, 3.0, 5.0
    x, steps = gap / eps + eps / (2 * L), 0  # Huber: slope eps, curvature L within eps / L
    while x > eps / L:
        x, steps = x - eps / L, steps + 1
    bound = float(bounds.first_order_upper(gap, L, eps))
    assert 0.45 * bound <= steps <= bound


def test_cubic_newton_needs_no_more():
    # A slope eps: the model's minimizer is s = -sqrt(2 eps / L2), and f falls by eps |s| a step.
    eps, L2, gap = 0.2, 3.0, 5.0
    steps = gap / (eps * np.sqrt(2 * eps / L2))
    bound = float(bounds.second_order_upper(gap, L2, eps))
    assert steps * 12 * np.sqrt(2) == pytest.approx(bound)


def test_upper_lies_above_lower():
    gap, L, eps = 1e4, 2.0, jnp.logspace(-3, 0, 7)
    assert np.all(bounds.first_order_lower(gap, L, eps) <= bounds.first_order_upper(gap, L, eps))
    assert np.all(bounds.second_order_lower(gap, L, eps) <= bounds.second_order_upper(gap, L, eps))


def test_deformed_functions_have_the_constants_and_no_smaller_ones():
    a = 5.0
    L1, L2 = bounds.deformed_lipschitz(2.0, 3.0, a)
    assert (float(L1), float(L2)) == (50.0, 375.0)
    f = jnp.sin  # L1 = L2 = 1, along a fast direction
    second, third = jax.grad(jax.grad(lambda x: f(a * x))), jax.grad(jax.grad(jax.grad(lambda x: f(a * x))))
    x = jnp.linspace(-1, 1, 2001)
    assert float(jnp.max(jnp.abs(jax.vmap(second)(x)))) == pytest.approx(a**2, rel=1e-5)
    assert float(jnp.max(jnp.abs(jax.vmap(third)(x)))) == pytest.approx(a**3, rel=1e-5)
    jitted = jax.jit(bounds.deformed_lipschitz)(2.0, 3.0, a)
    assert (float(jitted[0]), float(jitted[1])) == (50.0, 375.0)
