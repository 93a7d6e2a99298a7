"""Statement 3.4 [standard]: Rates of gradient descent and heavy ball on a quadratic.

STATEMENT. Let L(x) = (x - x*)^T H (x - x*) / 2, H = H^T with eigenpairs (lambda_i, v_i), c_i = v_i^T (x_0 -
x*).

    (i)   Under GD with step eta, v_i^T (x_T - x*) = (1 - eta lambda_i)^T c_i, and L(x_T) = sum_i lambda_i
          c_i^2 (1 - eta lambda_i)^(2T) / 2. Where lambda_i > 0 it tends to zero iff 0 < eta lambda_i < 2,
          and the first T at which at most a fraction f < 1 of c_i is left is the least integer T >= 1 with
          T >= log f / log |1 - eta lambda_i|.
    (ii)  For spectra in [l, u], 0 < l <= u, kappa = u / l: no step has max |1 - eta lambda| < (kappa - 1) /
          (kappa + 1), and eta = 2 / (l + u) attains it.
    (iii) Under heavy ball started at rest, v_i^T (x_T - x*) = e_T c_i with
          e_{t+1} = (1 + b - s) e_t - b e_{t-1}, e_0 = e_{-1} = 1, s = eta lambda_i. Its rate
          limsup |e_T|^(1/T) is the larger modulus of the roots of z^2 - (1 + b - s) z + b: sqrt(b) where
          (1 + b - s)^2 <= 4b, else (|1 + b - s| + sqrt((1 + b - s)^2 - 4b)) / 2 >= sqrt(b). Over [l, u] the
          smallest worst rate is (sqrt kappa - 1) / (sqrt kappa + 1), attained at
          eta = 4 / (sqrt u + sqrt l)^2 and b = that rate squared.

ASSUMPTIONS. A quadratic with H = H^T, a fixed step, no noise; c_i != 0 for a rate. For (ii), (iii) l > 0. In
(i) the claim of convergence is refused where eta lambda_i is outside (0, 2). The rate in (iii) is asymptotic.

PROOF. (i) The gradient is H (x - x*), so v_i^T (x_{t+1} - x*) = (1 - eta lambda_i) v_i^T (x_t - x*). L is
half of sum_i lambda_i (v_i^T (x - x*))^2. |1 - eta lambda_i| < 1 iff 0 < eta lambda_i < 2; |r|^T <= f iff T
log |r| <= log f, log |r| < 0; for r = 0 one step does. (ii) max(1 - eta l, eta u - 1) is at least the mean
of the two with weights u / (l + u) and l / (l + u), which is (u - l) / (u + l) for every eta; both are
equal to it at eta = 2 / (l + u), and |1 - eta lambda| is convex in lambda, so the ends decide. (iii)
m_{t+1} = g_t + b m_t and eta m_t = x_{t-1} - x_t give the recurrence; m_0 = 0 is e_{-1} = e_0. e_T is a
combination of powers of the two roots (of z^T and T z^T if they agree), and a root of largest modulus takes
part unless e is the pure power of the other one, which e_0 = e_{-1} allows only for the root 1, that is s =
0. The roots have the product b, so the larger modulus is at least sqrt(b), with equality iff they are
complex or equal. Optimum: let rho < 1 be the worst rate, so b <= rho^2. A real root of modulus r >= sqrt(b)
has r + b/r = |1 + b - s|, and r + b/r grows with r >= sqrt(b); complex roots have |1 + b - s| < 2 sqrt(b)
<= rho + b/rho. So 1 + b - eta l <= rho + b/rho and eta u - 1 - b <= rho + b/rho. kappa times the first plus
the second: (kappa - 1)(1 + b) <= (kappa + 1) (rho + b/rho). Now (rho + b/rho) / (1 + b) grows with b, as
its derivative has the sign of 1/rho - rho, so it is at most 2 rho / (1 + rho^2), its value at b = rho^2.
That grows with rho on (0, 1) and is (kappa - 1) / (kappa + 1) at rho = (sqrt kappa - 1) / (sqrt kappa + 1),
so rho is no smaller. With the parameters given 1 + b - eta l = 2 sqrt(b) = eta u - 1 - b: the roots at both
ends are double, of modulus sqrt(b). QED.

TIGHTNESS. (i) is an equality. (ii) and (iii) are attained by the parameters given. The rate of (iii) is no
bound step by step: |e_T| exceeds rate^T, by about T where the root is double.

SOURCE. Nesterov, Introductory lectures on convex optimization (2004), 1.2.3; Polyak, Some methods of speeding
up the convergence of iteration methods (1964).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray, PyTree

from specdef_jax import bounds
from theory import methods
from theory.assumptions import require
from theory.certificate import (
    Certificate,
    Certificates,
    equality,
    inequality,
    refuses,
    refuted,
    tight,
    under_assumptions,
)
from theory.draws import over_draws
from theory.falsifier import falsify
from theory.hessians import curvature_of
from theory.instances.matrices import orthonormal
from theory.instances.networks import linear_tail_instance, mlp_instance
from theory.methods import radii, simulate
from theory.sizes import Size
from theory.trajectories import plain, trajectory

STEPS = 40
MOMENTA = (0.0, 0.5, 0.9)
COORDINATES = "v_i^T (x_T - x*) = (1 - eta lambda_i)^T c_i"
QUADRATIC = "the loss is a quadratic (its Hessian is the same everywhere)"


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify rates against optax on random quadratics and on the last layer of a network."""
    tail, whole = linear_tail_instance(key), mlp_instance(key)
    last = functools.partial(_last_layer_loss, tail.loss)

    def train_last(step: float | None = None) -> Certificates:
        name = f"{tail.name}, last layer"
        return on_network(
            last, tail.params["layer_1"], tail.params, *tail.args, name=name, key=key, step=step
        )

    claim = "outside its assumptions the statement is refused"
    return (
        *_random(key, size),
        *_counts(),
        *_heavy_ball(),
        _falsified(key, size),
        *_best(),
        *train_last(),
        *_negative(),
        refuses(claim, f"{whole.name}, all layers",
                on_network(whole.loss, whole.params, *whole.args, name="", key=key), QUADRATIC),
        refuses(claim, f"{tail.name}, last layer, a step of 1000", train_last(1e3), "0 < eta lambda < 2"),
    )  # fmt: skip


def on_network(
    loss: Callable[..., Array],
    params: PyTree,
    *args: Any,
    name: str,
    key: PRNGKeyArray,
    step: float | None = None,
) -> Certificates:
    """Certify (i) on anyone's loss, if it is a quadratic in what is trained.

    Args:
      loss: loss(params, *args).
      params: what is trained, few enough for a dense Hessian.
      *args: data, and what is frozen.
      name: of the instance.
      key: for a second point, at which the Hessian must be the same.
      step: step size, the best one if not given.
    """

    def evaluate() -> list[Certificate]:
        flat, unravel = ravel_pytree(params)
        at = curvature_of(loss, params, *args)
        away = curvature_of(loss, unravel(flat + jax.random.normal(key, flat.shape)), *args)
        H, g = np.asarray(at.hessian), np.asarray(at.gradient)
        require(np.allclose(H, away.hessian, rtol=0, atol=1e-9 * np.abs(H).max()), QUADRATIC)
        values, vectors = np.linalg.eigh((H + H.T) / 2)
        require(values[0] > 1e-9 * values[-1], "H > 0, so that there is one minimum")
        star = np.asarray(flat) - np.linalg.solve(H, g)
        eta = float(bounds.best_step(values[0], values[-1])) if step is None else step
        require(0 < eta * values[-1] < 2, f"0 < eta lambda < 2 (eta lambda_max = {eta * values[-1]:.3g})")
        path, losses = trajectory(plain(loss, params), optax.sgd(eta), *args, steps=STEPS)
        counts = np.array([0, 1, 7, STEPS])
        points = np.asarray(jax.vmap(lambda tree: ravel_pytree(tree)[0])(path))[counts]
        coordinates = (points - star) @ vectors
        predicted = bounds.decay_factor(eta, values, counts[:, None]) * coordinates[0]
        lowest = float(loss(unravel(jnp.asarray(star)), *args))
        after = functools.partial(
            bounds.quadratic_loss, eta, jnp.asarray(values), jnp.asarray(coordinates[0])
        )
        above = [after(int(t)) for t in counts]
        return [
            equality(COORDINATES, f"{name}, T = 0, 1, 7, {STEPS}", coordinates, predicted, count=1),
            equality("L(x_T) - L* = sum_i lambda_i c_i^2 (1 - eta lambda_i)^(2T) / 2", name,
                     np.asarray(losses)[counts] - lowest, above, count=1),
        ]  # fmt: skip

    return under_assumptions(COORDINATES, name, evaluate)


def _random(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Random quadratics, spectra over one to three decades, steps up to the edge of stability."""
    sides = over_draws(_draw, key, size.draws)
    told = f"6 coordinates, P = I, eta lambda_max in (0, 2), T = 0 ... {STEPS}"
    return [
        equality(COORDINATES, told, sides["coordinates"], sides["predicted"], scale=sides["start"]),
        equality("L(x_T) = sum_i lambda_i c_i^2 (1 - eta lambda_i)^(2T) / 2", told, sides["loss"],
                 sides["sum"], scale=sides["first loss"]),
        inequality("|x_T| <= max |1 - eta lambda_i|^T |x_0|", told, sides["norm"], sides["worst"],
                   allowance=sides["allowance"], scale=sides["start"]),
    ]  # fmt: skip


def _draw(key: PRNGKeyArray) -> dict[str, Array]:
    """Follow optax on one quadratic.

    Allowance: a step multiplies by H (6 products a row), scales and subtracts; it adds at most 16 eps times
    the norm, which does not grow, and so do the T factors on the other side.
    """
    keys = jax.random.split(key, 5)
    decades = jax.random.uniform(keys[1], minval=1.0, maxval=3.0)
    values = 10 ** -(decades * jax.random.uniform(keys[0], (6,)))
    V = orthonormal(keys[2], 6, 6)
    x = jax.random.normal(keys[3], (6,))
    step = 2 * jax.random.uniform(keys[4]) / jnp.max(values)
    H = (V * values) @ V.T
    path = simulate(methods.gd, step, jnp.zeros(()), (H + H.T) / 2, x, steps=STEPS)
    counts, c, start = jnp.arange(STEPS + 1), V.T @ x, jnp.linalg.norm(x)
    factors = bounds.decay_factor(step, values, counts[:, None])
    return {
        "coordinates": path @ V,
        "predicted": factors * c,
        "loss": jnp.einsum("ti,ij,tj->t", path, H, path) / 2,
        "sum": jax.vmap(lambda t: bounds.quadratic_loss(step, values, c, t))(counts),
        "first loss": x @ H @ x / 2,
        "start": start,
        "norm": jnp.linalg.norm(path[-1]),
        "worst": jnp.max(jnp.abs(factors[-1])) * start,
        "allowance": 16 * STEPS * jnp.finfo(x.dtype).eps * start,
    }


def _counts() -> list[Certificate]:
    """How many steps optax takes to leave a fraction, exact powers and coordinates that stay among them."""
    curvature = np.concatenate([[0.0, 0.5, 1.0, 1.5, 2.0, 2.01], np.linspace(0.01, 1.99, 58)])
    fractions = np.array([0.5, 0.25, 0.1, 1e-3, 1.0])
    path = np.asarray(
        simulate(methods.gd, jnp.ones(()), jnp.zeros(()), jnp.diag(curvature), jnp.ones(64), steps=1_000)
    )
    reached = np.abs(path)[:, None] <= fractions[:, None] * (1 + 1e-12)
    first = np.where(reached.any(axis=0), reached.argmax(axis=0), np.inf)
    found = np.asarray(bounds.steps_to_reduce(1.0, curvature, fractions[:, None]))
    arrived = np.isfinite(first)
    told = "64 curvatures, fractions .5, .25, .1, 1e-3 and 1"
    return [
        equality("the first T with |x_T| <= f |x_0|", told, found[arrived], first[arrived], allowance=0.0),
        equality("infinite iff it is never reached", told, np.isinf(found), ~arrived, allowance=0.0, count=1),
    ]


def _heavy_ball() -> list[Certificate]:
    """Heavy ball against optax: coordinates step by step, and the spectral radius of its map."""
    curvature, counts = np.linspace(0.0, 3.9, 40), (0, 1, 2, 7, 30)
    path, factors, rate, radius = [], [], [], []
    for b in MOMENTA:
        run = simulate(
            methods.heavy_ball, jnp.ones(()), jnp.asarray(b), jnp.diag(curvature), jnp.ones(40), steps=30
        )
        path.append(np.asarray(run)[list(counts)])
        factors.append(_factors(jnp.asarray(curvature), counts, b))
        rate.append(bounds.heavy_ball_rate(1.0, curvature, momentum=b))
        radius.append([radii("heavy_ball", [1.0], b, np.array([[c]]), np.eye(1))[0] for c in curvature])
    told = f"40 values of eta lambda in 0 ... 3.9, b in {MOMENTA}"
    last, largest = np.abs(factors[-1][-1]), np.asarray(rate[-1]) ** counts[-1]
    return [
        equality("e_T of heavy ball is that of optax", f"{told}, T in {counts}", path, factors, count=1),
        equality(
            "its rate is the spectral radius of optax's map", told, rate, radius, allowance=1e-7, count=1
        ),
        inequality("sqrt(b) <= rate", told, np.sqrt(np.array(MOMENTA))[:, None], rate, allowance=1e-15),
        refuted(
            "|e_T| <= rate^T is false: the rate is asymptotic",
            "eta lambda in 0 ... 3.9 (stable), b = .9, T = 30",
            last,
            largest,
        ),
    ]


@functools.partial(jax.jit, static_argnames=("counts", "momentum"))
def _factors(curvature: Array, counts: tuple[int, ...], momentum: float) -> Array:
    def after(t: int) -> Array:
        return jax.vmap(lambda c: bounds.heavy_ball_factor(1.0, c, t, momentum=momentum))(curvature)

    return jnp.stack([after(t) for t in counts])


def _falsified(key: PRNGKeyArray, size: Size) -> Certificate:
    """Let the falsifier look for a step, or a step and a momentum, that is better than the best."""
    steps = 100 if size is Size.SMALL else 200
    found = falsify(_slack, _sample, key, tried=size.draws, climbed=size.starts, steps=steps)
    return inequality(
        "no step beats (kappa - 1) / (kappa + 1), no heavy ball (sqrt kappa - 1) / (sqrt kappa + 1)",
        "where a falsifier looks: step, momentum and kappa", 0.0, _slack(found.point), search=found.search,
    )  # fmt: skip


def _sample(key: PRNGKeyArray) -> dict[str, Array]:
    return dict(zip(("kappa", "step", "momentum"), jax.random.normal(key, (3,)), strict=True))


def _slack(point: dict[str, Array]) -> Array:
    """Return how much worse a step and momentum are than the best, over the ends of [1, kappa].

    Allowance: the rates are a few operations on numbers of order 1, a square root near zero among them.
    """
    kappa, b = 1 + jnp.exp(2 * point["kappa"]), jax.nn.sigmoid(point["momentum"])
    ends = jnp.stack([jnp.ones(()), kappa])
    gd_step, ball_step = (jnp.exp(point["step"] / 2) * best for best in (
        bounds.best_step(1.0, kappa), bounds.best_heavy_ball(1.0, kappa).step))  # fmt: skip
    gd = jnp.max(jnp.abs(bounds.decay_factor(gd_step, ends, 1))) - bounds.best_rate(kappa)
    trace = jnp.abs(1 + b - ball_step * ends)
    root = (trace + jnp.sqrt(jnp.maximum(trace**2 - 4 * b, 1e-300))) / 2
    ball = jnp.max(jnp.where(trace**2 > 4 * b, root, jnp.sqrt(b))) - bounds.best_heavy_ball(1.0, kappa).rate
    return jnp.minimum(gd + 1e-14, ball + 1e-7)


def _best() -> list[Certificate]:
    """The best step and the best heavy ball are as good as stated; optax contracts so at both ends."""
    low, high = 0.3, np.array([0.3, 1.0, 30.0, 3e3])
    step, rate = bounds.best_step(low, high), bounds.best_rate(high / low)
    worst = np.maximum(*(np.abs(bounds.decay_factor(step, end, 1)) for end in (low, high)))
    ball = bounds.best_heavy_ball(low, high)
    at_ends = [
        np.max([radii("heavy_ball", [s], b, np.array([[end]]), np.eye(1)) for end in (low, h)])
        for s, b, h in zip(ball.step, ball.momentum, high, strict=True)
    ]
    expected = (np.sqrt(high / low) - 1) / (np.sqrt(high / low) + 1)
    path = simulate(
        methods.gd, step[2], jnp.zeros(()), jnp.diag(jnp.array([low, high[2]])), jnp.ones(2), steps=10
    )
    told = "kappa = 1, 3.3, 100, 1e4"
    return [
        tight("(kappa - 1) / (kappa + 1) <= max |1 - eta lambda| at eta = 2 / (l + u)", told, rate, worst,
              factor=1 + 1e-10, allowance=1e-14),
        equality("the radius of optax's heavy ball at its best step and momentum", told, at_ends, expected,
                 allowance=1e-6, count=1),
        equality("its rate as returned", told, ball.rate, expected, count=1),
        equality("10 steps of optax at the best step leave ((kappa - 1) / (kappa + 1))^10 at both ends",
                 "kappa = 100", np.abs(path[-1]), (99 / 101) ** 10),
    ]  # fmt: skip


def _negative() -> list[Certificate]:
    """The law is one of eigenvectors, and of quadratics."""
    H = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    path = simulate(methods.gd, jnp.asarray(0.2), jnp.zeros(()), H, jnp.ones(2), steps=5)
    x, quartic = 1.0, []
    for _ in range(5):
        x -= 0.2 * (x + x**3)
        quartic.append(x)
    return [
        refuted("x_1(T) = (1 - eta H_11)^T x_1(0) is false for a coordinate that is no eigenvector",
                "H = [[2, 1], [1, 3]], T = 5", abs(path[-1, 0] - bounds.decay_factor(0.2, 2.0, 5)), 0.0,
                allowance=1e-3),
        refuted("x_T = (1 - eta lambda)^T x_0 is false for x^2 / 2 + x^4 / 4", "x_0 = 1, T = 5",
                abs(quartic[-1] - bounds.decay_factor(0.2, 1.0, 5)), 0.0, allowance=1e-3),
    ]  # fmt: skip


def _last_layer_loss(loss: Callable[..., Array], last: PyTree, frozen: PyTree, x: Array, y: Array) -> Array:
    return loss({**frozen, "layer_1": last}, x, y)
