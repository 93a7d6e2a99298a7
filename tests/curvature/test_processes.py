"""Two processes, one device each, through jax.distributed: the numbers of one process."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest

from specdef_jax import curvature as cv
from tests.curvature.test_sharding import KEY, loss, problem

SCRIPT = textwrap.dedent("""
    import sys
    import jax
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from specdef_jax import curvature as cv
    from tests.curvature.test_sharding import KEY, loss, problem

    assert jax.process_count() == 2 and jax.device_count() == 2
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, address, str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [p.communicate(timeout=300) for p in processes]
    one = cv.eigsh(cv.hessian(loss, *problem()), 1, "LM", 1e-9, key=KEY)
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err[-2000:]
        _, value, status = out.splitlines()[-1].split()
        assert status == "CONVERGED"
        assert float(value) == pytest.approx(float(one.values[0]), rel=1e-12)
