import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from jax.tree_util import Partial

from specdef_jax.curvature import Status, eigsh, from_matrix, hessian, lanczos, linear, thick_restart
from specdef_jax.curvature import basis as bs
from specdef_jax.curvature.operators import check_choice
from specdef_jax.curvature.restart import Setting, start
from specdef_jax.errors import ProblemError
from tests.curvature.helpers_spectra import wanted, with_spectrum

N, K = 120, 3
KEY = jax.random.key(7)
BULK = np.linspace(0.0, 1.0, N)


def top(*values):
    return np.concatenate([BULK[: N - len(values)], values])


SPECTRA = {
    "simple": top(2.0, 3.0, 5.0),
    "flat": BULK,
    "cluster": top(2.0, 2.0 + 1e-9, 2.0 + 2e-9),
    "tie of 3": top(2.0, 2.0, 2.0),
    "tie inside": top(2.0, 3.0, 3.0),
    "tie at the cut": top(2.0, 2.0, 2.0, 2.0, 3.0),
    "12 decades": 10.0 ** -np.linspace(0, 12, N),
    "indefinite": np.linspace(-3.0, 2.0, N),
    "signed tie": top(-4.0, 4.0, 3.0),
    "rank one": np.r_[np.zeros(N - 1), 7.0],
    "rank two": np.r_[np.zeros(N - 2), -7.0, 1.0],
    "zero": np.zeros(N),
    "identity": np.ones(N),
    "1e-200": 1e-200 * top(2.0, 3.0, 5.0),
}


def true_residuals(matrix, eigen):
    """||A v - theta v|| / ||v|| in float64 numpy, apart from anything the library computed."""
    a, vectors = np.asarray(matrix, np.float64), np.asarray(eigen.vectors, np.float64)
    images = vectors @ a.T - np.asarray(eigen.values, np.float64)[:, None] * vectors
    return np.linalg.norm(images, axis=1) / np.linalg.norm(vectors, axis=1)


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("name", SPECTRA)
def test_prescribed_spectrum(name, which):
    matrix, tol = with_spectrum(SPECTRA[name]), 1e-8
    krylov = N if (name, which) == ("12 decades", "SA") else None
    eigen = eigsh(from_matrix(matrix), K, which, tol, key=KEY, krylov=krylov)
    exact = np.linalg.eigvalsh(matrix) if name != "1e-200" else SPECTRA[name]
    largest = np.max(np.abs(exact))
    assert eigen.status is Status.CONVERGED
    # the error is quadratic in the residual over the gap, and never above the residual
    np.testing.assert_allclose(eigen.values, wanted(exact, K, which), rtol=0, atol=2 * tol * largest)
    if name != "1e-200":
        true = true_residuals(matrix, eigen)
        np.testing.assert_allclose(eigen.residuals, true, rtol=1e-3, atol=1e-14 * largest)
        assert np.all(true <= tol * largest * (1 + 1e-6))
    gram = np.asarray(eigen.vectors) @ np.asarray(eigen.vectors).T
    np.testing.assert_allclose(gram, np.eye(K), atol=1e-13)
    assert float(eigen.norm) <= largest * (1 + 1e-12)
    assert int(eigen.matvecs) < 600


def test_the_small_end_of_12_decades_is_not_claimed():
    """Forty eigenvalues lie within 1e-8 of each other there, and the status says that tol was missed."""
    eigen = eigsh(from_matrix(with_spectrum(SPECTRA["12 decades"])), K, "SA", 1e-8, key=KEY)
    assert eigen.status is Status.NOT_CONVERGED
    assert np.max(eigen.residuals) > 1e-8


def test_ends_of_an_indefinite_spectrum_differ():
    op = from_matrix(with_spectrum(SPECTRA["indefinite"]))
    found = {which: float(eigsh(op, K, which, key=KEY).values[0]) for which in ("LM", "LA", "SA")}
    assert found["LM"] == pytest.approx(-3.0, abs=1e-5)
    assert found["LA"] == pytest.approx(2.0, abs=1e-5)
    assert found["SA"] == pytest.approx(-3.0, abs=1e-5)
    positive = from_matrix(with_spectrum(np.linspace(-2.0, 3.0, N)))
    assert float(eigsh(positive, K, "LM", key=KEY).values[0]) == pytest.approx(3.0, abs=1e-5)


@pytest.mark.parametrize("name", ["simple", "flat", "12 decades"])
def test_agrees_with_arpack_at_a_comparable_price(name):
    matrix, products = with_spectrum(SPECTRA[name]), []

    def mv(v):
        products.append(1)
        return matrix @ v

    peer = scipy.sparse.linalg.LinearOperator((N, N), mv, dtype=float)
    values = scipy.sparse.linalg.eigsh(peer, K, which="LA", tol=1e-8, return_eigenvectors=False)
    eigen = eigsh(from_matrix(matrix), K, "LA", 1e-8, key=KEY)
    np.testing.assert_allclose(eigen.values, np.sort(values)[::-1], atol=1e-12)
    assert int(eigen.matvecs) <= 3 * len(products)


def test_one_pair_needs_no_search_for_copies():
    op = from_matrix(with_spectrum(SPECTRA["simple"]))
    eigen = eigsh(op, key=KEY)
    assert eigen.status is Status.CONVERGED
    assert float(eigen.values[0]) == pytest.approx(5.0)
    assert int(eigen.matvecs) <= 41
    assert float(eigen.values[0]) <= 5.0 + 1e-14  # a lower bound on lambda_max


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (2, 2), (3, 2), (5, 5), (31, 30)])
def test_small_operators_and_nearly_all_pairs(n, k):
    matrix = with_spectrum(np.arange(n) + 1.0)
    eigen = eigsh(from_matrix(matrix), k, "LA", 1e-10, key=KEY)
    assert eigen.status is Status.CONVERGED
    np.testing.assert_allclose(eigen.values, n - np.arange(k), rtol=1e-12)


def test_factorization_identity():
    """A V = V T + r e^T, and V orthonormal, after the first cycle and after a restart."""
    matrix = with_spectrum(SPECTRA["indefinite"])
    setting = Setting(K, 12, "LM", whole=False, narrowest="float64")
    state, basis = (
        start(setting, jnp.float64),
        bs.zeros(13, jax.ShapeDtypeStruct((N,), jnp.float64), jnp.float64),
    )
    not_now = thick_restart.Judged(jnp.array(False), jnp.array(0.0), lambda state: state)
    for _ in range(3):
        state, basis = thick_restart.multiply(setting, lambda v: matrix @ v, KEY, state, basis, not_now)
        v, t = np.asarray(basis), np.asarray(state.projection)
        np.testing.assert_allclose(v @ v.T, np.eye(13), atol=1e-14)
        residual = matrix @ v[:12].T - v[:12].T @ t - np.outer(v[12] * float(state.beta), np.eye(12)[11])
        np.testing.assert_allclose(residual, 0, atol=1e-14)
        state, basis = thick_restart.rotate(setting, state, basis)


@pytest.mark.parametrize("amplitude", [1e-9, 1e-6])
def test_noise_in_the_product_is_not_taken_for_convergence(amplitude):
    matrix = jnp.asarray(with_spectrum(SPECTRA["simple"]))
    wobble = amplitude * jnp.asarray(with_spectrum(np.linspace(-1, 1, N), seed=1))

    def mv(matrix, wobble, v):
        return matrix @ v + wobble @ jnp.sin(v / amplitude)

    eigen = eigsh(linear(Partial(mv, matrix, wobble), matrix[0]), K, "LA", 1e-12, key=KEY)
    assert eigen.status is (Status.FLOOR if amplitude < 1e-8 else Status.NOT_SYMMETRIC)
    assert np.max(eigen.residuals) > amplitude / 10
    assert int(eigen.matvecs) < 600


def test_float32_residuals_are_measured_and_the_floor_reported():
    matrix = jnp.asarray(with_spectrum(SPECTRA["flat"]), jnp.float32)
    eigen = eigsh(from_matrix(matrix), K, "LA", tol=0.0, key=KEY)
    assert eigen.status is Status.FLOOR
    assert eigen.values.dtype == eigen.vectors.dtype == jnp.float32
    assert eigen.narrowest == "float32"
    assert float(eigen.floor) == pytest.approx(2.0**-23 * float(eigen.norm))
    true = true_residuals(matrix, eigen)
    np.testing.assert_allclose(eigen.residuals, true, rtol=0.5, atol=2 * float(eigen.floor))
    assert np.max(true) < 20 * float(eigen.floor)
    assert np.min(true) > np.min(eigen.estimates)  # the cheap residual is no certificate
    exact = np.linalg.eigvalsh(np.asarray(matrix, np.float64))
    np.testing.assert_allclose(eigen.values, wanted(exact, K, "LA"), atol=20 * float(eigen.floor))


def test_tiny_and_huge_float32():
    for size in (1e-30, 1e30):
        matrix = jnp.asarray(size * with_spectrum(SPECTRA["simple"]), jnp.float32)
        eigen = eigsh(from_matrix(matrix), K, "LA", 1e-5, key=KEY)
        assert eigen.status is Status.CONVERGED
        np.testing.assert_allclose(eigen.values / size, [5.0, 3.0, 2.0], rtol=1e-5)


def test_a_float32_product_in_a_float64_tree_is_named():
    matrix = jnp.asarray(with_spectrum(SPECTRA["simple"]), jnp.float32)
    op = linear(Partial(lambda a, v: (a @ v.astype(jnp.float32)).astype(v.dtype), matrix), jnp.zeros(N))
    eigen = eigsh(op, K, "LA", 1e-12, key=KEY)
    assert eigen.values.dtype == jnp.float64
    assert eigen.narrowest == "float32"
    assert eigen.status is Status.FLOOR
    assert np.max(eigen.residuals) > 1e-12 * float(eigen.norm)


def test_bfloat16_leaves_keep_a_float32_basis():
    matrix = jnp.asarray(with_spectrum(SPECTRA["simple"]), jnp.bfloat16)
    op = linear(Partial(jnp.matmul, matrix), matrix[0])
    eigen = eigsh(op, K, "LA", 0.05, key=KEY)
    assert eigen.vectors.dtype == jnp.float32
    assert eigen.narrowest == "bfloat16"
    np.testing.assert_allclose(eigen.values, [5.0, 3.0, 2.0], rtol=0.05)


def test_not_symmetric_is_noticed():
    matrix = with_spectrum(SPECTRA["simple"])
    skew = np.zeros((N, N))
    skew[0, 1], skew[1, 0] = 1.0, -1.0
    assert eigsh(from_matrix(matrix + 1e-3 * skew), K, key=KEY).status is Status.NOT_SYMMETRIC
    assert eigsh(from_matrix(matrix + 1e-12 * skew), K, key=KEY).status is Status.CONVERGED
    assert float(eigsh(from_matrix(matrix + skew), K, key=KEY).asymmetry) > 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_is_noticed(value):
    matrix = with_spectrum(SPECTRA["simple"])
    matrix[3, 4] = matrix[4, 3] = value
    eigen = eigsh(from_matrix(matrix), K, key=KEY)
    assert eigen.status is Status.NOT_FINITE
    assert np.all(np.isnan(eigen.values))
    assert int(eigen.matvecs) < 10


def test_budget_is_kept():
    op = from_matrix(with_spectrum(SPECTRA["flat"]))
    eigen = eigsh(op, K, "LA", 1e-10, key=KEY, max_matvecs=60)
    assert eigen.status is Status.NOT_CONVERGED
    assert int(eigen.matvecs) <= 60
    assert np.all(np.isfinite(eigen.residuals))
    assert "max_matvecs" in eigen.status.advice
    enough = eigsh(op, K, "LA", 1e-10, key=KEY)
    assert enough.status is Status.CONVERGED
    assert int(enough.matvecs) > 60


def test_deterministic_in_the_key():
    op = from_matrix(with_spectrum(SPECTRA["flat"]))
    first, again, other = (eigsh(op, K, "LA", key=k).vectors for k in (KEY, KEY, jax.random.key(8)))
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first) != np.asarray(other))


@pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="older XLA copies the basis once more")
@pytest.mark.parametrize("in_place", [True, False])
def test_memory_is_one_basis_and_where_it_is_not_rotated_in_place_the_kept_vectors(in_place):
    n = 1_000_000
    op = linear(Partial(jnp.multiply, jnp.linspace(0, 1, n)), jax.ShapeDtypeStruct((n,), jnp.float64))
    setting = Setting(1, 20, "LA", whole=False, narrowest="float64", in_place=in_place)
    memory = lanczos._solve.lower(setting, op, KEY, 1e-6, 1000, None).compile().memory_analysis()
    assert memory.temp_size_in_bytes / (8 * n) < (20 + 1) + (1 if in_place else setting.kept) + 4


def test_the_product_is_compiled_once():
    op = linear(Partial(lambda d, v: jnp.sinh(d) * v, jnp.ones(N)), jax.ShapeDtypeStruct((N,), jnp.float64))
    setting = Setting(K, 20, "LA", whole=False, narrowest="float64", in_place=True)
    text = lanczos._solve.lower(setting, op, KEY, 1e-6, 1000, None).as_text()
    assert text.count("chlo.sinh") == 1


def test_inside_jit_and_vmap():
    matrices = jnp.stack([jnp.asarray(with_spectrum(SPECTRA[s])) for s in ("simple", "tie inside")])

    @jax.jit
    def values(matrices):
        return jax.vmap(lambda a: eigsh(from_matrix(a), K, "LA", 1e-8, key=KEY).values)(matrices)

    np.testing.assert_allclose(values(matrices), [[5.0, 3.0, 2.0], [3.0, 3.0, 2.0]], rtol=1e-12)


def test_new_data_does_not_trace_again():
    calls = []

    def loss(params, x):
        calls.append(1)
        return jnp.sum(jnp.cos(params["w"]) * x) + jnp.prod(params["b"])

    def problem(scale):
        return {"w": scale * jnp.arange(50.0), "b": jnp.ones(3)}, jnp.linspace(1, scale, 50)

    one, two = (hessian(loss, *problem(scale)) for scale in (1.0, 2.0))
    first = eigsh(one, K, key=KEY)
    assert calls
    calls.clear()
    second = eigsh(two, K, key=KEY, tol=1e-7, max_matvecs=1000)
    assert not calls
    assert abs(float(second.values[1]) - float(first.values[1])) > 1e-3


def test_bad_arguments_say_what_to_do():
    op = from_matrix(jnp.eye(4))
    with pytest.raises(ProblemError, match=r"k = 5 .* size 4"):
        eigsh(op, 5, key=KEY)
    with pytest.raises(ProblemError, match="k = 0"):
        eigsh(op, 0, key=KEY)
    with pytest.raises(ProblemError, match="'SM'"):
        check_choice("which", "SM", ("LM", "LA"))
    with pytest.raises(ProblemError, match="tol = nan"):
        eigsh(op, 1, tol=float("nan"), key=KEY)
    with pytest.raises(ProblemError, match="at least 5"):
        eigsh(op, 1, key=KEY, max_matvecs=3)
    with pytest.raises(ProblemError, match=r"krylov = 3 .* at least 4"):
        eigsh(from_matrix(jnp.eye(9)), 2, key=KEY, krylov=3)
    with pytest.raises(ProblemError, match="svds"):
        eigsh(from_matrix(jnp.eye(4), symmetric=False), 1, key=KEY)


def test_every_status_has_advice():
    assert len({status.advice for status in Status}) == len(Status)


@pytest.mark.parametrize("k", [2, 3])
def test_the_search_for_repeated_values_is_not_broken_off(k):
    # four copies, hardly above the rest: a random vector takes long to show what it has of them
    values = np.r_[np.linspace(-0.5, 1.0, 116), [1.005] * 4]
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((120, 120)))[0]
    op = from_matrix((q * values) @ q.T)
    for seed in range(12):
        found = eigsh(op, k, "LA", 1e-8, key=jax.random.key(seed), max_matvecs=3000)
        np.testing.assert_allclose(found.values, [1.005] * k, atol=1e-7)
        assert found.status is Status.CONVERGED
