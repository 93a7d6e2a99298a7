"""What `work` reads from a state is what a counter inside the loss and the products counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specdef_jax import optim, race
from specdef_jax.optim.work import PRODUCT, VALUE, work

KEY = jax.random.key(0)


class Counter:
    """Counts in gradients: VALUE each time the loss runs forward, the rest of 1 when it runs backward."""

    def __init__(self):
        self.total = 0.0

    def add(self, amount, x):
        """Return x, and count when the program that computes it runs."""

        def count():
            self.total += amount

        jax.debug.callback(count)
        return x

    def watched(self, loss):
        @jax.custom_vjp
        def seen(value):
            return self.add(VALUE, value)

        seen.defvjp(
            lambda value: (self.add(VALUE, value), None), lambda _, dual: (self.add(1 - VALUE, dual),)
        )
        return lambda params: seen(loss(params))


def problem():
    keys = jax.random.split(KEY, 4)
    params = {
        "w": jax.random.normal(keys[0], (5, 8)) / 2,
        "b": jnp.zeros(8),
        "v": jax.random.normal(keys[1], (8, 2)) / 3,
    }
    x = jax.random.normal(keys[2], (24, 5))
    y = jnp.stack([jnp.sin(x[:, 0]), x[:, 1] * x[:, 2] / 2], axis=1)
    return params, (lambda p: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]), (lambda out: jnp.mean((out - y) ** 2))


def counted_and_read(optimizer, steps):
    """Return for each step what was counted, and what its state says."""
    params, model, criterion = problem()
    counter = Counter()
    optimizer = optax.with_extra_args_support(optimizer)

    def loss(p):
        return criterion(model(p))

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(counter.watched(loss))(params)

        def product(p, v):
            return jax.jvp(jax.grad(loss), (p,), (v,))[1]

        def hvp(v):
            return counter.add(PRODUCT, product(params, v))

        def gnvp(v):
            outputs, push = jax.linearize(model, params)
            image = jax.jvp(jax.grad(criterion), (outputs,), (push(v),))[1]
            return counter.add(PRODUCT, jax.linear_transpose(push, params)(image)[0])

        # Sophia differentiates obj_fn twice, in one product
        more = {"value_fn": counter.watched(loss), "obj_fn": lambda p: counter.add(PRODUCT, loss(p))}
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, hvp=hvp, gnvp=gnvp, **more
        )
        return optax.apply_updates(params, updates), state, work(state)

    counted, read, state = [], [], optimizer.init(params)
    for _ in range(steps):
        before = counter.total
        params, state, found = step(params, state)
        jax.block_until_ready(params)
        jax.effects_barrier()
        counted.append(counter.total - before)
        read.append(float(found))
    return counted, read


def searching(search):
    """Return gradient descent with a line search from a step that is too long."""
    inner = optax.chain(optax.scale(-30.0), search)

    def update(updates, state, params, *, value, grad, value_fn, **extra):
        return inner.update(updates, state, params, value=value, grad=grad, value_fn=value_fn)

    return optax.GradientTransformationExtraArgs(inner.init, update)


EVERY = {name: make(0.05) for name, make in {**race.FIRST_ORDER, **race.SECOND_ORDER}.items()} | {
    "lbfgs": race.SECOND_ORDER["lbfgs"](1.0),
    "damped_gauss_newton": optim.damped_gauss_newton(1.0),
    "damped_gauss_newton, fixed": optim.damped_gauss_newton(1.0, adapt=False),
    "cubic_newton, fixed": optim.cubic_newton(1.0, adapt=False, krylov=3),
    "newton_cg, halvings": optim.newton_cg(50.0, halvings=10),
    "adahessian, probes": optim.adahessian(0.01, probes=3, key=KEY),
    "zoom": searching(optax.scale_by_zoom_linesearch(15)),
    "zoom, cut short": searching(optax.scale_by_zoom_linesearch(2)),
    "backtracking": searching(optax.scale_by_backtracking_linesearch(15)),
    "backtracking, gradient kept": searching(optax.scale_by_backtracking_linesearch(15, store_grad=True)),
    "chained": optax.chain(optax.clip_by_global_norm(1.0), optim.newton_cg(0.5, tol=1e-3), optax.scale(0.5)),
    "nested": optax.apply_if_finite(optax.chain(optim.kfac(0.1)), 3),
}


@pytest.mark.parametrize("name", EVERY)
def test_the_state_tells_what_was_counted(name):
    counted, read = counted_and_read(EVERY[name], 23 if name == "sophia" else 5)
    np.testing.assert_array_equal(read, counted)
    if name in race.FIRST_ORDER:
        assert set(read) == {1.0}
    else:
        assert max(read) > 1


def test_steps_of_one_optimizer_may_differ():
    """Of those whose work depends on the step, it does: nothing here is a constant."""
    assert counted_and_read(EVERY["sophia"], 12)[1] == [3.0, *[1.0] * 9, 3.0, 1.0]
    for name in ("zoom", "newton_cg, halvings", "backtracking", "chained"):
        assert len(set(counted_and_read(EVERY[name], 8)[1])) > 1, name


def test_masked_states_are_read():
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    inner = optax.masked(optim.adahessian(probes=4, key=KEY), {"w": True, "b": False})
    product = functools.partial(jax.tree.map, lambda x: 2 * x)
    _, state = inner.update(params, inner.init(params), params, hvp=product)
    assert float(work(state)) == 1 + 4 * PRODUCT


def test_before_the_first_step_and_without_state_it_is_the_gradient():
    params = {"w": jnp.ones((3, 2))}
    for optimizer in EVERY.values():
        assert float(work(optimizer.init(params))) == 1.0
    assert float(work(())) == 1.0


def test_it_is_traced():
    _, state = optim.newton_cg().update(
        jnp.ones(3), optim.newton_cg().init(jnp.ones(3)), hvp=lambda v: jnp.arange(1.0, 4.0) * v
    )
    assert float(jax.jit(work)(state)) == 1 + PRODUCT * float(state.products)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    np.testing.assert_array_equal(jax.vmap(work)(stacked), jnp.full(2, work(state)))
