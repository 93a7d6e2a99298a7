"""Rebalancing forgets alpha, whichever factor compensates, and refuses the rest (THEORY.md 5.5)."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import specdef_jax as sd
from specdef_jax import attacks, curvature, trees
from specdef_jax.attacks import AdjacentPair, Knowledge, adjacent
from specdef_jax.errors import ProblemError, StructureError
from specdef_jax.parametrization import Deformed
from specdef_jax.tasks.networks import cnn, mlp
from theory.instances.adjacent import grouped_attention, perceptron

KEY = jax.random.key(3)
FORMS = [(side, basis) for side in ("output", "input") for basis in ("symmetric", "rotated", "axis")]
PAIR = AdjacentPair("first/w", "second/w", "first/b", groups=2)


def cross_entropy(network):
    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(network.apply(params, x), y).mean()

    return loss


@pytest.fixture(scope="module", params=["mlp", "cnn"])
def task(request):
    """Return loss, parameters, data and the kernel to deform: (6, 5) dense, (2, 2, 3, 4) a convolution."""
    network, where = {
        "mlp": (mlp((16, 6, 5, 3)), "layer_1/w"),
        "cnn": (cnn((4, 4, 1), (3, 4), classes=3, window=2), "conv_1/w"),
    }[request.param]
    keys = jax.random.split(KEY, 2)
    args = jax.random.normal(keys[0], (12, 16)), jnp.arange(12) % 3
    return cross_entropy(network), network.init(keys[1]), args, where


def deformed_by(task, side, basis, alpha=1e3):
    _, params, _, where = task
    spec = sd.SpecDef(alpha=alpha, k=2, side=side, basis=basis)
    return sd.deform(params, spec, where=where, key=KEY)


def leaf_of(tree, where):
    return dict(trees.named_leaves(tree, is_leaf=lambda x: isinstance(x, Deformed)))[where]


@pytest.mark.parametrize(("side", "basis"), FORMS)
def test_the_factors_are_balanced_and_the_network_is_the_same(task, side, basis):
    loss, params, args, where = task
    attack = attacks.rebalance(loss, deformed_by(task, side, basis), *args)
    made = attack.problem
    np.testing.assert_allclose(made.loss(made.params, *args), loss(params, *args), rtol=1e-10)
    for (name, want), got in zip(
        trees.named_leaves(params), jax.tree.leaves(made.read_back(made.params)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-10, err_msg=name)
    leaf = leaf_of(made.params, where)
    kernel = np.asarray(leaf.axes.to_sided(leaf_of(params, where), side))
    X, Y = (np.asarray(x[0]) for x in adjacent.factors_of(leaf))
    np.testing.assert_allclose(X.T @ X, Y @ Y.T, atol=1e-12)
    roots = np.sqrt(np.linalg.svd(kernel, compute_uv=False))
    for factor in (X, Y):
        np.testing.assert_allclose(np.linalg.svd(factor, compute_uv=False)[: len(roots)], roots, atol=1e-9)


def test_the_bill_by_hand(task):
    loss, params, args, where = task
    attack = attacks.rebalance(loss, deformed_by(task, "output", "symmetric"), *args)
    d = leaf_of(params, where).shape[-1]
    assert attack.name == "rebalance"
    assert attack.bill.added_parameters == d * d
    assert attack.bill.added_share == pytest.approx(d * d / trees.size(params))
    assert attack.bill.knowledge is Knowledge.WEIGHTS
    assert attack.bill.conversion_seconds > 0
    assert attack.bill.added_flops > 0


def test_alpha_is_forgotten_and_the_original_path_is_not_found(task):
    loss, params, args, where = task
    tops, steps = [], []
    for alpha in (1.0, 1e4):
        made = attacks.rebalance(loss, deformed_by(task, "output", "symmetric", alpha), *args).problem
        operator = curvature.hessian(made.loss, made.params, *args)
        tops.append(float(np.abs(curvature.eigvals(operator)).max()))
        gradient = jax.grad(made.loss)(made.params, *args)
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, made.params, gradient)
        steps.append(leaf_of(made.read_back(moved), where))
    assert tops[0] == pytest.approx(tops[1], rel=1e-8)
    np.testing.assert_allclose(*steps, atol=1e-9)
    plain = leaf_of(params, where) - 0.1 * leaf_of(jax.grad(loss)(params, *args), where)
    assert float(jnp.abs(plain - steps[0]).max()) > 1e-3
    sharp = deformed_by(task, "output", "symmetric", 1e4)
    assert attacks.rebalance(loss, sharp, *args).problem.loss(sharp, *args) == pytest.approx(
        float(loss(params, *args)), rel=1e-8
    )


@pytest.fixture(scope="module")
def attention():
    net = grouped_attention(KEY)

    def loss(params, x):
        return jnp.mean(jnp.sin(3 * net.apply(params, x)))

    return net, loss


def gauged(net, basis, alpha=2.0**12):
    first, second = net.params["first"], net.params["second"]
    made = sd.deform_pair(
        first["w"], second["w"], sd.SpecDef(alpha=alpha, basis=basis), key=KEY, bias=first["b"], groups=2
    )
    return {
        **net.params,
        "first": {"w": made.first, "b": made.bias},
        "second": {**second, "w": made.second},
    }


@pytest.mark.parametrize("basis", ["symmetric", "rotated", "axis"])
def test_a_grouped_gauge_is_undone_without_an_added_parameter(attention, basis):
    net, loss = attention
    attack = attacks.rebalance(loss, gauged(net, basis), net.x, pairs=[PAIR])
    found = attack.problem.params
    np.testing.assert_allclose(net.apply(found, net.x), net.apply(net.params, net.x), atol=1e-9)
    assert (attack.bill.added_parameters, attack.bill.added_flops) == (0, 0)
    other = attacks.rebalance(loss, net.params, net.x, pairs=[PAIR]).problem.params
    named = [dict(trees.named_leaves(tree)) for tree in (found, other)]
    # The same up to an orthogonal matrix in each group: equal Gram matrices of what reads and writes.
    for group in range(2):
        X, Z = (np.asarray(adjacent.kernels_of(leaves, PAIR)[0][group]) for leaves in named)
        Y, V = (np.asarray(adjacent.kernels_of(leaves, PAIR)[1][group]) for leaves in named)
        np.testing.assert_allclose(X @ X.T, Z @ Z.T, atol=1e-9)
        np.testing.assert_allclose(X.T @ X, Y @ Y.T, atol=1e-10)
        np.testing.assert_allclose(Y.T @ Y, V.T @ V, atol=1e-9)


def test_putting_kernels_back_undoes_taking_them(attention):
    net, _ = attention
    leaves = dict(trees.named_leaves(net.params))
    again = adjacent.put_kernels(net.params, PAIR, *adjacent.kernels_of(leaves, PAIR))
    jax.tree.map(np.testing.assert_array_equal, again, net.params)


def test_stacked_layers_and_storage_dtypes():
    params = {"w": jax.random.normal(KEY, (3, 6, 4), jnp.float32)}
    deformed = sd.deform(params, sd.SpecDef(alpha=64.0), where="w", key=KEY, stacked=True)

    def loss(p, x):
        return jnp.mean(jnp.einsum("lio,bi->blo", p["w"], x) ** 2)

    made = attacks.rebalance(loss, deformed, jnp.ones((2, 6), jnp.float32)).problem
    leaf = made.params["w"]
    assert (leaf.weight.dtype, leaf.comp.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(leaf.materialize(), params["w"], atol=2e-5)
    for X, Y in zip(*adjacent.factors_of(leaf), strict=True):
        np.testing.assert_allclose(X.T @ X, Y @ Y.T, atol=1e-5)


def test_what_is_not_adjacent_is_refused(attention):
    net, loss = attention
    normed = grouped_attention(KEY, "norm")
    with pytest.raises(ProblemError, match="not adjacent"):
        attacks.rebalance(
            lambda p, x: jnp.mean(jnp.sin(3 * normed.apply(p, x))), normed.params, normed.x, pairs=[PAIR]
        )
    bent = perceptron(KEY, "gelu")
    pair = AdjacentPair("first/w", "second/w", "first/b")
    with pytest.raises(ProblemError, match="not adjacent"):
        attacks.rebalance(lambda p, x: jnp.mean(bent.apply(p, x) ** 2), bent.params, bent.x, pairs=[pair])
    with pytest.raises(ProblemError, match="not adjacent"):  # the bias is not named
        attacks.rebalance(
            loss, gauged(net, "symmetric"), net.x, pairs=[AdjacentPair("first/w", "second/w", groups=2)]
        )


def test_bad_input(attention):
    net, loss = attention
    with pytest.raises(ProblemError, match="no leaf of this tree is deformed"):
        attacks.rebalance(loss, net.params, net.x)
    with pytest.raises(ProblemError, match="'third/w' is no plain leaf"):
        attacks.rebalance(loss, net.params, net.x, pairs=[AdjacentPair("first/w", "third/w")])
    with pytest.raises(ProblemError, match="stand in two pairs"):
        attacks.rebalance(loss, net.params, net.x, pairs=[PAIR, PAIR])
    with pytest.raises(StructureError, match="do not fit together in 5 groups"):
        attacks.rebalance(loss, net.params, net.x, pairs=[AdjacentPair("first/w", "second/w", groups=5)])
    with pytest.raises(StructureError, match="'q/b' has shape"):
        attacks.rebalance(loss, net.params, net.x, pairs=[AdjacentPair("first/w", "second/w", "q/b", 2)])
    broken = {
        **net.params,
        "first": {**net.params["first"], "w": net.params["first"]["w"].at[0, 0].set(jnp.nan)},
    }
    with pytest.raises(ProblemError, match="NaN or Inf"):
        attacks.rebalance(loss, broken, net.x, pairs=[PAIR])


def test_examples():
    assert doctest.testmod(adjacent).failed == 0
