"""Stored factors, built by parts, are those of the definition, rounded once (THEORY.md 0)."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from specdef_jax.hub import factors
from specdef_jax.parametrization import KernelAxes
from specdef_jax.spec import Layer

AXES = {
    "jax": ((12, 8), KernelAxes((0,), (1,))),
    "hf": ((8, 12), KernelAxes((1,), (0,))),
    "convolution": ((3, 3, 6, 8), KernelAxes((2,), (3,), (0, 1))),
    "hf convolution": ((8, 6, 3, 3), KernelAxes((1,), (0,), (2, 3))),
    "experts": ((3, 12, 8), KernelAxes((1,), (2,), stack=(0,))),
    "heads": ((6, 4, 5), KernelAxes((0,), (1, 2))),
    "middle stack": ((12, 3, 8), KernelAxes((0,), (2,), stack=(1,))),
}
DTYPES = [np.dtype(np.float64), np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]
ALPHA, K = 8.0, 2


def layer_of(shape, axes: KernelAxes, side, basis: str) -> Layer:
    rng = np.random.default_rng(1)
    d, stack = axes.dim(shape, side), tuple(shape[i] for i in axes.stack)
    if basis == "axis":
        U = np.stack([np.eye(d)[:, rng.permutation(d)[:K]] for _ in range(int(np.prod(stack)))])
    else:
        U = np.linalg.qr(rng.normal(size=(int(np.prod(stack)), d, K)))[0]
    U = U.reshape(*stack, d, K)
    nothing = jnp.zeros(stack)
    return Layer(
        jnp.asarray(U), jnp.asarray(ALPHA), jnp.zeros((*stack, K)), nothing, nothing, side, basis, axes
    )


def as_matrices(array: np.ndarray, axes: KernelAxes, side: str) -> np.ndarray:
    """Return (stack, rest, d) in float64, feature axes last."""
    features, other = (axes.outputs, axes.inputs) if side == "output" else (axes.inputs, axes.outputs)
    moved = array.astype(float).transpose(axes.stack + axes.window + other + features)
    stack = int(np.prod([array.shape[i] for i in axes.stack]))
    return moved.reshape(stack, -1, int(np.prod([array.shape[i] for i in features])))


@pytest.fixture(params=[1 << 23, 20], ids=["whole", "by parts"])
def part(request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_PART", request.param)


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("basis", ["symmetric", "rotated", "axis"])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("layout", AXES)
def test_both_factors_are_those_of_the_definition(layout, side, basis):
    shape, axes = AXES[layout]
    array = np.random.default_rng(0).normal(size=shape)
    layer = layer_of(shape, axes, side, basis)
    weight, comp = factors.build_stored(array, layer, DTYPES[0])
    assert weight.shape == shape
    d = axes.dim(shape, side)
    assert comp.shape == (*(shape[i] for i in axes.stack), d, d)
    U = np.asarray(layer.U).reshape(-1, d, K)
    for M, found, C, u in zip(
        as_matrices(array, axes, side),
        as_matrices(weight, axes, side),
        comp.reshape(-1, d, d),
        U,
        strict=True,
    ):
        right = C if side == "output" else C.T
        np.testing.assert_allclose(found @ right, M, rtol=0, atol=1e-13)
        T = np.eye(d) + (ALPHA - 1) * u @ u.T
        if basis == "rotated":
            np.testing.assert_allclose(found @ found.T, M @ T @ T @ M.T, rtol=0, atol=1e-11)
            np.testing.assert_allclose(
                right @ right.T, np.diag([ALPHA**-2] * K + [1] * (d - K)), rtol=0, atol=1e-13
            )
        else:
            np.testing.assert_allclose(found, M @ T, rtol=0, atol=1e-13)
            np.testing.assert_allclose(C, np.linalg.inv(T), rtol=0, atol=1e-13)


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["jax", "hf", "hf convolution", "middle stack"])
def test_factors_are_rounded_once_from_float64(layout, dtype):
    shape, axes = AXES[layout]
    array = np.random.default_rng(0).normal(size=shape).astype(DTYPES[2])
    layer = layer_of(shape, axes, "input", "rotated")
    wide = factors.build_stored(array, layer, DTYPES[0])
    for found, exact in zip(factors.build_stored(array, layer, dtype), wide, strict=True):
        assert found.dtype == dtype
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, exact.astype(dtype))


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("layout", AXES)
def test_two_factors_fuse_to_their_product(layout, side, diagonal):
    shape, axes = AXES[layout]
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape)
    d, stack = axes.dim(shape, side), tuple(shape[i] for i in axes.stack)
    comp = rng.normal(size=(*stack, d, d)) * (np.eye(d) if diagonal else 1)
    fused = factors.fuse_stored(weight, comp, axes, side, DTYPES[0])
    assert fused.shape == shape
    for M, found, C in zip(
        as_matrices(weight, axes, side), as_matrices(fused, axes, side), comp.reshape(-1, d, d), strict=True
    ):
        np.testing.assert_allclose(found, M @ (C if side == "output" else C.T), rtol=0, atol=1e-13)


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_computed_in_float64_and_rounded_once(dtype):
    shape, axes = AXES["hf"]
    rng = np.random.default_rng(0)
    weight, comp = (rng.normal(size=s).astype(DTYPES[2]) for s in (shape, (8, 8)))
    wide = factors.fuse_stored(weight, comp, axes, "output", DTYPES[0])
    np.testing.assert_allclose(wide, comp.astype(float).T @ weight.astype(float), rtol=0, atol=1e-14)
    fused = factors.fuse_stored(weight, comp, axes, "output", dtype)
    assert fused.dtype == dtype
    np.testing.assert_array_equal(fused, wide.astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("layout", ["jax", "hf", "hf convolution", "experts"])
def test_a_power_of_two_on_the_axis_comes_back_to_the_bit(layout, side, dtype):
    shape, axes = AXES[layout]
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    layer = layer_of(shape, axes, side, "axis")
    weight, comp = factors.build_stored(array, layer, dtype)
    assert (weight != array).any()
    np.testing.assert_array_equal(factors.fuse_stored(weight, comp, axes, side, dtype), array)
