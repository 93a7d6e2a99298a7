"""K_U and K_V against Hessians of the loss in C itself, and bounds on what else there is (THEORY.md 2.2)."""

import doctest
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax import bounds
from specdef_jax.bounds import FastBlocks, compensation
from specdef_jax.errors import ProblemError

KEY = jax.random.key(11)
EXAMPLES, POSITIONS, M, N, ALPHA = 5, 3, 4, 6, 3.0


def orthonormal(key, d, k):
    return jnp.linalg.qr(jax.random.normal(key, (d, k)))[0]


@pytest.fixture(scope="module")
def layer():
    """Return W, inputs h, and a loss of all outputs of one example that is not convex."""
    keys = jax.random.split(KEY, 4)
    W, h = jax.random.normal(keys[0], (M, N)), jax.random.normal(keys[1], (EXAMPLES, POSITIONS, N))
    mix = jax.random.normal(keys[2], (POSITIONS * M, POSITIONS * M))

    def loss(y):  # (positions, m)
        return jnp.sum(jnp.sin(mix @ y.ravel())) + jnp.prod(y[:, 0])

    return W, h, loss


@pytest.mark.parametrize("k", [1, 2])
def test_output_side_against_the_hessian_in_the_compensation(layer, k):
    W, h, loss = layer
    U = orthonormal(KEY, M, k)
    Wt, C = W + (ALPHA - 1) * U @ U.T @ W, jnp.eye(M) + (1 / ALPHA - 1) * U @ U.T

    def of_E(flat):  # row by row of E^T (k, m)
        E = flat.reshape(k, M).T
        return jnp.mean(jax.vmap(lambda x: loss(x @ ((C + E @ U.T) @ Wt).T))(h))

    G = jax.vmap(jax.hessian(loss))(h @ W.T)
    found = ALPHA**2 * bounds.compensation_block_shared(h @ W.T @ U, G)
    np.testing.assert_allclose(found, jax.hessian(of_E)(jnp.zeros(k * M)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found, found.T, atol=1e-12)


def test_input_side_against_the_hessian_in_the_compensation(layer):
    W, h, loss = layer
    V = orthonormal(KEY, N, 2)
    Wt, C = W + (ALPHA - 1) * W @ V @ V.T, jnp.eye(N) + (1 / ALPHA - 1) * V @ V.T

    def of_E(flat):  # row by row of E (n, k)
        return jnp.mean(jax.vmap(lambda x: loss(x @ (Wt @ (C + V @ flat.reshape(N, 2).T)).T))(h))

    WV = W @ V
    G = jnp.einsum("ai,etasb,bj->etisj", WV, jax.vmap(jax.hessian(loss))(h @ W.T), WV)
    found = ALPHA**2 * bounds.compensation_block_shared(h, G)
    np.testing.assert_allclose(found, jax.hessian(of_E)(jnp.zeros(N * 2)), rtol=1e-9, atol=1e-9)


def test_one_position_is_the_mean_of_kronecker_products():
    keys = jax.random.split(KEY)
    z, root = jax.random.normal(keys[0], (EXAMPLES, 2)), jax.random.normal(keys[1], (EXAMPLES, M, M))
    G = root + jnp.swapaxes(root, 1, 2)
    want = np.mean(
        [np.kron(np.outer(a, a), g) for a, g in zip(np.asarray(z), np.asarray(G), strict=True)], axis=0
    )
    np.testing.assert_allclose(jax.jit(bounds.compensation_block)(z, G), want, rtol=1e-12)
    over = jax.vmap(lambda c: bounds.compensation_block(c * z, G))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(over[1], 4 * over[0], rtol=1e-12)


def test_shapes_that_do_not_fit():
    block, shared = (inspect.unwrap(f) for f in (bounds.compensation_block, bounds.compensation_block_shared))
    with pytest.raises(ProblemError, match="use compensation_block_shared"):
        block(jnp.ones((2, 3, 1)), jnp.ones((2, 4, 4)))
    with pytest.raises(ProblemError, match="use compensation_block_shared"):
        block(jnp.ones((2, 3)), jnp.ones((2, 1, 4, 1, 4)))
    for G in (
        jnp.ones((2, 4, 4)),
        jnp.ones((2, 3, 4, 2, 4)),
        jnp.ones((2, 3, 4, 3, 5)),
        jnp.ones((1, 3, 4, 3, 4)),
    ):
        with pytest.raises(ProblemError, match="give \\(examples, positions, k\\)"):
            shared(jnp.ones((2, 3, 1)), G)


def test_norms_of_blocks_against_numpy():
    keys = jax.random.split(KEY)
    X = np.asarray(jax.random.normal(keys[0], (7, 7)))
    H, Q = X + X.T, np.asarray(orthonormal(keys[1], 7, 7))
    turned = Q.T @ H @ Q
    want = [np.linalg.norm(block, 2) for block in (turned[:3, :3], turned[3:, :3], turned[3:, 3:])]
    np.testing.assert_allclose(jax.jit(bounds.fast_blocks)(H, Q[:, :3]), want, rtol=1e-12)
    assert len(set(np.round(want, 3))) == 3


def test_the_upper_bound_is_the_eigenvalue_of_two_by_two():
    blocks = FastBlocks(*map(jnp.asarray, (2.0, 3.0, 5.0)))
    alphas = np.array([1.0, 2.0, 10.0, 1e3])
    want = [np.linalg.eigvalsh([[a * a * 2, a * 3], [a * 3, 5.0]])[-1] for a in alphas]
    np.testing.assert_allclose(bounds.sharpness_upper(alphas, blocks), want, rtol=1e-14)
    excess = np.array(want) - alphas**2 * 2
    assert float(bounds.sharpness_remainder(blocks)) == 5 + 9 / 2
    assert (excess <= 5 + 9 / 2).all()
    assert excess[-1] == pytest.approx(9 / 2, rel=1e-4)


def test_without_a_fast_block_growth_is_linear():
    blocks = FastBlocks(*map(jnp.asarray, (0.0, 3.0, 5.0)))
    assert float(bounds.sharpness_remainder(blocks)) == np.inf
    alphas = np.array([1e3, 2e3])
    found = np.asarray(bounds.sharpness_upper(alphas, blocks))
    assert (found <= 3 * alphas + 5).all()
    assert found[1] / found[0] == pytest.approx(2, rel=1e-3)


def test_the_examples_run():
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    names = [name for name in vars(compensation) if name in bounds.__all__ and name != "FastBlocks"]
    assert len(names) == 5
    for name in names:
        function = inspect.unwrap(getattr(compensation, name))
        (test,) = finder.find(function, name, globs=dict(vars(compensation)))
        assert runner.run(test).attempted >= 1
    assert runner.failures == 0
