"""The sandwich against dense spectra (THEORY.md 2.2)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import specdef_jax as sd
from specdef_jax import bounds, curvature
from specdef_jax.spec import Plan

KEY = jax.random.key(7)
ALPHAS = (1.0, 2.0, 8.0, 64.0)


def loss(params, x, y):
    h = jnp.tanh(x @ params["a"] + params["b"])
    return optax.softmax_cross_entropy_with_integer_labels(h @ params["c"], y).mean()


@pytest.fixture(scope="module")
def network():
    keys = jax.random.split(KEY, 4)
    params = {
        "a": jax.random.normal(keys[0], (5, 4)),
        "b": jax.random.normal(keys[1], (4,)) / 4,
        "c": jax.random.normal(keys[2], (4, 3)),
    }
    return params, jax.random.normal(keys[3], (12, 5)), jnp.arange(12) % 3


def sigma_1(params, *args):
    values = curvature.eigvals(curvature.hessian(loss, params, *args))
    return float(np.abs(values).max())


def test_brackets_the_sharpness_of_one_layer(network):
    params, *data = network
    plan = sd.plan(params, sd.SpecDef(alpha=1.0, k=2, side="output"), where="a", key=KEY)
    at_one = bounds.sandwich(loss, params, plan, *data, key=KEY)
    inserted = sigma_1(sd.apply_plan(params, plan), *data)
    np.testing.assert_allclose(at_one.sigma_1, inserted, rtol=1e-7)
    np.testing.assert_allclose(at_one.upper, inserted, rtol=1e-7)
    task = bounds.fast_subspace(loss, params, plan, *data)
    block = curvature.eigvals(curvature.hessian(task.loss, task.params, *data))
    np.testing.assert_allclose(at_one.lower, np.abs(block).max(), rtol=1e-7)
    for alpha in ALPHAS:
        found = bounds.sandwich(loss, params, plan.with_alpha(alpha), *data, key=KEY)
        lower, upper = bounds.sandwich_sides(alpha, at_one.lower, at_one.sigma_1)
        np.testing.assert_allclose(found.lower, lower, rtol=1e-6)
        np.testing.assert_allclose(found.upper, upper, rtol=1e-6)
        measured = sigma_1(sd.apply_plan(params, plan.with_alpha(alpha)), *data)
        assert bool(found.holds(measured))
        assert float(found.allowance) <= 1e-6 * float(found.upper)
        if alpha >= 8:  # tight from below, so a side linear in alpha would break
            assert measured == pytest.approx(float(lower), rel=0.05)
            assert measured > 2 * alpha * float(at_one.sigma_1)
        assert not bool(found.holds(0.9 * float(found.lower)))
        assert not bool(found.holds(1.1 * float(found.upper)))


def test_brackets_the_sharpness_of_two_layers(network):
    params, *data = network
    made = sd.plan(params, sd.SpecDef(alpha=1.0, k=2, side="input"), where=["a", "c"], key=KEY)
    for alphas in ((16.0, 2.0), (4.0, 4.0)):
        plan = Plan(
            {p: replace(v, alpha=jnp.asarray(a)) for (p, v), a in zip(made.items(), alphas, strict=True)}
        )
        found = bounds.sandwich(loss, params, plan, *data, key=KEY)
        measured = sigma_1(sd.apply_plan(params, plan), *data)
        assert bool(found.holds(measured))
        assert float(found.upper) == pytest.approx(max(alphas) ** 2 * float(found.sigma_1))
        one = bounds.fast_subspace(loss, params, plan.with_alpha(1.0), *data)
        block = curvature.dense(curvature.hessian(one.loss, one.params, *data)).matrix
        split = made["a"].U.size
        scale = np.r_[np.full(split, alphas[0]), np.full(len(block) - split, alphas[1])]
        want = np.abs(np.linalg.eigvalsh(scale[:, None] * np.asarray(block) * scale)).max()
        assert float(found.lower) == pytest.approx(want, rel=1e-7)  # block (i, j) grows as a_i a_j


def test_a_loss_that_curves_downwards_is_as_sharp(network):
    params, *data = network
    plan = sd.plan(params, sd.SpecDef(alpha=4.0, k=2, side="output"), where="a", key=KEY)
    up = bounds.sandwich(loss, params, plan, *data, key=KEY)
    down = bounds.sandwich(lambda *args: -loss(*args), params, plan, *data, key=KEY)
    for name in ("lower", "upper", "sigma_1"):
        assert float(getattr(down, name)) == pytest.approx(float(getattr(up, name)), rel=1e-7)


def test_the_allowance_is_what_both_eigenvalues_may_be_off_by(network):
    params, *data = network
    plan = sd.plan(params, sd.SpecDef(alpha=4.0, k=2, side="output"), where="a", key=KEY)
    found = bounds.sandwich(loss, params, plan, *data, key=KEY, tol=1e-3)
    keys = jax.random.split(KEY)
    task = bounds.fast_subspace(loss, params, plan, *data)
    operators = (
        curvature.hessian(task.loss, task.params, *data),
        curvature.hessian(loss, sd.apply_plan(params, plan.with_alpha(1.0)), *data),
    )
    block, full = (
        curvature.eigsh(o, k=1, which="LM", tol=1e-3, key=k) for o, k in zip(operators, keys, strict=True)
    )
    want = 16 * float(full.residuals[0] + full.floor) + float(block.floor)
    assert float(found.allowance) == pytest.approx(want, rel=1e-6, abs=0)
    assert float(full.floor) > 1e-6 * want


def test_holds_up_to_the_allowance_on_either_side():
    found = bounds.Sandwich(*map(jnp.asarray, (2.0, 3.0, 0.25, 1.0)))
    told = [bool(found.holds(x)) for x in (1.7, 1.8, 2.0, 3.0, 3.2, 3.3)]
    assert told == [False, True, True, True, True, False]
