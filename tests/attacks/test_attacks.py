"""Attacks against fine-tuning of the original, and their bills counted by hand (THEORY.md 5)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import specdef_jax as sd
from specdef_jax import attacks, bounds, curvature, trees
from specdef_jax.attacks import Knowledge
from specdef_jax.errors import ProblemError
from specdef_jax.parametrization import problem

KEY = jax.random.key(4)
SIZE = 5 * 4 + 4 + 4 * 3  # a, b, c


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
    return params, (jax.random.normal(keys[3], (12, 5)), jnp.arange(12) % 3)


@pytest.fixture(scope="module")
def plan(network):
    """Return the output side of both layers: compensations 4 x 4 and 3 x 3."""
    spec = sd.SpecDef(alpha=64.0, k=2, side="output")
    return sd.plan(network[0], spec, where=["a", "c"], key=KEY)


@pytest.fixture(scope="module")
def deformed(network, plan):
    return sd.apply_plan(network[0], plan)


@pytest.fixture(scope="module")
def made(network, deformed):
    return {
        f.__name__: f(loss, deformed, *network[1]) for f in (attacks.fuse, attacks.freeze, attacks.inject)
    }


def assert_trees_close(found, want, rtol):
    for (name, a), b in zip(trees.named_leaves(want), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=rtol * float(jnp.abs(a).max()), err_msg=name)


def top(loss_of, params, args):
    return float(np.abs(curvature.eigvals(curvature.hessian(loss_of, params, *args))).max())


def trajectory(task, optimizer, args, steps=50):
    """Return read_back(params) after each step of optax."""

    @jax.jit
    def run(task, args):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(task.loss)(params, *args), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), task.read_back(params)

        return jax.lax.scan(step, (task.params, optimizer.init(task.params)), None, length=steps)[1]

    return run(task, args)


@pytest.mark.parametrize("name", ["fuse", "freeze", "inject"])
def test_every_attack_starts_from_the_same_network(network, deformed, made, name):
    params, args = network
    task = made[name].problem
    assert made[name].name == name
    assert_trees_close(task.read_back(task.params), sd.merge(deformed), 1e-14)
    assert_trees_close(task.read_back(task.params), params, 1e-12)
    np.testing.assert_allclose(task.loss(task.params, *args), loss(params, *args), rtol=1e-12)
    # Plain leaves in the places and shapes of the original: no compensation is trained.
    gradient = jax.grad(task.loss)(task.params, *args)
    assert {n: g.shape for n, g in trees.named_leaves(gradient)} == {n: p.shape for n, p in params.items()}


def test_fuse_trains_the_merged_network(deformed, made, network):
    task = made["fuse"].problem
    for want, got in zip(jax.tree.leaves(sd.merge(deformed)), jax.tree.leaves(task.params), strict=True):
        np.testing.assert_array_equal(got, want)
    assert made["fuse"].bill.added_flops == 0
    assert made["fuse"].bill.added_parameters == 0
    np.testing.assert_allclose(top(task.loss, task.params, network[1]), top(loss, *network), rtol=1e-9)


def test_freeze_is_no_sharper_than_the_undeformed_network(network, deformed, plan, made):
    params, args = network
    task = made["freeze"].problem
    frozen = top(task.loss, task.params, args)
    # phi^-1 is a contraction on (weight, rest): their block at alpha = 1 is the plain Hessian.
    undeformed = top(loss, params, args)
    assert frozen <= undeformed * (1 + 1e-10)
    assert top(loss, deformed, args) > 100 * undeformed
    merged = jax.grad(lambda p: loss(sd.merge(p), *args))(deformed)
    gradient = jax.grad(task.loss)(task.params, *args)
    np.testing.assert_allclose(gradient["a"], merged["a"].weight, rtol=1e-12)
    np.testing.assert_allclose(gradient["b"], merged["b"], rtol=1e-12)
    # A step on the weights reads back through the compensation: W - eta (I - (1 - 1/a^2) U U^T) g.
    step = jax.tree.map(lambda p, g: p - 0.1 * g, task.params, gradient)
    U, plain = plan["a"].U, jax.grad(loss)(params, *args)["a"]
    slow = plain - (1 - 64.0**-2) * plain @ U @ U.T
    np.testing.assert_allclose(task.read_back(step)["a"], params["a"] - 0.1 * slow, rtol=0, atol=1e-12)
    assert float(bounds.condition(plan)) == 64


OPTIMIZERS = {
    "sgd": optax.sgd(0.3),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.02),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_inject_is_fine_tuning_of_the_original(network, made, name):
    params, args = network
    original = problem(loss, params, *args)
    want = trajectory(original, OPTIMIZERS[name], args)
    assert_trees_close(trajectory(made["inject"].problem, OPTIMIZERS[name], args), want, 1e-9)
    assert float(jnp.abs(want["a"][-1] - params["a"]).max()) > 0.1, "nothing moved: the test is empty"


def test_inject_is_not_fine_tuning_under_weight_decay(network, made):
    params, args = network
    decayed = optax.adamw(0.02, weight_decay=0.1)
    want = trajectory(problem(loss, params, *args), decayed, args)
    found = trajectory(made["inject"].problem, decayed, args)
    assert float(jnp.abs(found["a"] - want["a"])[-1].max()) > 1e-2


def test_freeze_is_not_fine_tuning_of_the_original(network, made):
    params, args = network
    want = trajectory(problem(loss, params, *args), OPTIMIZERS["sgd"], args)
    found = trajectory(made["freeze"].problem, OPTIMIZERS["sgd"], args)
    assert float(jnp.abs(found["a"] - want["a"])[-1].max()) > 1e-2


def test_bills_by_hand(made):
    freeze, inject = made["freeze"].bill, made["inject"].bill
    comps = 4 * 4 + 3 * 3
    assert freeze.added_parameters == comps
    assert inject.added_parameters == comps + 5 * 4 + 4 * 3  # the frozen weights beside B
    assert freeze.added_share == pytest.approx(comps / SIZE)
    assert inject.added_share == pytest.approx((comps + 32) / SIZE)
    for bill in (freeze, inject):
        assert bill.added_flops > 0
        assert bill.added_flops_share > 0
        assert 0 <= bill.conversion_seconds < 60
        assert bill.knowledge is Knowledge.WHICH_LAYERS
    # W = Wt C costs 2 n m^2 a layer forward.
    assert freeze.added_flops >= 2 * (5 * 4 * 4 + 4 * 3 * 3)


def test_knowledge_is_a_ladder():
    assert sorted(Knowledge) == [
        Knowledge.BLACK_BOX, Knowledge.WEIGHTS, Knowledge.WHICH_LAYERS, Knowledge.EVERYTHING
    ]  # fmt: skip
    assert [rung.label for rung in Knowledge] == ["black box", "weights", "which layers", "everything"]


@pytest.mark.parametrize("attack", [attacks.fuse, attacks.freeze, attacks.inject])
def test_nothing_to_attack(network, attack):
    params, args = network
    with pytest.raises(ProblemError, match="no leaf of this tree is deformed"):
        attack(loss, params, *args)
