"""Two step sizes against real steps on pairs, dense Hessians and dense operators (THEORY.md 5.2b)."""

import doctest
import inspect
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.bounds import two_steps
from specdef_jax.errors import StructureError
from specdef_jax.spec import Plan

KEY = jax.random.key(6)
ALPHAS = {"a": 8.0, "c": 3.0}
PARAMS = {
    "a": jax.random.normal(KEY, (3, 4)),
    "b": jnp.array([0.3, -0.2, 0.1, 0.4]),
    "c": jax.random.normal(jax.random.key(7), (4, 3)),
}
FORMS = [("output", "symmetric"), ("input", "rotated")]
X = jax.random.normal(jax.random.key(8), (9, 3))
RNG = np.random.default_rng(9)


@jax.jit
def loss(params):
    params = sd.merge(params)
    logits = jnp.tanh(X @ params["a"] + params["b"]) @ params["c"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(9) % 3).mean()


GRADIENT = jax.jit(jax.grad(loss))


def pairs(side, basis):
    """Return a plan with an alpha of its own for either layer, and the tree it deforms."""
    made = sd.plan(PARAMS, sd.SpecDef(alpha=1.0, k=2, side=side, basis=basis), where=list(ALPHAS), key=KEY)
    plan = Plan({path: replace(v, alpha=jnp.asarray(ALPHAS[path])) for path, v in made.items()})
    return plan, sd.apply_plan(PARAMS, plan)


def layer(rank=3):
    """Return M (4, 3) of a given rank and U (3, 2)."""
    M = RNG.standard_normal((4, rank)) @ RNG.standard_normal((rank, 3))
    return jnp.asarray(M), jnp.asarray(np.linalg.qr(RNG.standard_normal((3, 2)))[0])


@pytest.mark.parametrize(("side", "basis"), FORMS)
def test_the_metric_is_one_number_per_compensation(side, basis):
    plan, deformed = pairs(side, basis)
    for metric in (bounds.two_step_metric(deformed, plan), jax.jit(bounds.two_step_metric)(deformed, plan)):
        assert jax.tree.structure(metric) == jax.tree.structure(deformed)
        assert (float(metric["a"].comp), float(metric["c"].comp)) == pytest.approx((1 / 64, 1 / 9))
        assert float(metric["a"].weight) == float(metric["c"].weight) == float(metric["b"]) == 1


@pytest.mark.parametrize(("side", "basis"), FORMS)
def test_real_steps_move_the_merged_matrix_at_these_velocities(side, basis):
    plan, deformed = pairs(side, basis)
    slope = jax.tree.map(jnp.multiply, bounds.two_step_metric(deformed, plan), GRADIENT(deformed))

    def after(step, tree):
        return sd.merge(jax.tree.map(lambda x, s: x - step * s, deformed, tree))

    # A merged matrix is quadratic in the step, so a central difference is its derivative exactly.
    ahead, behind = after(0.5, slope), after(-0.5, slope)
    frozen = {p: replace(v, comp=0 * v.comp) if p in ALPHAS else v for p, v in slope.items()}
    far = after(10.0, frozen)
    for path, made in plan.items():
        matrix = partial(made.axes.to_matrix, side=side)
        M, G = matrix(PARAMS[path]), matrix(GRADIENT(PARAMS)[path])
        want = bounds.two_step_velocity(M, made.U, made.alpha, G)
        np.testing.assert_allclose(matrix(behind[path] - ahead[path]), want, rtol=0, atol=1e-13)
        want = M - 10 * bounds.frozen_velocity(made.U, made.alpha, G)
        np.testing.assert_allclose(matrix(far[path]), want, rtol=0, atol=1e-13)
        assert jnp.linalg.norm(G) > 1e-3


@pytest.mark.parametrize(("side", "basis"), FORMS)
def test_the_sharpness_of_a_network_lies_between(side, basis):
    plan, deformed = pairs(side, basis)

    def sharpness(tree, scale):
        flat, unravel = ravel_pytree(tree)
        root = np.sqrt(ravel_pytree(jax.tree.map(lambda s, x: s * jnp.ones_like(x), scale, tree))[0])
        H = np.asarray(jax.jit(jax.hessian(lambda v: loss(unravel(v))))(flat))
        return np.linalg.norm(root[:, None] * H * root, 2)

    ones = jax.tree.map(lambda _: 1.0, deformed)
    inserted = sharpness(sd.apply_plan(PARAMS, plan.with_alpha(1.0)), ones)
    below, above = bounds.two_step_sides(inserted, 8.0)
    assert below <= sharpness(deformed, bounds.two_step_metric(deformed, plan)) <= above * (1 + 1e-12)
    assert sharpness(deformed, ones) > 3 * above


@pytest.mark.parametrize(("w", "side"), [(1e5, 1), (1e-7, 0)])
def test_both_sides_are_attained_by_a_scalar_layer(w, side):
    a = 4.0
    hessian = jax.jit(jax.hessian(lambda pair: (pair[0] * pair[1] - w) ** 2 / 2))  # of (comp, weight)
    H_1, H_a = hessian(jnp.array([1.0, w])), hessian(jnp.array([1 / a, a * w]))
    root = jnp.array([1 / a, 1.0])
    top = jnp.linalg.norm(root[:, None] * H_a * root, 2)
    sides = bounds.two_step_sides(jnp.linalg.norm(H_1, 2), a)
    assert float(top) == pytest.approx(float(sides[side]), rel=1e-8)


@pytest.mark.parametrize(("rank", "slow"), [(3, 4), (1, 6), (0, 8)])
def test_slow_directions_are_counted_in_the_dense_operator(rank, slow):
    M, U = layer(rank=rank)
    units = jnp.eye(M.size).reshape(-1, *M.shape)

    def speeds(velocity):
        return np.linalg.eigvalsh(np.asarray(jax.vmap(velocity)(units)).reshape(M.size, M.size))

    assert int(bounds.slow_dimension(M, U)) == slow
    assert (speeds(partial(bounds.two_step_velocity, M, U, 1e6)) < 1e-9).sum() == slow
    assert (speeds(partial(bounds.frozen_velocity, U, 1e6)) < 1e-9).sum() == 2 * 4


def test_the_limit_of_large_alpha():
    M, U = layer()
    G = jnp.asarray(RNG.standard_normal(M.shape))
    P = U @ U.T
    limit = M @ P @ M.T @ G + G @ (jnp.eye(3) - P)
    np.testing.assert_allclose(bounds.two_step_velocity(M, U, 1e7, G), limit, rtol=1e-11)
    E = jnp.linalg.svd(M @ U)[0][:, 2:] @ jnp.ones((2, 2))  # orthogonal to the range of M U
    assert jnp.abs(bounds.two_step_velocity(M, U, 1e7, E @ U.T)).max() < 1e-12
    np.testing.assert_allclose(bounds.two_step_velocity(M, U, 1.0, G), M @ M.T @ G + G, rtol=1e-12)


def test_under_jit_and_vmap():
    M, U = layer()
    alphas = jnp.array([1.0, 5.0])
    for velocity in (partial(bounds.two_step_velocity, M, U), partial(bounds.frozen_velocity, U)):
        over = jax.jit(jax.vmap(lambda a, velocity=velocity: velocity(a, M)))(alphas)
        np.testing.assert_allclose(over, [velocity(a, M) for a in alphas], rtol=1e-12)
    below, above = jax.vmap(bounds.two_step_sides)(jnp.array([6.0, 50.0]), alphas)
    assert (below.tolist(), above.tolist()) == ([6, 2], [6, 50])
    counted = jax.jit(jax.vmap(bounds.slow_dimension, (0, None)))(jnp.stack([M, 0 * M]), U)
    assert counted.tolist() == [4, 8]


def test_plan_that_does_not_fit_the_tree():
    plan, deformed = pairs("output", "symmetric")
    with pytest.raises(StructureError, match="'a' is planned but not deformed; apply the plan first"):
        bounds.two_step_metric(PARAMS, plan)
    with pytest.raises(StructureError, match=r"the plan names \['c'\], which the tree lacks"):
        bounds.two_step_metric({"a": deformed["a"]}, plan)


def test_the_examples_run():
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    # The other two have no example.
    for name in ("two_step_metric", "two_step_sides", "two_step_velocity"):
        (test,) = finder.find(inspect.unwrap(getattr(two_steps, name)), name, globs=dict(vars(two_steps)))
        assert runner.run(test).attempted >= 1
    assert runner.failures == 0
