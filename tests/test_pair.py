"""The pair of one matrix by parts: frame, weight and compensation against dense T(a) (THEORY.md 0, 1.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax.pair import build_pair, compensation, deformed_weight, frame_of

ALPHA, K, D, REST = 16.0, 3, 7, 11
BASES = ["symmetric", "rotated", "axis"]
SIDES = ["output", "input"]


def directions(basis: str, stack: tuple[int, ...] = ()) -> np.ndarray:
    rng = np.random.default_rng(2)
    if basis == "axis":
        return np.broadcast_to(np.eye(D)[:, [5, 0, 3]], (*stack, D, K)).copy()
    return np.linalg.qr(rng.normal(size=(*stack, D, K)))[0]


def matrix(side: str, stack: tuple[int, ...] = ()) -> np.ndarray:
    shape = (REST, D) if side == "output" else (D, REST)
    return np.random.default_rng(3).normal(size=(*stack, *shape))


def swapped(a: np.ndarray) -> np.ndarray:
    return np.swapaxes(a, -1, -2)


@pytest.mark.parametrize("stack", [(), (2, 3)])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("basis", BASES)
def test_weight_and_compensation_are_those_of_the_definition(basis, side, stack):
    U, M, alpha = directions(basis, stack), matrix(side, stack), jnp.asarray(ALPHA)
    frame = frame_of(jnp.asarray(U), basis)
    weight = np.asarray(deformed_weight(jnp.asarray(M), frame, K, alpha, basis, side))
    comp = np.asarray(compensation(frame, K, alpha, basis, side))
    np.testing.assert_allclose(weight @ comp if side == "output" else comp @ weight, M, rtol=0, atol=1e-13)
    T = np.eye(D) + (ALPHA - 1) * U @ swapped(U)
    if basis == "rotated":  # Q D on one side and D^-1 Q^T on the other: T(a) up to an orthogonal factor
        gram = weight @ swapped(weight) if side == "output" else swapped(weight) @ weight
        squared = M @ T @ T @ swapped(M) if side == "output" else swapped(M) @ T @ T @ M
        np.testing.assert_allclose(gram, squared, rtol=0, atol=1e-10)
        inner = comp @ swapped(comp) if side == "output" else swapped(comp) @ comp
        scales = [ALPHA**-2] * K + [1.0] * (D - K)
        np.testing.assert_allclose(inner, np.broadcast_to(np.diag(scales), inner.shape), rtol=0, atol=1e-13)
    else:
        np.testing.assert_allclose(weight, M @ T if side == "output" else T @ M, rtol=0, atol=1e-12)
        np.testing.assert_allclose(comp, np.linalg.inv(T), rtol=0, atol=1e-13)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("basis", BASES)
def test_parts_of_a_matrix_give_parts_of_its_weight(basis, side):
    M, alpha = jnp.asarray(matrix(side)), jnp.asarray(ALPHA)
    frame = frame_of(jnp.asarray(directions(basis)), basis)
    whole = deformed_weight(M, frame, K, alpha, basis, side)
    axis = 0 if side == "output" else 1
    split = [deformed_weight(part, frame, K, alpha, basis, side) for part in jnp.split(M, [2, 3], axis)]
    np.testing.assert_allclose(jnp.concatenate(split, axis), whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("basis", BASES)
def test_build_pair_is_made_of_the_parts(basis, side):
    M, U, alpha = jnp.asarray(matrix(side)), jnp.asarray(directions(basis)), jnp.asarray(ALPHA)
    frame = frame_of(U, basis)
    weight, comp = build_pair(M, U, alpha, basis, side)
    np.testing.assert_array_equal(weight, deformed_weight(M, frame, K, alpha, basis, side))
    np.testing.assert_array_equal(comp, compensation(frame, K, alpha, basis, side))


@pytest.mark.parametrize("stack", [(), (4,)])
def test_the_frame_is_orthonormal_to_float64_though_the_directions_are_not(stack):
    rough = directions("symmetric", stack).astype(np.float32)
    assert np.abs(swapped(rough).astype(float) @ rough - np.eye(K)).max() > 1e-9
    polished = np.asarray(frame_of(jnp.asarray(rough), "symmetric"))
    np.testing.assert_allclose(polished, rough, rtol=0, atol=1e-6)
    whole = np.asarray(frame_of(jnp.asarray(rough), "rotated"))
    for frame, columns in ((polished, K), (whole, D)):
        assert frame.shape == (*stack, D, columns)
        gram = swapped(frame) @ frame
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(columns), gram.shape), rtol=0, atol=1e-14)
    spans = whole[..., :K] @ swapped(whole[..., :K])
    np.testing.assert_allclose(spans, polished @ swapped(polished), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(frame_of(jnp.asarray(directions("axis")), "axis"), directions("axis"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("basis", BASES)
def test_factors_are_float64_whatever_the_caller_has_enabled(basis, dtype):
    M = matrix("output").astype(jnp.dtype(dtype))
    U = directions(basis).astype(np.float32)
    with jax.enable_x64(False):
        weight, comp = build_pair(jnp.asarray(M), jnp.asarray(U), jnp.asarray(ALPHA), basis, "output")
    assert weight.dtype == comp.dtype == np.float64
    np.testing.assert_allclose(np.asarray(weight) @ np.asarray(comp), M.astype(float), rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", SIDES)
def test_the_precision_of_the_matrix_costs_its_part_along_u_alone(side):
    """M U is taken in single precision: what is off is off along U, and no more than that, at any alpha."""
    U, alpha = directions("symmetric"), jnp.asarray(2.0**20)
    M = matrix(side).astype(np.float32)
    weight, comp = map(np.asarray, build_pair(jnp.asarray(M), jnp.asarray(U), alpha, "symmetric", side))
    error = (weight @ comp - M) if side == "output" else (comp @ weight - M).T
    assert np.abs(error).max() < 1e-6
    np.testing.assert_allclose(error @ (np.eye(D) - U @ U.T), 0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("side", SIDES)
def test_a_power_of_two_on_the_axis_changes_exponents_only(side, dtype):
    M = matrix(side).astype(jnp.dtype(dtype))
    U = jnp.asarray(directions("axis"))
    weight, comp = build_pair(jnp.asarray(M), U, jnp.asarray(2.0**12), "axis", side)
    scales = np.where(np.isin(np.arange(D), [5, 0, 3]), 2.0**12, 1.0)
    np.testing.assert_array_equal(comp, np.diag(1 / scales))
    expected = M.astype(float) * (scales if side == "output" else scales[:, None])
    np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("side", SIDES)
def test_a_power_of_two_scales_rotated_factors_after_the_rotation(side):
    """THEORY.md 1.3: the rotated pair is its own a = 1 form but for exponents."""
    M, U = jnp.asarray(matrix(side)), jnp.asarray(directions("rotated"))
    scales = np.where(np.arange(D) < K, 2.0**30, 1.0)
    (one, comp_one), (wide, comp_wide) = (
        build_pair(M, U, jnp.asarray(alpha), "rotated", side) for alpha in (1.0, 2.0**30)
    )
    if side == "output":
        np.testing.assert_array_equal(wide, one * scales)
        np.testing.assert_array_equal(comp_wide, comp_one / scales[:, None])
    else:
        np.testing.assert_array_equal(wide, one * scales[:, None])
        np.testing.assert_array_equal(comp_wide, comp_one / scales)


def test_alpha_may_be_traced_and_below_one():
    M, U = jnp.asarray(matrix("output")), jnp.asarray(directions("symmetric"))
    for alpha in (1e-3, 1.0, 1e3):
        pair = jax.jit(lambda a: build_pair(M, U, a, "symmetric", "output"))(jnp.asarray(alpha))
        np.testing.assert_allclose(pair[0] @ pair[1], M, rtol=0, atol=1e-11)
        norm = np.linalg.norm(pair[1] @ U, ord=2)
        assert norm == pytest.approx(1 / alpha)
