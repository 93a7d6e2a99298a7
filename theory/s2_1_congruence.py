"""Statement 2.1 [ours, after Dinh et al. 2017]: Congruence of the Hessians before and after deformation.

STATEMENT. Let phi: (C, Wt, rest) -> (C T(1/a), T(a) Wt, rest), and theta_a = phi theta_1 with theta_1 =
(I, W, rest). Where L is twice differentiable at theta_1,

    H_a = phi^-T H_1 phi^-1,      g_a = phi^-T g_1.

phi^-1 takes dC to dC T(a) and dWt to T(1/a) dWt; its singular values are a (m k per deformed layer), 1/a
(k n) and 1. Hence the inertia of the Hessian is unchanged and lambda_i(H_a) = c_i lambda_i(H_1) with
a^-2 <= c_i <= a^2, both ascending. On the input side dWt -> dWt T(1/a) and dC -> T(a) dC (n k and m k
change places). Several layers: phi is a direct sum, alphas do not multiply, block (i, j) of the fast
directions grows as a_i a_j. In gauge placement all of it holds on the original network with the identity
never inserted: phi: (V, b, O) -> (T V, T b, O T^-1).

ASSUMPTIONS. alpha >= 1 (for alpha < 1 the factors swap roles); nothing nonlinear between the two factors,
so that L(phi theta) = L(theta) for ALL theta; L twice differentiable at the point.

PROOF. The network reads (C, Wt) through the product C Wt only, and (C T(1/a)) (T(a) Wt) = C Wt, so
L(phi theta) = L(theta) for every theta. phi is linear. Differentiate once: phi^T g(phi theta) = g(theta),
and again: phi^T H(phi theta) phi = H(theta). Take theta = theta_1 and solve for g_a, H_a; phi is
invertible with inverse the same map at 1/a. T(a) is symmetric with eigenvalues a (k) and 1, so
dC -> dC T(a) has each of them m times and dWt -> T(1/a) dWt n times; the maps act on separate blocks.
Sylvester's law gives the inertia. Ostrowski's theorem (Horn and Johnson, Matrix Analysis, 4.5.9) says
lambda_i(S H S^T) = c_i lambda_i(H) with smin(S)^2 <= c_i <= smax(S)^2; S = phi^-T. QED.

TIGHTNESS. c_i = a^2 is attained when an eigenvector of H_1 lies in the directions dC = E U^T: a loss
quadratic in C along them and flat elsewhere; below, diag(1, 0, ...) in those coordinates.

SOURCE. The reparametrization argument is that of Dinh, Pascanu, Bengio and Bengio, Sharp minima can
generalize (2017); the statement for the deformed pair, its spectrum and the gauge form are ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.parametrization import Deformed, loss_on
from specdef_jax.spec import Plan
from theory.assumptions import require_congruence
from theory.certificate import (
    Certificate,
    Certificates,
    equality,
    inequality,
    refuses,
    tight,
    under_assumptions,
)
from theory.draws import over_draws
from theory.forms import forms, planned
from theory.hessians import curvature_of, eigenvalues, linear_matrix, rounding
from theory.instances.matrices import orthonormal
from theory.instances.networks import Instance, mlp_instance, networks, transformer_instance
from theory.sizes import Size

ALPHA = 7.0  # no power of two: both sides round
CLAIM = "H_a = phi^-T H_1 phi^-1"


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify congruence on networks, gauge included, Ostrowski's interval on random matrices."""
    found: list[Certificate] = []
    for instance in networks(size, key):
        for form in forms(size):
            plan, name = planned(instance, ALPHA, form, key)
            found += on_network(instance.loss, instance.params, plan, *instance.args, name=name, key=key)
    found += _two_layers(mlp_instance(key), key)
    found += _gauge(transformer_instance(key), key)
    found += _ostrowski(key, size)
    found += _outside(key)
    return tuple(found)


def on_network(
    loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any, name: str, key: PRNGKeyArray
) -> Certificates:
    """Certify the statement on anyone's network, small enough for a dense Hessian.

    Args:
      loss: loss(params, *args) on plain parameters, or one that reads Deformed leaves itself.
      params: plain parameters.
      plan: what to deform; its alphas must be at least 1.
      *args: data.
      name: of the instance.
      key: for the test of invariance.
    """

    def evaluate() -> list[Certificate]:
        as_partial, inserted = require_congruence(loss, params, plan, *args, key=key)
        phi_inverse = linear_matrix(lambda t: bounds.phi_inverse(t, plan), inserted)
        deformed = sd.apply_plan(params, plan)
        factor = float(bounds.condition(plan))
        return _congruent(as_partial, inserted, deformed, phi_inverse, factor, name, *args)

    return under_assumptions(CLAIM, name, evaluate)


def _congruent(
    loss: Any, one: PyTree, deformed: PyTree, phi_inverse: Array, factor: float, name: str, *args: Any
) -> list[Certificate]:
    """Compare both networks, given the matrix of phi^-1."""
    at_one, at_alpha = curvature_of(loss, one, *args), curvature_of(loss, deformed, *args)
    predicted = phi_inverse.T @ at_one.hessian @ phi_inverse
    size = len(at_one.gradient)
    spread = np.linalg.svd(np.asarray(phi_inverse), compute_uv=False)
    return [
        equality(
            CLAIM, name, at_alpha.hessian[None], predicted[None],
            scale=float(jnp.linalg.norm(at_alpha.hessian, 2)), note=f"{size} x {size}",
        ),
        equality("g_a = phi^-T g_1", name, at_alpha.gradient[None], (phi_inverse.T @ at_one.gradient)[None]),
        equality("the extreme singular values of phi^-1 are a and 1/a", name,
                 [spread.max(), spread.min()], [factor, 1 / factor]),
        *_spectra(at_one.hessian, at_alpha.hessian, factor, name),
    ]  # fmt: skip


def _spectra(before: Array, after: Array, factor: float, name: str) -> list[Certificate]:
    """Compare the eigenvalues that stand above rounding: their signs, and c_i with Ostrowski's interval."""
    values_1, values_a = eigenvalues(before), eigenvalues(after)
    floor_1, floor_a = rounding(before), rounding(after)
    sure = (jnp.abs(values_1) > floor_1) & (jnp.abs(values_a) > floor_a)
    note = f"{int(sure.sum())} of {len(values_1)} eigenvalues stand above rounding"
    values_1, values_a = values_1[sure], values_a[sure]
    low, high = bounds.ostrowski(values_1, factor)
    outside = jnp.maximum(low - values_a, values_a - high) / jnp.abs(values_a)
    allowance = factor**2 * floor_1 / jnp.abs(values_a) + floor_a / jnp.abs(values_a)
    return [
        equality("the inertia is unchanged", name, jnp.sign(values_a), jnp.sign(values_1), allowance=0.0,
                 note=note),
        inequality("lambda_i(H_a) leaves [a^-2, a^2] lambda_i(H_1) by nothing", name, outside, 0.0,
                   allowance=allowance, note=note),
    ]  # fmt: skip


def _two_layers(instance: Instance, key: PRNGKeyArray) -> Certificates:
    """Two layers at different alphas: phi is a direct sum."""
    spec = sd.SpecDef(alpha=1.0, k=1, side="output")
    made = sd.plan(instance.params, spec, where=["layer_0/w", "layer_1/w"], key=key)
    alphas = {"layer_0/w": 3.0, "layer_1/w": ALPHA}
    plan = Plan({p: replace(layer, alpha=jnp.asarray(alphas[p])) for p, layer in made.items()})
    name = f"{instance.name}, two layers at 3 and {ALPHA:g}"
    found = on_network(instance.loss, instance.params, plan, *instance.args, name=name, key=key)
    return tuple(c for c in found if "singular" not in c.claim)


def _gauge(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """Value and output projections of attention, one T per head, nothing inserted."""
    params, heads = instance.params, 2
    v, o = params["block_0_v"], params["block_0_o"]
    spec = sd.SpecDef(alpha=ALPHA, k=1)
    pair = sd.deform_pair(v["w"], o["w"], spec, key=key, bias=v["b"], groups=heads)

    def with_pair(first: Array, bias: Array, second: Array) -> PyTree:
        return {**params, "block_0_v": {"w": first, "b": bias}, "block_0_o": {**o, "w": second}}

    deformed = with_pair(pair.first, pair.bias, pair.second)
    blocks = [jnp.eye(len(U)) + (ALPHA - 1) * U @ U.T for U in pair.layer.U]
    T = jax.scipy.linalg.block_diag(*blocks)

    def phi_inverse(tree: PyTree) -> PyTree:
        inverse = jnp.linalg.inv(T)
        v, o = tree["block_0_v"], tree["block_0_o"]
        moved = {"w": v["w"] @ inverse, "b": v["b"] @ inverse}
        return {**tree, "block_0_v": moved, "block_0_o": {**o, "w": T @ o["w"]}}

    name = f"{instance.name}, gauge on value and output projections"
    return _congruent(
        loss_on(instance.loss, params, *instance.args), params, deformed, linear_matrix(phi_inverse, params),
        ALPHA, name, *instance.args,
    )  # fmt: skip


def _ostrowski(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Random symmetric matrices under random phi, and one that attains a^2."""
    draw = functools.partial(_draw, 6, ALPHA)
    sides = over_draws(draw, key, size.draws)
    H = jnp.zeros((6, 6)).at[0, 0].set(1.0)
    S = jnp.diag(jnp.array([ALPHA, ALPHA, 1 / ALPHA, 1 / ALPHA, 1.0, 1.0]))
    top = eigenvalues(S @ H @ S)[-1]
    return [
        inequality("lambda_i(S H S^T) leaves Ostrowski's interval by nothing", "Gaussian and graded 6 x 6",
                   sides["outside"], 0.0, allowance=sides["allowance"], scale=sides["norm"]),
        tight("lambda_1(H_a) <= a^2 lambda_1(H_1) is attained", "an eigenvector along dC = E U^T",
              top, bounds.ostrowski(eigenvalues(H), ALPHA)[1][-1], factor=1 + 1e-12),
    ]  # fmt: skip


def _draw(n: int, alpha: float, key: PRNGKeyArray) -> dict[str, Array]:
    """Return by how much eigenvalues of S H S^T leave their intervals; S has singular values a, 1/a, 1."""
    keys = jax.random.split(key, 4)
    graded = jnp.where(jax.random.bernoulli(keys[0]), jnp.logspace(0, -5, n), 1.0)
    H = jax.random.normal(keys[1], (n, n)) * graded[:, None] * graded
    H = (H + H.T) / 2
    values = jnp.array([alpha] * 2 + [1 / alpha] * 2 + [1.0] * (n - 4))
    S = (orthonormal(keys[2], n, n) * values) @ orthonormal(keys[3], n, n).T
    product = S @ H @ S.T
    low, high = bounds.ostrowski(eigenvalues(H), alpha)
    found = eigenvalues(product)
    allowance = rounding(product) + alpha**2 * rounding(H)
    outside = jnp.max(jnp.maximum(low - found, found - high))
    return {"outside": outside, "allowance": allowance, "norm": jnp.linalg.norm(product)}


def _outside(key: PRNGKeyArray) -> list[Certificate]:
    """Networks on which an assumption fails are refused by name."""
    smooth, kinked = mlp_instance(key), mlp_instance(key, "relu")
    plan = sd.plan(smooth.params, sd.SpecDef(alpha=ALPHA, side="output"), where=smooth.where, key=key)

    def run(loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any) -> Certificates:
        return on_network(loss, params, plan, *args, name="", key=key)

    x, y = kinked.args
    flat = jax.tree.map(lambda b: jnp.zeros_like(b) if b.ndim == 1 else b, kinked.params)
    at_kink = run(kinked.loss, flat, plan, x.at[0].set(0.0), y)
    between = run(_tanh_between, smooth.params, plan, *smooth.args)
    below = run(smooth.loss, smooth.params, plan.with_alpha(0.5), *smooth.args)
    claim = "outside its assumptions the statement is refused"
    return [
        refuses(claim, "a tanh between weight and comp", between, "nothing nonlinear"),
        refuses(claim, "alpha = 1/2", below, "alpha >= 1"),
        refuses(claim, "a ReLU network with a preactivation of exactly 0", at_kink, "twice differentiable"),
    ]


def _tanh_between(params: PyTree, x: Array, y: Array) -> Array:
    """A perceptron that puts a nonlinearity between the two factors of its second layer."""
    pair = params["layer_1"]["w"]
    h = jnp.tanh(x @ params["layer_0"]["w"])
    h = jnp.tanh(h @ pair.weight) @ pair.comp if isinstance(pair, Deformed) else jnp.tanh(h @ pair)
    logits = h @ params["layer_2"]["w"]
    return jnp.mean((logits - jax.nn.one_hot(y, logits.shape[-1])) ** 2)
