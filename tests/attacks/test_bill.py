"""What stands on a bill, against counts by hand."""

import functools
import math

import jax
import numpy as np
import optax
import pytest

import specdef_jax as sd
from specdef_jax import attacks, trees
from specdef_jax.attacks import ATTACKS, Knowledge
from specdef_jax.attacks.bill import carry_out
from specdef_jax.errors import ProblemError
from specdef_jax.parametrization import Problem, problem
from specdef_jax.tasks.networks import mlp
from tests.attacks.helpers_layers import cross_entropy, data

KEY = jax.random.key(7)
NETWORK = mlp((8, 6, 5, 3))
LOSS, ARGS = cross_entropy(NETWORK.apply), data(12, 8)
PARAMS = NETWORK.init(KEY)
SIZE = 8 * 6 + 6 + 6 * 5 + 5 + 5 * 3 + 3
# Scalars beyond the plain network and the release; the kernel (6, 5) has C (5, 5). LoRA is on all three.
ADAPTERS = 4 * (8 + 6) + 4 * (6 + 5) + 4 * (5 + 3)
COUNTS = {
    "fuse": (0, -25),
    "freeze": (25, 0),
    "two_steps": (25, 0),
    "inject": (25 + 30, 30),
    "identity": (25 + 25, 25),
    "svd_chain_2": (25 + 6 * 5 + 5 * 5 - 30, 25),
    "svd_chain_3": (25 + 6 * 5 + 2 * 5 * 5 - 30, 50),
    "svd_chain_5": (25 + 6 * 5 + 4 * 5 * 5 - 30, 100),
    "rebalance": (25, 0),
    "blind": (25, 0),
    "precondition": (25, 0),
    "precondition_phi": (25, 0),
    "precondition_kfac": (25, 0),
    "lora": (25 + ADAPTERS, ADAPTERS),
    "lora_factors": (25 + ADAPTERS + 4 * 10, ADAPTERS + 4 * 10),
}
BLIND = {"rebalance", "blind", "precondition_kfac", "lora_factors"}


@pytest.fixture(scope="module")
def released():
    return sd.deform(PARAMS, sd.SpecDef(alpha=64.0, side="output"), where="layer_1/w", key=KEY)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_bills_by_hand(released, name):
    attack = ATTACKS[name](LOSS, released, *ARGS)
    bill = attack.bill
    assert (bill.added_parameters, bill.injected_parameters) == COUNTS[name]
    assert bill.added_share == pytest.approx(COUNTS[name][0] / SIZE)
    assert bill.knowledge is (Knowledge.WEIGHTS if name in BLIND else Knowledge.WHICH_LAYERS)
    assert bill.examples == 0
    assert math.isnan(bill.step_seconds)
    assert 0 <= bill.conversion_seconds < 60
    assert (bill.added_flops > 0) == (bill.added_flops_share > 0) == (name != "fuse")
    # At least what is trained and held, in bytes of float64, and the data.
    held = SIZE + bill.added_parameters + ARGS[0].size
    assert bill.peak_bytes >= 8 * held
    assert bill.plain_peak_bytes >= 8 * (SIZE + ARGS[0].size)
    assert (bill.peak_bytes > bill.plain_peak_bytes) == (name != "fuse")


def test_a_wrapped_optimizer_is_paid_for(released):
    """K-FAC takes a gradient more each step, on the same problem as two step sizes."""
    cheap, dear = (ATTACKS[name](LOSS, released, *ARGS).bill for name in ("two_steps", "precondition_kfac"))
    assert dear.added_flops_share > cheap.added_flops_share + 1
    assert dear.peak_bytes > cheap.peak_bytes


def test_steps_are_timed_on_request(released):
    attack = ATTACKS["two_steps"](LOSS, released, *ARGS)
    bill = attacks.timed(attack, LOSS, released, *ARGS, repeats=3).bill
    assert 0 < bill.step_seconds < 10
    assert 0 < bill.plain_step_seconds < 10
    assert math.isnan(attack.bill.step_seconds)


def test_timing_tells_a_slow_step_from_a_fast_one(released):
    attack = ATTACKS["fuse"](LOSS, released, *ARGS)

    def laboured(params, x, y):
        slow = jax.lax.fori_loop(0, 30_000, lambda i, m: jax.numpy.tanh(m @ m), jax.numpy.eye(30))
        return LOSS(params, x, y) + 0 * slow.sum()

    slow = attacks.Attack("slow", problem(laboured, PARAMS, *ARGS), attack.bill)
    bill = attacks.timed(slow, LOSS, released, *ARGS, repeats=5).bill
    assert bill.step_seconds > 3 * bill.plain_step_seconds


def test_what_an_attack_wraps_is_hashable_and_the_same_for_the_same_factory(released):
    wrapped = set()
    for _ in range(2):
        for name in ("two_steps", "precondition", "precondition_kfac", "freeze"):
            wrapped.add(ATTACKS[name](LOSS, released, *ARGS).optimizer(optax.sgd))
    assert len(wrapped) == 4
    assert optax.sgd in wrapped


def test_moved_names_what_stayed(released):
    task = attacks.identity(LOSS, released, *ARGS).problem
    gone = jax.tree.map(lambda x: x + 1, task.params)
    attacks.moved(task, gone)
    stuck = {**gone, "layer_1": {**gone["layer_1"], "w": task.params["layer_1"]["w"]}}
    with pytest.raises(ProblemError, match="'layer_1/w' did not move"):
        attacks.moved(task, stuck)
    broken = {**gone, "layer_2": {**gone["layer_2"], "b": gone["layer_2"]["b"] * np.nan}}
    with pytest.raises(ProblemError, match="'layer_2/b' did not move, or left"):
        attacks.moved(task, broken)


def test_problems_of_one_attack_share_a_structure(released):
    """Networks of different seeds are raced as one program: a loss holds nothing of its own."""
    other = sd.deform(
        NETWORK.init(jax.random.key(8)), sd.SpecDef(alpha=9.0, side="output"), where="layer_1/w", key=KEY
    )
    for name, attack in ATTACKS.items():
        tasks = [attack(LOSS, tree, *ARGS).problem for tree in (released, other)]
        assert isinstance(tasks[0], Problem)
        assert jax.tree.structure(tasks[0]) == jax.tree.structure(tasks[1]), name
        assert trees.size(tasks[0]) == trees.size(tasks[1])


def test_bills_of_one_shape_compile_once(released):
    traced = []

    def counted(step_size):
        traced.append(None)
        return optax.sgd(step_size)

    def charge(tree):
        convert = functools.partial(problem, LOSS, tree, *ARGS)
        return carry_out("any", convert, LOSS, tree, *ARGS, wrap=lambda factory: counted).bill

    first, again = charge(released), charge(jax.tree.map(lambda x: 2 * x, released))
    assert len(traced) == 2  # the start of the optimizer, and a step
    assert (again.added_flops, again.peak_bytes) == (first.added_flops, first.peak_bytes)
    assert charge(PARAMS).peak_bytes < first.peak_bytes
    assert len(traced) == 4
