"""Targets of adapters, what a blind attacker finds, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import specdef_jax as sd
from specdef_jax import attacks, trees
from specdef_jax.attacks import AdjacentPair, Knowledge
from specdef_jax.errors import LeafError, ProblemError, SelectionError, SpecError
from specdef_jax.parametrization import Deformed, is_structured
from tests.attacks.helpers_layers import KINDS, PAIR

KEY = jax.random.key(1)
DENSE = KINDS["dense"]()
RELEASED = DENSE.deform(64.0)


def lora(**settings):
    return attacks.lora(DENSE.loss, RELEASED, *DENSE.args, **settings).problem


def test_targets_choose_matrices_and_each_must_match_one():
    assert set(lora(targets=["layer_1/w", "layer_2/*"]).params) == {"layer_1/w", "layer_2/w"}
    assert set(lora().params) == {"layer_0/w", "layer_1/w", "layer_2/w"}
    with pytest.raises(SelectionError, match="'q_proj' matches no matrix; the matrices are 'layer_0/w'"):
        lora(targets=["layer_1/w", "q_proj"])
    with pytest.raises(SelectionError, match="'layer_1/b' matches no matrix"):
        lora(targets=["layer_1/b"])


def test_only_targets_move():
    task = lora(targets=["layer_1/w"])
    changed = jax.tree.map(lambda x: x + 1.0, task.params)
    back, before = task.read_back(changed), task.read_back(task.params)
    for name, leaf in trees.named_leaves(before):
        same = bool(jnp.all(dict(trees.named_leaves(back))[name] == leaf))
        assert same == (name != "layer_1/w"), name


@pytest.mark.parametrize(("rank", "scale"), [(1, 8.0), (4, 8.0), (4, 2.0)])
def test_rank_and_scale_by_hand(rank, scale):
    """W + (scale / rank) A B; A Gaussian of variance 1 / rows, B zero."""
    task = lora(rank=rank, scale=scale, targets=["layer_1/w"])
    A, B = (task.params["layer_1/w"][part] for part in ("down", "up"))
    assert (A.shape, B.shape) == ((6, rank), (rank, 5))
    assert not B.any()
    full = task.read_back({"layer_1/w": {"down": A, "up": jnp.ones_like(B)}})["layer_1"]["w"]
    added = full - task.read_back(task.params)["layer_1"]["w"]
    np.testing.assert_allclose(added, scale / rank * A @ jnp.ones_like(B), atol=1e-13)


def test_the_start_is_gaussian_with_the_key():
    kernel = {"w": jnp.zeros((400, 300))}
    found = [
        attacks.lora(lambda p: jnp.sum(p["w"]), kernel, rank=100, key=jax.random.key(i)).problem.params
        for i in (0, 1)
    ]
    A, other = (tree["w"]["down"] for tree in found)
    assert float(A.std()) == pytest.approx(400**-0.5, rel=0.02)
    assert float(jnp.mean(A**4) / jnp.mean(A**2) ** 2) == pytest.approx(3, rel=0.05)
    assert float(jnp.abs(A - other).max()) > 0.01


def test_adapters_that_no_gradient_reaches_are_named():
    def half(params, x, y):
        cut = {**params, "layer_2": jax.lax.stop_gradient(params["layer_2"])}
        return DENSE.loss(cut, x, y)

    task = attacks.lora(half, RELEASED, *DENSE.args).problem
    params = task.params
    for _ in range(3):
        gradient = jax.grad(task.loss)(params, *DENSE.args)
        params = optax.apply_updates(params, jax.tree.map(lambda g: -0.01 * g, gradient))
    with pytest.raises(ProblemError, match="'layer_2/w/down', 'layer_2/w/up' did not move"):
        attacks.moved(task, params)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"scale": 0.0}])
def test_settings_without_a_meaning(settings):
    with pytest.raises(SpecError, match="both must be positive"):
        lora(**settings)
    with pytest.raises(SpecError, match="at least one"):
        attacks.svd_chain(DENSE.loss, RELEASED, *DENSE.args, factors=0)


def test_low_precision_stays_what_it_is():
    """Every attack on a float32 network trains float32 and reads it back."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), DENSE.params)
    released = sd.deform(params, sd.SpecDef(alpha=16.0), where="layer_1/w", key=KEY)
    args = DENSE.args[0].astype(jnp.float32), DENSE.args[1]
    for name, attack in attacks.ATTACKS.items():
        task = attack(DENSE.loss, released, *args).problem
        assert {x.dtype for x in jax.tree.leaves(task.params)} == {jnp.dtype("float32")}, name
        assert {x.dtype for x in jax.tree.leaves(task.read_back(task.params))} == {jnp.dtype("float32")}, name


def test_blind_finds_the_deformed_pair_and_leaves_the_other_alone():
    """Two pairs are inserted, one of them with nothing in it."""
    keys = jax.random.split(KEY, 3)
    orthogonal = jnp.linalg.qr(jax.random.normal(keys[0], (6, 6)))[0]
    params = {"a": orthogonal, "b": jax.random.normal(keys[1], (6, 6))}
    released = {
        "a": sd.deform(params, sd.SpecDef(alpha=1.0), where="a", key=KEY)["a"],
        "b": sd.deform(params, sd.SpecDef(alpha=100.0), where="b", key=KEY)["b"],
    }

    def loss(p, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) ** 2)

    x = jax.random.normal(keys[2], (7, 6))
    assert attacks.suspects(released, alpha=20.0) == ("b",)
    attack = attacks.blind(loss, released, x, alpha=20.0)
    found = attack.problem.params
    assert attack.bill.knowledge is Knowledge.WEIGHTS
    jax.tree.map(np.testing.assert_array_equal, found["a"], released["a"])
    want = attacks.rebalance(loss, released, x).problem.params["b"]
    jax.tree.map(np.testing.assert_array_equal, found["b"], want)
    assert float(jnp.abs(found["b"].weight - released["b"].weight).max()) > 1


def test_blind_finds_a_gauge_by_the_architecture_alone():
    kind = KINDS["gauge"]()
    assert attacks.suspects(kind.deform(2.0**12), [PAIR], alpha=16.0) == (PAIR.name,)
    balanced = attacks.rebalance(kind.loss, kind.params, *kind.args, pairs=[PAIR]).problem.params
    assert attacks.suspects(balanced, [PAIR], alpha=16.0) == ()
    calm = attacks.blind(kind.loss, balanced, *kind.args, pairs=[PAIR], alpha=16.0).problem.params
    jax.tree.map(np.testing.assert_array_equal, calm, balanced)
    undone = attacks.blind(kind.loss, kind.deform(2.0**12), *kind.args, pairs=[PAIR]).problem.params
    grams = [tree["first"]["w"] @ tree["first"]["w"].T for tree in (undone, balanced)]
    np.testing.assert_allclose(*grams, atol=1e-8)


def test_blind_refusals():
    nothing = jax.tree.map(lambda x: x.at[0].set(jnp.nan) if x.shape == (8, 6) else x, RELEASED)
    with pytest.raises(LeafError, match="NaN or Inf"):
        attacks.blind(DENSE.loss, nothing, *DENSE.args)
    with pytest.raises(SpecError, match="alpha = 1"):
        attacks.blind(DENSE.loss, RELEASED, *DENSE.args, alpha=1.0)
    pairs = [AdjacentPair("layer_0/w", "layer_2/w")] * 2
    with pytest.raises(ProblemError, match="stand in two pairs"):
        attacks.blind(DENSE.loss, RELEASED, *DENSE.args, pairs=pairs)


@pytest.mark.parametrize("name", ["two_steps", "precondition"])
def test_a_singular_compensation_is_refused(name):
    def zeroed(leaf):
        if not isinstance(leaf, Deformed):
            return leaf
        return Deformed(leaf.weight, leaf.comp.at[0].set(0.0), leaf.side, leaf.axes)

    broken = jax.tree.map(zeroed, RELEASED, is_leaf=is_structured)
    with pytest.raises(ProblemError, match=r"'layer_1/w': .*Use fuse"):
        attacks.ATTACKS[name](DENSE.loss, broken, *DENSE.args)
