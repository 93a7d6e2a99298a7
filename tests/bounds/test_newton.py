"""Damping in the metric phi^T phi, on a perceptron and on quadratics (THEORY.md 4.1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.errors import StructureError
from specdef_jax.parametrization import loss_on

KEY = jax.random.key(5)
ALPHA = 6.0


@pytest.fixture(params=[("output", "symmetric"), ("input", "rotated")], ids="-".join)
def case(request):
    side, basis = request.param
    keys = jax.random.split(KEY, 4)
    params = {"a": jax.random.normal(keys[0], (3, 4)), "c": jax.random.normal(keys[1], (4, 2))}
    args = jax.random.normal(keys[2], (9, 3)), jax.random.normal(keys[3], (9, 2))

    def loss(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["a"]) @ params["c"] - y) ** 2)

    plan = sd.plan(
        params,
        sd.SpecDef(alpha=ALPHA, k=1, side=side, basis=basis, directions="random"),
        where=["a"],
        key=KEY,
    )
    return loss, params, plan, args


def dense(loss, tree, args):
    flat, unravel = ravel_pytree(tree)
    fn = loss_on(loss, tree, *args)
    return (
        jax.grad(lambda v: fn(unravel(v), *args))(flat),
        jax.hessian(lambda v: fn(unravel(v), *args))(flat),
        unravel,
    )


def test_damping_is_that_metric(case):
    loss, params, plan, args = case
    inserted = sd.apply_plan(params, plan.with_alpha(1.0))
    g, H, unravel = dense(loss, inserted, args)
    g_a, H_a, unravel_a = dense(loss, sd.apply_plan(params, plan), args)
    metric = np.stack([ravel_pytree(bounds.damping_metric(unravel(e), plan))[0] for e in np.eye(len(g))]).T
    damping = 0.3
    p_a = np.linalg.solve(H_a + damping * np.eye(len(g)), g_a)
    p = np.linalg.solve(H + damping * metric, g)
    back = ravel_pytree(bounds.phi_inverse(unravel_a(jnp.asarray(p_a)), plan))[0]
    np.testing.assert_allclose(back, p, rtol=1e-8, atol=1e-10)
    assert float(bounds.damping_norm(unravel(jnp.asarray(p)), plan)) == pytest.approx(np.linalg.norm(p_a))
    values = np.linalg.eigvalsh(metric)
    d = plan["a"].U.shape[0]
    pairs = {3: (3, 3), 4: (4, 3)}[d]  # entries of comp and of weight along one direction
    want = np.sort(
        np.r_[np.full(pairs[0], ALPHA**-2), np.full(12 // d, ALPHA**2), np.ones(len(g) - d - 12 // d)]
    )
    np.testing.assert_allclose(values, want, rtol=1e-10)


def test_a_plan_of_another_tree(case):
    _, params, plan, _ = case
    with pytest.raises(StructureError, match="planned but not deformed"):
        bounds.damping_metric(params, plan)
    with pytest.raises(StructureError, match="planned but not deformed"):
        bounds.damping_norm(params, plan)


@pytest.mark.parametrize(("block", "which"), [(0, 0), (1, None), (2, 1)])
def test_the_interval_and_where_it_is_met(block, which):
    scales = np.array([ALPHA, 1.0, 1 / ALPHA])
    low, high = bounds.damping_interval(0.5, ALPHA)
    assert (low, high) == (0.5 / ALPHA**2, 0.5 * ALPHA**2)
    h = 3.0
    found = scales[block] ** 2 / (scales[block] ** 2 * h + 0.5)
    ends = [1 / (h + low), 1 / (h + high)]
    assert ends[1] <= found * (1 + 1e-12)
    assert found <= ends[0] * (1 + 1e-12)
    if which is not None:
        assert found == pytest.approx(ends[which], rel=1e-12)
