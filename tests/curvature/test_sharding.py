"""Eight virtual devices, automatic and explicit axes: the numbers of one device, and nothing gathered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from specdef_jax import curvature as cv
from specdef_jax.curvature import lanczos
from specdef_jax.curvature.restart import Setting

KEY = jax.random.key(9)
WIDTH = 64


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["in"])
    return jnp.mean((hidden @ params["out"] - y) ** 2)


def explicit_loss(params, x, y):
    """The same where shardings are part of the type: a contraction of split axes says where it goes."""
    hidden = jnp.tanh(jnp.dot(x, params["in"], out_sharding=P("data", "model")))
    return jnp.mean((jnp.dot(hidden, params["out"], out_sharding=P("data", None)) - y) ** 2)


LOSSES = {AxisType.Auto: loss, AxisType.Explicit: explicit_loss}


def problem(mesh=None):
    """Tensor parallel: hidden units over "model", the batch over "data"."""
    shapes = {"in": (16, WIDTH), "out": (WIDTH, 4)}
    keys = dict(zip(shapes, jax.random.split(KEY, 2), strict=True))
    params = {name: jax.random.normal(keys[name], shape) / 8 for name, shape in shapes.items()}
    x, y = jax.random.normal(KEY, (32, 16)), jax.random.normal(KEY, (32, 4))
    if mesh is None:
        return params, x, y
    specs = {"in": P(None, "model"), "out": P("model", None)}
    params = {n: jax.device_put(v, NamedSharding(mesh, specs[n])) for n, v in params.items()}
    x, y = (jax.device_put(v, NamedSharding(mesh, P("data", None))) for v in (x, y))
    return params, x, y


def gathered(text, entries):
    """Return the all-gathers in a compiled module whose result has as many entries or more."""
    found = []
    for shape in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", text):
        if np.prod([int(d) for d in shape.split(",")]) >= entries:
            found.append(shape)
    return found


BOTH = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


@BOTH
def test_eigsh_agrees_and_vectors_keep_the_sharding(kind):
    mesh = mesh_of(kind)
    params, x, y = problem(mesh)
    with jax.set_mesh(mesh):
        found = cv.eigsh(cv.hessian(LOSSES[kind], params, x, y), 2, "LM", 1e-9, key=KEY)
    one = cv.eigsh(cv.hessian(loss, *problem()), 2, "LM", 1e-9, key=KEY)
    assert found.status is cv.Status.CONVERGED
    np.testing.assert_allclose(found.values, one.values, rtol=1e-12)
    for name, leaf in params.items():
        vectors = found.vectors[name]
        assert vectors.sharding.is_equivalent_to(
            NamedSharding(mesh, P(None, *leaf.sharding.spec)), vectors.ndim
        ), name
        same = np.abs(np.sum(np.asarray(vectors) * np.asarray(one.vectors[name])))
        assert same > 0


@BOTH
def test_svds_density_and_trace_agree(kind):
    mesh = mesh_of(kind)
    params, x, y = problem(mesh)
    with jax.set_mesh(mesh):
        block = cv.block(LOSSES[kind], params, "in", "out", x, y)
        singular = cv.svds(block, 2, 1e-9, key=KEY)
        op = cv.hessian(LOSSES[kind], params, x, y)
        spread = cv.density(op, key=KEY, probes=2, steps=12)
        total = cv.trace(op, key=KEY, probes=6)
    params, x, y = problem()
    np.testing.assert_allclose(
        singular.values,
        cv.svds(cv.block(loss, params, "in", "out", x, y), 2, 1e-9, key=KEY).values,
        rtol=1e-10,
    )
    op = cv.hessian(loss, params, x, y)
    one = cv.density(op, key=KEY, probes=2, steps=12)
    np.testing.assert_allclose(spread.nodes, one.nodes, atol=1e-10)
    np.testing.assert_allclose(spread.weights, one.weights, atol=1e-10)
    assert float(total.value) == pytest.approx(float(cv.trace(op, key=KEY, probes=6).value), rel=1e-9)


@BOTH
def test_nothing_of_the_size_of_a_leaf_is_gathered(kind):
    mesh = mesh_of(kind)
    params, x, y = problem(mesh)
    setting = Setting(1, 12, "LM", whole=False, narrowest="float64")
    with jax.set_mesh(mesh):
        op = cv.hessian(LOSSES[kind], params, x, y)
        text = lanczos._solve.lower(setting, op, KEY, 1e-6, 100, None).compile().as_text()
        product = jax.jit(lambda op, v: op.mv(v))
        compiled = product.lower(op, params).compile()
    assert "all-reduce" in text  # the inner products
    assert gathered(text, WIDTH * 4) == []
    for name, leaf in params.items():
        assert compiled.output_shardings[name].is_equivalent_to(leaf.sharding, leaf.ndim)


def test_gathers_would_be_seen():
    mesh = mesh_of(AxisType.Auto)
    params, _, _ = problem(mesh)
    replicated = NamedSharding(mesh, P())
    text = jax.jit(lambda v: v * 2, out_shardings=replicated).lower(params["in"]).compile().as_text()
    assert gathered(text, 16 * WIDTH)
