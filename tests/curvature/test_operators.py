import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from specdef_jax import trees
from specdef_jax.curvature import (
    Status,
    dense,
    eigsh,
    eigvals,
    from_matrix,
    hessian,
    linear,
    narrow_floats,
    narrowest_float,
)
from specdef_jax.errors import ProblemError, StructureError
from specdef_jax.parametrization import Deformed, KernelAxes
from tests.curvature.helpers_spectra import with_spectrum

KEY = jax.random.key(3)


def mlp_loss(params, x, y):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return jnp.mean((hidden @ params["second"]["kernel"] - y) ** 2)


def mlp(dtype=jnp.float64):
    a, b, c, x, y = (
        jax.random.normal(k, s, dtype)
        for k, s in zip(jax.random.split(KEY, 5), [(4, 5), (5,), (5, 2), (16, 4), (16, 2)], strict=True)
    )
    return {"first": {"kernel": a, "bias": b}, "second": {"kernel": c}}, x, y


def deformed_mlp():
    params, x, y = mlp()
    comp = jnp.eye(5) + 0.1 * jax.random.normal(KEY, (5, 5))
    weight = params["first"]["kernel"] @ jnp.linalg.inv(comp)
    params["first"]["kernel"] = Deformed(weight, comp, "output", KernelAxes((0,), (1,)))
    return params, x, y


def exact_hessian(params, x, y):
    flat, unravel = ravel_pytree(params)

    def loss(v):
        tree = unravel(v)
        kernel = tree["first"]["kernel"]
        if isinstance(kernel, Deformed):  # written out, not through merge
            tree["first"]["kernel"] = kernel.weight @ kernel.comp
        return mlp_loss(tree, x, y)

    return jax.jit(jax.hessian(loss))(flat)


@pytest.mark.parametrize("problem", [mlp, deformed_mlp])
def test_hessian_against_jax_hessian(problem):
    params, x, y = problem()
    op, exact = hessian(mlp_loss, params, x, y), exact_hessian(*problem())
    found = dense(op)
    assert (op.size, op.dtype, op.symmetric) == (exact.shape[0], jnp.float64, True)
    np.testing.assert_allclose(found.matrix, exact, atol=1e-14)
    assert float(found.asymmetry) < 1e-14
    vector = trees.normal_like(KEY, op.template)
    expected = exact @ ravel_pytree(vector)[0]
    for mv in (op.mv, lambda v: jax.jit(lambda o, v: o.rmv(v))(op, v)):
        np.testing.assert_allclose(ravel_pytree(mv(vector))[0], expected, atol=1e-13)
    assert jax.tree.structure(op.mv(vector)) == jax.tree.structure(params)
    np.testing.assert_allclose(eigvals(op), np.linalg.eigvalsh(exact), atol=1e-13)
    eigen = eigsh(op, 2, "LM", 1e-8, key=KEY)
    values = np.linalg.eigvalsh(exact)
    assert eigen.status is Status.CONVERGED
    np.testing.assert_allclose(eigen.values, values[np.argsort(-np.abs(values))][:2], atol=1e-10)
    assert jax.tree.structure(eigen.vectors) == jax.tree.structure(params)


def test_deformation_changes_the_spectrum():
    plain, deformed = (eigvals(hessian(mlp_loss, *problem()))[-1] for problem in (mlp, deformed_mlp))
    assert abs(float(plain - deformed)) > 1e-2


def test_products_are_symmetric():
    params, x, y = deformed_mlp()
    op = hessian(mlp_loss, params, x, y)
    u, v = (trees.normal_like(k, op.template) for k in jax.random.split(KEY))
    assert float(trees.inner(u, op.mv(v))) == pytest.approx(float(trees.inner(op.mv(u), v)), rel=1e-13)


def test_mixed_dtypes_promote():
    params, x, y = mlp(jnp.float32)
    params["second"]["kernel"] = params["second"]["kernel"].astype(jnp.float64)
    op = hessian(mlp_loss, params, x, y)
    assert op.dtype == jnp.float64
    eigen = eigsh(op, 1, key=KEY)
    assert eigen.narrowest == "float32"
    assert eigen.vectors["first"]["kernel"].dtype == jnp.float64
    assert float(eigen.values[0]) == pytest.approx(float(jnp.abs(eigvals(op)).max()), rel=1e-4)


def test_structure_errors_name_the_leaf():
    params, x, y = mlp()
    op = hessian(mlp_loss, params, x, y)
    wrong = trees.normal_like(KEY, params)
    wrong["first"]["bias"] = jnp.zeros(6)
    with pytest.raises(
        StructureError, match=r"hessian.mv: leaf 'first/bias' has shape \(6,\), expected \(5,\)"
    ):
        op.mv(wrong)
    del wrong["first"]["bias"]
    with pytest.raises(StructureError, match="'first/bias' is missing"):
        op.mv(wrong)


@pytest.mark.parametrize("leaf", [jnp.ones(3, int), jnp.ones(3, complex), 1.0])
def test_parameters_must_be_real_float_arrays(leaf):
    with pytest.raises(ProblemError, match="leaf 'layer/step' has dtype"):
        hessian(lambda p: jnp.sum(p["w"] ** 2), {"w": jnp.ones(2), "layer": {"step": leaf}})


def test_bad_losses_and_matrices():
    with pytest.raises(ProblemError, match="one real scalar"):
        hessian(lambda p: p, jnp.ones(3))
    with pytest.raises(ProblemError, match=r"shape \(2, 3\)"):
        from_matrix(jnp.ones((2, 3)))
    with pytest.raises(ProblemError, match="int"):
        from_matrix(np.eye(3, dtype=int))
    with pytest.raises(ProblemError, match="none"):
        linear(lambda v: v, {})
    with pytest.raises(ProblemError, match="eigsh"):
        dense(linear(lambda v: v, jax.ShapeDtypeStruct((20_001,), jnp.float64)))


def test_matrix_and_its_transpose():
    matrix = np.random.default_rng(0).standard_normal((7, 7))
    op = from_matrix(matrix, symmetric=False)
    v = np.arange(7.0)
    np.testing.assert_allclose(op.mv(v), matrix @ v, rtol=1e-14)
    np.testing.assert_allclose(op.rmv(v), matrix.T @ v, rtol=1e-14)
    np.testing.assert_allclose(dense(op, chunk=3).matrix, matrix, rtol=1e-14)
    assert float(dense(op).asymmetry) == pytest.approx(np.abs(matrix - matrix.T).max())


def test_rectangular_operators_have_a_transpose():
    matrix = np.random.default_rng(0).standard_normal((3, 5))
    op = linear(
        Partial(lambda a, v: {"y": a @ v["x"]}, jnp.asarray(matrix)), {"x": jnp.zeros(5)}, symmetric=False
    )
    np.testing.assert_allclose(op.rmv({"y": np.arange(3.0)})["x"], matrix.T @ np.arange(3.0), rtol=1e-14)
    with pytest.raises(StructureError, match="linear"):
        op.rmv({"x": np.zeros(5)})
    with pytest.raises(ProblemError, match="square"):
        dense(op)


def test_scaled_matrix_through_linear_is_the_matrix():
    matrix = jnp.asarray(with_spectrum(np.linspace(-1, 4, 30)))
    op = linear(Partial(jnp.matmul, matrix), jax.ShapeDtypeStruct((30,), jnp.float64))
    np.testing.assert_allclose(dense(op).matrix, matrix, atol=1e-15)


def test_narrow_floats_looks_into_sub_jaxprs():
    def scanned(x):
        def step(carry, _):
            return jax.lax.cond(
                carry[0] > 0, lambda c: c.astype(jnp.bfloat16).astype(c.dtype), lambda c: c, carry
            ), None

        return jax.lax.scan(step, x, None, length=2)[0]

    x = jnp.ones(3)
    names = {(f.primitive, f.dtype) for f in narrow_floats(jax.jit(scanned), x)}
    assert names == {("convert_element_type", "bfloat16")}
    assert narrowest_float(scanned, x) == "bfloat16"
    assert narrow_floats(lambda x: jnp.sin(x) @ x, x) == []


def test_exact_narrow_data_is_not_a_narrow_computation():
    x, data = jnp.ones(3), jnp.ones(3, jnp.float32)
    assert narrow_floats(lambda x, d: jnp.sum(x * d), x, data) == []
    assert narrowest_float(lambda x, d: jnp.sum(x * d), x, data) == "float64"
    assert [f.dtype for f in narrow_floats(lambda d: d * 2, data)] == ["float32"]
    assert narrow_floats(lambda d: d * 2, data, asked=jnp.float32) == []


def test_float32_inside_a_float64_loss_is_seen_through_the_hessian():
    def loss(w, x):
        return jnp.sum(jnp.tanh(x.astype(jnp.float32) @ w.astype(jnp.float32))).astype(jnp.float64)

    op = hessian(loss, jnp.ones((3, 2)), jnp.ones((4, 3)))
    assert op.dtype == jnp.float64
    assert narrowest_float(op.mv, op.template) == "float32"
    assert any(f.primitive == "dot_general" for f in narrow_floats(op.mv, op.template))
