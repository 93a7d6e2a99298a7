"""A raveled problem is the same problem, and what cannot be raveled is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specdef_jax import race
from specdef_jax.errors import ProblemError, StructureError
from specdef_jax.parametrization import merge, problem
from specdef_jax.race.inputs import stack
from specdef_jax.spec import SpecDef
from specdef_jax.specdef import deform

X = jax.random.normal(jax.random.key(1), (32, 6))
Y = jnp.sin(X[:, :2])


def network(seed, dtype=jnp.float64):
    a, b = jax.random.split(jax.random.key(seed))
    return {
        "in": {"w": jax.random.normal(a, (6, 5), dtype), "b": jnp.zeros(5, dtype)},
        "out": {"w": jax.random.normal(b, (5, 2), dtype), "scale": jnp.ones((), dtype)},
    }


def mse(params, x, y):
    hidden = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"])
    return jnp.mean((params["out"]["scale"] * hidden @ params["out"]["w"] - y) ** 2)


def raced(problems, **more):
    return race.run_problems(
        problems, {"adam": race.adam}, sample=race.minibatches(8, X, Y), steps=60, step_sizes=[1e-2, 5e-2],
        target=0.3, eval_every=5, eval_args=(X, Y), ends=True, lanes=1, **more,
    )  # fmt: skip


@pytest.mark.parametrize("deformed", [False, True])
def test_steps_and_ends_are_those_of_the_tree(deformed):
    trees = [network(i) for i in range(3)]
    if deformed:
        trees = [deform(tree, SpecDef(10.0, 1), key=jax.random.key(7)) for tree in trees]
    problems = [problem(mse, tree, X, Y) for tree in trees]
    vectors = [race.raveled(one) for one in problems]
    whole, flat = raced(problems), raced(vectors)
    np.testing.assert_allclose(flat.to_target, whole.to_target, rtol=1e-9)
    assert np.isfinite(whole.to_target).any()
    for j in range(3):
        back = vectors[j].read_back(flat.end("adam", 1, j))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9),
            back,
            merge(whole.end("adam", 1, j)),
        )


def test_every_dtype_has_a_vector_and_every_leaf_its_place():
    tree = network(0) | {"half": jnp.arange(3, dtype=jnp.bfloat16), "more": jnp.arange(4.0)}
    found = race.raveled(problem(lambda p, x, y: mse(p, x, y) + p["more"].sum(), tree, X, Y))
    assert {name: v.shape for name, v in found.params.items()} == {"bfloat16": (3,), "float64": (50,)}
    jax.tree.map(np.testing.assert_array_equal, found.read_back(found.params), tree)
    assert float(found.loss(found.params, X, Y)) == pytest.approx(float(mse(tree, X, Y)) + 6)


def test_layouts_that_differ_are_not_stacked():
    def turned(params, x, y):
        out = params["out"]
        return mse(params | {"out": out | {"w": out["w"].T}}, x, y)

    other = network(0)
    other["out"]["w"] = other["out"]["w"].T  # as many entries
    vectors = [race.raveled(problem(f, tree, X, Y)) for f, tree in ((mse, network(0)), (turned, other))]
    with pytest.raises(StructureError, match="another structure"):
        stack(vectors)


def test_parameters_on_several_devices_are_refused():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    tree = network(0)
    tree["in"]["w"] = jax.device_put(tree["in"]["w"], NamedSharding(mesh, PartitionSpec("x")))
    with pytest.raises(ProblemError, match="'in/w' lies on several devices"):
        race.raveled(problem(mse, tree, X, Y))
