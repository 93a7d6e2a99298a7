"""Outputs of kernels taken from networks as they are, against the same computed by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax.errors import LayeredUnsupported, SelectionError
from specdef_jax.tasks import networks

KEY = jax.random.key(12)


def rows_of(array):
    """The rows of an array in some order."""
    return np.asarray(array)[np.lexsort(np.asarray(array).T)]


def test_a_convolution_gives_a_row_per_position():
    made = networks.cnn((4, 4, 1), (3, 2), classes=2)
    params, x = made.init(KEY), jax.random.normal(KEY, (5, 16))
    found = sd.activations(made.apply, params, x, where="conv_*/w")
    assert {k: v.shape for k, v in found.items()} == {"conv_0/w": (5 * 16, 3), "conv_1/w": (5 * 4, 2)}
    want = jax.lax.conv_general_dilated(
        x.reshape(5, 4, 4, 1),
        params["conv_0"]["w"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(rows_of(found["conv_0/w"]), rows_of(want.reshape(-1, 3)), atol=1e-12)


def test_a_transformer_gives_a_row_per_token():
    made = networks.transformer(tokens=3, features=2, dim=4, heads=2, hidden=5, classes=3)
    params, x = made.init(KEY), jax.random.normal(KEY, (6, 6))
    found = sd.activations(made.apply, params, x, where="patch/w")
    want = x.reshape(-1, 2) @ params["patch"]["w"]
    np.testing.assert_allclose(rows_of(found["patch/w"]), rows_of(want), atol=1e-12)
    every = sd.activations(made.apply, params, x)
    assert set(made.kernels) <= set(every)
    assert every["head/w"].shape == (6, 3)


def test_a_kernel_used_twice_gives_both():
    def apply(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    params, x = {"w": jax.random.normal(KEY, (3, 3))}, jax.random.normal(KEY, (4, 3))
    found = sd.activations(apply, params, x, where="w")["w"]
    want = jnp.concatenate([x @ params["w"], jnp.tanh(x @ params["w"]) @ params["w"]])
    np.testing.assert_allclose(found, want, rtol=1e-12)


def test_flax_under_vmap_jit_and_remat():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.remat(nn.Dense)(4)(x))

    x = jax.random.normal(KEY, (5, 3))
    params = Net().init(KEY, x)["params"]

    def apply(params, x):
        return jax.vmap(jax.jit(lambda row: Net().apply({"params": params}, row)))(x)

    found = sd.activations(apply, params, x, where="*/kernel")
    name = next(n for n in found if "Dense_0" in n and "Checkpoint" not in n)
    assert {v.shape[-1] for v in found.values()} == {2, 4}
    assert all(v.shape[0] == 5 for v in found.values())
    assert name


def test_stacked_layers():
    def apply(params, x):
        return jnp.einsum("bi,lio->lbo", x, params["w"]).sum(0)

    params, x = {"w": jax.random.normal(KEY, (2, 3, 4))}, jax.random.normal(KEY, (5, 3))
    found = sd.activations(apply, params, x, where="w", stacked=True)["w"]
    np.testing.assert_allclose(found, jnp.einsum("bi,lio->lbo", x, params["w"]), rtol=1e-12)


def test_bad_input():
    def loop(params, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ params["w"]), None), x, None, length=2)[0]

    params, x = {"w": jnp.eye(3), "unused": jnp.eye(3)}, jnp.ones((2, 3))
    with pytest.raises(LayeredUnsupported, match="Activations cannot be taken out of it"):
        sd.activations(loop, params, x, where="w")
    with pytest.raises(SelectionError, match=r"\['unused'\] are never multiplied"):
        sd.activations(lambda p, x: x @ p["w"], params, x, where="unused")
    with pytest.raises(SelectionError, match="matched nothing"):
        sd.activations(lambda p, x: x @ p["w"], params, x, where="v")
