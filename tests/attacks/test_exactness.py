"""What is the same, step for step, and what is not: the linear-size limit and others (THEORY.md 5.3)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import specdef_jax as sd
from specdef_jax import attacks, bounds, curvature, trees
from specdef_jax.attacks.rescaling import Rescaled
from specdef_jax.attacks.two_steps import TwoSteps, shares
from specdef_jax.parametrization import Deformed, is_structured, problem
from specdef_jax.race.optimizers import FIRST_ORDER, kfac, momentum, newton_cg, sgd
from specdef_jax.tasks.networks import cnn, mlp, transformer
from tests.attacks.helpers_layers import cross_entropy, data, with_biases

KEY = jax.random.key(2)
READS_WEIGHTS = {"adamw", "adafactor"}
NETWORK = mlp((8, 6, 5, 3))
LOSS = cross_entropy(NETWORK.apply)
STEP = {"sgd": 0.1, "momentum": 0.02, "nesterov": 0.02, "adagrad": 0.05, "schedule_free": 0.1}


@pytest.fixture(scope="module")
def network():
    return with_biases(NETWORK.init(KEY)), data(16, 8)


@pytest.fixture(scope="module")
def plan(network):
    return sd.plan(network[0], sd.SpecDef(alpha=64.0, k=2, side="output"), where="layer_*/w", key=KEY)


@pytest.fixture(scope="module")
def deformed(network, plan):
    return sd.apply_plan(network[0], plan)


@functools.partial(jax.jit, static_argnames=("factories", "steps"))
def distance(tasks, args, *, factories, steps, read=None):
    """Return how far two runs are apart at most, relative to how far the first has come, and that."""

    def start(task, factory):
        return task.params, factory[0](factory[1]).init(task.params)

    def moved_on(task, factory, carry):
        params, state = carry

        def value_fn(p):
            return task.loss(p, *args)

        def hvp(v):
            return jax.jvp(jax.grad(value_fn), (params,), (v,))[1]

        value, grad = jax.value_and_grad(value_fn)(params)
        update = optax.with_extra_args_support(factory[0](factory[1])).update
        given = {"value": value, "grad": grad, "value_fn": value_fn, "hvp": hvp}
        updates, state = update(grad, state, params, **given)
        return optax.apply_updates(params, updates), state

    def flat(task, carry):
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(task.read_back(carry[0]))])

    def step(carries, _):
        carries = tuple(map(moved_on, tasks, factories, carries))
        return carries, jnp.abs(flat(tasks[0], carries[0]) - flat(tasks[1], carries[1])).max()

    carries = tuple(map(start, tasks, factories))
    begin = flat(tasks[0], carries[0])
    carries, apart = jax.lax.scan(step, carries, None, length=steps)
    return apart.max(), jnp.abs(flat(tasks[0], carries[0]) - begin).max()


@pytest.mark.parametrize("name", list(FIRST_ORDER))
def test_inject_is_fine_tuning_for_every_optimizer_that_reads_gradients_alone(network, deformed, name):
    params, args = network
    tasks = problem(LOSS, params, *args), attacks.inject(LOSS, deformed, *args).problem
    factory = FIRST_ORDER[name], STEP.get(name, 0.01)
    apart, moved = distance(tasks, args, factories=(factory, factory), steps=100)
    assert moved > 1e-2, "nothing moved: the test is empty"
    if name in READS_WEIGHTS:
        assert apart > 1e-5 * moved
    else:
        assert apart < 1e-9 * moved


NETWORKS = {"mlp": mlp(), "cnn": cnn(), "transformer": transformer()}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_network_at_most_doubles(name):
    """Every kernel is deformed: what is added to the release, and what is trained, by counting."""
    net = NETWORKS[name]
    params = net.init(KEY)
    released = sd.deform(params, sd.SpecDef(alpha=16.0), where=list(net.kernels), key=KEY)
    x, y = data(4, 64)
    attack = attacks.inject(cross_entropy(net.apply), released, x, y)
    assert trees.size(attack.problem.params) == trees.size(params)
    assert 0 < attack.bill.injected_parameters <= trees.size(params)
    kernels = [leaf.size for path, leaf in trees.named_leaves(params) if path in net.kernels]
    assert attack.bill.injected_parameters == sum(kernels)
    assert attack.bill.added_parameters == sum(kernels) + trees.size(released) - trees.size(params)


def test_two_steps_is_gradient_descent_in_the_metric_of_the_plan(network, plan, deformed):
    args = network[1]
    metric = bounds.two_step_metric(deformed, plan)
    for share, want in zip(jax.tree.leaves(shares(deformed)), jax.tree.leaves(metric), strict=True):
        np.testing.assert_allclose(jnp.squeeze(share), want, rtol=1e-10)
    task = attacks.two_steps(LOSS, deformed, *args).problem

    def by_plan(step_size):
        return optax.chain(
            optax.stateless(lambda g, _: jax.tree.map(jnp.multiply, g, metric)), sgd(step_size)
        )

    apart, moved = distance((task, task), args, factories=((TwoSteps(sgd), 0.1), (by_plan, 0.1)), steps=30)
    assert apart < 1e-9 * moved


@pytest.mark.parametrize("basis", ["symmetric", "rotated", "axis"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_the_diagonal_metric_is_gradient_descent_with_the_identity_inserted(network, side, basis):
    params, args = network
    spec = sd.SpecDef(alpha=64.0, k=2, side=side, basis=basis)
    released = sd.deform(params, spec, where="layer_*/w", key=KEY)
    inserted = problem(LOSS, identity_inserted(released), *args)
    attack = attacks.precondition(LOSS, released, *args)
    wrapped, plain = (attack.optimizer(momentum), 0.02), (momentum, 0.02)
    apart, moved = distance((inserted, attack.problem), args, factories=(plain, wrapped), steps=30)
    assert apart < 1e-9 * moved
    reset = attacks.precondition(LOSS, released, *args, method="phi")
    apart, moved = distance((inserted, reset.problem), args, factories=(plain, plain), steps=30)
    assert apart < 1e-9 * moved
    assert reset.wrap is None


def by_given_gradient(step_size):
    """Gradient descent on what is handed over as grad."""

    def update(updates, state, params=None, *, grad, **_):
        return jax.tree.map(lambda g: -step_size * g, grad), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def by_given_function(step_size):
    """Gradient descent on what is handed over as value_fn."""

    def update(updates, state, params=None, *, value_fn, **_):
        return jax.tree.map(lambda g: -step_size * g, jax.grad(value_fn)(params)), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


@pytest.mark.parametrize("optimizer", [by_given_gradient, by_given_function, newton_cg])
def test_what_an_optimizer_is_given_is_converted_too(network, deformed, optimizer):
    """In rescaled coordinates: that of the turned, undeformed pair."""
    args = network[1]
    attack = attacks.precondition(LOSS, deformed, *args)
    D = Rescaled(sgd)(1.0).init(attack.problem.params).D
    turned = problem(LOSS, jax.tree.map(jnp.divide, attack.problem.params, D), *args)
    pair = turned, attack.problem
    factories = (optimizer, 0.1), (attack.optimizer(optimizer), 0.1)
    apart, moved = distance(pair, args, factories=factories, steps=4)
    assert apart < 1e-6 * moved
    # The same optimizer without the conversion goes elsewhere.
    apart, moved = distance(pair, args, factories=((optimizer, 0.1),) * 2, steps=4)
    assert apart > 1e-3 * moved


def test_kfac_in_front_of_gradient_descent_is_kfac(network, deformed):
    args = network[1]
    attack = attacks.precondition(LOSS, deformed, *args, method="kfac")
    task = attack.problem
    factories = (kfac, 0.01), (attack.optimizer(sgd), 0.01)
    apart, moved = distance((task, task), args, factories=factories, steps=5)
    assert apart < 1e-9 * moved


def test_a_step_on_the_identity_by_hand(network, deformed):
    """S - c g_S gives W - c W W^T g, in the layout of kernels."""
    params, args = network
    task = attacks.identity(LOSS, deformed, *args).problem
    gradient = jax.grad(task.loss)(task.params, *args)
    back = task.read_back(jax.tree.map(lambda p, g: p - 0.1 * g, task.params, gradient))
    plain = jax.grad(LOSS)(params, *args)
    for layer in params:
        w, g = params[layer]["w"], plain[layer]["w"]
        np.testing.assert_allclose(back[layer]["w"], w - 0.1 * w @ w.T @ g, rtol=0, atol=1e-10)
        np.testing.assert_allclose(back[layer]["b"], params[layer]["b"] - 0.1 * plain[layer]["b"], atol=1e-10)


def test_lora_on_the_composite_is_lora_on_the_original_and_on_the_factors_it_is_not(network, deformed):
    params, args = network
    factory = (optax.adam, 0.01)
    original = attacks.lora(LOSS, params, *args).problem
    for on, same in (("composite", True), ("factors", False)):
        task = attacks.lora(LOSS, deformed, *args, on=on).problem
        apart, moved = distance((original, task), args, factories=(factory, factory), steps=30)
        assert (apart < 1e-9 * moved) if same else (apart > 1e-2 * moved), on


def test_a_chain_of_one_is_freezing_and_longer_ones_are_sharper(network):
    """Sharpness at alpha 2^14 and 2^18: exponent 2 (p - 1) / p, of one deformed layer."""
    params, args = network

    def top(attack):
        operator = curvature.hessian(attack.problem.loss, attack.problem.params, *args)
        return float(np.abs(curvature.eigvals(operator)).max())

    made = [
        sd.deform(params, sd.SpecDef(alpha=a, side="output"), where="layer_1/w", key=KEY)
        for a in (2.0**14, 2.0**18)
    ]
    frozen = [top(attacks.freeze(LOSS, tree, *args)) for tree in made]
    for p in (1, 2, 3, 5):
        found = [top(attacks.svd_chain(LOSS, tree, *args, factors=p)) for tree in made]
        assert np.log(found[1] / found[0]) / np.log(16) == pytest.approx(bounds.chain_exponent(p), abs=0.05)
        np.testing.assert_allclose(found, frozen, rtol=1e-6) if p == 1 else None
        assert p == 1 or found[1] > 10 * frozen[1]


def identity_inserted(released):
    return jax.tree.map(
        lambda leaf: (
            Deformed(leaf.materialize(), jnp.eye(len(leaf.comp)), leaf.side, leaf.axes)
            if isinstance(leaf, Deformed)
            else leaf
        ),
        released,
        is_leaf=is_structured,
    )
