import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax.curvature import density, diagonal, eigsh, from_matrix, operators, trace
from specdef_jax.errors import ProblemError
from tests.curvature.helpers_spectra import with_spectrum

KEY = jax.random.key(2)
N = 400


def smoothed(values, grid, width):
    return np.mean(np.exp(-(((grid[:, None] - values) / width) ** 2) / 2), 1) / (width * np.sqrt(2 * np.pi))


def test_it_is_the_smoothed_spectrum_within_its_standard_errors():
    values = np.r_[np.linspace(-1.0, 1.0, N - 100), np.linspace(2.0, 2.5, 100)]
    found = density(from_matrix(with_spectrum(values)), key=KEY, probes=24, width=0.1)
    away = np.abs(found.density - smoothed(values, found.grid, 0.1))
    seen = found.density > 1e-3
    assert np.mean(away[seen] <= 2 * found.stderr[seen]) > 0.8
    assert np.max(away) < 0.05
    assert np.trapezoid(found.density, found.grid) == pytest.approx(1.0, abs=1e-6)
    assert found.matvecs == 24 * 80
    share, stderr = found.share(1.5, 3.0)
    assert 0 < stderr < 0.02
    assert abs(share - 0.25) < 4 * stderr


def test_standard_errors_cover_over_many_keys():
    op = from_matrix(with_spectrum(np.linspace(-1.0, 2.0, N)))
    inside = []
    for seed in range(40):
        share, stderr = density(op, key=jax.random.key(seed), probes=10, steps=60).share(0.5, 5.0)
        inside.append(abs(share - 0.5) <= 1.833 * stderr)  # 90% of Student's t with 9 degrees
    assert 29 <= sum(inside) <= 40


@pytest.mark.parametrize("axis", ["linear", "log"])
def test_small_operators_are_exact(axis):
    values = np.r_[-np.geomspace(1e-4, 10, 15), np.geomspace(1e-6, 1e3, 25)]
    found = density(from_matrix(with_spectrum(values)), key=KEY, axis=axis)
    assert found.exact
    assert not found.stderr.any()
    np.testing.assert_allclose(np.sort(found.nodes[0]), np.sort(values), atol=1e-12)
    if axis == "log":
        positive, negative = np.trapezoid(found.density, np.log10(found.grid))
        assert (positive, negative) == (pytest.approx(25 / 40, abs=1e-6), pytest.approx(15 / 40, abs=1e-6))
        assert found.null == 0


def test_outliers_and_tail_of_a_deformed_spectrum_show_on_the_log_axis():
    """alpha = 1e3: two outliers of alpha^2 and as many of 1 / alpha^2, a bulk between them."""
    values = np.r_[1e-6, 2e-6, np.linspace(0.5, 2.0, 96), 1e6, 2e6]
    found = density(from_matrix(with_spectrum(values)), key=KEY, axis="log", steps=100)
    positive = found.density[0]
    for decade, share in ((6.15, 0.02), (0.05, 0.96), (-5.85, 0.02)):
        near = np.abs(np.log10(found.grid) - decade) < 1.2
        assert np.trapezoid(positive[near], np.log10(found.grid[near])) == pytest.approx(share, abs=1e-6)


def test_what_is_below_rounding_is_null():
    values = np.r_[np.zeros(100), np.linspace(1.0, 2.0, N - 100)]
    found = density(from_matrix(with_spectrum(values)), key=KEY, axis="log", steps=60)
    assert abs(found.null - 0.25) < 4 * found.null_stderr
    total = np.sum(np.trapezoid(found.density, np.log10(found.grid))) + found.null
    assert total == pytest.approx(1.0, abs=1e-6)


def test_outliers_are_taken_out_and_counted_exactly():
    values = np.r_[np.linspace(0.01, 1.0, N - 2), 1e8, 2e8]
    op = from_matrix(with_spectrum(values))
    top = eigsh(op, 2, "LA", 1e-12, key=KEY)
    with_them, without = (density(op, key=KEY, steps=30, outliers=o) for o in (top, None))
    assert with_them.share(1e7, 1e9) == (pytest.approx(2 / N, abs=1e-15), 0.0)
    assert without.share(1e7, 1e9)[1] > 0
    assert np.sum(with_them.weights, axis=1) == pytest.approx(1 - 2 / N, abs=1e-12)
    half, _ = with_them.share(0.01, 0.505)
    assert abs(half - 199 / N) < 0.05
    assert with_them.nodes.max() < 1.1
    unconverged = eigsh(op, 5, "SA", 1e-14, key=KEY, max_matvecs=30)
    with pytest.raises(ProblemError, match="NOT_CONVERGED"):
        density(op, key=KEY, outliers=unconverged)


def test_an_invariant_subspace_ends_the_recurrence():
    found = density(from_matrix(3.0 * jnp.eye(N)), key=KEY, steps=20)
    assert found.share(3 - 1e-9, 3 + 1e-9)[0] == pytest.approx(1.0, abs=1e-12)
    zero = density(from_matrix(jnp.zeros((N, N))), key=KEY, steps=20, axis="log")
    assert zero.null == pytest.approx(1.0, abs=1e-12)


def test_batches_of_draws_change_nothing():
    op = from_matrix(with_spectrum(np.linspace(-1.0, 2.0, N)))
    one, many = (density(op, key=KEY, probes=6, steps=30, batch=b) for b in (1, 4))
    np.testing.assert_allclose(one.nodes, many.nodes, atol=1e-12)


def test_bad_arguments():
    op = from_matrix(jnp.eye(4))
    with pytest.raises(ProblemError, match="symmetric"):
        density(from_matrix(jnp.eye(4), symmetric=False), key=KEY)
    with pytest.raises(ProblemError, match="at least 2"):
        density(op, key=KEY, probes=1)
    with pytest.raises(ProblemError, match="NaN"):
        density(from_matrix(jnp.full((200, 200), jnp.nan)), key=KEY)


def test_trace_is_unbiased_and_its_error_is_its_error():
    matrix = with_spectrum(1.0 / np.arange(1, N + 1) ** 2)
    op, exact = from_matrix(matrix), np.trace(matrix)
    away = []
    for seed in range(30):
        found = trace(op, key=jax.random.key(seed), probes=10)
        away.append((float(found.value) - exact) / float(found.stderr))
    assert np.abs(np.mean(away)) < 1.0
    assert np.mean(np.abs(away) < 3) > 0.8
    assert found.matvecs == 20
    assert float(found.stderr) < 0.02 * exact  # Hutchinson's: sqrt(2) ||A||_F / sqrt(20) = 0.33


@pytest.mark.parametrize("probes", [2, 6, 29])
def test_trace_of_a_multiple_of_the_identity_is_exact(probes):
    # what a left-out vector sees beyond the range of the others is the same in every direction
    found = trace(from_matrix(3.0 * np.eye(30)), key=KEY, probes=probes)
    assert float(found.value) == pytest.approx(90, rel=1e-12)
    assert float(found.stderr) < 1e-11


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_trace_of_low_rank_is_exact(rank):
    values = np.r_[np.zeros(N - rank), -3.0 - np.arange(rank)]
    found = trace(from_matrix(with_spectrum(values)), key=KEY, probes=6)
    assert float(found.value) == pytest.approx(values.sum(), abs=1e-10)
    assert float(found.stderr) < 1e-10


def test_trace_without_symmetry_and_of_few_rows():
    matrix = np.random.default_rng(0).standard_normal((60, 60))
    found = trace(from_matrix(matrix, symmetric=False), key=KEY, probes=40)
    assert abs(float(found.value) - np.trace(matrix)) < 4 * float(found.stderr)
    few = trace(from_matrix(matrix, symmetric=False), key=KEY, probes=60)
    assert float(few.value) == pytest.approx(np.trace(matrix), rel=1e-12)
    assert (float(few.stderr), few.matvecs) == (0.0, 60)


def test_diagonal_within_its_standard_errors():
    matrix = with_spectrum(np.linspace(0.0, 2.0, 50))
    found = diagonal(from_matrix(matrix), key=KEY, probes=400)
    away = np.abs(np.asarray(found.value) - np.diag(matrix)) / np.asarray(found.stderr)
    assert np.mean(away < 2) > 0.85
    assert np.max(found.stderr) < 0.1
    exact = diagonal(from_matrix(np.diag(np.arange(5.0))), key=KEY, probes=2)
    np.testing.assert_allclose(exact.value, np.arange(5.0), atol=1e-12)
    with pytest.raises(ProblemError, match="square"):
        diagonal(from_matrix(np.ones((2, 3)), symmetric=False), key=KEY)
    with pytest.raises(ProblemError, match="probes = 1"):
        trace(from_matrix(matrix), key=KEY, probes=1)


def test_the_rule_is_that_of_matfree_from_the_same_vector():
    from matfree import decomp

    matrix = jnp.asarray(with_spectrum(np.linspace(-1.0, 2.0, N)))
    found = density(from_matrix(matrix), key=KEY, probes=2, steps=25)
    for i, key in enumerate(jax.random.split(KEY, 2)):
        start = operators.random_vector(from_matrix(matrix), key, jnp.float64)
        peer = decomp.tridiag_sym(25, materialize=True)(lambda v: matrix @ v, start)
        nodes, vectors = np.linalg.eigh(peer.J_small)
        np.testing.assert_allclose(found.nodes[i], nodes, atol=1e-12)
        np.testing.assert_allclose(found.weights[i], vectors[0] ** 2, atol=1e-12)
