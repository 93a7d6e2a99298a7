"""The product of windows is the convolution, with its derivatives, at every stride and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from specdef_jax.convolution import by_windows


def direct(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((1, 1), (1, 1)), ((0, 1), (2, 0))])
@pytest.mark.parametrize("window", [(3, 3), (2, 3), (1, 1)])
def test_it_is_the_convolution(stride, padding, window):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, 7, 6, 3)), jax.random.normal(keys[1], (*window, 3, 4))
    expected = direct(x, kernel, stride, padding)
    found, pull = jax.vjp(lambda x, k: by_windows(x, k, stride, padding), x, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    cotangent = jax.random.normal(keys[2], expected.shape)
    _, reference = jax.vjp(lambda x, k: direct(x, k, stride, padding), x, kernel)
    for ours, theirs in zip(pull(cotangent), reference(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_single_precision_stays_so():
    x, kernel = jnp.ones((1, 4, 4, 2), jnp.float32), jnp.ones((3, 3, 2, 2), jnp.float32)
    assert by_windows(x, kernel, 1, ((1, 1), (1, 1))).dtype == jnp.float32
