"""The fast set against blocks of dense Hessians, K_U by hand, and its floor (THEORY.md 2.2, 3.3)."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.errors import StructureError
from specdef_jax.spec import Plan

KEY = jax.random.key(5)


def shared_loss(params, x, y):
    """A layer applied at four positions and again after itself, then a second layer."""
    h = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["a"])
    return optax.softmax_cross_entropy_with_integer_labels((h @ params["c"]).mean(1), y).mean()


def linear_loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["w"], y).mean()


@pytest.fixture(scope="module")
def shared():
    keys = jax.random.split(KEY, 3)
    params = {"a": jax.random.normal(keys[0], (4, 4)) / 2, "c": jax.random.normal(keys[1], (4, 3))}
    return params, jax.random.normal(keys[2], (6, 4, 4)), jnp.arange(6) % 3


@pytest.fixture(scope="module")
def linear():
    keys = jax.random.split(KEY, 2)
    return (
        {"w": jax.random.normal(keys[0], (5, 3))},
        jax.random.normal(keys[1], (12, 5)),
        jnp.arange(12) % 3,
    )


def hessian_at(fn, point):
    flat, unravel = ravel_pytree(point)
    return np.asarray(jax.jit(jax.hessian(lambda v: fn(unravel(v))))(flat))


@pytest.mark.parametrize("side", ["output", "input"])
def test_hessian_is_the_block_on_the_compensations(shared, side):
    params, x, y = shared
    made = sd.plan(params, sd.SpecDef(alpha=1.0, k=2, side=side), where=["a", "c"], key=KEY)
    plan = Plan(
        {"a": replace(made["a"], alpha=jnp.asarray(16.0)), "c": replace(made["c"], alpha=jnp.asarray(3.0))}
    )
    deformed = sd.apply_plan(params, plan)

    def at(B):  # dC = U B^T in the layout of kernels; on the input side its transpose, B U^T
        step = {name: layer.U @ B[name].T for name, layer in plan.items()}
        moved = {
            name: replace(pair, comp=pair.comp + (step[name] if side == "output" else step[name].T))
            for name, pair in deformed.items()
        }
        return shared_loss(sd.merge(moved), x, y)

    task = bounds.fast_subspace(shared_loss, params, plan, x, y)
    assert {name: b.shape for name, b in task.params.items()} == {n: v.U.shape for n, v in plan.items()}
    want = hessian_at(at, task.params)
    got = hessian_at(lambda b: task.loss(b, x, y), task.params)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11 * abs(want).max())
    # Between layers too, and not because it vanishes there.
    split = plan["a"].U.size
    assert abs(want[:split, split:]).max() > 1e-3
    np.testing.assert_allclose(task.loss(task.params, x, y), shared_loss(params, x, y), rtol=1e-14)
    for name, leaf in task.read_back(task.params).items():
        np.testing.assert_array_equal(leaf, params[name])


def test_k_u_by_hand_for_softmax_cross_entropy(linear):
    params, x, y = linear
    plan = sd.plan(params, sd.SpecDef(alpha=8.0, k=2, side="output"), where="w", key=KEY)
    U, W, inputs = (np.asarray(a) for a in (plan["w"].U, params["w"].T, x))
    p = np.asarray(jax.nn.softmax(x @ params["w"]))
    K = np.zeros((6, 6))
    for h, q in zip(inputs, p, strict=True):
        z = U.T @ W @ h
        K += np.kron(np.diag(q) - np.outer(q, q), np.outer(z, z)) / len(p)  # B (m, k) raveled row by row
    task = bounds.fast_subspace(linear_loss, params, plan, x, y)
    got = hessian_at(lambda b: task.loss(b, x, y), task.params)
    np.testing.assert_allclose(got, 64 * K, rtol=0, atol=1e-12 * 64 * abs(K).max())


def test_k_v_by_hand_on_the_input_side(linear):
    params, x, y = linear
    plan = sd.plan(params, sd.SpecDef(alpha=4.0, k=2, side="input"), where="w", key=KEY)
    V, W, inputs = (np.asarray(a) for a in (plan["w"].U, params["w"].T, x))
    p = np.asarray(jax.nn.softmax(x @ params["w"]))
    K = np.zeros((10, 10))
    for h, q in zip(inputs, p, strict=True):
        G = np.diag(q) - np.outer(q, q)
        K += np.kron(np.outer(h, h), (W @ V).T @ G @ (W @ V)) / len(p)  # B (n, k)
    task = bounds.fast_subspace(linear_loss, params, plan, x, y)
    got = hessian_at(lambda b: task.loss(b, x, y), task.params)
    np.testing.assert_allclose(got, 16 * K, rtol=0, atol=1e-12 * 16 * abs(K).max())


def test_floor_falls_with_k_for_nested_directions(linear):
    params, x, y = linear
    # Labels that an attacker cannot fit exactly keep every floor finite and attained.
    y = jnp.asarray(np.random.default_rng(0).integers(0, 3, 12))
    start = float(linear_loss(params, x, y))
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    floors = []
    for k in range(1, 4):
        spec = sd.SpecDef(alpha=2.0**9, k=k, side="output", directions=basis[:, :k])
        plan = sd.plan(params, spec, where="w", key=KEY)
        floors.append(float(bounds.fast_subspace_loss(linear_loss, params, plan, x, y, tol=1e-8)))
    assert floors[0] < start - 1e-3
    assert all(b <= a + 1e-10 for a, b in itertools.pairwise(floors))
    assert floors[-1] < floors[0] - 1e-2
    # At k = m the fast set is {M W}: the floor is the minimum of a convex problem in M.
    in_m = jax.jit(jax.value_and_grad(lambda v: linear_loss({"w": params["w"] @ v.reshape(3, 3)}, x, y)))
    found = scipy.optimize.minimize(in_m, np.eye(3).ravel(), jac=True, method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(floors[-1], found.fun, rtol=1e-9)


def test_floor_of_an_optimum_is_the_start():
    def loss(params, y):
        return jnp.mean((params["w"] - y) ** 2) + 2.0

    W = jax.random.normal(KEY, (4, 3))
    plan = sd.plan({"w": W}, sd.SpecDef(alpha=4.0, k=1), where="w", key=KEY)
    assert float(bounds.fast_subspace_loss(loss, {"w": W}, plan, W)) == 2.0
    # A start from which no step is taken is returned as it is, finite.
    far = bounds.fast_subspace_loss(loss, {"w": W}, plan, W + 1.0, steps=0)
    assert float(far) == float(loss({"w": W}, W + 1.0))


def test_no_more_steps_than_asked_for(linear):
    params, x, y = linear
    plan = sd.plan(params, sd.SpecDef(alpha=1.0, k=2), where="w", key=KEY)
    floors = [
        float(bounds.fast_subspace_loss(linear_loss, params, plan, x, y, steps=steps))
        for steps in (0, 1, 2, 3, 500)
    ]
    assert all(b < a - 1e-6 for a, b in itertools.pairwise(floors))


def test_stacked_layers_move_each_in_its_own_directions():
    params = {"w": jax.random.normal(KEY, (3, 5, 4))}
    plan = sd.plan(params, sd.SpecDef(alpha=1.0, k=2, side="output"), where="w", key=KEY, stacked=True)
    task = bounds.fast_subspace(lambda p: jnp.sum(p["w"] ** 3), params, plan)
    B = jax.random.normal(KEY, task.params["w"].shape)
    moved = task.read_back({"w": B})["w"]
    for i in range(3):
        want = params["w"][i] + params["w"][i] @ plan["w"].U[i] @ B[i].T
        np.testing.assert_allclose(moved[i], want, rtol=0, atol=1e-12)


def test_plan_that_does_not_fit_the_tree(linear):
    params, x, y = linear
    plan = sd.plan(params, sd.SpecDef(alpha=4.0), where="w", key=KEY)
    with pytest.raises(StructureError, match=r"\['w'\], which are no plain leaves"):
        bounds.fast_subspace(linear_loss, {"v": params["w"]}, plan, x, y)
    with pytest.raises(StructureError, match="merge it first"):
        bounds.fast_subspace(linear_loss, sd.apply_plan(params, plan), plan, x, y)
