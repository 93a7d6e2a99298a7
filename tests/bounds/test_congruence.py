"""phi against apply_plan, and H_a = phi^-T H_1 phi^-1 against dense Hessians (THEORY.md 2.1)."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import specdef_jax as sd
from specdef_jax import bounds, trees
from specdef_jax.errors import StructureError
from specdef_jax.parametrization import Deformed, KernelAxes
from specdef_jax.spec import Plan

KEY = jax.random.key(3)
TOLERANCE = 1e-10


def mlp_loss(params, x, y):
    h = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"])
    return optax.softmax_cross_entropy_with_integer_labels(h @ params["c"]["w"], y).mean()


def conv_loss(params, x, y):
    h = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    logits = jnp.tanh(h).mean((1, 2)) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def stacked_loss(params, x, y):
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])
    return optax.softmax_cross_entropy_with_integer_labels(h, y).mean()


@pytest.fixture(scope="module")
def data():
    x = jax.random.normal(jax.random.fold_in(KEY, 1), (12, 5))
    return x, jnp.arange(12) % 3


@pytest.fixture(scope="module")
def mlp():
    keys = jax.random.split(KEY, 3)
    return {
        "a": {"w": jax.random.normal(keys[0], (5, 4)) / 2, "b": jax.random.normal(keys[1], (4,)) / 9},
        "c": {"w": jax.random.normal(keys[2], (4, 3))},
    }


def planned(params, alphas, **spec):
    """Plan each path with its own alpha."""
    stacked = spec.pop("stacked", False)
    made = sd.plan(params, sd.SpecDef(alpha=1.0, **spec), where=list(alphas), key=KEY, stacked=stacked)
    return Plan({path: replace(layer, alpha=jnp.asarray(alphas[path])) for path, layer in made.items()})


def dense(loss, deformed, *args):
    """Return (gradient, Hessian) on raveled parameters, from jax.hessian alone."""
    return tuple(map(np.asarray, _dense(deformed, args, loss=loss)))


@partial(jax.jit, static_argnames="loss")
def _dense(deformed, args, *, loss):
    flat, unravel = ravel_pytree(deformed)

    def on_vector(v):
        return loss(sd.merge(unravel(v)), *args)

    return jax.grad(on_vector)(flat), jax.hessian(on_vector)(flat)


def congruent(matrix, like, plan):
    """Apply congruent_product to every basis vector."""
    return np.asarray(_congruent(matrix, like, plan)).T


@jax.jit
def _congruent(matrix, like, plan):
    flat, unravel = ravel_pytree(like)

    def column(v):
        return ravel_pytree(
            bounds.congruent_product(lambda t: unravel(matrix @ ravel_pytree(t)[0]), unravel(v), plan)
        )[0]

    return jax.vmap(column)(jnp.eye(flat.size))


def check_congruence(loss, params, plan, *args):
    """Assert the identity for Hessian and gradient, and what follows for the spectrum."""
    inserted = sd.apply_plan(params, plan.with_alpha(1.0))
    deformed = sd.apply_plan(params, plan)
    g_1, h_1 = dense(loss, inserted, *args)
    g_a, h_a = dense(loss, deformed, *args)
    predicted = congruent(h_1, inserted, plan)
    assert np.linalg.norm(predicted - h_a, 2) <= TOLERANCE * np.linalg.norm(h_a, 2)
    # Entry by entry in coordinates scaled back: the blocks that alpha does not amplify count as much.
    back = congruent(h_a, inserted, Plan({p: replace(v, alpha=1 / v.alpha) for p, v in plan.items()}))
    assert np.linalg.norm(back - h_1, 2) <= 1e-8 * np.linalg.norm(h_1, 2)
    unravel = ravel_pytree(inserted)[1]
    g_pred = ravel_pytree(bounds.phi_inverse(unravel(g_1), plan))[0]
    assert np.linalg.norm(g_pred - g_a) <= TOLERANCE * np.linalg.norm(g_a)
    assert np.linalg.norm(h_a, 2) > 2 * np.linalg.norm(h_1, 2), "alpha did nothing: the test is empty"
    return h_1, h_a


@pytest.mark.parametrize(
    ("side", "basis"),
    [("output", "symmetric"), ("input", "symmetric"), ("output", "rotated"), ("input", "axis")],
)
def test_hessian_and_gradient_of_two_layers_with_different_alphas(mlp, data, side, basis):
    plan = planned(mlp, {"a/w": 8.0, "c/w": 3.0}, k=2, side=side, basis=basis)
    h_1, h_a = check_congruence(mlp_loss, mlp, plan, *data)
    low, high = np.linalg.eigvalsh(h_1), np.linalg.eigvalsh(h_a)
    floor_1, floor_a = (1e-9 * abs(x).max() for x in (low, high))
    factor = float(bounds.condition(plan)) ** 2
    assert factor == 64
    # Inertia, and Ostrowski's interval for the eigenvalues that rounding leaves a sign.
    sure = (abs(low) > floor_1 * factor) & (abs(high) > floor_a)
    assert sure.sum() > 6
    np.testing.assert_array_equal(np.sign(low[sure]), np.sign(high[sure]))
    ratio = high[sure] / low[sure]
    assert ratio.min() >= 1 / factor * (1 - 1e-6)
    assert ratio.max() <= factor * (1 + 1e-6)
    assert ((high > floor_a).sum(), (high < -floor_a).sum()) == pytest.approx(
        ((low > floor_1).sum(), (low < -floor_1).sum()), abs=0
    )


def test_hessian_of_a_convolution(data):
    keys = jax.random.split(KEY, 3)
    params = {
        "kernel": jax.random.normal(keys[0], (2, 2, 2, 3)) / 2,
        "head": jax.random.normal(keys[1], (3, 3)),
    }
    x = jax.random.normal(keys[2], (6, 3, 3, 2))
    plan = planned(params, {"kernel": 8.0}, k=2, side="input")
    check_congruence(conv_loss, params, plan, x, data[1][:6])


def test_hessian_of_stacked_layers(data):
    params = {"w": jax.random.normal(KEY, (3, 5, 5)) / 2}
    plan = planned(params, {"w": 8.0}, k=2, stacked=True)
    assert plan["w"].U.shape == (3, 5, 2)
    check_congruence(stacked_loss, params, plan, *data)


@pytest.mark.parametrize("basis", ["symmetric", "rotated"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_phi_of_stacked_layers_is_that_of_each_layer(side, basis):
    params = {"w": jax.random.normal(KEY, (3, 5, 4))}
    plan = planned(params, {"w": 8.0}, k=2, side=side, basis=basis, stacked=True)
    tangent = trees.normal_like(KEY, sd.apply_plan(params, plan))
    together = bounds.phi(tangent, plan)
    for i in range(3):
        layer = replace(plan["w"], U=plan["w"].U[i], axes=KernelAxes((0,), (1,)))
        pair = Deformed(tangent["w"].weight[i], tangent["w"].comp[i], side, layer.axes)
        alone = bounds.phi({"w": pair}, Plan({"w": layer}))["w"]
        np.testing.assert_allclose(together["w"].weight[i], alone.weight, rtol=0, atol=1e-12)
        np.testing.assert_allclose(together["w"].comp[i], alone.comp, rtol=0, atol=1e-12)
        assert float(jnp.abs(alone.comp - pair.comp).max()) > 0.1


@pytest.mark.parametrize("basis", ["symmetric", "rotated", "axis"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_phi_carries_alpha_one_to_alpha_and_back(mlp, side, basis):
    plan = planned(mlp, {"a/w": 64.0, "c/w": 0.25}, k=2, side=side, basis=basis)
    inserted = sd.apply_plan(mlp, plan.with_alpha(1.0))
    deformed = sd.apply_plan(mlp, plan)
    moved = bounds.phi(inserted, plan)
    for (name, want), got in zip(trees.named_leaves(deformed), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * float(jnp.abs(want).max()), err_msg=name)
    tangent = trees.normal_like(KEY, inserted)
    there_and_back = bounds.phi_inverse(bounds.phi(tangent, plan), plan)
    for want, got in zip(jax.tree.leaves(tangent), jax.tree.leaves(there_and_back), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * 64)
    assert float(trees.norm(trees.axpy(-1.0, tangent, bounds.phi(tangent, plan)))) > 1
    # Self-adjoint: <phi x, y> = <x, phi y>.
    other = trees.normal_like(jax.random.key(8), inserted)
    left, right = trees.inner(bounds.phi(tangent, plan), other), trees.inner(tangent, bounds.phi(other, plan))
    np.testing.assert_allclose(left, right, rtol=1e-11)


def test_singular_values_of_phi(mlp):
    plan = planned(mlp, {"a/w": 8.0}, k=2, side="output")
    inserted = sd.apply_plan(mlp, plan.with_alpha(1.0))
    flat, unravel = ravel_pytree(inserted)
    matrix = jax.vmap(lambda v: ravel_pytree(bounds.phi(unravel(v), plan))[0])(jnp.eye(flat.size))
    found = np.sort(np.linalg.svd(matrix, compute_uv=False))
    # alpha on k rows of the weight (k n), 1 / alpha on the compensation (m k), 1 elsewhere.
    want = np.sort(np.r_[np.full(2 * 5, 8.0), np.full(4 * 2, 1 / 8), np.ones(flat.size - 18)])
    np.testing.assert_allclose(found, want, rtol=1e-12)
    assert float(bounds.condition(plan)) == 8
    assert float(bounds.condition(plan.with_alpha(1 / 16))) == 16


def test_plan_that_does_not_fit_the_tree(mlp):
    plan = planned(mlp, {"a/w": 8.0, "c/w": 8.0})
    deformed = sd.apply_plan(mlp, plan)
    with pytest.raises(StructureError, match=r"'a/w' is planned but not deformed"):
        bounds.phi(mlp, plan)
    with pytest.raises(StructureError, match=r"\['c/w'\], which the tree lacks"):
        bounds.phi_inverse({"a": deformed["a"]}, plan)
    sides = (planned(mlp, {"c/w": 8.0}, side=side) for side in ("output", "input"))
    output, other = sides
    with pytest.raises(StructureError, match="output side, but planned on the input side"):
        bounds.phi(sd.apply_plan(mlp, output), other)
