"""Emulated TF32: products of rounded operands, nothing else touched."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from specdef_jax.errors import SpecError
from specdef_jax.precision import as_format
from specdef_jax.rounding import round_products

TF32 = as_format("tf32")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def ten_bits(x):
    """Round to 10 explicit bits, ties to even, with NumPy integers."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    lower = bits & 0x1FFF
    up = (lower > 0x1000) | ((lower == 0x1000) & ((bits >> 13) & 1 == 1))
    return ((bits - lower) + np.where(up, 0x2000, 0)).astype(np.uint32).view(np.float32)


A, B = normal(0, 5, 7), normal(1, 7, 3)


def test_operands_of_a_product_are_rounded_to_ten_bits_and_nothing_else_is():
    found = round_products(lambda a, b: (a @ b + a[:, :3]) * 3, TF32)(A, B)
    np.testing.assert_array_equal(found, (jnp.asarray(ten_bits(A)) @ ten_bits(B) + A[:, :3]) * 3)
    assert np.abs(found - (A @ B + A[:, :3]) * 3).max() > 1e-5


@jax.custom_jvp
def square(x):
    return x @ x.T


@square.defjvp
def _(primals, tangents):
    return square(*primals), tangents[0] @ primals[0].T


@jax.custom_vjp
def cube(x):
    return x @ x.T @ x


cube.defvjp(lambda x: (cube(x), x), lambda x, g: (g,))


@pytest.mark.parametrize(
    "fn", [square, jax.jit(lambda x: jax.jit(square)(x)), cube], ids=["jvp", "jit", "vjp"]
)
def test_products_inside_calls_are_rounded(fn):
    x = jnp.asarray(ten_bits(A))
    expected = x @ x.T
    if fn is cube:
        expected = jnp.asarray(ten_bits(expected)) @ x
    np.testing.assert_array_equal(round_products(fn, TF32)(A), expected)


def test_convolutions_are_rounded_and_integers_and_float64_are_not():
    x, kernel = normal(2, 1, 5, 5, 2), normal(3, 3, 3, 2, 4)

    def conv(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    np.testing.assert_array_equal(round_products(conv, TF32)(x, kernel), conv(ten_bits(x), ten_bits(kernel)))
    for other in (A.astype(jnp.float64) * 1e60, jnp.arange(12).reshape(3, 4) + 2**20):
        np.testing.assert_array_equal(round_products(lambda x: x @ x.T, TF32)(other), other @ other.T)


def test_trees_come_back_as_trees_and_jit_takes_the_result():
    def fn(tree):
        return {"out": tree["a"] @ tree["b"], "same": tree["a"], "one": 1.0}

    found = jax.jit(round_products(fn, TF32))({"a": A, "b": B})
    np.testing.assert_allclose(found["out"], ten_bits(A) @ ten_bits(B), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found["same"], A)
    assert float(found["one"]) == 1


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (lambda x: lax.scan(lambda c, _: (c @ c.T, None), x[:, :5], length=2)[0], "scan"),
        (lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x.T, lambda x: x[:, :5], x), "cond"),
        (lambda x: jax.checkpoint(lambda x: x @ x.T)(x), "(checkpoint|remat2)"),
    ],
)
def test_products_inside_control_flow_are_refused(fn, name):
    with pytest.raises(SpecError, match=rf"inside '{name}'.*unroll"):
        round_products(fn, TF32)(A)


def test_control_flow_without_products_is_left_alone():
    def fn(x):
        return lax.scan(lambda c, _: (jnp.tanh(c), None), x, length=2)[0] @ B

    expected = jnp.asarray(ten_bits(jnp.tanh(jnp.tanh(A)))) @ ten_bits(B)
    np.testing.assert_allclose(round_products(fn, TF32)(A), expected, rtol=1e-6, atol=1e-6)
