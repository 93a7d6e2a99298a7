"""Largest stable steps against optax itself and the spectral radius of its update map (THEORY.md 3.1)."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specdef_jax import bounds
from specdef_jax.errors import SpecError

CURVATURE = 3.7
FROZEN = 1e8  # an eps so large that Adam's preconditioner is this constant


def adam_like(step, b, nesterov):
    return optax.adam(step * FROZEN, b1=b, b2=0.5, eps=FROZEN, nesterov=nesterov)


OPTIMIZERS = {
    "gd": lambda step, b: optax.sgd(step),
    "heavy_ball": lambda step, b: optax.sgd(step, momentum=b),
    "nesterov": lambda step, b: optax.sgd(step, momentum=b, nesterov=True),
    "ema_momentum": lambda step, b: optax.chain(optax.ema(b, debias=False), optax.scale(-step)),
    "ema_nesterov": lambda step, b: optax.chain(
        optax.scale(1 - b), optax.trace(b, nesterov=True), optax.scale(-step)
    ),
}
ADAM = {"ema_momentum": False, "ema_nesterov": True}


def last_iterate(optimizer, steps=3000):
    """Return log |x| after optax has minimized CURVATURE x^2 / 2 from x = 1."""

    def one(carry, _):
        x, state = carry
        updates, state = optimizer.update(CURVATURE * x, state, x)
        return (optax.apply_updates(x, updates), state), None

    x = jnp.asarray(1.0)
    (x, _), _ = jax.lax.scan(one, (x, optimizer.init(x)), None, length=steps)
    return jnp.log(jnp.abs(x))


def update_map(optimizer):
    """Return the matrix of one step on (x, floating state), linear for these optimizers."""
    x = jnp.asarray(1.0)
    leaves, treedef = jax.tree.flatten((x, optimizer.init(x)))
    free = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def step(values):
        full = list(leaves)
        for i, value in zip(free, values, strict=True):
            full[i] = value
        x, state = treedef.unflatten(full)
        updates, state = optimizer.update(CURVATURE * x, state, x)
        after = jax.tree.leaves((optax.apply_updates(x, updates), state))
        return jnp.stack([after[i] for i in free])

    return np.asarray(jax.jacobian(step)(jnp.zeros(len(free))))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("method", list(OPTIMIZERS))
def test_the_spectral_radius_is_one_at_the_step(method, momentum):
    step = float(bounds.max_stable_step(method, CURVATURE, momentum=momentum))
    for share, sign in ((0.99, -1), (1.01, 1)):
        matrix = update_map(OPTIMIZERS[method](share * step, momentum))
        assert np.sign(np.abs(np.linalg.eigvals(matrix)).max() - 1) == sign
    at = np.abs(np.linalg.eigvals(update_map(OPTIMIZERS[method](step, momentum)))).max()
    assert at == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("method", list(OPTIMIZERS))
def test_optax_converges_one_percent_below_and_diverges_one_percent_above(method):
    limit = bounds.max_stable_step(method, CURVATURE, momentum=0.9)
    run = jax.jit(lambda step: last_iterate(OPTIMIZERS[method](step, 0.9)))
    assert float(run(0.99 * limit)) < -1
    assert float(run(1.01 * limit)) > 1


@pytest.mark.parametrize("method", list(ADAM))
def test_adam_with_a_frozen_preconditioner_has_the_same_limit(method):
    # Momentum .5: the bias correction of the first steps then stays far below FROZEN.
    limit = bounds.max_stable_step(method, CURVATURE, momentum=0.5)
    run = jax.jit(lambda step: last_iterate(adam_like(step, 0.5, ADAM[method])))
    assert float(run(0.99 * limit)) < -1
    assert float(run(1.01 * limit)) > 1


def test_the_methods_differ():
    steps = [float(bounds.max_stable_step(m, 1.0)) for m in OPTIMIZERS]
    assert len(set(steps)) == len(steps)
    assert steps[3] == pytest.approx(38)


def test_curvature_that_is_not_positive_limits_nothing():
    found = bounds.max_stable_step("gd", jnp.asarray([4.0, 0.0, -2.0, jnp.nan]))
    np.testing.assert_array_equal(found, [0.5, np.inf, np.inf, np.nan])


def test_deformed_falls_as_alpha_squared():
    assert float(bounds.max_stable_step_deformed("gd", 2.0, 8.0)) == 2 / (64 * 2)
    assert float(bounds.max_stable_step_deformed("gd", -2.0, 8.0)) == np.inf
    momentum = float(bounds.max_stable_step_deformed("heavy_ball", 2.0, 8.0, momentum=0.5))
    assert momentum == 2 * 1.5 / 128


def test_bad_input():
    with pytest.raises(SpecError, match=r"'sgd': must be one of gd, heavy_ball"):
        inspect.unwrap(bounds.max_stable_step)("sgd", 1.0)  # past the type checker of the tests
    for momentum in (-0.1, 1.0, float("nan")):
        with pytest.raises(SpecError, match="momentum = "):
            bounds.max_stable_step("heavy_ball", 1.0, momentum=momentum)
