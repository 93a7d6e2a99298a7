"""Bounds on sigma_1(ABC): known answers, a slow oracle, and rounding against fifty digits (THEORY.md 2.4)."""

import itertools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from specdef_jax import bounds
from theory import s2_4_product_bound as statement
from theory.instances.matrices import aligned_triple, gaussian, graded
from theory.sizes import Size

VALID = {"v1": bounds.product_v1, "v2": bounds.product_v2, "v2k": bounds.product_v2k}
KEY = jax.random.key(2)


def draw(family, shape, seed=0):
    keys = jax.random.split(jax.random.fold_in(KEY, seed), 3)
    p, m, n, q = shape
    return family(keys[0], (p, m)), family(keys[1], (m, n)), family(keys[2], (n, q))


def slow(A, B, C):
    """Every bound by its definition, a loop over indices with full decompositions in NumPy."""
    A, B, C = map(np.asarray, (A, B, C))
    a, Vt = np.linalg.svd(A)[1:]
    U, b, Wt = np.linalg.svd(B)
    Q, c, _ = np.linalg.svd(C)
    rank = int(np.sum(b > 1e-12 * b[0]))
    padded = np.r_[b, 0.0]
    best = dict.fromkeys(("reported", "v1", "v2", "v2k"), 0.0)

    def smin(X, k):
        return np.linalg.svd(X, compute_uv=False)[k - 1] if min(X.shape) >= k else 0.0

    for r1, r2 in itertools.product(range(1, len(a) + 1), range(1, len(c) + 1)):
        P, R = Vt[:r1].T, Q[:, :r2]
        scale = a[r1 - 1] * c[r2 - 1]
        c1, c2 = np.linalg.norm(P.T @ U[:, 0]), np.linalg.norm(R.T @ Wt[0])
        s1, s2 = (np.linalg.norm(x - Y @ (Y.T @ x)) for x, Y in ((U[:, 0], P), (Wt[0], R)))
        best["reported"] = max(best["reported"], scale * b[0] * c1 * c2)
        best["v2"] = max(best["v2"], scale * max(b[0] * c1 * c2 - padded[1] * s1 * s2, 0))
        low = smin(P.T @ U[:, :rank], rank) * smin(R.T @ Wt[:rank].T, rank)
        best["v1"] = max(best["v1"], scale * b[0] * low)
        for k in range(1, min(r1, r2, len(b)) + 1):
            low = smin(P.T @ U[:, :k], k) * smin(R.T @ Wt[:k].T, k)
            best["v2k"] = max(best["v2k"], scale * max(b[0] * low - padded[k], 0))
    return best


@pytest.mark.parametrize("shape", [(3, 3, 3, 3), (1, 2, 2, 1), (2, 4, 3, 5), (5, 2, 4, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("family", [gaussian, graded, None])
def test_against_the_definitions(family, shape):
    A, B, C = draw(family, shape) if family else aligned_triple(KEY, *shape)
    want = slow(A, B, C)
    for name, bound in {**VALID, "reported": bounds.product_reported}.items():
        assert float(bound(A, B, C)) == pytest.approx(want[name], rel=1e-9, abs=1e-14), name
    assert float(bounds.product_bound(A, B, C)) == pytest.approx(max(want[n] for n in VALID), rel=1e-9)


def test_the_counterexample_to_the_reported_reading():
    s, c = np.sin(0.7), np.cos(0.7)
    A, B, C = jnp.array([[c, s]]), jnp.diag(jnp.array([1.01, 1.0])), jnp.array([[-s], [c]])
    assert float(jnp.linalg.norm(A @ B @ C)) == pytest.approx(0.0049, abs=5e-5)
    assert float(bounds.product_reported(A, B, C)) == pytest.approx(0.498, abs=5e-4)
    assert float(bounds.product_bound(A, B, C)) == pytest.approx(float(jnp.linalg.norm(A @ B @ C)), abs=1e-14)


def test_v1_needs_the_rank():
    A, B, C = draw(gaussian, (1, 3, 3, 3))
    assert float(bounds.product_v1(A, B, C)) == 0
    low_rank = B[:, :1] @ B[:1]
    assert float(bounds.product_v1(A, low_rank, C)) == pytest.approx(slow(A, low_rank, C)["v1"])
    assert float(bounds.product_v1(A, low_rank, C)) > 0


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_rank_does_not_depend_on_the_scale(scale):
    A, B, C = draw(gaussian, (3, 4, 3, 2))
    low_rank = B[:, :1] @ B[:1]
    want = scale * float(bounds.product_v1(A, low_rank, C))
    assert want > 0
    assert float(bounds.product_v1(A, scale * low_rank, C)) == pytest.approx(want, rel=1e-9)


def test_the_rounding_allowance_by_its_formula():
    A, B, C = draw(gaussian, (3, 5, 3, 2))
    A, C = 7.0 * A, C / 30
    norms = [np.linalg.norm(np.asarray(X), 2) for X in (A, B, C)]
    want = 8 * 5 * np.finfo(float).eps * np.prod(norms)
    assert float(bounds.product_allowance(A, B, C)) == pytest.approx(want, rel=1e-12, abs=0)


def exact(A, B, C):
    """sigma_1(ABC) in fifty digits."""
    product = mpmath.matrix(np.asarray(A).tolist()) * mpmath.matrix(np.asarray(B).tolist())
    return mpmath.svd_r(product * mpmath.matrix(np.asarray(C).tolist()), compute_uv=False)[0]


@pytest.mark.parametrize("family", [gaussian, graded, None])
def test_the_rounding_allowance_covers_what_fifty_digits_show(family):
    """The multiple: every bound and the singular value itself, against sigma_1 in fifty digits."""
    with mpmath.workdps(50):
        for seed in range(20):
            key = jax.random.fold_in(KEY, seed)
            A, B, C = draw(family, (3, 4, 3, 2), seed) if family else aligned_triple(key, 3, 4, 3, 2)
            truth, allowance = exact(A, B, C), float(bounds.product_allowance(A, B, C))
            assert abs(float(jnp.linalg.norm(A @ B @ C, 2) - float(truth))) <= allowance
            for bound in VALID.values():
                assert float(bound(A, B, C)) <= float(truth) + allowance
    assert allowance < 1e-12 * float(np.prod([jnp.linalg.norm(X, 2) for X in (A, B, C)]))


def test_under_jit_vmap_and_grad():
    triples = [draw(gaussian, (3, 4, 3, 2), seed) for seed in range(4)]
    stacked = [jnp.stack(x) for x in zip(*triples, strict=True)]
    found = jax.jit(jax.vmap(bounds.product_bound))(*stacked)
    np.testing.assert_allclose(found, [bounds.product_bound(*t) for t in triples], rtol=1e-12)
    grads = jax.grad(lambda B: bounds.product_v2k(triples[0][0], B, triples[0][2]))(triples[0][1])
    step = 1e-6 * jax.random.normal(KEY, grads.shape)
    A, B, C = triples[0]
    moved = bounds.product_v2k(A, B + step, C) - bounds.product_v2k(A, B - step, C)
    assert float(moved) == pytest.approx(2 * float(jnp.sum(grads * step)), rel=1e-5)


def wrong_v2(A, B, C):
    """V2 with the sign of the interference dropped."""
    o = statement.product._overlaps(A, B, C)
    inside = o.b[0] * jnp.outer(*(jnp.linalg.norm(x[..., 0], axis=1) for x in (o.left, o.right)))
    return jnp.max(jnp.outer(o.a, o.c) * (inside - 0.5 * o.b[1] * jnp.outer(o.sin_1, o.sin_2)))


def test_a_wrong_bound_planted_in_the_statement_is_found(monkeypatch):
    monkeypatch.setitem(statement.VALID, "V2", wrong_v2)
    survival = statement._survival("V2", (1, 2, 2, 1), KEY, Size.SMALL)
    assert survival.fails
    assert survival.search.worst < -1e-3
    family = statement.triples(Size.SMALL)["gaussian"]
    found = statement._on_family("x", lambda k: family(k, 1, 2, 2, 1), KEY, Size.SMALL)
    assert any(c.fails and c.claim.startswith("V2 ") for c in found)
