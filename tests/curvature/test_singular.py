import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from jax.tree_util import Partial

from specdef_jax.curvature import Status, bidiagonal, eigsh, from_matrix, linear, singular, svds
from specdef_jax.curvature import basis as bs
from specdef_jax.curvature.restart import Setting, start
from specdef_jax.errors import ProblemError

ROWS, COLS, K = 150, 90, 3
KEY = jax.random.key(5)
BULK = np.linspace(0.0, 1.0, COLS)


def top(*values):
    return np.concatenate([BULK[: COLS - len(values)], values])


SPECTRA = {
    "simple": top(2.0, 3.0, 5.0),
    "flat": BULK,
    "cluster": top(2.0, 2.0 + 1e-9, 2.0 + 2e-9),
    "tie of 3": top(2.0, 2.0, 2.0),
    "tie at the cut": top(2.0, 2.0, 2.0, 2.0, 3.0),
    "12 decades": 10.0 ** -np.linspace(0, 12, COLS),
    "rank one": np.r_[np.zeros(COLS - 1), 7.0],
    "rank two": np.r_[np.zeros(COLS - 2), 7.0, 1.0],
    "zero": np.zeros(COLS),
    "orthogonal": np.ones(COLS),
    "1e-200": 1e-200 * top(2.0, 3.0, 5.0),
}


def with_singular_values(values, rows=ROWS, seed=0):
    """Return U diag(values) V^T in float64, U and V Haar distributed."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    return (left * values) @ right.T


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", SPECTRA)
def test_prescribed_singular_values(name, wide):
    matrix, tol = with_singular_values(SPECTRA[name]), 1e-9
    matrix = matrix.T if wide else matrix
    found = svds(from_matrix(matrix, symmetric=False), K, tol, key=KEY)
    exact, largest = np.sort(SPECTRA[name])[::-1][:K], np.max(SPECTRA[name])
    assert found.status is Status.CONVERGED
    np.testing.assert_allclose(found.values, exact, rtol=0, atol=2 * tol * largest)
    u, v = np.asarray(found.left), np.asarray(found.right)
    for basis in (u, v):
        np.testing.assert_allclose(basis @ basis.T, np.eye(K), atol=1e-13)
    if name == "1e-200":
        return
    values = np.asarray(found.values)[:, None]
    of_left = np.linalg.norm(v @ matrix.T - values * u, axis=1)
    of_right = np.linalg.norm(u @ matrix - values * v, axis=1)
    np.testing.assert_allclose(found.left_residuals, of_left, rtol=1e-3, atol=1e-14 * largest)
    np.testing.assert_allclose(found.right_residuals, of_right, rtol=1e-3, atol=1e-14 * largest)
    assert max(of_left.max(), of_right.max()) <= tol * largest * (1 + 1e-6)
    assert float(found.lower_bound) <= largest
    assert float(found.lower_bound) >= largest * (1 - 1e-12)


def test_agrees_with_scipy_at_a_comparable_price():
    matrix, products = with_singular_values(SPECTRA["flat"]), []

    def counted(a):
        def mv(v):
            products.append(1)
            return a @ v

        return mv

    peer = scipy.sparse.linalg.LinearOperator(
        matrix.shape, matvec=counted(matrix), rmatvec=counted(matrix.T), dtype=float
    )
    values = scipy.sparse.linalg.svds(peer, K, tol=1e-9, return_singular_vectors=False, rng=0)
    found = svds(from_matrix(matrix, symmetric=False), K, 1e-9, key=KEY)
    np.testing.assert_allclose(found.values, np.sort(values)[::-1], rtol=1e-9)
    assert int(found.matvecs) <= 2 * len(products)


def test_small_values_keep_their_digits_beside_large_ones():
    """Products with A^T A would leave an error of eps s_1^2 / s_3 = 2e-8 in the third value."""
    values = np.r_[np.full(COLS - 3, 1e-12), 1e-8, 1e-4, 1.0]
    found = svds(from_matrix(with_singular_values(values), symmetric=False), 3, 1e-14, key=KEY)
    np.testing.assert_allclose(found.values, [1.0, 1e-4, 1e-8], rtol=0, atol=2e-15)


def test_factorization_identities():
    matrix = jnp.asarray(with_singular_values(SPECTRA["flat"]))
    setting = Setting(K, 12, "LA", whole=False, narrowest="float64", price=2)
    state = start(setting, jnp.float64)
    vectors = [jax.ShapeDtypeStruct((n,), jnp.float64) for n in matrix.shape]
    bases = bidiagonal.Bases(
        bs.zeros(13, vectors[1], jnp.float64), bs.zeros(12, vectors[0], jnp.float64), jnp.zeros((2, K))
    )
    for _ in range(3):
        state, bases = bidiagonal.extend(
            setting, lambda v: matrix @ v, lambda u: matrix.T @ u, KEY, state, bases
        )
        v, u, b = np.asarray(bases.right), np.asarray(bases.left), np.asarray(state.projection)
        np.testing.assert_allclose(v @ v.T, np.eye(13), atol=1e-14)
        np.testing.assert_allclose(u @ u.T, np.eye(12), atol=1e-14)
        np.testing.assert_allclose(matrix @ v[:12].T, u.T @ b, atol=1e-14)
        beyond = np.outer(v[12] * float(state.beta), np.eye(12)[11])
        np.testing.assert_allclose(matrix.T @ u.T, v[:12].T @ b.T + beyond, atol=1e-14)
        state, bases = bidiagonal.rotate(setting, state, bases)
        v, u = np.asarray(bases.right), np.asarray(bases.left)
        values = np.diag(state.projection)[: setting.kept]
        rest = u[: setting.kept] @ matrix - values[:, None] * v[: setting.kept]
        coupling = np.asarray(state.projection)[: setting.kept, setting.kept]
        np.testing.assert_allclose(rest, np.outer(coupling, v[setting.kept]), atol=1e-14)
        np.testing.assert_allclose(state.estimates, np.linalg.norm(rest[:K], axis=1), atol=1e-14)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (2, 5), (5, 5), (40, 39)])
def test_small_operators_and_all_values(shape):
    matrix = np.random.default_rng(1).standard_normal(shape)
    k = min(shape)
    found = svds(from_matrix(matrix, symmetric=False), k, 1e-10, key=KEY)
    assert found.status is Status.CONVERGED
    np.testing.assert_allclose(found.values, np.linalg.svd(matrix, compute_uv=False), rtol=1e-9, atol=1e-12)


def test_of_a_symmetric_operator_the_magnitudes():
    matrix = np.diag(np.linspace(-4.0, 3.0, 60))
    values = svds(from_matrix(matrix), 2, 1e-10, key=KEY).values
    np.testing.assert_allclose(
        values, np.abs(eigsh(from_matrix(matrix), 2, "LM", 1e-10, key=KEY).values), rtol=1e-12
    )


def test_a_transpose_of_something_else_is_noticed():
    matrix, other = (jnp.asarray(with_singular_values(SPECTRA["simple"], seed=s)) for s in (0, 1))

    def lying(wrong, factor=1.0):
        def transpose(a, b, u):
            return factor * (a.T @ u) + wrong * (b.T @ u)

        product = Partial(lambda a, b, v: a @ v, matrix, other)
        op = linear(product, matrix[0], symmetric=False)
        return svds(type(op)(op.product, op.domain, op.kind, False, transpose), K, key=KEY)

    assert lying(1e-3).status is Status.NOT_SYMMETRIC
    assert lying(0.0, 1.001).status is Status.NOT_SYMMETRIC  # what differs is the diagonal alone
    assert lying(0.0).status is Status.CONVERGED
    assert "transpose" in Status.NOT_SYMMETRIC.advice


def test_not_finite_and_budget():
    matrix = with_singular_values(SPECTRA["flat"])
    short = svds(from_matrix(matrix, symmetric=False), K, 1e-12, key=KEY, max_matvecs=100)
    assert short.status is Status.NOT_CONVERGED
    assert int(short.matvecs) <= 100
    assert np.all(np.isfinite(short.left_residuals + short.right_residuals))
    matrix[3, 4] = np.nan
    broken = svds(from_matrix(matrix, symmetric=False), K, key=KEY)
    assert broken.status is Status.NOT_FINITE
    assert np.all(np.isnan(broken.values))


TICKS = []


def counted_product(a, v):
    jax.debug.callback(lambda: TICKS.append(1))
    return a @ v


def counted_transpose(a, u):
    jax.debug.callback(lambda: TICKS.append(1))
    return a.T @ u


@pytest.mark.parametrize(("name", "tol"), [("flat", 0.0), ("tie of 3", 1e-6), ("12 decades", 1e-9)])
def test_products_are_counted_and_never_exceed_the_budget(name, tol):
    matrix = jnp.asarray(with_singular_values(SPECTRA[name]))
    op = linear(Partial(counted_product, matrix), matrix[0], symmetric=False)
    op = type(op)(op.product, op.domain, op.kind, False, counted_transpose)
    for budget in (46, 70, 101, 133, 190):
        TICKS.clear()
        found = svds(op, K, tol, key=KEY, max_matvecs=budget)
        jax.effects_barrier()
        assert int(found.matvecs) == len(TICKS)
        assert len(TICKS) <= budget
        if tol == 0:
            assert found.status is Status.NOT_CONVERGED
            assert len(TICKS) > budget - 2 * (20 + K), "the budget is not used"


def test_float32_stops_at_its_floor():
    matrix = jnp.asarray(with_singular_values(SPECTRA["flat"]), jnp.float32)
    found = svds(from_matrix(matrix, symmetric=False), K, tol=0.0, key=KEY)
    assert found.status is Status.FLOOR
    assert found.values.dtype == found.left.dtype == jnp.float32
    exact = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)[:K]
    np.testing.assert_allclose(found.values, exact, atol=20 * float(found.floor))
    assert float(found.lower_bound) <= exact[0]


def test_trees_on_both_sides():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((6, 4, 5)), rng.standard_normal((7, 4, 5))

    def product(a, b, tree):
        return {"p": jnp.tensordot(a, tree["x"], 2), "q": jnp.tensordot(b, tree["x"], 2)}

    op = linear(Partial(product, jnp.asarray(a), jnp.asarray(b)), {"x": jnp.zeros((4, 5))}, symmetric=False)
    assert op.shape == (13, 20)
    found = svds(op, 2, 1e-10, key=KEY)
    exact = np.linalg.svd(np.concatenate([a, b]).reshape(13, 20), compute_uv=False)
    np.testing.assert_allclose(found.values, exact[:2], rtol=1e-10)
    assert found.right["x"].shape == (2, 4, 5)
    assert {name: x.shape for name, x in found.left.items()} == {"p": (2, 6), "q": (2, 7)}


@pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="older XLA copies the basis once more")
@pytest.mark.parametrize("in_place", [True, False])
def test_memory_is_two_bases_and_where_they_are_not_rotated_in_place_the_kept_vectors(in_place):
    n = 1_000_000
    op = linear(Partial(jnp.multiply, jnp.linspace(0, 1, n)), jax.ShapeDtypeStruct((n,), jnp.float64), False)
    setting = Setting(1, 20, "LA", whole=False, narrowest="float64", price=2, in_place=in_place)
    memory = singular._solve.lower(setting, op, KEY, 1e-6, 1000, None).compile().memory_analysis()
    assert memory.temp_size_in_bytes / (8 * n) < (20 + 1) + 20 + (0 if in_place else 2 * setting.kept) + 8


def test_bad_arguments_say_what_to_do():
    op = from_matrix(np.ones((4, 7)), symmetric=False)
    with pytest.raises(ProblemError, match=r"k = 5 .* size 4"):
        svds(op, 5, key=KEY)
    with pytest.raises(ProblemError, match="at least 10"):
        svds(op, 1, key=KEY, max_matvecs=9)
    with pytest.raises(ProblemError, match="tol = -1"):
        svds(op, 1, tol=-1.0, key=KEY)
