"""Two processes, one device each, through jax.distributed: the numbers of one process."""

import textwrap

import pytest

from specdef_jax import curvature as cv
from tests.curvature.test_sharding import KEY, loss, problem
from tests.processes import last_lines

SCRIPT = textwrap.dedent("""
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from specdef_jax import curvature as cv
    from tests.curvature.test_sharding import KEY, loss, problem

    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(leaf, spec):
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, NamedSharding(mesh, spec), lambda index: host[index])

    params, x, y = problem()
    params = {"in": spread(params["in"], P(None, "model")), "out": spread(params["out"], P("model", None))}
    with jax.set_mesh(mesh):
        found = cv.eigsh(cv.hessian(loss, params, spread(x, P()), spread(y, P())), 1, "LM", 1e-9, key=KEY)
    assert not found.vectors["in"].is_fully_addressable
    print("sigma", repr(float(found.values[0])), found.status.name, flush=True)
""")


def test_two_processes_find_the_eigenvalue_of_one():
    one = cv.eigsh(cv.hessian(loss, *problem()), 1, "LM", 1e-9, key=KEY)
    for line in last_lines(SCRIPT):
        _, value, status = line.split()
        assert status == "CONVERGED"
        assert float(value) == pytest.approx(float(one.values[0]), rel=1e-12)
