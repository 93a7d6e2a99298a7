"""Activations and gradients taken from a loss alone, for every way to write a dense layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from specdef_jax import trees
from specdef_jax.optim.dense_layers import dense_layers
from specdef_jax.tasks.networks import mlp, transformer

KEY = jax.random.key(0)


def layers_of(loss, params, batch=None):
    numbers = [i for i, x in enumerate(jax.tree.leaves(params)) if x.ndim == 2]
    names = [name for name, _ in trees.named_leaves(params)]
    found = dense_layers(loss, params, numbers, batch, "kfac")
    return {names[i]: layer for i, layer in found.items()}, names


def test_every_way_to_write_a_dense_layer_is_found_to_be_the_same():
    rng = np.random.default_rng(1)
    x, w, b = (jnp.asarray(rng.standard_normal(s)) for s in ((30, 5), (5, 4), (4,)))
    target = jnp.asarray(rng.standard_normal((30, 4)))

    def finish(z):
        return jnp.mean(jnp.sum((jnp.sin(z) - target) ** 2, -1))

    ways = {
        "matmul": (lambda p: x @ p["w"] + p["b"], 0),
        "einsum": (lambda p: jnp.einsum("bi,io->bo", x, p["w"]) + p["b"], 0),
        "einsum back": (lambda p: (jnp.einsum("io,bi->ob", p["w"], x) + p["b"][:, None]).T, 0),
        "remat": (jax.checkpoint(lambda p: x @ p["w"] + p["b"]), 0),
        "jit": (jax.jit(lambda p: p["b"] + x @ p["w"]), 0),
        "transposed": (lambda p: (p["w"].T @ x.T).T + p["b"][None], 0),
        "other layout": (lambda p: x @ p["w"].T + p["b"], 1),
        "vmap, from the left": (lambda p: jax.vmap(lambda row: p["w"] @ row + p["b"])(x), 1),
        "linear": (lambda p: jax.vmap(lambda row: jnp.dot(row, p["w"]) + p["b"])(x), 0),
    }
    expected = None
    for way, (layer, axis) in ways.items():
        params = {"b": b, "w": w.T if axis else w}
        found, names = layers_of(lambda p, layer=layer: finish(layer(p)), params)
        assert list(found) == ["w"], way
        assert (found["w"].axis, found["w"].batch, names[found["w"].bias]) == (axis, 30, "b"), way
        np.testing.assert_allclose(found["w"].h, x, err_msg=way)
        expected = found["w"].g if expected is None else expected
        np.testing.assert_allclose(found["w"].g, expected, atol=1e-14, err_msg=way)
    z = x @ w + b
    np.testing.assert_allclose(expected, 2 * (jnp.sin(z) - target) * jnp.cos(z) / 30, atol=1e-14)


def test_a_kernel_used_twice_is_two_positions():
    rng = np.random.default_rng(2)
    x, w = jnp.asarray(rng.standard_normal((7, 4))), jnp.asarray(rng.standard_normal((4, 4)))
    params = {"w": w}
    (layer,) = layers_of(lambda p: jnp.mean(jnp.tanh(x @ p["w"]) @ p["w"]), params)[0].values()
    np.testing.assert_allclose(layer.h, jnp.concatenate([x, jnp.tanh(x @ w)]))
    assert layer.g.shape == (14, 4)
    np.testing.assert_allclose(layer.h.T @ layer.g, jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w) @ w))(w))


def test_h_and_g_of_a_transformer_give_back_its_gradients():
    """sum h g^T is the gradient of a kernel, sum g that of its bias."""
    network = transformer()
    params = network.init(KEY)
    x = jax.random.normal(KEY, (12, 64))
    y = jnp.arange(12) % 10

    def loss(p):
        return optax.softmax_cross_entropy_with_integer_labels(network.apply(p, x), y).mean()

    found, names = layers_of(loss, params)
    assert set(found) == set(network.kernels)
    gradients = dict(trees.named_leaves(jax.grad(loss)(params)))
    for name, layer in found.items():
        np.testing.assert_allclose(layer.h.T @ layer.g, gradients[name], atol=1e-12)
        assert names[layer.bias] == name.replace("/w", "/b")
        np.testing.assert_allclose(layer.g.sum(0), gradients[names[layer.bias]], atol=1e-12)
        assert layer.batch == 12


def test_it_takes_layers_of_flax():
    x = jax.random.normal(KEY, (12, 5))
    dense = nn.Sequential([nn.Dense(4), jnp.tanh, nn.DenseGeneral((2, 3)), nn.LayerNorm()])
    params = dense.init(KEY, x)
    found, names = layers_of(lambda p: jnp.mean(jnp.sin(dense.apply(p, x)) ** 2), params)
    assert {name: names[layer.bias] for name, layer in found.items()} == {
        "params/layers_0/kernel": "params/layers_0/bias"
    }


def test_it_takes_a_network_of_the_package():
    network = mlp()
    params = network.init(KEY)
    x = jax.random.normal(KEY, (20, 64))
    found, _ = layers_of(lambda p: jnp.mean(network.apply(p, x) ** 2), params)
    assert tuple(found) == network.kernels
