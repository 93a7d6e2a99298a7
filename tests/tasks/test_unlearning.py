"""Unlearning: gradients by hand, and what it does to a model that knows two things."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from specdef_jax.race import minibatches
from specdef_jax.tasks import unlearning
from specdef_jax.tasks.unlearning import Schedule

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (40, 4))
Y = (X @ jax.random.normal(jax.random.key(1), (4,)) > 0).astype(int)
FORGET, RETAIN = (X[:20], Y[:20]), (X[20:], Y[20:])
ONE = Schedule(steps=1, step_size=0.5)


def logits(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def hidden(params, x, y):
    del y
    return jnp.tanh(x @ params["w"] + params["b"])


def loss(params, x, y):
    return -jnp.mean(likely(params, x, y))


def likely(params, x, y):
    return jnp.take_along_axis(jax.nn.log_softmax(logits(params, x)), y[:, None], axis=-1)[:, 0]


def start():
    keys = jax.random.split(jax.random.key(2))
    params = {"w": jax.random.normal(keys[0], (4, 6)) / 2, "v": jax.random.normal(keys[1], (6, 2)) / 2}
    params["b"] = jnp.zeros(6)
    for _ in range(300):
        slopes = jax.grad(loss)(params, X, Y)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, slopes)
    return params


KNOWN = start()
GIVEN = KNOWN, minibatches(20, *FORGET), minibatches(20, *RETAIN), KEY
METHODS = {
    "ascent": lambda schedule, **more: unlearning.gradient_ascent(loss, *GIVEN, schedule, **more),
    "npo": lambda schedule, **more: unlearning.npo(likely, loss, *GIVEN, schedule, **more),
    "rmu": lambda schedule, **more: unlearning.rmu(hidden, *GIVEN, schedule, **more),
}


@pytest.mark.parametrize("method", ["ascent", "npo"])
def test_it_forgets_one_and_keeps_the_other(method):
    found = METHODS[method](Schedule(60, 1e-2), weight=5.0)
    assert float(loss(found, *FORGET)) > 3 * float(loss(KNOWN, *FORGET))
    assert float(loss(found, *RETAIN)) < float(loss(found, *FORGET)) / 2


def test_without_the_retained_loss_more_is_lost():
    kept, lost = (METHODS["ascent"](Schedule(60, 1e-2), weight=w) for w in (5.0, 0.0))
    assert float(loss(lost, *RETAIN)) > 2 * float(loss(kept, *RETAIN))


def test_ascent_is_unbounded_and_preference_stops():
    far, near = (METHODS[m](Schedule(300, 3e-2), weight=0.0) for m in ("ascent", "npo"))
    assert float(loss(far, *FORGET)) > 2 * float(loss(near, *FORGET)) > 4 * float(loss(KNOWN, *FORGET))


def test_misdirection_leads_hidden_states_one_way():
    found = METHODS["rmu"](Schedule(300, 1e-2), weight=0.0)
    states = np.asarray(hidden(found, *FORGET))
    directions = states / np.linalg.norm(states, axis=1, keepdims=True)
    assert np.mean(directions @ directions.mean(0)) > 0.9
    kept = METHODS["rmu"](Schedule(300, 1e-2), weight=1e4)
    moved = np.abs(np.asarray(hidden(kept, *RETAIN)) - np.asarray(hidden(KNOWN, *RETAIN))).mean()
    assert moved < np.abs(np.asarray(hidden(found, *RETAIN)) - np.asarray(hidden(KNOWN, *RETAIN))).mean() / 5


def test_the_preference_loss_is_its_equation():
    moved = jax.tree.map(lambda x: 1.1 * x, KNOWN)
    beta, weight = 0.3, 0.7
    ours = unlearning._preference(
        Partial(likely), Partial(loss), beta, weight, moved, KNOWN, FORGET, RETAIN, KEY
    )
    ratio = np.exp(np.asarray(likely(moved, *FORGET)) - np.asarray(likely(KNOWN, *FORGET)))
    want = weight * float(loss(moved, *RETAIN)) + 2 / beta * np.mean(np.log(1 + ratio**beta))
    assert float(ours) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_a_function_of_its_key(method):
    a, b = (METHODS[method](ONE) for _ in range(2))
    assert all(bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert any(bool((x != y).any()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(KNOWN), strict=True))
