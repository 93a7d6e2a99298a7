"""Every optimizer by the one protocol of the runner: each reaches the target of a small problem."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import specdef_jax as sd
from specdef_jax import optim, race

EVERY = {**race.FIRST_ORDER, **race.SECOND_ORDER}
KEY = jax.random.key(1)


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean((hidden @ params["v"] - y) ** 2)


def problem():
    keys = jax.random.split(KEY, 4)
    params = {
        "w": jax.random.normal(keys[0], (5, 8)) / 2,
        "b": jnp.zeros(8),
        "v": jax.random.normal(keys[1], (8, 2)) / 3,
    }
    x = jax.random.normal(keys[2], (24, 5))
    return params, (x, jnp.stack([jnp.sin(x[:, 0]), x[:, 1] * x[:, 2] / 2], axis=1))


def all_of_it(x, y, key):
    return x, y


@pytest.mark.parametrize("name", EVERY)
def test_each_reaches_the_target_at_some_step_size(name):
    params, args = problem()
    result = race.run(
        loss, params, {name: EVERY[name]}, sample=Partial(all_of_it, *args), steps=200,
        step_sizes=np.logspace(-3, 0.5, 8), seeds=1, target=0.6 * float(loss(params, *args)),
    )  # fmt: skip
    assert np.all(np.isfinite(result.steps(name)))
    assert float(result.steps(name)[0]) > 0


@pytest.mark.parametrize("lanes", [1, 4])
def test_kfac_sees_both_factors_of_a_deformed_layer_through_the_merge(lanes):
    params, args = problem()
    deformed = sd.deform(params, sd.SpecDef(alpha=8.0), where=sd.select.match("w"), key=KEY)
    raced = {"whole": race.SECOND_ORDER["kfac"], "weight alone": lambda s: optim.kfac(s, plain=("w/comp",))}
    result = race.run(
        loss, deformed, raced, sample=Partial(all_of_it, *args), steps=200, lanes=lanes,
        step_sizes=np.logspace(-3, -1, 4), seeds=1, target=0.6 * float(loss(params, *args)),
    )  # fmt: skip
    whole, weight = (result.to_target[result.index(name), :, 0] for name in raced)
    assert np.isfinite(whole).any()
    assert not np.array_equal(whole, weight, equal_nan=True)


@pytest.mark.parametrize("name", ["lbfgs", "sophia", "newton_cg", "cubic_newton", "adahessian", "kfac"])
def test_the_runner_is_a_plain_loop_with_the_same_arguments(name):
    params, args = problem()
    target = 0.8 * float(loss(params, *args))
    step_size = {"sophia": 0.01, "adahessian": 0.01, "kfac": 0.01}.get(name, 1.0)
    result = race.run(
        loss, params, {name: EVERY[name]}, sample=Partial(all_of_it, *args), steps=300,
        step_sizes=np.array([step_size]), seeds=1, target=target,
    )  # fmt: skip
    optimizer = optax.with_extra_args_support(EVERY[name](step_size))

    @jax.jit
    def step(params, state):
        def value_fn(p):
            return loss(p, *args)

        value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn, obj_fn=value_fn,
            hvp=lambda v: jax.jvp(jax.grad(value_fn), (params,), (v,))[1],
        )  # fmt: skip
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(300):
        params, state, value = step(params, state)
        losses.append(float(value))
        if value <= target:
            break
    steps = float(result.steps(name)[0])
    assert len(losses) - 2 < steps <= len(losses) - 1
