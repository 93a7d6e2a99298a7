"""One helper for every linear map: what may stand for a kernel."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax.errors import StructureError
from specdef_jax.models.linear import linear, take
from specdef_jax.parametrization import KernelAxes

KEY = jax.random.key(5)
H = jax.random.normal(KEY, (2, 3, 4))
W = jax.random.normal(jax.random.key(6), (4, 5))
STACK = jax.random.normal(jax.random.key(7), (6, 4, 5))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A frozen kernel and a trainable product, applied in parts."""

    base: jax.Array
    down: jax.Array
    up: jax.Array

    def materialize(self):
        return self.base + self.down @ self.up

    def apply(self, h):
        return h @ self.base + (h @ self.down) @ self.up


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled:
    kernel: jax.Array

    def materialize(self):
        return 2 * self.kernel


def deformed(kernel, side="auto", basis="symmetric", **options):
    return sd.deform(
        {"w": kernel}, sd.SpecDef(alpha=8.0, side=side, basis=basis), where="w", key=KEY, **options
    )["w"]


def test_a_plain_kernel_and_a_bias():
    b = jnp.arange(5.0)
    np.testing.assert_allclose(linear(H, W, b), np.asarray(H) @ np.asarray(W) + np.asarray(b), atol=1e-14)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("basis", ["symmetric", "rotated", "axis"])
def test_a_pair_is_two_products_in_the_order_of_the_released_network(side, basis):
    pair = deformed(W, side, basis)
    first, second = (pair.weight, pair.comp) if side == "output" else (pair.comp, pair.weight)
    np.testing.assert_allclose(linear(H, pair), (H @ first) @ second, atol=1e-14)
    np.testing.assert_allclose(linear(H, pair), H @ W, atol=1e-13)


def test_a_pair_in_the_layout_of_pytorch_is_read_as_it_is():
    pair = deformed(W.T, "output", axes=((1,), (0,)))
    np.testing.assert_allclose(linear(H, pair), H @ W, atol=1e-13)


def test_products_of_a_pair_ask_for_full_precision_and_wide_sums():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), deformed(W, "output"))
    text = str(jax.make_jaxpr(linear)(H.astype(jnp.bfloat16), half))
    assert text.count("dot_general[") == 2
    assert text.count("Precision.HIGHEST, Precision.HIGHEST") == 2
    assert text.count("preferred_element_type=float32") == 2


@pytest.mark.parametrize("side", ["output", "input"])
def test_stacks_of_kernels(side):
    pair = deformed(STACK, side, stacked=True)
    b = jax.random.normal(KEY, (6, 5))
    flat = H.reshape(-1, 4)
    want = jnp.einsum("tn,enm->etm", flat, STACK) + b[:, None]
    for w in (STACK, pair):
        np.testing.assert_allclose(linear(flat, w, b), want, atol=1e-13)
        np.testing.assert_allclose(linear(jnp.stack([flat] * 6), w, b), want, atol=1e-13)


@pytest.mark.parametrize("kind", ["plain", "output", "input", "other"])
def test_chosen_kernels_of_a_stack(kind):
    w = {"plain": STACK, "other": Scaled(STACK / 2)}.get(kind)
    w = deformed(STACK, kind, stacked=True) if w is None else w
    chosen = jnp.asarray([[1, 5], [0, 1], [3, 3]])
    h = jax.random.normal(KEY, (3, 4))
    found = linear(h[:, None, None], take(w, chosen))[..., 0, :]
    np.testing.assert_allclose(found, jnp.einsum("tn,tknm->tkm", h, STACK[chosen]), atol=1e-13)
    one = linear(h, take(w, jnp.asarray([2])))[0]
    np.testing.assert_allclose(one, h @ STACK[2], atol=1e-13)


def test_other_structured_weights_are_applied_by_themselves_or_read_back():
    low = LowRank(W, jnp.ones((4, 1)), jnp.ones((1, 5)))
    np.testing.assert_allclose(linear(H, low), H @ (W + 1), atol=1e-13)
    assert str(jax.make_jaxpr(linear)(H, low)).count("dot_general[") == 3
    np.testing.assert_allclose(linear(H, Scaled(W)), 2 * (H @ W), atol=1e-13)
    slopes = jax.grad(lambda w: jnp.sum(linear(H, w) ** 2))(low)
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(slopes))


def test_a_convolution_is_refused():
    kernel = jax.random.normal(KEY, (3, 3, 4, 5))
    with pytest.raises(StructureError, match="is a convolution"):
        linear(H, deformed(kernel, "output", axes=KernelAxes((2,), (3,), (0, 1))))
