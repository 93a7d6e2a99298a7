"""The sides of a chain of factors against its dense Hessian and explicit products (THEORY.md 5.4)."""

import doctest
import inspect
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from specdef_jax import bounds
from specdef_jax.bounds import chain
from specdef_jax.errors import SpecError

RNG = np.random.default_rng(11)
N = 3


def build(mask, alpha, p, m):
    """Return W, its singular values, C and F_1 ... F_p, as matrices."""
    r = len(mask)
    left, right = (np.linalg.qr(RNG.standard_normal((size, size)))[0][:, :r] for size in (m, N))
    values = np.array([2.0, 1.1, 0.6])[:r]
    share = np.where(mask, alpha * values, values) ** (1 / p)
    on = left[:, np.asarray(mask)]
    C = np.eye(m) + (1 / alpha - 1) * on @ on.T
    factors = [np.diag(share) for _ in range(p)]
    factors[0] = left @ factors[0]
    factors[-1] = factors[-1] @ right.T
    return left * values @ right.T, values, C, factors


def product(factors):
    return np.linalg.multi_dot(factors) if len(factors) > 1 else factors[0]


def sharpness(C, factors, A, target):
    """Return sigma_1 of the Hessian of vec(W - target)^T A vec(W - target) / 2 over the factors."""
    flat, unravel = ravel_pytree(list(map(jnp.asarray, factors)))
    return float(_sharpness(flat, jnp.asarray(C), jnp.asarray(A), jnp.asarray(target), unravel=unravel))


@partial(jax.jit, static_argnames="unravel")
def _sharpness(flat, C, A, target, *, unravel):
    def loss(flat):
        W = C
        for factor in unravel(flat):
            W = W @ factor
        off = (W - target).ravel()
        return off @ A @ off / 2

    return jnp.linalg.norm(jax.hessian(loss)(flat), 2)


def largest_outside(C, factors, A):
    """Return K: the largest curvature along u v^T, u in the eigenspace of C for 1."""
    v = np.linalg.svd(product(factors))[2][0]
    values, vectors = np.linalg.eigh(C)
    lift = np.kron(vectors[:, np.isclose(values, 1)], v[:, None])
    return np.linalg.norm(lift.T @ A @ lift, 2) if lift.size else 0.0


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize(
    ("mask", "m"), [((True, False, False), 4), ((False, True, True), 3), ((True, True, True), 3)]
)
def test_dense_hessians_lie_between(mask, m, p):
    for alpha in (1.0, 3.0, 50.0):
        W, values, C, factors = build(mask, alpha, p, m)
        np.testing.assert_allclose(product([C, *factors]), W, atol=1e-14)
        A = RNG.standard_normal((m * N, m * N))
        A, target = A + A.T, W + RNG.standard_normal(W.shape)
        gradient = np.linalg.norm((A @ (W - target).ravel()).reshape(W.shape), 2)
        below, above = bounds.chain_sides(
            jnp.asarray(values), jnp.asarray(mask), alpha, p, m,
            outside=largest_outside(C, factors, A), sigma_1=np.linalg.norm(A, 2), gradient_norm=gradient,
        )  # fmt: skip
        top = sharpness(C, factors, A, target)
        assert float(below) <= top * (1 + 1e-12) <= float(above) * (1 + 2e-12)


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize(("mask", "m"), [((True, False), 2), ((True, True), 2), ((True, True), 3)])
def test_both_sides_against_explicit_products(mask, m, p):
    _, values, C, factors = build(mask, 7.0, p, m)

    def norm(matrices):
        return np.linalg.norm(product(matrices), 2) if matrices else 1.0

    before = [norm([C, *factors[:j]]) for j in range(p)]
    after = [norm(factors[j + 1 :]) for j in range(p)]
    between = np.zeros((p, p))
    for i in range(p):
        for j in range(i + 1, p):
            between[i, j] = between[j, i] = before[i] * norm(factors[i + 1 : j]) * after[j]
    below, above = bounds.chain_sides(
        jnp.asarray(values), jnp.asarray(mask), 7.0, p, m, outside=0.3, sigma_1=2.0, gradient_norm=5.0
    )
    jacobian = sum((b * a) ** 2 for b, a in zip(before, after, strict=True))
    assert float(below) == pytest.approx(0.3 * norm(factors[1:]) ** 2)
    assert float(above) == pytest.approx(2 * max(jacobian, 1) + 5 * np.linalg.norm(between, 2))


@pytest.mark.parametrize("p", [1, 2, 3])
def test_the_exponent_is_that_of_dense_hessians(p):
    for mask, m in (((True, False, False), 4), ((True, True, True), 3)):
        tops = []
        for alpha in (1e6, 1e8):
            W, values, C, factors = build(mask, alpha, p, m)
            tops.append(sharpness(C, factors, np.eye(m * N), W))  # at a minimum: no gradient
        slope = math.log(tops[1] / tops[0]) / math.log(100)
        assert slope == pytest.approx(bounds.chain_exponent(p, whole=all(mask)), abs=2e-2)
        if not all(mask):
            below, _ = bounds.chain_sides(
                jnp.asarray(values), jnp.asarray(mask), 1e8, p, m, outside=1.0, sigma_1=1.0, gradient_norm=0.0
            )
            assert float(below) == pytest.approx(tops[1], rel=1e-2)  # attained in the limit


def test_under_jit_and_vmap():
    values, mask, alphas = jnp.array([3.0, 1.0]), jnp.array([True, False]), jnp.array([1.0, 4.0])
    rest = {"outside": 0.5, "sigma_1": 2.0, "gradient_norm": 1.0}
    over = jax.jit(jax.vmap(lambda a: bounds.chain_sides(values, mask, a, 3, 2, **rest)))(alphas)
    alone = [bounds.chain_sides(values, mask, float(a), 3, 2, **rest) for a in alphas]
    np.testing.assert_allclose(np.transpose(over), alone, rtol=1e-12)


@pytest.mark.parametrize("factors", [0, -2])
def test_a_chain_without_factors(factors):
    with pytest.raises(SpecError, match=f"factors = {factors}: a chain has at least one"):
        bounds.chain_exponent(factors, whole=True)
    with pytest.raises(SpecError, match=f"factors = {factors}: a chain has at least one"):
        bounds.chain_sides(
            jnp.ones(1), jnp.ones(1, bool), 2.0, factors, 2, outside=1.0, sigma_1=1.0, gradient_norm=1.0
        )


def test_the_examples_run():
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for name in ("chain_exponent", "chain_sides"):
        (test,) = finder.find(inspect.unwrap(getattr(chain, name)), name, globs=dict(vars(chain)))
        assert runner.run(test).attempted >= 1
    assert runner.failures == 0
