"""Architectures: shapes, names, and that each part of them matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax import trees
from specdef_jax.errors import SpecError
from specdef_jax.tasks import networks

KEY = jax.random.key(14)
MADE = {
    "mlp": networks.mlp((64, 6, 5, 10)),
    "relu": networks.mlp((64, 6, 5, 10), "relu"),
    "cnn": networks.cnn(channels=(3, 4)),
    "transformer": networks.transformer(dim=8, heads=2, hidden=6, blocks=2),
}


@pytest.mark.parametrize("name", list(MADE))
def test_logits_and_kernels(name):
    network = MADE[name]
    params, x = network.init(KEY), jax.random.normal(KEY, (3, 64))
    assert network.apply(params, x).shape == (3, 10)
    leaves = dict(trees.named_leaves(params))
    assert set(network.kernels) <= set(leaves)
    assert all(leaves[k].ndim >= 2 for k in network.kernels)
    # Every leaf moves the output.
    loss = jax.grad(lambda p: jnp.sum(network.apply(p, x) ** 2))(params)
    for path, leaf in trees.named_leaves(loss):
        # keys only shift all scores of a query by the same amount, which the softmax drops
        assert (float(jnp.abs(leaf).max()) > 1e-8) != path.endswith("_k/b"), path


@pytest.mark.parametrize("name", list(MADE))
def test_examples_do_not_see_each_other(name):
    network = MADE[name]
    params, x = network.init(KEY), jax.random.normal(KEY, (3, 64))
    np.testing.assert_allclose(network.apply(params, x)[1], network.apply(params, x[1:2])[0], atol=1e-12)


def test_one_object_per_architecture():
    assert networks.mlp((4, 3)) is networks.mlp((4, 3))
    assert networks.mlp((4, 3)) is not networks.mlp((4, 3), "relu")


def test_bad_input():
    with pytest.raises(SpecError, match="at least inputs and logits"):
        networks.mlp((4,))
    with pytest.raises(SpecError, match="multiple of heads"):
        networks.transformer(dim=5, heads=2)
    with pytest.raises(SpecError, match="activation 'swish'"):
        networks._activation("swish")
