"""Statement 4.1 [ours]: Newton's method does not see the deformation; its damping does, as phi^T phi.

STATEMENT. Let H_1, g_1 belong to the identity-inserted network at theta, H_a, g_a to the deformed one at
phi theta.
  (a) Where H_1 is invertible the Newton step is p_a = phi p_1, so theta_a^t = phi theta_1^t for any step
      lengths chosen from losses and g^T p: no slowdown in exact arithmetic. The decrement g^T H^-1 g is the
      same.
  (b) (H_a + lambda I)^-1 g_a = phi (H_1 + lambda phi^T phi)^-1 g_1. phi^T phi has the eigenvalues a^-2 on
      C's fast directions (m k), a^2 on U E^T (k n), 1 on the rest. A FIXED lambda therefore damps the rest
      as ever, the fast directions less, and slows U E^T alone, as a^-2. lambda = lambda_0 sigma_1(H_a),
      lambda_0 > 1 or K_U >= 0, slows the rest as a^-2 and U E^T as a^-4. The same with Gauss-Newton or
      Fisher matrices in place of H.
  (c) For H_1 >= 0 the decrease that the damped model predicts, q_a(lambda) = g_a^T (H_a + lambda I)^-1 g_a /
      2, lies between those of the original with a^2 lambda and with a^-2 lambda, both attained.
  (d) Cubic regularization sigma |s|^3 / 3 and trust regions |s| <= r of the deformed network are sigma
      |phi s|^3 / 3 and |phi s| <= r of the original.
  (e) H_1 is nearly singular near stationary points and singular at them: C Wt = (C G^-1)(G Wt), so with
      t_A = M_A theta = (-C A, A Wt, 0), A any m x m matrix, H_1 t_A = -M_A^T g_1 everywhere. Hence m^2
      singular values of H_1 are at most |g_1| max_A |M_A| / min_A |t_A|, and at stationary points m^2
      eigenvalues vanish: undamped Newton is not defined there.
  (f) With softmax outputs H_1 is singular EVERYWHERE: adding one number to all logits changes nothing, so
      1 v^T in the last kernel and 1 in the last bias are flat, one direction per last-layer input and one.
      If these span the kernel of H_1, pseudo-inverse Newton still runs equally on both networks, loss by
      loss. In general the pseudo-inverse is NOT equivariant: H_a^+ g_a != phi H_1^+ g_1.

ASSUMPTIONS. Those of 2.1. (a): H_1 invertible at every iterate. (c): H_1 >= 0, lambda > 0.

PROOF. (a), (b) By 2.1 H_a + lambda I = phi^-T (H_1 + lambda phi^T phi) phi^-1 and g_a = phi^-T g_1: invert.
Induction over t; L and g^T p agree on both sides, as g_a^T phi p = g_1^T p. phi^T phi: 2.1. In coordinates
where phi = diag(a^-e) row i of the system, multiplied by a^e_i, shows that with lambda fixed and a -> inf
the slow part of the step is O(a^-2) and the others tend to the solution of the system without it; with
lambda = l a^2 (sigma_1(H_a) = a^2 ||K_U|| + O(1), 2.2) fast coordinates see l, rest l a^2, slow l a^4.
(c) a^-2 I <= phi^T phi <= a^2 I, and inversion reverses the order of positive definite matrices; attained
where g and H live in one block. (d) Put s_a = phi s in the model: g_a^T s_a = g_1^T s, s_a^T H_a s_a = s^T
H_1 s. (e) L(exp(u M_A) theta) = L(theta) for all theta; differentiate at u = 0: g(theta)^T M_A theta = 0 for
all theta; differentiate in theta: H M_A theta + M_A^T g = 0. A -> t_A is injective, C being invertible, so
its range has dimension m^2, and |H t| <= ||N|| |A| <= (||N|| / s_min(J)) |t| there, N: A -> M_A^T g, J: A ->
t_A; Courant and Fischer give the singular values. (f) L(theta + n) = L(theta) for n in a fixed space N:
differentiate twice, H n = 0, and g, H do not change along N. If N = ker H_1 every solution of H_1 p = -g_1
is p_1 + N and gives one loss; phi^-1 p_a, p_a = -H_a^+ g_a, is among them. QED.

TIGHTNESS. (c) by blocks; (e) by L = (c w - y)^2 / 2, where both sides are |c w - y| at c = w = 1.

SOURCE. Ours; affine invariance of Newton's method is textbook (Boyd and Vandenberghe, Convex Optimization,
9.5.1), as is the damped form in another metric.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.optim.cubic_newton import cubic_step
from specdef_jax.parametrization import loss_on
from specdef_jax.spec import Plan
from specdef_jax.words import Word
from theory.assumptions import require, require_congruence
from theory.certificate import (
    Certificate,
    Certificates,
    equality,
    fit,
    inequality,
    refuses,
    refuted,
    tight,
    under_assumptions,
)
from theory.diagonal_phi import Blocks, blocks, stiff
from theory.draws import over_draws
from theory.falsifier import falsify
from theory.fits import exponent
from theory.forms import USUAL, alternating, planned
from theory.hessians import Curvature, curvature_of, linear_matrix, rounding, sigma_1
from theory.instances.networks import Instance, mlp_instance, networks
from theory.orbit import orbit_maps
from theory.sizes import Size

ALPHA = 7.0
ALPHAS = np.logspace(3, 5, 6)
CLAIM = "theta_a^t = phi theta_1^t for Newton's method"
SINGULAR = "H_1 is invertible at the point"
EPS = float(np.finfo(float).eps)


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify (a) to (f) on networks, the inequality on random matrices, and where they end."""
    found: list[Certificate] = []
    instances = networks(size, key, smooth="tanh squared", hard="transformer squared")
    for instance in instances:
        for form in alternating(size, instance is instances[0]):
            plan, name = planned(instance, ALPHA, form, key)
            found += on_network(instance.loss, instance.params, plan, *instance.args, name=name, key=key)
    first = instances[0]
    found += _scaling(first, key)
    found += _matrices(key, size)
    found += _stationary(first, key)
    found += _softmax(mlp_instance(key), key)
    found += _outside(first, mlp_instance(key), key)
    return tuple(found)


def on_network(
    loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any, name: str, key: PRNGKeyArray
) -> Certificates:
    """Certify (a), (b), (d) and (e) at a point of anyone's network, small enough for dense Hessians.

    Where softmax outputs make H_1 singular, (a) is left out.

    Args:
      loss: loss(params, *args) on plain parameters.
      params: plain parameters.
      plan: what to deform; alphas at least 1.
      *args: data.
      name: of the instance.
      key: for the test of invariance, and the direction along the orbit.
    """

    def evaluate() -> list[Certificate]:
        as_partial, inserted = require_congruence(loss, params, plan, *args, key=key)
        phi = linear_matrix(lambda tree: bounds.phi(tree, plan), inserted)
        one, at = (curvature_of(as_partial, t, *args) for t in (inserted, sd.apply_plan(params, plan)))
        metric = linear_matrix(lambda tree: bounds.damping_metric(tree, plan), inserted)
        found = [
            equality("phi^T phi has the eigenvalues a^-2, 1, a^2", name, jnp.linalg.eigvalsh(metric),
                     jnp.sort(jnp.linalg.svd(phi, compute_uv=False)) ** 2, count=len(phi)),
            *(_damped(one, at, phi, metric, share, name) for share in (1e-3, 1.0)),
            *_cubic(one, at, phi, inserted, plan, name),
            *_orbit(one, inserted, plan, name, key),
        ]  # fmt: skip
        if not _is_singular(one.hessian):
            found += newton_certificates(as_partial, inserted, plan, *args, name=name)
        return found

    return under_assumptions(CLAIM, name, evaluate)


def newton_certificates(
    loss: Callable[..., Array], inserted: PyTree, plan: Plan, *args: Any, name: str, steps: int = 4
) -> Certificates:
    """Certify (a) along some Newton steps, of length 0.3 at most.

    Args:
      loss: on deformed trees.
      inserted: parameters with the identity inserted.
      plan: what is deformed.
      *args: data.
      name: of the instance.
      steps: how many.
    """
    claim = "p_a = phi p_1"

    def evaluate() -> list[Certificate]:
        phi = linear_matrix(lambda tree: bounds.phi(tree, plan), inserted)
        flat, unravel = ravel_pytree(inserted)
        residual, scale, error, allowed, decrements = [], [], [], [], []
        for _ in range(steps):
            point = unravel(flat)
            one = curvature_of(loss, point, *args)
            at = curvature_of(loss, bounds.phi(point, plan), *args)
            require(not _is_singular(one.hessian), SINGULAR)
            p, p_a = (-jnp.linalg.solve(c.hessian, c.gradient) for c in (one, at))
            residual.append(jnp.linalg.norm(at.hessian @ (phi @ p) + at.gradient))
            scale.append(jnp.linalg.norm(at.hessian, 2) * jnp.linalg.norm(phi @ p))
            error.append(jnp.linalg.norm(p_a - phi @ p) / jnp.linalg.norm(phi @ p))
            # Backward stable solves, on Hessians that are off by rounding themselves.
            condition = sum(jnp.linalg.cond(c.hessian) for c in (one, at))
            allowed.append(64 * len(p) * EPS * condition)
            decrements.append((at.gradient @ p_a, one.gradient @ p))
            flat = flat + _length(p) * p
        found, expected = np.asarray(decrements).T
        return [
            equality("H_a (phi p_1) = -g_a, relative to ||H_a|| |phi p_1|", name, residual, np.zeros(steps),
                     scale=np.asarray(scale), note=f"{steps} Newton steps, 0.3 p / max(1, |p|)"),
            inequality("|p_a - phi p_1| / |phi p_1| is rounding", name, error, np.zeros(steps),
                       allowance=np.asarray(allowed), word=Word.CHECKED,
                       note="allowance: 64 n u (cond H_1 + cond H_a)"),
            inequality("the Newton decrement is the same", name, np.abs(found - expected) / np.abs(expected),
                       np.zeros(steps), allowance=np.asarray(allowed), word=Word.CHECKED),
        ]  # fmt: skip

    return under_assumptions(claim, name, evaluate)


def _length(step: Array) -> Array:
    return 0.3 / jnp.maximum(1.0, jnp.linalg.norm(step))


def _is_singular(H: Array) -> bool:
    values = np.abs(np.linalg.eigvalsh(H))
    return bool(values.min() <= 1e3 * len(values) * EPS * values.max())


def _damped(one: Curvature, at: Curvature, phi: Array, metric: Array, share: float, name: str) -> Certificate:
    """(b): phi times the original's step solves the deformed system, for a damping relative to sigma_1."""
    damping = share * sigma_1(at.hessian)
    p = phi @ -jnp.linalg.solve(one.hessian + damping * metric, one.gradient)
    left = at.hessian @ p + damping * p + at.gradient
    scale = jnp.linalg.norm(at.hessian, 2) * jnp.linalg.norm(p) + jnp.linalg.norm(at.gradient)
    return equality(
        f"(H_a + lambda I) phi (H_1 + lambda phi^T phi)^-1 g_1 = g_a, lambda = {share:g} sigma_1(H_a)",
        name, left[None], jnp.zeros_like(left)[None], scale=scale,
    )  # fmt: skip


def _cubic(
    one: Curvature, at: Curvature, phi: Array, inserted: PyTree, plan: Plan, name: str
) -> list[Certificate]:
    """(d): what optim.cubic_newton finds on the deformed network minimizes the model with |phi s|^3."""
    sigma, n = 1.0, len(phi)
    p, _ = cubic_step(lambda v: at.hessian @ v, at.gradient, sigma, n)
    s = jnp.linalg.solve(phi, p)
    unravel = ravel_pytree(inserted)[1]
    size = bounds.damping_norm(unravel(s), plan)
    shifted = at.hessian + sigma * size * jnp.eye(n)
    model = one.gradient @ s + s @ one.hessian @ s / 2 + sigma * size**3 / 3
    on_deformed = at.gradient @ p + p @ at.hessian @ p / 2 + sigma * jnp.linalg.norm(p) ** 3 / 3
    left = shifted @ p + at.gradient
    scale = jnp.linalg.norm(shifted, 2) * jnp.linalg.norm(p)
    return [
        equality("the cubic models agree, |s_a| = |phi s|", name, on_deformed, model),
        equality("phi^-1 s_a is stationary for the model with |phi s|^3", name, left[None],
                 jnp.zeros((1, n)), scale=scale),
        inequality("and its minimizer: H_1 + sigma |phi s| phi^T phi >= 0", name,
                   -jnp.linalg.eigvalsh(shifted)[0], 0.0, allowance=rounding(shifted), word=Word.CHECKED),
    ]  # fmt: skip


def _orbit(one: Curvature, inserted: PyTree, plan: Plan, name: str, key: PRNGKeyArray) -> list[Certificate]:
    """(e): the derivative of the invariance, and the singular values that it bounds."""
    J, N = orbit_maps(one, inserted, plan)
    count = J.shape[1]
    values = jnp.sort(jnp.abs(jnp.linalg.eigvalsh(one.hessian)))
    bound = jnp.linalg.norm(N, 2) / jnp.linalg.svd(J, compute_uv=False)[-1]
    scale = jnp.linalg.norm(one.hessian, 2) * jnp.linalg.norm(J, 2)
    return [
        equality("H_1 t_A = -M_A^T g_1 for all A", name, (one.hessian @ J)[None], -N[None], scale=scale,
                 note=f"m^2 = {count} directions of {len(J)}"),
        inequality("m^2 singular values of H_1 are at most ||N|| / s_min(J)", name, values[count - 1], bound,
                   allowance=rounding(one.hessian), scale=bound, word=Word.CHECKED),
    ]  # fmt: skip


def _stationary(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """(e) at a point that fits its data exactly, at a saddle-free scalar network, and tight there."""
    plan, name = planned(instance, ALPHA, USUAL, key)
    x, _ = instance.args
    targets = instance.network.apply(instance.params, x)

    def fitted(params: PyTree, x: Array, y: Array) -> Array:
        return 0.5 * jnp.mean(jnp.sum((instance.network.apply(params, x) - y) ** 2, axis=-1))

    inserted = sd.apply_plan(instance.params, plan.with_alpha(1.0))
    one = curvature_of(fitted, inserted, x, targets)
    J, _ = orbit_maps(one, inserted, plan)
    values = jnp.sort(jnp.abs(jnp.linalg.eigvalsh(one.hessian)))
    residual = 0.3
    scalar = jnp.array([[1.0, 1 + residual], [1 + residual, 1.0]])  # of (c w - y)^2 / 2 at c = w = 1
    return [
        equality("at a stationary point H_1 t_A = 0 for all A", f"{name}, data fitted exactly",
                 (one.hessian @ J)[None], jnp.zeros_like(J)[None],
                 scale=jnp.linalg.norm(one.hessian, 2) * jnp.linalg.norm(J, 2)),
        inequality("there m^2 eigenvalues of H_1 vanish", f"{name}, data fitted exactly",
                   values[J.shape[1] - 1], 0.0, allowance=rounding(one.hessian), word=Word.CHECKED),
        tight("|lambda|_min(H_1) <= ||N|| / s_min(J)", "(c w - y)^2 / 2 at c = w = 1, c w - y = 0.3",
              jnp.min(jnp.abs(jnp.linalg.eigvalsh(scalar))), residual * np.sqrt(2) / np.sqrt(2),
              factor=1 + 1e-12, allowance=1e-14),
    ]  # fmt: skip


def _softmax(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """(f): flat directions everywhere, and pseudo-inverse Newton on both networks."""
    plan, name = planned(instance, ALPHA, USUAL, key)
    inserted = sd.apply_plan(instance.params, plan.with_alpha(1.0))
    last = list(instance.params)[-1]
    shapes = {k: v.shape for k, v in instance.params[last].items()}
    zero = jax.tree.map(jnp.zeros_like, inserted)
    flats = [
        {**zero, last: {**zero[last], "w": jnp.zeros(shapes["w"]).at[i].set(1.0)}}
        for i in range(shapes["w"][0])
    ]
    flats.append({**zero, last: {**zero[last], "b": jnp.ones(shapes["b"])}})
    N = jnp.stack([ravel_pytree(t)[0] for t in flats]).T
    one = curvature_of(instance.loss, inserted, *instance.args)
    values = np.sort(np.abs(np.linalg.eigvalsh(one.hessian)))
    floor = float(rounding(one.hessian))
    loss = loss_on(instance.loss, inserted, *instance.args)
    losses, allowed = _pseudo_inverse_losses(loss, inserted, plan, instance.args, N.shape[1])
    return [
        equality("softmax outputs: H_1 n = 0 along 1 v^T and 1 of the last layer", name,
                 (one.hessian @ N)[None], jnp.zeros_like(N)[None],
                 scale=jnp.linalg.norm(one.hessian, 2) * jnp.linalg.norm(N, 2)),
        equality("and no other direction is flat there", name, float(np.sum(values <= floor)), N.shape[1],
                 note="eigenvalues below rounding, away from stationary points"),
        inequality("pseudo-inverse Newton has the same losses on both networks", name,
                   np.abs(losses[:, 0] - losses[:, 1]), 0.0, allowance=allowed, word=Word.CHECKED,
                   note="allowance: |g_a| |p_a| times 64 n u times the condition of what is inverted"),
    ]  # fmt: skip


def _pseudo_inverse_losses(
    loss: Callable[..., Array], inserted: PyTree, plan: Plan, args: tuple[Any, ...], flat: int, steps: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps, 2) losses of the inserted and the deformed network, and what rounding may do to them."""
    points = [inserted, bounds.phi(inserted, plan)]
    losses, allowed = [], []
    error = 0.0
    for _ in range(steps):
        after, length = [], None
        for point in points:
            flat_point, unravel = ravel_pytree(point)
            at = curvature_of(loss, point, *args)
            values, vectors = jnp.linalg.eigh(at.hessian)
            keep = jnp.argsort(jnp.abs(values))[flat:]
            step = -vectors[:, keep] @ ((vectors[:, keep].T @ at.gradient) / values[keep])
            condition = jnp.max(jnp.abs(values)) / jnp.min(jnp.abs(values[keep]))
            size = jnp.linalg.norm(at.gradient) * jnp.linalg.norm(step)
            error += float(64 * len(values) * EPS * condition * size)
            length = _length(step) if length is None else length  # the inserted network's, for both
            after.append(unravel(flat_point + length * step))
        points = after
        losses.append([float(loss(point, *args)) for point in points])
        allowed.append(error)
    return np.asarray(losses), np.asarray(allowed)


def _scaling(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """(b): how the parts of a damped step, in original coordinates, fall with alpha."""
    plan, name = planned(instance, ALPHA, USUAL, key)
    own = blocks(instance.loss, instance.params, plan, *instance.args)
    fixed = 0.1 * float(sigma_1(own.hessian))
    predicted = {
        "fixed": {"fast": 0, "rest": 0, "slow": -2},
        "proportional to sigma_1(H_a)": {"fast": 0, "rest": -2, "slow": -4},
    }
    found = []
    for kind, orders in predicted.items():
        sizes = [own.sizes(damped_step(own, a, fixed if kind == "fixed" else None)) for a in ALPHAS]
        for part, order in orders.items():
            slope = exponent(ALPHAS, [s[part] for s in sizes]).slope
            found.append(
                fit(f"damping {kind}: the {part} part of the step goes as a^{order}", name, slope, order,
                    tolerance=0.02, count=len(ALPHAS), note="a = 1e3 to 1e5")
            )  # fmt: skip
    return found


def damped_step(own: Blocks, alpha: float, damping: float | None) -> Array:
    """Return the original's step for a damping of the deformed network, None for 2 sigma_1(H_a)."""
    scales = own.scales(alpha)
    if damping is None:
        damping = 2 * sigma_1(scales[:, None] * own.hessian * scales)
    return -jnp.linalg.solve(own.hessian + damping * jnp.diag(scales**-2.0), own.gradient)


def _decreases(own: Blocks, alpha: Array, damping: Array) -> tuple[Array, Array, Array]:
    """Return g^T (.)^-1 g with the upper damping, the deformed network's, and the lower one."""
    n = len(own.gradient)
    low, high = bounds.damping_interval(damping, alpha)
    metric = own.scales(alpha) ** -2.0
    middle, upper, lower = (
        own.gradient @ jnp.linalg.solve(own.hessian + jnp.diag(d * jnp.ones(n)), own.gradient)
        for d in (damping * metric, high, low)
    )
    return upper, middle, lower


def _draw(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 3)
    own = stiff(keys[0], spread=2.0)
    alpha = 10 ** jax.random.uniform(keys[1], (), maxval=3)
    damping = 10 ** jax.random.uniform(keys[2], (), minval=-4, maxval=2)
    upper, middle, lower = _decreases(own, alpha, damping)
    condition = jnp.linalg.norm(own.hessian) * jnp.linalg.norm(jnp.linalg.inv(own.hessian))
    allowance = 64 * len(own.gradient) * EPS * condition * lower
    scales = own.scales(alpha)
    H_a = scales[:, None] * own.hessian * scales
    g_a = scales * own.gradient
    p = jnp.linalg.solve(own.hessian + damping * jnp.diag(scales**-2.0), own.gradient) / scales
    left = H_a @ p + damping * p - g_a
    size = jnp.linalg.norm(H_a) * jnp.linalg.norm(p) + damping * jnp.linalg.norm(p) + jnp.linalg.norm(g_a)
    return {"upper": upper, "middle": middle, "lower": lower, "allowance": allowance, "left": left,
            "size": size}  # fmt: skip


def _sample(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 4)
    return {
        "root": jax.random.normal(keys[0], (7, 7)),
        "g": jax.random.normal(keys[1], (7,)),
        "log_alpha": 2 * jax.random.normal(keys[2], ()),
        "log_damping": 3 * jax.random.normal(keys[3], ()),
    }


def _slack(point: dict[str, Array]) -> Array:
    """Return the smaller slack of (c), relative to the largest decrease, rounding added."""
    H = point["root"] @ point["root"].T + 1e-2 * jnp.eye(7)
    order = jnp.array([1.0, 1.0, 0.0, 0.0, 0.0, -1.0, -1.0])
    own = Blocks(point["g"], H, order, jnp.eye(7))
    alpha = jnp.exp(jnp.abs(point["log_alpha"]))
    upper, middle, lower = _decreases(own, alpha, jnp.exp(point["log_damping"]))
    return jnp.minimum(middle - upper, lower - middle) / lower + 64 * 7 * EPS * jnp.trace(H) / 1e-2


def _matrices(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(b) and (c) on random positive definite matrices, under a falsifier, and where (c) is met."""
    sides = over_draws(_draw, key, size.draws)
    search = falsify(_slack, _sample, key, tried=size.draws, climbed=size.starts, steps=100).search
    name = "random H > 0, 7 coordinates (2 fast, 2 slow), a 1 to 1000, lambda 1e-4 to 100"
    order = jnp.array([1.0, 0.0, -1.0])
    H = jnp.diag(jnp.array([3.0, 1.0, 2.0]))
    a = jnp.asarray(ALPHA)
    fast, slow = (
        _decreases(Blocks(jnp.eye(3)[i], H, order, jnp.eye(3)), a, jnp.asarray(0.5)) for i in (0, 2)
    )
    claim = "g^T (H + a^2 lambda I)^-1 g <= g_a^T (H_a + lambda I)^-1 g_a"
    other = "g_a^T (H_a + lambda I)^-1 g_a <= g^T (H + a^-2 lambda I)^-1 g"
    return [
        equality("(H_a + lambda I) phi p = g_a", name, sides["left"], np.zeros_like(sides["left"]),
                 scale=sides["size"]),
        inequality(claim, name, sides["upper"], sides["middle"], allowance=sides["allowance"],
                   scale=sides["lower"], search=search),
        inequality(other, name, sides["middle"], sides["lower"], allowance=sides["allowance"],
                   scale=sides["lower"]),
        tight(claim, "all in the slow block", slow[0], slow[1], factor=1 + 1e-12, allowance=1e-15),
        tight(other, "all in the fast block", fast[1], fast[2], factor=1 + 1e-12, allowance=1e-15),
        _pseudo_inverse_differs(key, size),
    ]  # fmt: skip


def _pseudo_inverse_differs(key: PRNGKeyArray, size: Size) -> Certificate:
    """(f): with a kernel that phi moves, the least-norm step depends on the deformation."""

    def draw(key: PRNGKeyArray) -> Array:
        root = jax.random.normal(key, (4, 3))
        H, g = root @ root.T, root.sum(1)  # g in the range of H
        scales = jnp.array([ALPHA, 1.0, 1.0, 1 / ALPHA])
        p = jnp.linalg.pinv(H, rtol=1e-10) @ g
        p_a = jnp.linalg.pinv(scales[:, None] * H * scales, rtol=1e-10) @ (scales * g)
        return jnp.linalg.norm(p_a * scales - p) / jnp.linalg.norm(p)

    return refuted("H_a^+ g_a = phi H_1^+ g_1 is false for singular H_1", "rank 3 of 4, a = 7",
                   over_draws(draw, key, size.draws), 0.0, allowance=1e-3,
                   note="the left side is |phi^-1 p_a - p_1| / |p_1|")  # fmt: skip


def _outside(instance: Instance, softmax: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """A singular Hessian, and alpha < 1, are refused; Newton damped by lambda I is not equivariant."""
    plan, name = planned(instance, ALPHA, USUAL, key)
    flat_plan, _ = planned(softmax, ALPHA, USUAL, key)
    inserted = sd.apply_plan(softmax.params, flat_plan.with_alpha(1.0))
    loss = loss_on(softmax.loss, inserted, *softmax.args)
    below = plan.with_alpha(0.5)
    own = blocks(instance.loss, instance.params, plan, *instance.args)
    damping = float(sigma_1(own.hessian))
    undeformed, deformed = (damped_step(own, a, damping) for a in (1.0, ALPHA))
    claim = "outside its assumptions the statement is refused"
    return [
        refuted("a step damped by lambda I is phi times the original's is false", name,
                jnp.linalg.norm(deformed - undeformed) / jnp.linalg.norm(undeformed), 0.0, allowance=1e-3,
                word=Word.CHECKED),
        refuses(claim, "softmax outputs, undamped",
                newton_certificates(loss, inserted, flat_plan, *softmax.args, name=""), SINGULAR),
        refuses(claim, "alpha = 1/2",
                on_network(instance.loss, instance.params, below, *instance.args, name="", key=key),
                "alpha >= 1"),
    ]  # fmt: skip
