"""Statement 2.2 [ours]: Sandwich around the sharpness, which grows as alpha squared.

STATEMENT. Deform y = W h (output side: C = T(1/a), Wt = T(a) W, y = C Wt h) at a >= 1 and let H_1, H_a be the
Hessians of 2.1, F the directions dC = E U^T, and K_U = F^T H_1 F. Then

    (i)    F^T H_a F = a^2 K_U,    so    a^2 ||K_U|| <= sigma_1(H_a) <= a^2 sigma_1(H_1);
    (ii)   if the layer's input does not depend on the layer's own C,
           K_U = E[sum_ts z_t z_s^T (x) G_ts],   z_t = U^T W h_t,   G_ts = d2L / dy_t dy_s,
           the sum over the positions t, s at which the layer is applied (one in a feed-forward layer);
    (iii)  with k = ||K_U||, c = ||(I - F F^T) H_1 F||, r = ||(I - F F^T) H_1 (I - F F^T)||,
           sigma_1(H_a) <= Lambda(a) = larger eigenvalue of [[a^2 k, a c], [a c, r]],
           hence  0 <= sigma_1(H_a) - a^2 ||K_U|| <= r + c^2 / k   for EVERY a >= 1,  if K_U != 0;
    (iv)   if K_U = 0 (a loss linear in y), a ||R^T H_1 F|| <= sigma_1(H_a) <= a c + r, with R the directions
           that phi leaves alone: linear growth, or none (U^T W = 0).
Input side: y = Wt C h, F the directions dC = V E^T, K_V = E[sum_ts h_t h_s^T (x) (W V)^T G_ts (W V)]. Several
layers: (i) holds with block (i, j) of K times a_i a_j, and max a_i^2 above.

ASSUMPTIONS. Those of 2.1: alpha >= 1, nothing nonlinear between the factors, L twice differentiable at the
point. For (ii) also that h_t does not depend on C; weights shared over positions are fine, a layer applied to
its own output is not: there (i), (iii), (iv) hold with K_U := F^T H_1 F, and (ii) is false.

PROOF. (i) H_a = phi^-T H_1 phi^-1 (2.1). phi^-1 takes dC to dC T(a), and E U^T T(a) = a E U^T, so
phi^-1 F = a F, and F^T H_a F = a^2 F^T H_1 F. F has orthonormal columns, as ||E U^T||_F = ||E||_F; a
compression never has a larger norm. Above, ||phi^-1|| = a. (ii) Along C + dC with Wt and all else fixed, L is
the function l(y_1, y_2, ...) of y_t = (C + dC) z'_t, z'_t = Wt h_t, linear in dC as z'_t does not move. So
d2L = sum_ts (dC z'_t)^T G_ts (dC z'_s). For dC = E U^T: U^T z'_t = U^T T(a) W h_t = a z_t, E z_t =
(z_t^T (x) I) vec E, which gives a^2 vec(E)^T (sum_ts z_t z_s^T (x) G_ts) vec(E); take the mean over examples.
If h_t moved with C, the term sum_t g_t^T (second derivative of y_t in C) would be missing. Input side:
y_t = Wt (C + dC) h_t, Wt V = a W V, dy_t = a W V E^T h_t. (iii) phi^-1 is symmetric with eigenvalues a on F,
1/a on S, 1 on R. In these orthonormal coordinates H_a = [[a^2 K, a N^T], [a N, M]] where N and M arise from
the blocks of H_1 beside F by factors 1/a <= 1 on S, so ||N|| <= c and ||M|| <= r. For unit (x, y),
|(x, y)^T H_a (x, y)| <= a^2 k |x|^2 + 2 a c |x| |y| + r |y|^2 <= Lambda(a). For d = r + c^2/k the number
a^2 k + d is at least both diagonal entries, and (a^2 k + d - a^2 k)(a^2 k + d - r) = (r + c^2/k)(a^2 k +
c^2/k) >= a^2 c^2, so (a^2 k + d) I - [[a^2 k, a c], [a c, r]] >= 0 and Lambda(a) <= a^2 k + d. (iv) The
block R^T H_a F is a R^T H_1 F, and Lambda(a) <= a c + r for k = 0. If U^T W = 0, dC Wt h = E U^T Wt h is zero
for every h and stays so along R, where U^T dWt = 0: then R^T H_1 F = 0 as well. QED.

TIGHTNESS. (i) both sides: y = C Wt h scalar, W = 2, h = 1, loss (y - 4)^2 / 2: H_a = diag(4 a^2, 1/a^2).
(iii) Lambda is attained by 2 x 2 matrices; the constant by k = 2, c = 4, r = 0 as a -> infinity (c^2/k), and
by c = 0, k << r at a = 1 (r). (iv) below: k = r = 0.

SOURCE. Ours; the rest is compression and the Schur complement (Horn and Johnson, Matrix Analysis, 7.7.7).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.spec import Plan
from specdef_jax.words import Word
from theory.assumptions import require_alpha, require_congruence
from theory.block_growth import falsified, random_blocks, tight_blocks
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
from theory.compensation import INDEPENDENT, block_by_formula, fast_directions, require_independent_input
from theory.fits import exponent
from theory.forms import alternating
from theory.hessians import curvature_of, linear_matrix, rounding
from theory.instances.layers import OpenLayer, opened, twice
from theory.instances.matrices import FAMILIES, families, graded
from theory.instances.networks import linear_tail_instance, mlp_instance, networks, shared_instance
from theory.sizes import Size

ALPHA = 7.0  # no power of two: both sides round
ALPHAS = np.geomspace(2, 1e4, 12)
SANDWICH = "a^2 ||K_U|| <= sigma_1(H_a) <= a^2 sigma_1(H_1)"
FORMULA = "F^T H_a F / a^2 = E[sum_ts z_t z_s^T (x) G_ts]"
CHECKED = Word.CHECKED  # the Hessians come from automatic differentiation, whose rounding is not derived


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify formula, sandwich and growth on networks, the matrix inequalities on random matrices."""
    layers = [opened(instance) for instance in networks(size, key)]
    found: list[Certificate] = []
    for layer in layers:
        for side, basis in alternating(size, layer is layers[0]):
            spec = sd.SpecDef(alpha=ALPHA, k=2, side=side, basis=basis)
            found += _on_both(layer, spec, f"{layer.name}, {side} side, {basis}", key)
    found += _graded(layers[0], key)
    found += _shared(key)
    found += _measured(layers[0], key, size)
    found += _without_quadratic_growth(key)
    found += _scalar(key)
    found += tight_blocks()
    for name in families(size):
        found += random_blocks(name, key, size)
    found.append(falsified(key, size))
    found += _outside(layers[0], key)
    return tuple(found)


def on_network(
    loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any, name: str, key: PRNGKeyArray
) -> Certificates:
    """Certify (i) and (iii) on anyone's network, small enough for a dense Hessian.

    Args:
      loss: loss(params, *args) on plain parameters, or one that reads Deformed leaves itself.
      params: plain parameters.
      plan: what to deform, its alphas at least 1; (iii) for a single layer, over alpha = 2 ... 1e4.
      *args: data.
      name: of the instance.
      key: for the test of invariance.
    """

    def evaluate() -> list[Certificate]:
        require_congruence(loss, params, plan, *args, key=key)
        task = bounds.fast_subspace(loss, params, plan, *args)
        K = _hessian(task.loss, task.params, *args)
        H_1, H_a, F = _dense(loss, params, plan, *args)
        lower, factor = _norm(K), float(bounds.condition(plan))
        upper = bounds.sandwich_sides(factor, lower, _norm(H_1))[1]
        found = [
            equality("F^T H_a F is the Hessian of L(W + a B U^T W) in B", name, (F.T @ H_a @ F)[None],
                     K[None], note=f"{F.shape[1]} of {len(H_a)} directions"),
            inequality(SANDWICH, name, [lower, _norm(H_a)], [_norm(H_a), upper], scale=_norm(H_a),
                       allowance=rounding(H_a) + factor**2 * rounding(H_1), word=CHECKED),
        ]  # fmt: skip
        if len(plan) == 1 and lower > rounding(H_a):
            found += _growth(loss, params, plan, H_1, F, name, *args)
        return found

    return under_assumptions(SANDWICH, name, evaluate)


def on_layer(layer: OpenLayer, plan: Plan, name: str, key: PRNGKeyArray) -> Certificates:
    """Certify (ii), the formula, on a layer that has been laid open."""

    def evaluate() -> Certificate:
        require_alpha(float(plan[layer.where].alpha))
        require_independent_input(layer, key)
        return _formula(layer, plan, name)

    return under_assumptions(FORMULA, name, evaluate)


def _on_both(layer: OpenLayer, spec: sd.SpecDef, name: str, key: PRNGKeyArray) -> Certificates:
    plan = sd.plan(layer.params, spec, where=layer.where, key=key)
    found = on_network(layer.loss, layer.params, plan, *layer.args, name=name, key=key)
    return found + on_layer(layer, plan, name, key)


def _hessian(loss: Any, params: PyTree, *args: Any) -> np.ndarray:
    """Return a dense Hessian as a NumPy array, whose algebra compiles nothing."""
    return np.asarray(curvature_of(loss, params, *args).hessian)


def _dense(loss: Any, params: PyTree, plan: Plan, *args: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return H_1, H_a and the directions F."""
    inserted, deformed = (sd.apply_plan(params, p) for p in (plan.with_alpha(1.0), plan))
    H_1, H_a = (_hessian(loss, p, *args) for p in (inserted, deformed))
    return H_1, H_a, np.asarray(fast_directions(inserted, plan))


def _norm(matrix: np.ndarray) -> Array:
    return jnp.linalg.norm(jnp.asarray(matrix), 2)


def _formula(layer: OpenLayer, plan: Plan, name: str) -> Certificate:
    """Compare the formula with the block of the dense Hessian of the deformed network."""
    block, formula = _both_blocks(layer, plan)
    note = f"{layer.positions} position(s), G by jax.hessian in y"
    return equality(FORMULA, name, block[None], formula[None], note=note)


def _both_blocks(layer: OpenLayer, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Return K_U by the dense Hessian, and by the formula."""
    _, H_a, F = _dense(layer.loss, layer.params, plan, *layer.args)
    block = F.T @ H_a @ F / float(plan[layer.where].alpha) ** 2
    return block, np.asarray(block_by_formula(layer, plan[layer.where]))


def _growth(
    loss: Any, params: PyTree, plan: Plan, H_1: np.ndarray, F: np.ndarray, name: str, *args: Any
) -> list[Certificate]:
    """Follow sigma_1(H_a) over alpha: Lambda, the remainder, and the exponent where a^2 ||K_U|| dominates."""
    blocks = jax.jit(bounds.fast_blocks)(H_1, F)
    fast, constant = float(blocks.fast), float(bounds.sharpness_remainder(blocks))
    sharpness, allowance = _curve(loss, params, plan, ALPHAS, *args)
    lower, _ = bounds.sandwich_sides(jnp.asarray(ALPHAS), blocks.fast, blocks.fast)
    remainder = sharpness - np.asarray(lower)
    # From where the remainder is at most a twentieth, so that the bend of the curve is known in advance.
    far = np.sqrt(20 * constant / fast) * np.logspace(0, 3, 6)
    grown = exponent(far, _curve(loss, params, plan, far, *args)[0])
    Lambda = np.asarray(bounds.sharpness_upper(jnp.asarray(ALPHAS), blocks))
    told = f"||K_U|| = {fast:.3g}; the remainder is at most {remainder.max():.3g}"
    return [
        inequality("sigma_1(H_a) <= Lambda(a), a = 2 ... 1e4", name, sharpness, Lambda, allowance=allowance,
                   scale=sharpness, word=CHECKED),
        inequality("0 <= sigma_1(H_a) - a^2 ||K_U|| <= r + c^2 / k, a = 2 ... 1e4", name,
                   [0 * remainder, remainder], [remainder, 0 * remainder + constant], allowance=allowance,
                   scale=constant, word=CHECKED, note=f"{told}, sigma_1(H_a) reaches {sharpness[-1]:.3g}"),
        fit("sigma_1(H_a) grows as a^2", name, grown.slope, 2.0, tolerance=0.02, count=len(far),
            note=f"a = {far[0]:.3g} ... {far[-1]:.3g}, interval [{grown.low:.4f}, {grown.high:.4f}]"),
    ]  # fmt: skip


def _curve(
    loss: Any, params: PyTree, plan: Plan, alphas: np.ndarray, *args: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return sigma_1(H_a) over alpha, and twice what rounding may move it by."""
    hessians = [_hessian(loss, sd.apply_plan(params, plan.with_alpha(a)), *args) for a in alphas]
    return np.array([_norm(H) for H in hessians]), 2 * np.array([rounding(H) for H in hessians])


def _graded(layer: OpenLayer, key: PRNGKeyArray) -> Certificates:
    """A weight whose singular values fall by six decades."""
    where = layer.where.removesuffix("/w")
    kernel = graded(key, layer.weight.T.shape)
    params = {**layer.params, where: {**layer.params[where], "w": kernel}}
    spec = sd.SpecDef(alpha=ALPHA, k=2, side="output")
    return _on_both(replace(layer, params=params), spec, f"{layer.name}, graded weight", key)


def _shared(key: PRNGKeyArray) -> Certificates:
    """Weights shared over positions, the formula alone: the sum over pairs of positions is seen."""
    layer = opened(shared_instance(key))
    plan = sd.plan(layer.params, sd.SpecDef(alpha=ALPHA, k=2, side="input"), where=layer.where, key=key)
    return on_layer(layer, plan, f"{layer.name}, input side", key)


def _measured(layer: OpenLayer, key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Hold what bounds.sandwich finds by Lanczos against dense Hessians; two layers beyond the small size."""
    where = [layer.where] if size is Size.SMALL else ["layer_0/w", layer.where]
    one = sd.plan(layer.params, sd.SpecDef(alpha=1.0, k=2, side="output"), where=where, key=key)
    alphas = {"layer_0/w": 3.0, layer.where: ALPHA}
    plan = Plan({path: replace(made, alpha=made.alpha * alphas[path]) for path, made in one.items()})
    H_1, H_a, F = _dense(layer.loss, layer.params, plan, *layer.args)
    scale = np.repeat([alphas[path] for path in plan], [made.U.size for _, made in plan.items()])
    at_one, found = (bounds.sandwich(layer.loss, layer.params, p, *layer.args, key=key) for p in (one, plan))
    upper = ALPHA**2 * _norm(H_1)
    lower, floor = _norm(F.T @ H_a @ F), 2.0**-52 * (_norm(F.T @ H_a @ F) + upper)
    name = f"{layer.name}, {len(plan)} layer(s)"
    return [
        equality("block (i, j) of the fast directions grows as a_i a_j", name, (F.T @ H_a @ F)[None],
                 (scale[:, None] * (F.T @ H_1 @ F) * scale)[None]),
        equality("bounds.sandwich finds max a^2 sigma_1(H_1), sigma_1(H_1), ||F^T H_a F||", name,
                 [found.upper, found.sigma_1, at_one.upper, found.lower],
                 [upper, _norm(H_1), _norm(H_1), lower], allowance=1e-7),
        inequality("its allowance covers Lanczos, and is at least eps times its sides", name,
                   [abs(float(found.upper) - upper), (1 - 1e-6) * floor, found.allowance],
                   [found.allowance, found.allowance, 1e-6 * upper], word=CHECKED),
        equality("it holds at the measured sharpness, and not beyond its sides", name,
                 [found.holds(x) for x in (_norm(H_a), 0.999 * lower, 1.001 * upper)], [True, False, False],
                 allowance=0.0),
    ]  # fmt: skip


def _without_quadratic_growth(key: PRNGKeyArray) -> list[Certificate]:
    """K_U = 0: under a loss linear in y growth is linear; along directions with U^T W = 0 there is none."""
    spec = sd.SpecDef(alpha=ALPHA, side="output")
    tail = linear_tail_instance(key)
    plan = sd.plan(tail.params, spec, where=tail.where, key=key)
    found = _linear(_linear_loss, tail.params, plan, 1.0, "a loss linear in y", *tail.args)
    instance = mlp_instance(key)
    kernel = FAMILIES["rank deficient"](key, instance.params["layer_1"]["w"].shape)
    params = {**instance.params, "layer_1": {**instance.params["layer_1"], "w": kernel}}
    spec = replace(spec, directions=jnp.linalg.svd(kernel)[2][-1:].T)
    plan = sd.plan(params, spec, where=instance.where, key=key)
    return found + _linear(instance.loss, params, plan, 0.0, "U^T W = 0, W of half rank", *instance.args)


def _linear(loss: Any, params: PyTree, plan: Plan, power: float, name: str, *args: Any) -> list[Certificate]:
    H_1, _, F = _dense(loss, params, plan, *args)
    inserted = sd.apply_plan(params, plan.with_alpha(1.0))
    phi_inverse = jax.jit(lambda plan: linear_matrix(lambda t: bounds.phi_inverse(t, plan), inserted))(plan)
    values, vectors = np.linalg.eigh(np.asarray(phi_inverse))
    R = vectors[:, np.abs(values - 1) < 1e-6]
    blocks = jax.jit(bounds.fast_blocks)(H_1, F)
    zero = blocks._replace(fast=jnp.zeros(()))
    far = 1e3 * np.logspace(0, 1, 4)
    sharpness, allowance = _curve(loss, params, plan, far, *args)
    allowance += far**2 * float(rounding(H_1))  # what rounding leaves of K_U grows too
    upper = np.asarray(bounds.sharpness_upper(jnp.asarray(far), zero))
    found = exponent(far, sharpness)
    return [
        equality("K_U = 0", name, blocks.fast, 0.0, scale=_norm(H_1)),
        inequality("a ||R^T H_1 F|| <= sigma_1(H_a) <= Lambda(a) <= a c + r", name,
                   [far * _norm(R.T @ H_1 @ F), sharpness, upper],
                   [sharpness, upper, far * float(blocks.coupling) + float(blocks.rest)],
                   allowance=allowance, scale=sharpness, word=CHECKED),
        fit(f"sigma_1(H_a) grows as a^{power:g}", name, found.slope, power, tolerance=0.05, count=len(far)),
    ]  # fmt: skip


def _linear_loss(params: PyTree, x: Array, y: Array) -> Array:
    """Return the mean logit of the target, linear in what the last layer puts out."""
    h = jnp.tanh(x @ params["layer_0"]["w"] + params["layer_0"]["b"])
    logits = h @ params["layer_1"]["w"] + params["layer_1"]["b"]
    return jnp.mean(jnp.take_along_axis(logits, y[:, None], axis=-1))


def _scalar(key: PRNGKeyArray) -> list[Certificate]:
    """A network on which both sides of the sandwich are attained."""
    params, args = {"w": jnp.full((1, 1), 2.0)}, (jnp.ones((1, 1)), jnp.full((1, 1), 4.0))
    plan = sd.plan(params, sd.SpecDef(alpha=ALPHA, side="output"), where="w", key=key)
    H_1, H_a, F = _dense(_scalar_loss, params, plan, *args)
    lower, upper = bounds.sandwich_sides(ALPHA, _norm(F.T @ H_1 @ F), _norm(H_1))
    name, told = "y = C Wt h scalar, W = 2, h = 1, loss (y - 4)^2 / 2", {"factor": 1 + 1e-12, "word": CHECKED}
    return [
        tight("a^2 ||K_U|| = sigma_1(H_a)", name, lower, _norm(H_a), **told),
        tight("sigma_1(H_a) = a^2 sigma_1(H_1)", name, _norm(H_a), upper, **told),
    ]


def _scalar_loss(params: PyTree, x: Array, y: Array) -> Array:
    return 0.5 * jnp.sum((x @ params["w"] - y) ** 2)


def _outside(layer: OpenLayer, key: PRNGKeyArray) -> list[Certificate]:
    """Instances outside the assumptions are refused; the formula is wrong where its own assumption fails."""
    spec = sd.SpecDef(alpha=ALPHA, k=2, side="output")
    plan = sd.plan(layer.params, spec, where=layer.where, key=key)
    below = on_network(layer.loss, layer.params, plan.with_alpha(0.5), *layer.args, name="", key=key)
    again = twice(key)
    plan = sd.plan(again.params, spec, where=again.where, key=key)
    claim = "outside its assumptions the statement is refused"
    block, formula = _both_blocks(again, plan)
    error = np.abs(block - formula).max() / np.abs(formula).max()
    still = on_network(again.loss, again.params, plan, *again.args, name=again.name, key=key)
    return [
        refuses(claim, "alpha = 1/2", below, "alpha >= 1"),
        refuses(f"{claim}: {FORMULA}", again.name, on_layer(again, plan, again.name, key), INDEPENDENT),
        *still[:2],
        refuted(f"{FORMULA} is false there", again.name, error, 0.0, allowance=1e-3,
                word=CHECKED, note="the left side is the relative error of the formula"),
    ]  # fmt: skip
