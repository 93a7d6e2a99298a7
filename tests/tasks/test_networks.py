"""Architectures: shapes, names, and that each part of them matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specdef_jax as sd
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


@pytest.mark.parametrize(
    ("size", "window", "stride"), [(8, 3, 1), (8, 3, 2), (5, 2, 2), (4, 2, 1), (7, 3, 2)]
)
def test_convolution_is_that_of_jax(size, window, stride):
    x = jax.random.normal(KEY, (2, size, size, 3))
    kernel = jax.random.normal(KEY, (window, window, 3, 4))
    dims = ("NHWC", "HWIO", "NHWC")
    want = jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=dims)
    np.testing.assert_allclose(networks._convolve(x, kernel, stride), want, atol=1e-12)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("name", list(MADE))
def test_every_kernel_has_a_layered_form(name, side):
    network = MADE[name]
    params, x = network.init(KEY), jax.random.normal(KEY, (3, 64))
    for kernel in network.kernels:
        if name == "cnn" and kernel == "conv_0/w" and side == "input":
            continue  # one input channel: nothing to choose among
        deformed = sd.deform(params, sd.SpecDef(alpha=4.0, side=side), where=kernel, key=KEY)
        np.testing.assert_allclose(
            sd.layered(network.apply)(deformed, x), network.apply(params, x), atol=1e-11, err_msg=kernel
        )


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
