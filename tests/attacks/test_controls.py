"""Controls: every attack reaches the target where nothing is deformed, and a broken one does not.

All kernels are deformed, so that a broken attack has nothing but biases to train. Steps are those of SGD at
the best of twelve step sizes.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import specdef_jax as sd
from specdef_jax import race, trees
from specdef_jax.attacks import ATTACKS
from specdef_jax.parametrization import problem
from specdef_jax.tasks.networks import mlp
from tests.attacks.helpers_layers import cross_entropy, data, with_biases

KEY = jax.random.key(2)
NETWORK, ARGS = mlp((8, 6, 5, 3)), data(16, 8)
LOSS, PARAMS = cross_entropy(NETWORK.apply), with_biases(NETWORK.init(KEY))
TARGET, CAP = 0.3, 60
ABOUT = 2.5  # times the steps of fine-tuning the original: identity and LoRA have other paths
# What leaves a factor of alpha in place: a chain by 5.4, adapters on the factors by 5.5.
STAYS_SLOW = {"svd_chain_2", "svd_chain_3", "svd_chain_5", "lora_factors"}


@functools.cache
def released(alpha):
    return sd.deform(PARAMS, sd.SpecDef(alpha=alpha), where="layer_*/w", key=KEY)


@functools.cache
def made(name, alpha):
    return ATTACKS[name](LOSS, released(alpha), *ARGS)


def steps(problems, factory):
    """Return the fewest steps to the target for each problem, NaN if beyond the cap."""
    return race.run_problems(
        problems, {"sgd": factory}, sample=race.full_batch(*ARGS), steps=CAP,
        step_sizes=10.0 ** np.arange(-2, 1, 0.25), target=TARGET, prune=True, lanes=1,
    ).steps("sgd")  # fmt: skip


@dataclass(frozen=True)
class Numbed:
    """A factory whose optimizer sees gradients of biases alone."""

    factory: Any

    def __call__(self, step_size):
        def cut(gradients, _):
            return trees.map_named(lambda name, g: g if name.endswith("/b") else jnp.zeros_like(g), gradients)

        return optax.chain(optax.stateless(cut), self.factory(step_size))


@pytest.fixture(scope="module")
def plain():
    found = steps([problem(LOSS, PARAMS, *ARGS)], race.DEFAULT["sgd"])[0]
    assert 10 < found < CAP / ABOUT
    return found


@pytest.mark.parametrize("name", list(ATTACKS))
def test_an_attack_reaches_the_target_and_a_broken_one_does_not(plain, name):
    attacks = [made(name, alpha) for alpha in (1.0, 64.0)]
    factory = attacks[0].optimizer(race.DEFAULT["sgd"])
    undeformed, deformed = steps([attack.problem for attack in attacks], factory)
    assert undeformed <= ABOUT * plain
    if name in STAYS_SLOW:
        assert not deformed <= ABOUT * plain
    else:
        assert deformed <= ABOUT * plain
    broken = steps([attack.problem for attack in attacks], Numbed(factory))
    assert np.isnan(broken).all(), "a broken attack passes its control"


def test_an_attack_that_forgets_to_convert_fails_where_it_should_not(plain):
    task = [problem(LOSS, released(alpha), *ARGS) for alpha in (1.0, 64.0)]
    undeformed, deformed = steps(task, race.DEFAULT["sgd"])
    assert undeformed <= ABOUT * plain
    assert np.isnan(deformed)
