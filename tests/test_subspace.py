"""Subspaces against numpy's full SVD, on matrices with a prescribed spectrum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdef_jax import block_iteration
from specdef_jax.errors import LeafError, SpecError
from specdef_jax.subspace import (
    Status,
    axis_subspace,
    bottom_subspace,
    given_subspace,
    random_subspace,
    top_subspace,
)

KEY = jax.random.key(0)
# Above DENSE_LIMIT, so these iterate; wide, tall and square, each dtype once at least.
CASES = [((300, 420), np.float32), ((420, 300), np.float64), ((300, 300), np.float32)]
INDEX = np.arange(1, 301)
SPECTRA = {
    "graded": 0.8**INDEX + 1e-6,
    "power law": INDEX**-1.0,
    "clustered": np.where(INDEX <= 3, 5.0, np.where(INDEX <= 12, 2.0, 0.1)) * (1 + 1e-5 * INDEX),
    "gap": np.where(INDEX <= 8, 1.0, 0.2) / np.sqrt(INDEX),
    "equal": np.ones(300),
}


def prescribed(shape, values, seed=0, dtype=np.float64):
    """Return U diag(values) V^T with random U and V."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, len(values))))[0] for n in shape)
    return ((left * values) @ right.T).astype(dtype)


def tail(count, low=0.01, high=1.0):
    """Return a spectrum with `count` small values below a gap."""
    return np.where(301 - count <= INDEX, low * (1 + INDEX / 300), high + 1 / INDEX)


def sine_of_angle(U, V):
    """Return the sine of the largest principal angle between two subspaces of equal dimension."""
    U, V = np.asarray(U, np.float64), np.asarray(V, np.float64)
    return np.linalg.norm(U - V @ (V.T @ U), 2)


def residual_of(matrix, found):
    """Evaluate the residual of the Subspace docstring in numpy."""
    M, U = np.asarray(matrix, np.float64), np.asarray(found.U, np.float64)
    s = np.linalg.norm(M @ U, axis=0)
    eps = np.finfo(np.asarray(found.U).dtype).eps
    counted = s > eps * max(M.shape) ** 0.5 * np.linalg.norm(M, 2)
    if not counted.any():
        return 0.0
    errors = M.T @ (M @ U[:, counted] / s[counted]) - U[:, counted] * s[counted]
    return np.linalg.norm(errors, axis=0).max() / s.max()


def check_honest(matrix, found):
    """Orthonormal to a few eps; singular values and residual are what numpy finds for this U."""
    U = np.asarray(found.U, np.float64)
    eps = np.finfo(np.asarray(found.U).dtype).eps
    scale = float(np.linalg.norm(matrix, 2))
    assert np.abs(U.T @ U - np.eye(U.shape[1])).max() < 50 * eps
    sigma = np.linalg.norm(np.asarray(matrix, np.float64) @ U, axis=0)
    np.testing.assert_allclose(found.singular_values, sigma, rtol=1e-5, atol=20 * eps * scale)
    assert float(found.residual) == pytest.approx(
        residual_of(matrix, found), rel=1e-3, abs=float(100 * eps * scale / (sigma.max() or 1.0))
    )


@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("name", SPECTRA)
def test_top_matches_svd(name, shape, dtype):
    values = SPECTRA[name]
    matrix = prescribed(shape, values, dtype=dtype)
    found = top_subspace(jnp.asarray(matrix), 8, key=KEY)
    check_honest(matrix, found)
    assert found.U.dtype == dtype
    assert Status(int(found.status)) == Status.CONVERGED
    assert float(found.residual) <= 1e-2
    best = np.sort(values)[::-1][:8]
    assert np.sum(np.asarray(found.singular_values) ** 2) >= 0.999 * np.sum(best**2)
    assert np.all(np.diff(found.singular_values) <= 1e-6)


def test_top_finds_the_directions_and_tol_sharpens_them():
    matrix = prescribed((300, 420), SPECTRA["gap"])
    truth = np.linalg.svd(matrix)[2][:8].T
    angles, residuals = [], []
    for tol in (1e-2, 1e-8):
        found = top_subspace(matrix, 8, tol=tol, max_passes=50, key=KEY)
        assert Status(int(found.status)) == Status.CONVERGED
        assert float(found.residual) <= tol
        angles.append(sine_of_angle(found.U, truth))
        residuals.append(float(found.residual))
    # Davis-Kahan: the sine is at most residual * s_1 / gap, and sqrt(k) for all directions together.
    gap = (SPECTRA["gap"][7] - SPECTRA["gap"][8]) / SPECTRA["gap"][0]
    assert all(a <= 8**0.5 * r / gap for a, r in zip(angles, residuals, strict=True))
    assert angles[1] < 1e-6


def test_top_on_a_gaussian_stops_early_and_says_so():
    matrix = np.random.default_rng(0).standard_normal((600, 800)).astype(np.float32)
    found = top_subspace(matrix, 25, tol=1e-3, key=KEY)
    check_honest(matrix, found)
    assert Status(int(found.status)) == Status.FLAT_SPECTRUM
    assert int(found.passes) <= 6
    best = np.linalg.svd(matrix, compute_uv=False)[:25]
    assert np.sum(np.asarray(found.singular_values) ** 2) >= 0.9 * np.sum(best**2)


def test_top_that_runs_out_of_passes_is_stalled():
    found = top_subspace(prescribed((300, 420), SPECTRA["gap"]), 8, tol=1e-12, max_passes=3, key=KEY)
    assert Status(int(found.status)) == Status.STALLED
    assert int(found.passes) == 3


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_bottom_matches_svd_without_the_null_space(shape, dtype):
    matrix = prescribed(shape, tail(4), dtype=dtype)
    found = bottom_subspace(jnp.asarray(matrix), 4, tol=1e-4, key=KEY)
    check_honest(matrix, found)
    assert Status(int(found.status)) == Status.CONVERGED
    assert found.U.dtype == dtype
    truth = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(found.singular_values, truth[1][::-1][:4], rtol=1e-3)
    assert sine_of_angle(found.U, truth[2][-4:].T) < 1e-3


def test_bottom_of_a_nearly_singular_matrix():
    values = np.where(INDEX > 297, 1e-6 * (301 - INDEX), 1.0)
    matrix = prescribed((300, 420), values)
    found = bottom_subspace(matrix, 3, key=KEY)
    check_honest(matrix, found)
    np.testing.assert_allclose(found.singular_values, [1e-6, 2e-6, 3e-6], rtol=1e-4)


@pytest.mark.parametrize(("shape", "dtype"), [*CASES, ((60, 90), np.float64), ((90, 60), np.float32)])
@pytest.mark.parametrize("find", [top_subspace, bottom_subspace])
def test_rank_deficient_is_reported_and_still_orthonormal(find, shape, dtype):
    rank = 5 if find is top_subspace else min(shape) - 5
    matrix = prescribed(shape, np.linspace(2, 1, rank), dtype=dtype)
    found = find(matrix, 8, key=KEY)
    check_honest(matrix, found)
    assert Status(int(found.status)) == Status.RANK_DEFICIENT
    negligible = np.asarray(found.singular_values) < 1e-5
    assert negligible.sum() == (3 if find is top_subspace else 5)


def test_bottom_of_a_wide_matrix_with_zero_rows_is_annihilated():
    matrix = np.random.default_rng(0).standard_normal((300, 420))
    matrix[::60] = 0.0
    found = bottom_subspace(matrix, 8, key=KEY)
    check_honest(matrix, found)
    assert Status(int(found.status)) == Status.RANK_DEFICIENT
    assert (np.asarray(found.singular_values) < 1e-10).sum() == 5


@pytest.mark.parametrize("shape", [(300, 420), (50, 40)])
def test_zero_matrix(shape):
    matrix = np.zeros(shape, np.float32)
    for found in (
        top_subspace(matrix, 3, key=KEY),
        bottom_subspace(matrix, 3, key=KEY),
        axis_subspace(matrix, 3),
        axis_subspace(matrix, 3, bottom=True),
        random_subspace(matrix, 3, key=KEY),
    ):
        check_honest(matrix, found)
        assert Status(int(found.status)) == Status.RANK_DEFICIENT
        assert not np.asarray(found.singular_values).any()


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (300, 1)])
@pytest.mark.parametrize("find", [top_subspace, bottom_subspace])
def test_one_row_or_column(find, shape):
    matrix = np.random.default_rng(1).standard_normal(shape)
    found = find(matrix, 1, key=KEY)
    check_honest(matrix, found)
    assert Status(int(found.status)) == Status.EXACT
    assert float(found.singular_values[0]) == pytest.approx(np.linalg.norm(matrix))


def test_axis_takes_features_by_norm_with_ties_by_index():
    matrix = np.diag([2.0, 0.0, 3.0, 3.0, 1.0])
    top, bottom = axis_subspace(matrix, 3), axis_subspace(matrix, 3, bottom=True)
    assert np.argmax(top.U, axis=0).tolist() == [2, 3, 0]
    assert np.argmax(bottom.U, axis=0).tolist() == [4, 0, 2]
    for found in (top, bottom):
        check_honest(matrix, found)
        assert Status(int(found.status)) == Status.EXACT
        assert set(np.unique(found.U)) == {0.0, 1.0}
    skewed = np.random.default_rng(0).standard_normal((30, 20))
    check_honest(skewed, axis_subspace(skewed, 4))  # no singular vectors: a large residual, reported
    assert float(axis_subspace(skewed, 4).residual) > 0.1


def test_given_directions():
    matrix = np.random.default_rng(0).standard_normal((30, 20))
    columns = np.random.default_rng(1).standard_normal((20, 4))
    found = given_subspace(matrix, columns)
    check_honest(matrix, found)
    assert sine_of_angle(found.U, np.linalg.qr(columns)[0]) < 1e-14
    assert sine_of_angle(found.U[:, :1], columns[:, :1] / np.linalg.norm(columns[:, 0])) < 1e-14
    np.testing.assert_array_equal(given_subspace(matrix, np.eye(20)[:, [3, 1]]).U, np.eye(20)[:, [3, 1]])


def test_options_differ():
    matrix = prescribed((300, 420), SPECTRA["power law"])
    found = {
        "top": top_subspace(matrix, 3, key=KEY),
        "bottom": bottom_subspace(matrix, 3, key=KEY),
        "axis": axis_subspace(matrix, 3),
        "axis bottom": axis_subspace(matrix, 3, bottom=True),
        "random": random_subspace(matrix, 3, key=KEY),
        "random again": random_subspace(matrix, 3, key=jax.random.key(1)),
    }
    names = list(found)
    for i, a in enumerate(names):
        check_honest(matrix, found[a])
        for b in names[i + 1 :]:
            assert sine_of_angle(found[a].U, found[b].U) > 0.5, (a, b)
    assert found["top"].singular_values[0] > 10 * found["random"].singular_values[0]
    assert found["random"].singular_values[0] > 10 * found["bottom"].singular_values[0]


@pytest.mark.parametrize(
    "find",
    [
        lambda m, key: top_subspace(m, 3, key=key),
        lambda m, key: bottom_subspace(m, 3, key=key),
        lambda m, key: axis_subspace(m, 3),
        lambda m, key: random_subspace(m, 3, key=key),
        lambda m, key: given_subspace(m, np.eye(280)[:, :3]),
    ],
    ids=["top", "bottom", "axis", "random", "given"],
)
def test_vmap_over_a_stack_equals_a_loop(find):
    rng = np.random.default_rng(0)
    spectra = (INDEX[:260] ** -1.0, 0.7 ** INDEX[:260], rng.random(260) + 0.5)
    stack = jnp.stack([prescribed((260, 280), s, i, np.float32) for i, s in enumerate(spectra)])
    keys = jax.random.split(KEY, len(stack))
    together = jax.vmap(find)(stack, keys)
    for i, (matrix, key) in enumerate(zip(stack, keys, strict=True)):
        alone = find(matrix, key)
        check_honest(matrix, jax.tree.map(lambda x, i=i: x[i], together))
        assert int(alone.status) == int(together.status[i])
        assert abs(int(alone.passes) - int(together.passes[i])) <= 1
        np.testing.assert_allclose(together.singular_values[i], alone.singular_values, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    matrix = jnp.asarray(prescribed((300, 420), SPECTRA["gap"]), dtype)
    found = top_subspace(matrix, 8, key=KEY)
    assert found.U.dtype == jnp.float32
    check_honest(np.asarray(matrix, np.float64), found)


def test_works_without_x64_in_the_caller():
    matrix = prescribed((300, 420), tail(4), dtype=np.float32)
    expected = bottom_subspace(matrix, 4, key=KEY)
    with jax.enable_x64(False):
        found = jax.jit(lambda m: bottom_subspace(m, 4, key=KEY))(jnp.asarray(matrix))
        assert found.U.dtype == found.residual.dtype == jnp.float32
    np.testing.assert_allclose(found.singular_values, expected.singular_values, rtol=1e-5)


def test_same_shape_compiles_once():
    for search, find in ((block_iteration.top, top_subspace), (block_iteration.bottom, bottom_subspace)):
        search.clear_cache()
        for seed, tol in ((0, 1e-2), (1, 1e-3)):
            find(
                np.random.default_rng(seed).standard_normal((270, 290)), 2, tol=tol, key=jax.random.key(seed)
            )
        assert search._cache_size() == 1


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: top_subspace(m, 0, key=KEY), SpecError, "k = 0"),
        (lambda m: bottom_subspace(m, 21, key=KEY), SpecError, "k = 21.* 20"),
        (lambda m: axis_subspace(m, 21), SpecError, "k = 21"),
        (lambda m: random_subspace(m, -1, key=KEY), SpecError, "k = -1"),
        (lambda m: top_subspace(m[0], 1, key=KEY), LeafError, "rest, d"),
        (lambda m: top_subspace(m.astype(int), 1, key=KEY), LeafError, "int"),
        (lambda m: given_subspace(m, np.ones(20)), SpecError, "shape"),
        (lambda m: given_subspace(m, np.ones((19, 2))), SpecError, r"\(19, 2\).* 20 features"),
        (lambda m: given_subspace(m, np.ones((20, 2))), SpecError, "rank 1"),
        (lambda m: given_subspace(m, np.eye(20)[:, :2] * [1, 0]), SpecError, "column 1 .* zero"),
        (lambda m: given_subspace(m, np.full((20, 1), np.nan)), SpecError, "NaN"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(np.random.default_rng(0).standard_normal((30, 20)))


def test_every_status_has_advice():
    assert len({status.advice for status in Status}) == len(Status)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(8, 12), (12, 8), (270, 300)]),
    k=st.sampled_from([1, 5]),  # each shape and k compiles once
    seed=st.integers(0, 2**16),
    log_scale=st.integers(-15, 15),
    decay=st.floats(0.3, 1.0),
    bottom=st.booleans(),
)
def test_any_spectrum_and_scale_gives_an_honest_subspace(shape, k, seed, log_scale, decay, bottom):
    values = 10.0**log_scale * decay ** np.arange(min(shape))
    matrix = prescribed(shape, values, seed, np.float32)
    find = bottom_subspace if bottom else top_subspace
    found = find(matrix, k, key=jax.random.key(seed))
    check_honest(matrix, found)
    # Courant-Fischer: no k directions capture more than the top k. Left alone by "bottom" on a wide
    # matrix, whose null space holds less than any singular value.
    energy = np.sum(np.asarray(found.singular_values, np.float64) ** 2)
    assert energy <= np.sum(values[:k] ** 2) * (1 + 1e-5)
    if Status(int(found.status)) in (Status.CONVERGED, Status.EXACT) and not bottom:
        assert energy >= 0.98 * np.sum(values[:k] ** 2)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (400, 300)])
def test_transposed_input_finds_the_same_subspaces(shape):
    matrix = np.random.default_rng(0).standard_normal(shape)
    given_directions = np.eye(shape[1])[:, :2]
    for find in (
        lambda m, **how: top_subspace(m, 2, key=KEY, **how),
        lambda m, **how: bottom_subspace(m, 2, key=KEY, **how),
        lambda m, **how: axis_subspace(m, 2, **how),
        lambda m, **how: random_subspace(m, 2, key=KEY, **how),
        lambda m, **how: given_subspace(m, given_directions, **how),
    ):
        plain, turned = find(matrix), find(matrix.T, transposed=True)
        assert turned.U.shape == (shape[1], 2)
        np.testing.assert_allclose(turned.singular_values, plain.singular_values, rtol=1e-3)
        projector = np.asarray(plain.U @ plain.U.T)
        if shape != (400, 300):  # without a gap an iteration finds a subspace of its own
            np.testing.assert_allclose(turned.U @ turned.U.T, projector, atol=1e-9)
