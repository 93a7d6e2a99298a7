"""Statement 3.1 [standard]: Largest stable steps of first-order methods on a quadratic.

STATEMENT. On L(x) = x^T H x / 2, H >= 0, with a fixed positive definite preconditioner P (I if none),
lambda = lambda_max(P^-1 H) > 0, b in [0, 1) and eta > 0, gradients tend to zero from every start iff

    gd            x <- x - eta P^-1 g                                     eta lambda < 2
    heavy_ball    m <- g + b m,          x <- x - eta P^-1 m              eta lambda < 2 (1 + b)
    nesterov      m <- g + b m,          x <- x - eta P^-1 (g + b m)      eta lambda < (2 + 2b) / (1 + 2b)
    ema_momentum  m <- b m + (1 - b) g,  x <- x - eta P^-1 m              eta lambda < (2 + 2b) / (1 - b)
    ema_nesterov  m <- b m + (1 - b) g,  x <- x - eta P^-1 (b m + (1 - b) g)
                                                         eta lambda < (2 + 2b) / ((1 - b) (1 + 2b))

strictly: at equality a root is -1. For ema_momentum at b = .9 this is 38. CONSEQUENCE. A stationary point of
a deformed network is linearly unstable for each method beyond the step so found for a^2 lambda_max(K_U), for
GD eta > 2 / (a^2 lambda_max(K_U)), if that eigenvalue is positive; at a minimum too. Else nothing follows.

OPTAX. sgd(momentum) is heavy_ball (no factor 1 - b, no dampening). sgd(nesterov) is nesterov; its parameters
are Nesterov's look-ahead points y_t = x_t + b (x_t - x_{t-1}), with the same roots as x_t. ema(debias=False)
is ema_momentum. ema and adam divide m by 1 - b^t, and nadam takes b m / (1 - b^(t+1)) + (1 - b) g /
(1 - b^t): their maps change with t and tend to ema_momentum and ema_nesterov, so that the limits are those,
but early steps are larger, by up to 1 / (1 - b): x_1 = (1 - eta lambda) x_0, and for nadam x_1 =
(1 - (1 + 2b) / (1 + b) eta lambda) x_0. In adam and nadam P = diag(sqrt(v_hat) + eps) has to stand still;
while it moves the statement says nothing.

ASSUMPTIONS. H = H^T >= 0; P = P^T > 0, constant; 0 <= b < 1. For the consequence a stationary point at which
L is twice differentiable, alpha >= 1 and lambda_max(K_U) > 0. LOCAL: elsewhere none of this caps useful
steps; a run that trains on at 2.5 / lambda is shown.

PROOF. With y = P^(1/2) x the method reads the same with P = I and P^(-1/2) H P^(-1/2) for H, which has the
eigenvalues of P^-1 H; in its eigenbasis coordinates do not mix. Let s = eta lambda_i. Eliminating m gives
  gd            z - (1 - s);
  heavy_ball    x_{t+1} - x_t = b (x_t - x_{t-1}) - s x_t,  so  z^2 - (1 + b - s) z + b;
  nesterov      (x, eta m) has the matrix [[1 - (1 + b) s, -b^2], [s, b]], of trace (1 + b)(1 - s) and
                determinant b (1 - s), so z^2 - (1 + b)(1 - s) z + b (1 - s);
  ema_          m is 1 - b times that of heavy_ball or nesterov: the same with (1 - b) s for s.
Jury: z^2 + p z + q has both roots in |z| < 1 iff |q| < 1, 1 + p + q > 0 and 1 - p + q > 0. (Complex roots:
|z|^2 = q, and the values at 1 and -1 are positive. Real roots: these values are both positive iff both roots
lie in (-1, 1), or both beyond 1, or both below -1, and the product q tells the first from the others.)
gd: |1 - s| < 1. heavy_ball: q = b < 1; s > 0; 2 (1 + b) - s > 0. nesterov: s > 0; 1 - p + q = 2 + 2b -
(1 + 2b) s > 0; and then s < (2 + 2b) / (1 + 2b) <= 2 <= 1 + 1/b, so |b (1 - s)| < 1 adds nothing. All limits
fall as 1 / lambda_i, so the largest eigenvalue decides; where lambda_i = 0 the gradient is zero from the
start. Beyond a limit the polynomial is negative at -1 and has a root below -1; the start at rest has a part
along it. Corrected forms: x_{t+1} = A_t x_t (x with the state) with A_t -> A. If A has spectral radius < 1,
A_t is from some t on a contraction in a norm in which A is one; if it is > 1, a cone around the growing
eigenvectors is from some t on mapped into itself and stretched, and almost every start gets into it.
CONSEQUENCE: by 2.2 and 2.3, lambda_max(H_a) >= lambda_max(F^T H_a F) = a^2 lambda_max(K_U). The Jacobian of
the method's map at a stationary point is the map for the quadratic with H_a. It has a root of modulus > 1,
and such a fixed point of a smooth map is unstable (Shub, Global stability of dynamical systems, 1987,
chapter 5). QED.

TIGHTNESS. At equality there is a root -1, and gradients neither vanish nor grow. The consequence gives away
nothing as a grows: lambda_max(H_a) = a^2 lambda_max(K_U) + O(1) by 2.2.

SOURCE. Polyak (1964), Nesterov (1983), Jury (1964); with Adam's frozen preconditioner Cohen et al. (2022),
Adaptive gradient methods at the edge of stability; LOCAL: Cohen et al. (2021), Gradient descent on neural
networks typically occurs at the edge of stability.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.bounds import Method
from specdef_jax.spec import Plan
from specdef_jax.words import Word
from theory import methods
from theory.assumptions import require
from theory.certificate import (
    Certificate,
    Certificates,
    equality,
    inequality,
    refuses,
    refuted,
    under_assumptions,
)
from theory.draws import over_draws
from theory.falsifier import falsify
from theory.instances.matrices import orthonormal
from theory.instances.minima import minimum
from theory.instances.networks import Instance, mlp_instance
from theory.methods import METHODS, map_of, radii, simulate, update_map
from theory.sizes import Size
from theory.unstable_minimum import beyond_the_edge, on_network, tight_at_large_alpha

MOMENTA = (0.5, 0.9, 0.99)
SHARES = (0.99, 1.0, 1.01)  # of the largest stable step
STEPS = 2_000
CONVERGES = "gradients tend to zero 1% below the step, and grow 1% above"
CHECKED = Word.CHECKED  # eigenvalues of matrices that are not symmetric: the allowance 1e-9 is estimated


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify the limits on quadratics with optax, the consequence at the minimum of a network."""
    found: list[Certificate] = []
    for method in get_args(Method):
        found += _edge(method, key)
        found += _simulated(method, key)
        found.append(_random(method, key, size))
    for method in get_args(Method) if size is Size.FULL else ("nesterov",):
        found.append(_falsified(method, key, size))
    found += _without_curvature()
    found += _conventions(key)
    instance = mlp_instance(key, risk="squared")
    params = minimum(instance.loss, instance.params, *instance.args)
    for side in ("output",) if size is Size.SMALL else ("output", "input"):
        plan = sd.plan(params, sd.SpecDef(alpha=8.0, side=side), where=instance.where, key=key)
        name = f"a minimum of {instance.name}, {side} side, a = 8"
        found += on_network(instance.loss, params, plan, *instance.args, name=name)
    found.append(tight_at_large_alpha(instance, params, key))
    found.append(beyond_the_edge(instance))
    return (*found, *_outside(instance, params, key))


def on_quadratic(method: Method, H: Any, P: Any, momenta: Sequence[float], name: str) -> Certificates:
    """Certify the limit of one method on anyone's quadratic and preconditioner.

    Args:
      method: as in bounds.max_stable_step.
      H: (n, n).
      P: (n, n).
      momenta: values of b.
      name: of the instance.
    """
    claim = f"{method}: optax's update map has spectral radius 1 at the step, less 1% below, more 1% above"

    def evaluate() -> list[Certificate]:
        h, p = np.asarray(H, float), np.asarray(P, float)
        require(np.allclose(h, h.T) and np.allclose(p, p.T), "H = H^T, P = P^T")
        require(np.linalg.eigvalsh(p)[0] > 0, "P > 0")
        values = scipy.linalg.eigh(h, p, eigvals_only=True)
        require(values[0] > 1e-12 * abs(values).max(), "H > 0 (at a zero eigenvalue the radius is 1 always)")
        limits = [bounds.max_stable_step(method, float(values[-1]), momentum=b) for b in momenta]
        found = [
            radii(method, limit * np.array(SHARES), b, h, p) for limit, b in zip(limits, momenta, strict=True)
        ]
        below, at, above = np.transpose(found)
        ones = np.ones_like(at)
        return [
            equality(claim, name, at, ones, allowance=1e-9),
            inequality(claim, name, [below, ones + 1e-6], [ones - 1e-6, above], word=CHECKED),
        ]

    return under_assumptions(claim, name, evaluate)


def _quadratic(key: PRNGKeyArray, values: Any) -> tuple[Array, Array]:
    """Return H and P, which do not commute, such that P^-1 H has the given eigenvalues."""
    n = len(values)
    Q, S = (orthonormal(k, n, n) for k in jax.random.split(key))
    root = (S * jnp.linspace(0.5, 2, n)) @ S.T
    H = root @ (Q * jnp.asarray(values)) @ Q.T @ root
    return (H + H.T) / 2, root @ root


def _edge(method: Method, key: PRNGKeyArray) -> Certificates:
    H, P = _quadratic(key, (0.3, 1.7, 3.7))
    return on_quadratic(method, H, P, MOMENTA, f"P^-1 H of eigenvalues .3, 1.7, 3.7, b in {MOMENTA}")


def _simulated(method: Method, key: PRNGKeyArray) -> list[Certificate]:
    """Follow optax at the shares of the limit, with and without P, one eigenvalue zero."""
    values = (0.0, 0.4, 1.1, 3.7)
    H, P = _quadratic(key, values)
    Q = orthonormal(key, 4, 4)
    plain = (Q * jnp.asarray(values)) @ Q.T
    ends = [_ends(METHODS[method], method, MOMENTA, h, p) for h, p in ((H, P), (plain, jnp.eye(4)))]
    below, at, above = np.concatenate(ends, axis=1)
    told = f"P^-1 H of eigenvalues {values}, P = I and not, b in {MOMENTA}, {STEPS} steps"
    return [
        _on_both_sides(method, told, below, above),
        inequality(f"{method}: at the step they neither vanish nor explode", told, [1e-4 + 0 * at, at],
                   [at, 1e4 + 0 * at], word=CHECKED),
    ]  # fmt: skip


def _on_both_sides(name: str, told: str, below: np.ndarray, above: np.ndarray) -> Certificate:
    """Compare |gradient| after and before, at 1% below and 1% above."""
    lhs, rhs = np.append(below, np.full_like(above, 1e2)), np.append(np.full_like(below, 1e-2), above)
    return inequality(f"{name}: {CONVERGES}", told, lhs, rhs, word=CHECKED)


def _ends(make: Any, method: Method, momenta: tuple[float, ...], H: Array, *P: Array) -> np.ndarray:
    """Return |gradient| after over before, (shares, momenta)."""
    largest = float(scipy.linalg.eigh(H, *P, eigvals_only=True)[-1])
    limits = np.array([float(bounds.max_stable_step(method, largest, momentum=b)) for b in momenta])
    return np.asarray(_ratios(make, np.multiply.outer(SHARES, limits), np.asarray(momenta), H, P))


@functools.partial(jax.jit, static_argnames="make")
def _ratios(make: Any, steps: Array, momenta: Array, H: Array, P: tuple[Array, ...]) -> Array:
    def ratio(step: Array, momentum: Array) -> Array:
        x = jnp.ones(len(H))
        last = simulate(make, step, momentum, H, x, *P, steps=STEPS)[-1]
        return jnp.max(jnp.abs(H @ last)) / jnp.max(jnp.abs(H @ x))

    return jax.vmap(lambda row: jax.vmap(ratio)(row, momenta))(steps)


def _random(method: Method, key: PRNGKeyArray, size: Size) -> Certificate:
    """Random momenta, curvatures and steps on either side of the limit, by one coordinate."""
    momenta = np.asarray(0.99 * jax.random.uniform(key, (32,)))
    curvature = np.logspace(-3, 3, 32)
    limits = [
        float(bounds.max_stable_step(method, c, momentum=float(b)))
        for b, c in zip(momenta, curvature, strict=True)
    ]
    table = jnp.stack([jnp.asarray(column) for column in (momenta, curvature, limits)])
    sides = over_draws(functools.partial(_draw, method), key, size.draws, table)
    return inequality(
        f"{method}: Jury's conditions hold below the step, and not above",
        "32 momenta in 0 ... .99, curvatures 1e-3 ... 1e3, .01 to 3 times the step, a single coordinate",
        np.append(-sides["below"], sides["above"]),
        0.0,
        allowance=np.tile(sides["allowance"], 2),
    )


def _draw(method: Method, key: PRNGKeyArray, table: Array) -> dict[str, Array]:
    which, low, high = jax.random.split(key, 3)
    b, curvature, limit = table[:, jax.random.randint(which, (), 0, table.shape[1])]
    below = jax.random.uniform(low, minval=0.01, maxval=0.99)
    above = jax.random.uniform(high, minval=1.01, maxval=3.0)
    return _margins(method, b, curvature, limit * jnp.array([below, above]))


def _falsified(method: Method, key: PRNGKeyArray, size: Size) -> Certificate:
    """Let the falsifier look for an unstable step below a limit, or a stable one above."""
    steps = 100 if size is Size.SMALL else 200
    slack = functools.partial(_slack, method)
    found = falsify(slack, _sample, key, tried=size.draws, climbed=size.starts, steps=steps)
    return inequality(
        f"{method}: the limit where a falsifier looks", "curvature and a step on either side, b = .9", 0.0,
        slack(found.point), search=found.search, note="the slack is the least of Jury's quantities",
    )  # fmt: skip


def _sample(key: PRNGKeyArray) -> dict[str, Array]:
    return dict(zip(("curvature", "below", "above"), jax.random.normal(key, (3,)), strict=True))


def _slack(method: Method, point: dict[str, Array]) -> Array:
    """Return the smaller margin by which Jury's conditions hold below the limit, and fail above."""
    curvature = jnp.exp(point["curvature"])
    limit = bounds.max_stable_step(method, curvature, momentum=0.9)
    shares = jnp.array([jax.nn.sigmoid(point["below"]), 1 + jnp.exp(point["above"])])
    sides = _margins(method, 0.9, curvature, limit * shares)
    return jnp.minimum(sides["below"], -sides["above"]) + sides["allowance"]


def _margins(method: Method, b: Any, curvature: Array, steps: Array) -> dict[str, Array]:
    """Return the smallest of Jury's quantities for optax's update map of one coordinate, at two steps.

    Allowance: entries of the map are at most three products and sums of b and step * curvature, so the
    quantities are off by a few eps times (1 + the largest entry)^2; 32 covers them.
    """

    def margin(step: Array) -> tuple[Array, Array]:
        M = update_map(METHODS[method](step, b), curvature.reshape(1, 1))
        allowance = 32 * jnp.finfo(M.dtype).eps * jnp.square(1 + jnp.max(jnp.abs(M)))
        if len(M) == 1:
            return 1 - jnp.abs(M[0, 0]), allowance
        trace, determinant = jnp.trace(M), M[0, 0] * M[1, 1] - M[0, 1] * M[1, 0]
        conditions = [1 - jnp.abs(determinant), 1 - trace + determinant, 1 + trace + determinant]
        return jnp.min(jnp.stack(conditions)), allowance

    (below, above), allowance = jax.vmap(margin)(steps)
    return {"below": below, "above": above, "allowance": jnp.max(allowance)}


def _without_curvature() -> list[Certificate]:
    """Where the curvature is not positive the step is unlimited, and means nothing."""
    found = bounds.max_stable_step("gd", jnp.array([0.0, -2.0, jnp.nan]))
    deformed = bounds.max_stable_step_deformed("gd", jnp.array([0.0, -2.0, jnp.nan]), 8.0)
    saddle = np.diag([2.0, -0.1])
    radius = radii("gd", bounds.max_stable_step("gd", jnp.array([2.0])) / 2, 0.0, saddle, np.eye(2))
    return [
        equality("the step is infinite at zero and negative curvature, NaN at NaN", "0, -2, NaN",
                 [np.isinf(found), np.isinf(deformed), np.isnan(found)],
                 [[1, 1, 0], [1, 1, 0], [0, 0, 1]], allowance=0.0),
        refuted("half the step of the largest curvature is stable: false with a negative one beside it",
                "H = diag(2, -.1)", radius, 1.0, word=CHECKED),
    ]  # fmt: skip


def _conventions(key: PRNGKeyArray) -> list[Certificate]:
    """What optax does in its own way: look-ahead points, and corrections of the bias at the start."""
    H, _ = _quadratic(key, (0.0, 0.4, 1.1, 3.7))
    largest, b = float(jnp.linalg.eigvalsh(H)[-1]), 0.9
    one, told = jnp.full((1, 1), largest), f"eigenvalues of H 0 ... {largest:.2g}, b = .5 and .9"
    found: list[Certificate] = [_look_ahead(H, 1 / largest)]
    for name, make, limit, factor in (
        ("ema with debias", methods.debiased, "ema_momentum", 1.0),
        ("adam, P frozen by a large eps", methods.frozen_adam, "ema_momentum", 1.0),
        ("nadam, P frozen by a large eps", methods.frozen_nadam, "ema_nesterov", (1 + 2 * b) / (1 + b)),
    ):
        below, _, above = _ends(make, limit, (0.5, b), H)
        step = float(bounds.max_stable_step(limit, largest, momentum=b))
        first = simulate(make, jnp.asarray(step), jnp.asarray(b), one, jnp.ones(1), steps=1)[1, 0]
        found += [
            _on_both_sides(name, told, below, above),
            equality(f"{name}: x_1 = (1 - {factor:.3g} eta lambda) x_0", "b = .9, at the limit", first,
                     1 - factor * step * largest, allowance=1e-7),
        ]  # fmt: skip
    step = jnp.asarray(float(bounds.max_stable_step("ema_momentum", largest, momentum=b)))
    late, early = (
        np.abs(np.linalg.eigvals(map_of(methods.debiased, step, jnp.asarray(b), one, None, count))).max()
        for count in (10_000, 0)
    )
    return [
        *found,
        equality("ema with debias: the map of step 10,000 has radius 1 at the limit", "b = .9", late, 1.0,
                 allowance=1e-9),
        refuted("and that of the first step no more than 1: false", "b = .9", early, 1.0, word=CHECKED),
    ]  # fmt: skip


def _look_ahead(H: Array, step: float) -> Certificate:
    """Hold optax.sgd(nesterov=True) against Nesterov's method as he wrote it, with constant momentum."""
    path = simulate(methods.nesterov, jnp.asarray(step), jnp.asarray(0.9), H, jnp.ones(len(H)), steps=20)
    h = np.asarray(H)
    x, y, expected = np.ones(len(h)), np.ones(len(h)), [np.ones(len(h))]
    for _ in range(20):
        x, previous = y - step * h @ y, x
        y = x + 0.9 * (x - previous)
        expected.append(y)
    claim = (
        "optax's Nesterov parameters are y_t: x_t = y_(t-1) - eta g(y_(t-1)), y_t = x_t + b (x_t - x_(t-1))"
    )
    return equality(claim, "20 steps, b = .9", path, expected, count=1)


def _outside(instance: Instance, params: PyTree, key: PRNGKeyArray) -> list[Certificate]:
    """Quadratics and points outside the assumptions are refused by name."""
    eye, claim = np.eye(2), "outside its assumptions the statement is refused"
    spec = sd.SpecDef(alpha=8.0, side="output")
    here, start = (sd.plan(p, spec, where=instance.where, key=key) for p in (params, instance.params))

    def run(loss: Any, p: PyTree, plan: Plan) -> Certificates:
        return on_network(loss, p, plan, *instance.args, name="")

    def gd(H: Any, P: Any) -> Certificates:
        return on_quadratic("gd", H, P, (0.9,), "")

    return [
        refuses(claim, "H = diag(2, -.1)", gd(np.diag([2.0, -0.1]), eye), "H > 0"),
        refuses(claim, "H not symmetric", gd(eye + np.eye(2, k=1), eye), "H = H^T"),
        refuses(claim, "P = diag(1, -1)", gd(eye, np.diag([1.0, -1.0])), "P > 0"),
        refuses(claim, "where training starts", run(instance.loss, instance.params, start), "stationary"),
        refuses(claim, "the same with -L, so that K_U <= 0",
                run(functools.partial(_negative, instance.loss), params, here), "lambda_max(K_U) > 0"),
        refuses(claim, "alpha = 1/2", run(instance.loss, params, here.with_alpha(0.5)), "alpha >= 1"),
    ]  # fmt: skip


def _negative(loss: Callable[..., Array], *args: Any) -> Array:
    return -loss(*args)
