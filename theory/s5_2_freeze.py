"""Statement 5.2 [ours]: Freezing the compensation leaves a network no sharper than the undeformed one.

STATEMENT. Hold C fixed and train Wt and the rest. With S: (dWt, drest) -> (C dWt, drest), at every point,

    H_frozen(Wt, rest) = S^T H(C Wt, rest) S,      g_frozen = S^T g(C Wt, rest),

H, g those of the undeformed network. S has singular values 1/a (k n of them per layer) and 1, so it is a
contraction and

    a^-2 sigma_1(H) <= sigma_1(H_frozen) <= sigma_1(H).

Gradient descent, momentum and every method linear in the gradient history (3.2) with step c on (Wt, rest)
is, step for step and exactly, the same method on the undeformed network with step c T(a^-2) on W: a^-2 c on
the k output directions U, c on all others and on the rest. At k = m the whole layer moves at a^-2 c and
nothing else is slowed. On the input side the same with the k input directions.

ASSUMPTIONS. alpha >= 1; nothing nonlinear between the factors; L twice differentiable at the point (Hessian
only).

PROOF. L_frozen(Wt, rest) = L(C Wt, rest), and (Wt, rest) -> (C Wt, rest) is linear with matrix S:
differentiate twice. C = T(1/a) is symmetric with eigenvalues 1/a (k) and 1; it multiplies each of n
columns: the singular values. For a symmetric H, sigma_1(S^T H S) = sup |x^T S^T H S x| <= sigma_1(H)
||S||^2, and applying this to H = S^-T H_frozen S^-1 with ||S^-1|| = a gives the other side. (In the rotated
basis C = Q D^-1, with the same singular values, and C C^T is the same.) A step dWt = -c g_Wt = -c C^T g_W
moves W = C Wt by -c C C^T g_W = -c T(a^-2) g_W; a linear combination of past gradients in place of g
changes nothing, C being fixed. For k = m, T(a^-2) = a^-2 I. QED.

TIGHTNESS. Above: a top eigenvector of H with no component on U in dW, for instance in the rest. Below: k =
m and a network that consists of the layer alone.

SOURCE. Ours; Horn and Johnson, Matrix Analysis, 4.5.9 (Ostrowski) gives the bounds eigenvalue by
eigenvalue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import attacks, bounds, trees
from specdef_jax.parametrization import Deformed, is_structured
from specdef_jax.spec import Plan
from specdef_jax.words import Word
from theory.assumptions import require_alpha, require_smooth
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
from theory.forms import USUAL, forms, planned
from theory.hessians import curvature_of, linear_matrix, rounding, sigma_1
from theory.instances.matrices import graded, orthonormal
from theory.instances.networks import Instance, mlp_instance, networks
from theory.sizes import Size
from theory.trajectories import plain, trajectory

ALPHA = 48.0
STEPS = 60
CLAIM = "sigma_1(H_frozen) <= sigma_1(H)"


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify contraction and trajectories on networks, the inequality on random matrices."""
    found: list[Certificate] = []
    for instance in networks(size, key):
        for form in forms(size, [USUAL]):
            plan, name = planned(instance, ALPHA, form, key)
            found += on_network(instance.loss, instance.params, plan, *instance.args, name=name)
    instance = mlp_instance(key)
    found += _whole_layer(instance, key)
    found += _matrices(key, size)
    found += _controls(instance, key)
    return tuple(found)


def on_network(loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any, name: str) -> Certificates:
    """Certify the statement on anyone's network, small enough for a dense Hessian.

    Args:
      loss: loss(params, *args) on plain parameters.
      params: plain parameters.
      plan: what is deformed; alphas at least 1.
      *args: data.
      name: of the instance.
    """

    def evaluate() -> list[Certificate]:
        require_alpha(*(float(layer.alpha) for _, layer in plan.items()))
        require_smooth(loss, params, *args)
        deformed = sd.apply_plan(params, plan)
        task = attacks.freeze(loss, deformed, *args).problem
        frozen = curvature_of(task.loss, task.params, *args)
        before = curvature_of(loss, params, *args)
        S = linear_matrix(lambda tree: _through(deformed, tree), params)
        spread = np.linalg.svd(np.asarray(S), compute_uv=False)
        top, top_frozen, a = sigma_1(before.hessian), sigma_1(frozen.hessian), float(bounds.condition(plan))
        allowance = rounding(before.hessian) + rounding(frozen.hessian)
        # Rounding grows by 1 + eta |lambda| a step at most, so by 300 in 60 steps.
        step_size = 0.1 / float(top)
        path, _ = trajectory(task, optax.sgd(step_size), *args, steps=STEPS)
        slowed = optax.chain(optax.stateless(lambda g, _: _slow(g, plan)), optax.sgd(step_size))
        predicted, _ = trajectory(plain(loss, params), slowed, *args, steps=STEPS)
        return [
            equality("H_frozen = S^T H S", name, frozen.hessian[None], (S.T @ before.hessian @ S)[None]),
            equality("g_frozen = S^T g", name, frozen.gradient[None], (S.T @ before.gradient)[None]),
            equality("S has singular values 1/a (k n) and 1", name, np.sort(spread), _spectrum(params, plan),
                     count=len(spread)),
            inequality(CLAIM, name, top_frozen, top, allowance=allowance, word=Word.CHECKED),
            inequality("a^-2 sigma_1(H) <= sigma_1(H_frozen)", name, top / a**2, top_frozen,
                       allowance=allowance, word=Word.CHECKED),
            equality(f"SGD is SGD with step c T(a^-2) on W, {STEPS} steps", name,
                     *(_flat(p) - _flat(p)[0] for p in (path, predicted)), count=STEPS + 1),
        ]  # fmt: skip

    return under_assumptions(CLAIM, name, evaluate)


def _through(deformed: PyTree, tree: PyTree) -> PyTree:
    """Return S of a plain tree: each deformed weight replaced and multiplied by its compensation."""

    def multiply(leaf: Any, moved: Array) -> Array:
        return replace(leaf, weight=moved).materialize() if isinstance(leaf, Deformed) else moved

    return jax.tree.map(multiply, deformed, tree, is_leaf=is_structured)


def _slow(gradient: PyTree, plan: Plan) -> PyTree:
    """Return the gradient times T(a^-2) on every planned kernel."""

    def visit(name: str, leaf: Array) -> Array:
        if name not in plan.layers:
            return leaf
        layer = plan[name]
        matrix = layer.axes.to_matrix(leaf, layer.side)
        return layer.axes.from_matrix(
            bounds.frozen_velocity(layer.U, layer.alpha, matrix), leaf.shape, layer.side
        )

    return trees.map_named(visit, gradient)


def _spectrum(params: PyTree, plan: Plan) -> np.ndarray:
    """Return 1/a (k n per layer) and 1, ascending."""
    kernels = dict(trees.named_leaves(params))
    slow = {name: layer.U.shape[1] * kernels[name].size // layer.U.shape[0] for name, layer in plan.items()}
    values = [np.full(count, 1 / float(plan[name].alpha)) for name, count in slow.items()]
    return np.sort(np.concatenate([*values, np.ones(trees.size(params) - sum(slow.values()))]))


def _flat(path: PyTree) -> Array:
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(path)], axis=1)


def _whole_layer(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """At k = m slow the whole layer by a^-2, written without U, and no other layer."""
    m = instance.params["layer_1"]["w"].shape[1]
    plan = sd.plan(
        instance.params, sd.SpecDef(alpha=ALPHA, k=m, side="output"), where=instance.where, key=key
    )
    task = attacks.freeze(instance.loss, sd.apply_plan(instance.params, plan), *instance.args).problem
    path, _ = trajectory(task, optax.sgd(0.05), *instance.args, steps=STEPS)
    slow = optax.stateless(
        lambda g, _: trees.map_named(lambda name, x: x / ALPHA**2 if name in plan.layers else x, g)
    )
    predicted, _ = trajectory(
        plain(instance.loss, instance.params), optax.chain(slow, optax.sgd(0.05)), *instance.args, steps=STEPS
    )
    original, _ = trajectory(
        plain(instance.loss, instance.params), optax.sgd(0.05), *instance.args, steps=STEPS
    )
    moved = [jnp.abs(p["layer_1"]["w"][-1] - p["layer_1"]["w"][0]).max() for p in (path, original)]
    return [
        equality(f"k = m: SGD is SGD with step a^-2 c on the layer, c on the rest, {STEPS} steps",
                 instance.name, *(_flat(p) - _flat(p)[0] for p in (path, predicted)), count=STEPS + 1),
        refuted("frozen, every direction moves as in fine-tuning is false", f"{instance.name}, k = m",
                moved[1], 100 * moved[0], word=Word.CHECKED),
    ]  # fmt: skip


def _contraction(U: Array, alpha: Array, n: int, rest: int) -> Array:
    """Return S on vec(W), W (m, n) by rows, and `rest` more coordinates."""
    m = len(U)
    C = jnp.eye(m) + (1 / alpha - 1) * U @ U.T
    return jax.scipy.linalg.block_diag(jnp.kron(C, jnp.eye(n)), jnp.eye(rest))


def _draw(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 4)
    H = jnp.where(jax.random.bernoulli(keys[0]), jax.random.normal(keys[1], (8, 8)), graded(keys[1], (8, 8)))
    H = (H + H.T) / 2
    alpha = 10 ** jax.random.uniform(keys[2], (), maxval=3)
    S = _contraction(orthonormal(keys[3], 3, 1), alpha, 2, 2)
    frozen = S.T @ H @ S
    allowance = 2 * rounding(H) + rounding(frozen)
    return {"H": sigma_1(H), "frozen": sigma_1(frozen), "alpha": alpha, "allowance": allowance}


def _slack(point: dict[str, Array]) -> Array:
    """Return (sigma_1(H) - sigma_1(S^T H S)) / sigma_1(H), rounding added."""
    H = (point["H"] + point["H"].T) / 2
    U = point["U"] / jnp.linalg.norm(point["U"])
    S = _contraction(U, jnp.exp(jnp.abs(point["log_alpha"])), 2, 2)
    frozen = S.T @ H @ S
    return (sigma_1(H) - sigma_1(frozen) + 2 * rounding(H) + rounding(frozen)) / sigma_1(H)


def _sample(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 3)
    return {
        "H": jax.random.normal(keys[0], (8, 8)),
        "U": jax.random.normal(keys[1], (3, 1)),
        "log_alpha": 3 * jax.random.normal(keys[2], ()),
    }


def _matrices(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Both sides on random symmetric matrices, where a falsifier looks, and where they are met."""
    sides = over_draws(_draw, key, size.draws)
    name = "Gaussian and graded 8 x 8, m = 3, n = 2, k = 1, alpha 1 to 1000"
    search = falsify(_slack, _sample, key, tried=size.draws, climbed=size.starts, steps=100).search
    rest = jnp.zeros((8, 8)).at[6, 6].set(2.0)
    alone = jnp.diag(jnp.array([3.0, 1.0, -2.0, 0.5, 1.0, 1.0, 0.0, 0.0]))
    U, a = jnp.eye(3), jnp.asarray(ALPHA)
    S, whole = _contraction(U[:, :1], a, 2, 2), _contraction(U, a, 2, 2)
    return [
        inequality(CLAIM, name, sides["frozen"], sides["H"], allowance=sides["allowance"], scale=sides["H"],
                   search=search),
        inequality("a^-2 sigma_1(H) <= sigma_1(H_frozen)", name, sides["H"] / sides["alpha"]**2,
                   sides["frozen"], allowance=sides["allowance"], scale=sides["H"]),
        tight(CLAIM, "top curvature in the rest", sigma_1(S.T @ rest @ S), sigma_1(rest), factor=1 + 1e-12),
        tight("a^-2 sigma_1(H) <= sigma_1(H_frozen)", "k = m, the layer alone", sigma_1(alone) / ALPHA**2,
              sigma_1(whole.T @ alone @ whole), factor=1 + 1e-12, allowance=1e-15),
    ]  # fmt: skip


def _controls(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """Freeze the other factor: far sharper. alpha < 1: refused."""
    plan = sd.plan(instance.params, sd.SpecDef(alpha=ALPHA, side="output"), where=instance.where, key=key)
    deformed = sd.apply_plan(instance.params, plan)
    pair = deformed["layer_1"]["w"]

    def other(comp: Array, *args: Any) -> Array:
        layer = {**deformed["layer_1"], "w": replace(pair, comp=comp).materialize()}
        return instance.loss({**instance.params, "layer_1": layer}, *args)

    wrong = sigma_1(curvature_of(other, pair.comp, *instance.args).hessian)
    top = sigma_1(curvature_of(instance.loss, instance.params, *instance.args).hessian)
    below = on_network(instance.loss, instance.params, plan.with_alpha(0.5), *instance.args, name="")
    return [
        refuted("freezing Wt in place of C leaves it no sharper is false", instance.name, wrong, top,
                word=Word.CHECKED),
        refuses("outside its assumptions the statement is refused", "alpha = 1/2", below, "alpha >= 1"),
    ]  # fmt: skip
