"""The embedded default: its data, its networks, and the fields that a certification reads."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax import trees
from specdef_jax.errors import MissingExtra
from specdef_jax.tasks import digits


@pytest.fixture(scope="module")
def data():
    return digits.load()


@pytest.fixture(scope="module")
def task():
    return digits.task(2)


def test_data(data):
    assert (data.x.shape, data.y.shape) == ((1437, 64), (1437,))
    assert (data.x_test.shape, data.y_test.shape) == ((360, 64), (360,))
    for x, y in ((data.x, data.y), (data.x_test, data.y_test)):
        assert (float(x.min()), float(x.max())) == (0.0, 1.0)
        assert set(np.asarray(y).tolist()) == set(range(10))
    assert digits.load(test=0).x.shape == (1797, 64)


def test_networks_know_the_digits_and_differ_by_seed(data, task):
    for params in task.networks:
        assert float(digits.accuracy(params, data.x_test, data.y_test)) > 0.85
    first, second = task.networks
    assert float(jnp.abs(first["layer_1"]["w"] - second["layer_1"]["w"]).max()) > 0.1
    again = digits.pretrain(jax.random.key(0), data)
    for want, got in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(got, want)
    (shifted,) = digits.task(1, first_seed=1).networks
    np.testing.assert_array_equal(shifted["layer_1"]["w"], second["layer_1"]["w"])


def test_fields_fit_each_other(task):
    params = task.networks[0]
    plan = sd.plan(params, sd.SpecDef(alpha=2.0), where=task.where, key=jax.random.key(0))
    assert list(plan) == ["layer_1/w"]
    leaves = dict(trees.named_leaves(params))
    assert leaves[task.control].shape == (10,)
    x, y = task.args
    assert (x.shape, y.shape) == ((128, 64), (128,))
    assert float(task.loss(params, x, y)) > 10 * task.target
    # The attacker's labels are the shifted ones: the network gets nearly all of them wrong.
    assert float(digits.accuracy(params, x, y)) < 0.05
    assert float(digits.accuracy(params, x, (y - 1) % 10)) > 0.95
    facts = {name: float(fact(params)) for name, fact in task.facts.items()}
    assert facts["test accuracy"] > 0.85
    assert facts["attacker's test accuracy"] < 0.1
    assert task.apply(params, *task.inputs).shape == (360, 10)
    np.testing.assert_allclose(
        task.apply(params, *task.inputs),
        task.apply(sd.merge(sd.apply_plan(params, plan)), *task.inputs),
        rtol=1e-9,
        atol=1e-9,
    )


def test_shifted_labels_wrap_around():
    np.testing.assert_array_equal(digits.shifted(jnp.asarray([0, 8, 9])), [1, 9, 0])


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'specdef_jax\[cli\]'"):
        digits.load()
