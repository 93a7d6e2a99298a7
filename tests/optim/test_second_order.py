"""One suite over every second-order optimizer, and a step-by-step reference of each."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

from specdef_jax import curvature, optim, trees
from specdef_jax.errors import ProblemError, SpecError
from specdef_jax.optim.conjugate_gradient import truncated_cg
from specdef_jax.optim.cubic_newton import cubic_step
from specdef_jax.tasks import digits

KEY = jax.random.key(0)
OPTIMIZERS = {
    "newton_cg": lambda: optim.newton_cg(tol=1e-3, max_products=50, halvings=20),
    "damped_gauss_newton": lambda: optim.damped_gauss_newton(1.0),
    "cubic_newton": lambda: optim.cubic_newton(1.0),
    "adahessian": lambda: optim.adahessian(0.1, b2=0.99, key=KEY),
    "kfac": lambda: optim.kfac(0.3, damping=1e-3),
}
EVERY = pytest.mark.parametrize("name", OPTIMIZERS)
# K-FAC wants a dense layer, and is refused where there is none (test_kfac.py)
WITHOUT_LAYERS = pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "kfac"])


@dataclass(frozen=True)
class Problem:
    """loss = criterion(model(params)), so that a Gauss-Newton product exists."""

    model: Callable
    criterion: Callable
    start: object

    def loss(self, params):
        return self.criterion(self.model(params))


def run(problem, optimizer, steps, params=None):
    """Return the parameters, the state and the losses after so many steps, in one compiled loop."""
    params = problem.start if params is None else params

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(problem.loss)(params)

        def hvp(v):
            return jax.jvp(jax.grad(problem.loss), (params,), (v,))[1]

        def gnvp(v):
            outputs, push = jax.linearize(problem.model, params)
            image = jax.jvp(jax.grad(problem.criterion), (outputs,), (push(v),))[1]
            return jax.linear_transpose(push, params)(image)[0]

        updates, state = optimizer.update(
            gradient, state, params, value=value, value_fn=problem.loss, hvp=hvp, gnvp=gnvp
        )
        return (optax.apply_updates(params, updates), state), value

    (params, state), losses = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return params, state, losses


def quadratic(dtype=jnp.float64):
    scales = jnp.geomspace(1.0, 100.0, 12).astype(dtype)
    q = jnp.linalg.qr(jax.random.normal(KEY, (12, 12)))[0].astype(dtype)
    root = jnp.sqrt(scales)[:, None] * q

    def model(params):
        return root @ jnp.concatenate([params["a"], params["b"].ravel()])

    start = {"a": jnp.ones(4, dtype), "b": -jnp.ones((2, 4), dtype)}
    return Problem(model, lambda out: jnp.sum((out - 1) ** 2) / 2, start)


def regression(dtype=jnp.float64):
    """A quadratic with a dense layer.

    Steps with the empirical Fisher matrix go as 1 / residual^2: noise keeps them from growing, a start of
    small residuals from vanishing.
    """
    x = (jax.random.normal(KEY, (60, 4)) * jnp.geomspace(0.1, 1.0, 4)).astype(dtype)
    noise = jax.random.normal(jax.random.key(1), (60, 3)).astype(dtype)
    best = jnp.linalg.lstsq(x, noise)[0]

    def loss(out):  # above the least
        return jnp.mean(jnp.sum((out - noise) ** 2 - (x @ best - noise) ** 2, axis=1)) / 2

    return Problem(lambda params: x @ params["w"], loss, {"w": jnp.full((4, 3), 0.5, dtype)})


def quadratic_for(name, dtype=jnp.float64):
    return regression(dtype) if name == "kfac" else quadratic(dtype)


def rosenbrock():
    def model(v):
        return jnp.stack([10 * (v[1] - v[0] ** 2), 1 - v[0]])

    return Problem(model, lambda out: jnp.sum(out**2) / 2, jnp.array([-1.2, 1.0]))


@EVERY
def test_quadratic(name):
    steps = {"adahessian": 2000, "kfac": 120}.get(name, 60)
    params, _, losses = jax.jit(lambda: run(quadratic_for(name), OPTIMIZERS[name](), steps))()
    # estimates of the diagonal never settle, so a fixed step does not either
    assert float(losses[-1]) < (1e-4 if name == "adahessian" else 1e-8) * float(losses[0])
    assert trees.size(params) == 12


@WITHOUT_LAYERS
def test_rosenbrock(name):
    steps = 6000 if name == "adahessian" else 200
    params, _, losses = jax.jit(lambda: run(rosenbrock(), OPTIMIZERS[name](), steps))()
    assert float(losses[-1]) < (0.1 if name == "adahessian" else 1e-6)
    np.testing.assert_allclose(params, [1.0, 1.0], atol=0.6 if name == "adahessian" else 5e-3)


@EVERY
def test_digits(name):
    task = digits.task(1)
    x, y = (a[:100] for a in task.args)
    problem = Problem(
        lambda p: task.apply(p, x),
        lambda out: optax.softmax_cross_entropy_with_integer_labels(out, y).mean(),
        task.networks[0],
    )
    noisy = name == "adahessian"
    optimizer = optim.adahessian(0.01, key=KEY) if noisy else OPTIMIZERS[name]()
    _, _, losses = jax.jit(lambda: run(problem, optimizer, 200 if noisy else 40))()
    assert np.all(np.isfinite(losses))
    assert float(losses[-1]) < 0.3 * float(losses[0])


@EVERY
def test_under_vmap_and_without_jit_the_same(name):
    problem, optimizer = quadratic_for(name), OPTIMIZERS[name]()
    starts = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), problem.start)
    together = jax.jit(jax.vmap(lambda p: run(problem, optimizer, 5, p)[0]))(starts)
    for i in range(2):
        alone, _, _ = run(problem, optimizer, 5, jax.tree.map(lambda x, i=i: x[i], starts))
        for (_, a), (_, b) in zip(trees.named_leaves(alone), trees.named_leaves(together), strict=True):
            np.testing.assert_allclose(a, b[i], atol=1e-9)


@EVERY
def test_sharded_the_same(name):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    problem = Problem(lambda p: p * jnp.arange(1.0, 17.0), lambda o: jnp.sum((o - 1) ** 2), jnp.ones(16))
    if name == "kfac":
        x = jax.random.normal(KEY, (32, 16))
        problem = Problem(lambda w: x @ w, lambda o: jnp.mean(jnp.sum((o - 1) ** 2, 1)), jnp.ones((16, 3)))
    optimizer = OPTIMIZERS[name]()
    spread = jax.device_put(problem.start, jax.NamedSharding(mesh, jax.P("x")))
    one, many = (jax.jit(lambda p: run(problem, optimizer, 5, p)[0])(p) for p in (problem.start, spread))
    np.testing.assert_allclose(one, many, atol=1e-10)


@EVERY
def test_dtypes_are_kept(name):
    params, state, _ = run(quadratic_for(name, jnp.float32), OPTIMIZERS[name](), 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    again, _, _ = run(quadratic_for(name, jnp.float32), OPTIMIZERS[name](), 2)
    np.testing.assert_array_equal(ravel_pytree(params)[0], ravel_pytree(again)[0])
    assert jax.tree.structure(state) is not None


@EVERY
def test_a_missing_argument_is_named(name):
    params = {"w": jnp.ones(3)}
    optimizer = OPTIMIZERS[name]()
    needed = {"damped_gauss_newton": "gnvp", "kfac": "value_fn"}.get(name, "hvp")
    with pytest.raises(ProblemError, match=rf"{name} needs the extra argument {needed}="):
        optimizer.update(params, optimizer.init(params), params)


def test_what_adapts_needs_the_loss():
    params = {"w": jnp.ones(3)}
    for optimizer in (optim.cubic_newton(), optim.damped_gauss_newton(), optim.newton_cg(halvings=3)):
        with pytest.raises(ProblemError, match="value="):
            optimizer.update(params, optimizer.init(params), params, hvp=lambda v: v, gnvp=lambda v: v)
        with pytest.raises(ProblemError, match="needs the parameters"):
            optimizer.update(
                params, optimizer.init(params), hvp=lambda v: v, gnvp=lambda v: v, value=1.0, value_fn=len
            )


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.newton_cg(tol=0.0),
        lambda: optim.newton_cg(max_products=0),
        lambda: optim.cubic_newton(-1.0),
        lambda: optim.cubic_newton(krylov=0),
        lambda: optim.damped_gauss_newton(0.0),
        lambda: optim.adahessian(power=0.0, key=KEY),
        lambda: optim.adahessian(probes=0, key=KEY),
    ],
)
def test_bad_settings(make):
    with pytest.raises(SpecError, match="positive"):
        make()


def spd(n=20, seed=0):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return (q * np.geomspace(0.1, 10, n)) @ q.T, rng.standard_normal(n)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_truncated_cg_is_scipys_after_each_number_of_products(count):
    matrix, b = spd()
    found = truncated_cg(lambda v: matrix @ v, jnp.asarray(b), 1e-14, count)
    expected, _ = scipy.sparse.linalg.cg(matrix, b, rtol=1e-14, maxiter=count)
    np.testing.assert_allclose(found.step, expected, rtol=1e-9)
    assert int(found.products) == count
    assert float(found.residual) == pytest.approx(np.linalg.norm(matrix @ expected - b), rel=1e-8)


def test_truncated_cg_stops_at_negative_curvature():
    b = jnp.array([1.0, 1.0, 1.0])
    first = truncated_cg(lambda v: jnp.array([-1.0, -2.0, 1.0]) * v, b, 1e-10, 50)
    np.testing.assert_array_equal(first.step, b)
    assert bool(first.negative)
    later = truncated_cg(lambda v: jnp.array([3.0, -0.1, 1.0]) * v, b, 1e-10, 50)
    assert bool(later.negative)
    assert float(later.step @ b) > 0
    assert int(later.products) == 3


def test_newton_is_the_dense_step():
    matrix, g = spd()
    optimizer = optim.newton_cg(0.5, tol=1e-12, superlinear=False, damping=0.3)
    step, state = optimizer.update(
        jnp.asarray(g), optimizer.init(jnp.asarray(g)), None, hvp=lambda v: matrix @ v
    )
    np.testing.assert_allclose(step, -0.5 * np.linalg.solve(matrix + 0.3 * np.eye(20), g), rtol=1e-9)
    assert int(state.products) <= 30


@pytest.mark.parametrize("seed", range(8))
def test_a_cubic_step_is_the_global_minimizer(seed):
    """(H + sigma ||p|| I) p = -g and H + sigma ||p|| I >= 0 hold there and nowhere else."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((15, 15))
    matrix = (matrix + matrix.T) / 2  # indefinite
    g, sigma = 10.0 ** rng.uniform(-3, 2) * rng.standard_normal(15), 10.0 ** rng.uniform(-2, 2)
    p, decrease = cubic_step(lambda v: matrix @ v, jnp.asarray(g), sigma, 15)
    p = np.asarray(p)
    shifted = matrix + sigma * np.linalg.norm(p) * np.eye(15)
    np.testing.assert_allclose(shifted @ p, -g, atol=1e-9 * (1 + np.linalg.norm(g)))
    assert np.linalg.eigvalsh(shifted)[0] >= -1e-9 * np.abs(np.linalg.eigvalsh(matrix)).max()
    model = g @ p + p @ matrix @ p / 2 + sigma * np.linalg.norm(p) ** 3 / 3
    assert float(decrease) == pytest.approx(-model, rel=1e-9)


def test_gauss_newton_is_levenberg_marquardt_step_by_step():
    problem = rosenbrock()
    v, damping, expected = np.array([-1.2, 1.0]), 1.0, []
    for _ in range(15):
        r = np.array([10 * (v[1] - v[0] ** 2), 1 - v[0]])
        j = np.array([[-20 * v[0], 10.0], [-1.0, 0.0]])
        g, G = j.T @ r, j.T @ j
        p = -np.linalg.solve(G + damping * np.eye(2), g)
        new = v + p
        actual = r @ r / 2 - (100 * (new[1] - new[0] ** 2) ** 2 + (1 - new[0]) ** 2) / 2
        ratio = actual / -(g @ p + p @ G @ p / 2)
        v = new if ratio > 0 else v
        damping *= 1 / 3 if ratio > 0.75 else 2 if ratio < 0.25 else 1
        expected.append(v)
    optimizer = optim.damped_gauss_newton(1.0, tol=1e-14)
    for count in (1, 2, 5, 15):
        found, state, _ = run(problem, optimizer, count)
        np.testing.assert_allclose(found, expected[count - 1], rtol=1e-8)
    assert float(state.damping) == pytest.approx(damping, rel=1e-12)


def test_adahessian_step_by_step():
    matrix, _ = spd(6)
    optimizer = optim.adahessian(0.1, 0.8, 0.9, power=0.7, eps=1e-3, probes=2, key=KEY)
    params = jnp.linspace(-1.0, 1.0, 6)
    state = optimizer.init(params)
    x, m, v, key = np.asarray(params), np.zeros(6), np.zeros(6), KEY
    for t in range(1, 11):
        g = matrix @ x
        step, state = optimizer.update(jnp.asarray(matrix @ params), state, params, hvp=lambda z: matrix @ z)
        params = params + step
        key, *probes = jax.random.split(key, 3)
        signs = [np.where(np.asarray(trees.normal_like(k, params)) < 0, -1.0, 1.0) for k in probes]
        d = np.mean([s * (matrix @ s) for s in signs], axis=0)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * d**2
        x = x - 0.1 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) ** 0.7 + 1e-3)
        np.testing.assert_allclose(params, x, rtol=1e-10)


def test_the_estimated_diagonal_is_exact_where_the_hessian_is_diagonal_and_drowns_where_not():
    """THEORY.md 4.4: a large off-diagonal row hides a small diagonal entry."""
    loud = jnp.array([[1.0, 50.0], [50.0, 1.0]])
    for matrix, expected in ((jnp.diag(jnp.array([2.0, 3.0])), [2.0, 3.0]), (loud, [1.0, 1.0])):
        optimizer = optim.adahessian(b2=0.0, key=KEY)
        g = jnp.ones(2)
        _, state = optimizer.update(g, optimizer.init(g), hvp=lambda z, matrix=matrix: matrix @ z)
        away = np.abs(np.sqrt(state.nu) - expected).max()
        assert away < 1e-12 if matrix is not loud else away > 10


def test_it_works_with_the_operators_of_curvature():
    problem = quadratic()
    op = curvature.hessian(problem.loss, problem.start)
    optimizer = optim.newton_cg(tol=1e-12, superlinear=False)
    gradient = jax.grad(problem.loss)(problem.start)
    step, _ = optimizer.update(gradient, optimizer.init(problem.start), hvp=op.mv)
    after = optax.apply_updates(problem.start, step)
    assert float(trees.norm(jax.grad(problem.loss)(after))) < 1e-8
