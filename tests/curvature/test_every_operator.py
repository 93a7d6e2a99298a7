"""One suite over every operator: its matrix, its transpose, what it says of itself, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from specdef_jax import curvature as cv
from specdef_jax import trees
from specdef_jax.errors import StructureError
from tests.curvature.helpers_operators import KEY, OPERATORS

EVERY = pytest.mark.parametrize("name", OPERATORS)


def matrix_of(op):
    """Return the matrix by products with unit vectors."""
    _, unravel = ravel_pytree(jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), op.template))

    @jax.jit
    def columns(op):
        return jax.vmap(lambda unit: ravel_pytree(op.mv(unravel(unit)))[0])(jnp.eye(op.size, dtype=op.dtype))

    return np.asarray(columns(op)).T


def draw(template, seed):
    return trees.normal_like(jax.random.fold_in(KEY, seed), template)


@EVERY
@pytest.mark.parametrize("structured", [False, True], ids=["plain", "deformed"])
def test_it_is_the_matrix(name, structured):
    op, exact = OPERATORS[name](structured=structured)
    expected = exact()
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(matrix_of(op), expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    assert op.shape == expected.shape
    assert op.symmetric == (expected.shape[0] == expected.shape[1])
    assert op.dtype == jnp.float64


@EVERY
def test_the_transpose_is_the_adjoint(name):
    op, exact = OPERATORS[name]()
    for one, matrix in ((op, exact()), (op.T, exact().T), (op.T.T, exact())):
        u, v = draw(one.image, 0), draw(one.template, 1)
        forward, backward = one.mv(v), one.rmv(u)
        assert jax.tree.structure(forward) == jax.tree.structure(one.image)
        assert jax.tree.structure(backward) == jax.tree.structure(one.template)
        value = float(trees.inner(u, forward))
        assert value == pytest.approx(float(trees.inner(backward, v)), rel=1e-11)
        assert value == pytest.approx(float(ravel_pytree(u)[0] @ matrix @ ravel_pytree(v)[0]), rel=1e-10)


@EVERY
def test_its_leading_singular_values(name):
    op, exact = OPERATORS[name](structured=True)
    expected = np.linalg.svd(exact(), compute_uv=False)[:3]
    found = cv.svds(op, 3, 1e-10, key=KEY)
    assert found.status is cv.Status.CONVERGED
    np.testing.assert_allclose(found.values, expected, rtol=1e-9)
    if op.symmetric:
        eigen = cv.eigsh(op, 3, "LM", 1e-10, key=KEY)
        assert eigen.status is cv.Status.CONVERGED
        np.testing.assert_allclose(np.abs(eigen.values), expected, rtol=1e-9)


@EVERY
def test_a_wrong_tree_is_refused_by_name(name):
    op, _ = OPERATORS[name]()
    for method, template in ((op.mv, op.template), (op.rmv, op.image)):
        wrong = draw(template, 0)
        leaf = trees.named_leaves(wrong)[-1][0]
        wrong = trees.map_named(lambda n, x, leaf=leaf: jnp.zeros((7, 7)) if n == leaf else x, wrong)
        with pytest.raises(StructureError, match=rf"leaf '{leaf}' has shape \(7, 7\)"):
            method(wrong)


@EVERY
def test_narrow_floats_are_found(name):
    double, _ = OPERATORS[name]()
    single, _ = OPERATORS[name](dtype=jnp.float32)
    assert cv.narrow_floats(double.mv, double.template) == []
    assert {found.dtype for found in cv.narrow_floats(single.mv, single.template)} == {"float32"}
    assert single.dtype == jnp.float32


@EVERY
def test_float32_agrees_to_its_rounding(name):
    op, _ = OPERATORS[name](dtype=jnp.float32)
    expected, found = OPERATORS[name]()[1](), matrix_of(op)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    assert found.dtype == np.float32


@EVERY
def test_it_is_a_jit_argument(name):
    first, second = (OPERATORS[name](seed=seed)[0] for seed in (0, 5))
    traces = []

    @jax.jit
    def product(op, v):
        traces.append(1)
        return op.mv(v)

    v = draw(first.template, 0)
    results = [ravel_pytree(product(op, v))[0] for op in (first, second)]
    assert len(traces) == (2 if name == "streamed" else 1)  # another host sequence is another program
    assert np.abs(results[0] - results[1]).max() > 1e-3
