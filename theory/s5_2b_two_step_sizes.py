"""Statement 5.2b [ours]: One number, two step sizes: C at c / a^2, everything else at c.

STATEMENT. Multiply the step on every compensation by a^-2 (P = diag(a^-2 on C, 1 elsewhere)).

(i) The curvature that gradient descent then sees satisfies     a^-2 sigma_1(H_1) <= sigma_1(P^1/2 H_a
P^1/2) <= sigma_1(H_1), H_1 of the identity-inserted network. The upper side fails for a^-s with s < 2.
Several layers: each C_i at c / a_i^2, a the largest.

(ii) Under the flow of these steps the layer's own matrix moves as dW/dt = -Q_a G, G = dL/dW,

    Q_a G = (I - U U^T) G + G W_U^T W_U + a^-2 (U U^T G + G W^T (I - U U^T) W),       W_U = U^T W.

In the limit only G = U E^T with E orthogonal to row(W_U) is slow: k (n - rank W_U) directions, in which Q_a
G = a^-2 (G + G W^T (I - U U^T) W) exactly. All others move at least at min(1, smin+(W_U)^2), for every a;
eigenvalue by eigenvalue lambda(Q_inf) <= lambda(Q_a) <= lambda(Q_inf) + a^-2 (1 + ||(I - U U^T) W||^2),
with lambda(Q_inf) the sums of an eigenvalue of W_U^T W_U (n) and 1 (m - k times) or 0 (k times).

(iii) At the same point and the same c the loss falls at least as fast, at first, as with C frozen (5.2),
whose slow directions number k n: <G, Q_a G> >= <G, T(a^-2) G>. That is all: over a run, each at its best
step, two step sizes are NOT always better than freezing (refuted below; THEORY.md had seen 18 trials
without exception).

ASSUMPTIONS. alpha >= 1; nothing nonlinear between the factors; L twice differentiable at the point (for
(i)).

PROOF. (i) By 2.1 P^1/2 H_a P^1/2 = S^T H_1 S with S = phi^-1 P^1/2: dC -> dC T(a) / a, with singular values
1 and 1/a, dWt -> T(1/a) dWt, 1/a and 1, identity on the rest. So ||S|| = 1, ||S^-1|| = a, and sigma_1(S^T H
S) <= ||S||^2 sigma_1(H), also for the inverse. With a^-s on C, S has the singular value a^(1 - s/2) > 1 on
the fast directions and the bound fails for an H_1 that lives there. (ii) g_C = G Wt^T, g_Wt = C^T G. dW/dt
= (dC/dt) Wt + C dWt/dt = -(a^-2 G Wt^T Wt + C C^T G), and Wt^T Wt = W^T T(a^2) W = W^T W + (a^2 - 1) W_U^T
W_U, C C^T = T(a^-2) = I - U U^T + a^-2 U U^T. Collect. Left and right multiplications commute and are
symmetric in the Frobenius product, so Q_inf: G -> (I - U U^T) G + G W_U^T W_U has the sums stated as
eigenvalues; a sum is 0 iff it is 0 + 0, on U E^T with W_U E = 0, and otherwise at least min(1,
smin+(W_U)^2). The a^-2 term is positive semidefinite with norm at most 1 + ||(I - U U^T) W||^2: Weyl. On U
E^T, W_U E = 0, the first two terms vanish. (iii) Q_a - T(a^-2) = a^-2 (. Wt^T Wt) >= 0, and dL/dt = -<G, Q
G>. QED.

TIGHTNESS. (i) above: H_1 of rank one in the fast directions. (iii): equality when G Wt^T = 0.

SOURCE. Ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds, trees
from specdef_jax.parametrization import loss_on
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
    seen,
    tight,
    under_assumptions,
)
from theory.draws import over_draws
from theory.falsifier import falsify
from theory.forms import USUAL, forms, planned
from theory.hessians import curvature_of, linear_matrix, rounding, sigma_1
from theory.instances.matrices import graded, orthonormal, rank_deficient
from theory.instances.networks import mlp_instance, networks
from theory.sizes import Size

ALPHA = 48.0
REST, D, K = 2, 2, 1  # of the random matrices M (rest, d)
CLAIM = "sigma_1(P^1/2 H_a P^1/2) <= sigma_1(H_1)"


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify curvature and speeds on networks and random matrices, and compare runs with freezing."""
    found: list[Certificate] = []
    for instance in networks(size, key):
        for form in forms(size, [USUAL]):
            plan, name = planned(instance, ALPHA, form, key)
            found += on_network(instance.loss, instance.params, plan, *instance.args, name=name)
    found += _curvature(key, size)
    found += _speeds(key, size)
    found += _runs(key, (1,) if size is Size.SMALL else (1, 4))
    instance = mlp_instance(key)
    plan = sd.plan(instance.params, sd.SpecDef(alpha=0.5, side="output"), where=instance.where, key=key)
    below = on_network(instance.loss, instance.params, plan, *instance.args, name="")
    found.append(
        refuses("outside its assumptions the statement is refused", "alpha = 1/2", below, "alpha >= 1")
    )
    return tuple(found)


def on_network(loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any, name: str) -> Certificates:
    """Certify (i) and (ii) on anyone's network, small enough for a dense Hessian.

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
        inserted, deformed = sd.apply_plan(params, plan.with_alpha(1.0)), sd.apply_plan(params, plan)
        metric = bounds.two_step_metric(deformed, plan)
        root = ravel_pytree(jax.tree.map(lambda s, x: jnp.sqrt(s) * jnp.ones_like(x), metric, deformed))[0]
        H_1 = curvature_of(loss, inserted, *args).hessian
        H_a = root[:, None] * curvature_of(loss, deformed, *args).hessian * root
        lower, upper = bounds.two_step_sides(sigma_1(H_1), bounds.condition(plan))
        top, allowance = sigma_1(H_a), rounding(H_1) + rounding(H_a)
        without = float(sigma_1(H_a / root[:, None] / root))
        velocity, predicted = _velocities(loss, params, deformed, metric, plan, *args)
        return [
            inequality(CLAIM, name, top, upper, allowance=allowance, word=Word.CHECKED,
                       note=f"without the metric {without:.4g}"),
            inequality("a^-2 sigma_1(H_1) <= the same", name, lower, top, allowance=allowance,
                       word=Word.CHECKED),
            equality("dW/dt = -Q_a G", name, velocity[None], predicted[None]),
        ]  # fmt: skip

    return under_assumptions(CLAIM, name, evaluate)


def _velocities(
    loss: Callable[..., Array], params: PyTree, deformed: PyTree, metric: PyTree, plan: Plan, *args: Any
) -> tuple[Array, Array]:
    """Return -dM/dt of all planned kernels by automatic differentiation, and by the formula."""
    on_pairs, on_plain = (loss_on(loss, tree, *args) for tree in (deformed, params))
    moved, plain = _motion(on_pairs, on_plain, deformed, params, metric, args)
    kernels = dict(trees.named_leaves(params))
    found, predicted = [], []
    for (name, leaf), gradient in zip(trees.named_leaves(moved), jax.tree.leaves(plain), strict=True):
        if name in plan.layers:
            layer = plan[name]
            M, there, G = (layer.axes.to_matrix(x, layer.side) for x in (kernels[name], leaf, gradient))
            found.append(there.ravel())
            predicted.append(bounds.two_step_velocity(M, layer.U, layer.alpha, G).ravel())
    return jnp.concatenate(found), jnp.concatenate(predicted)


@jax.jit
def _motion(
    on_pairs: Any, on_plain: Any, deformed: PyTree, params: PyTree, metric: PyTree, args: tuple[Any, ...]
) -> tuple[PyTree, PyTree]:
    """Return how the merged tree moves along the scaled gradient, and the plain network's gradient."""
    step = jax.tree.map(jnp.multiply, metric, jax.grad(on_pairs)(deformed, *args))
    return jax.jvp(sd.merge, (deformed,), (step,))[1], jax.grad(on_plain)(params, *args)


def _stretch(U: Array, alpha: Array, on_comp: Array) -> Array:
    """Return S = phi^-1 P^1/2 on (C, Mt, one more coordinate), given the multiplier on C."""
    T = jnp.eye(D) + (alpha - 1) * U @ U.T
    inverse = jnp.eye(D) + (1 / alpha - 1) * U @ U.T
    on_weight = jnp.kron(jnp.eye(REST), inverse)
    return jax.scipy.linalg.block_diag(jnp.sqrt(on_comp) * jnp.kron(T, jnp.eye(D)), on_weight, jnp.eye(1))


N = D * D + REST * D + 1


def _draw(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 4)
    H = jnp.where(jax.random.bernoulli(keys[0]), jax.random.normal(keys[1], (N, N)), graded(keys[1], (N, N)))
    alpha = 10 ** jax.random.uniform(keys[2], (), maxval=3)
    return _sides((H + H.T) / 2, orthonormal(keys[3], D, K), alpha)


@jax.jit
def _sides(H: Array, U: Array, alpha: Array) -> dict[str, Array]:
    S = _stretch(U, alpha, alpha**-2)
    seen_by = S.T @ H @ S
    lower, upper = bounds.two_step_sides(sigma_1(H), alpha)
    allowance = 2 * rounding(H) + rounding(seen_by)
    return {"lower": lower, "top": sigma_1(seen_by), "upper": upper, "allowance": allowance}


def _slack(point: dict[str, Array]) -> Array:
    H, U = (point["H"] + point["H"].T) / 2, point["U"] / jnp.linalg.norm(point["U"])
    sides = _sides(H, U, jnp.exp(jnp.abs(point["log_alpha"])))
    return (sides["upper"] - sides["top"] + sides["allowance"]) / sides["upper"]


def _sample(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 3)
    return {
        "H": jax.random.normal(keys[0], (N, N)),
        "U": jax.random.normal(keys[1], (D, 1)),
        "log_alpha": 3 * jax.random.normal(keys[2], ()),
    }


def _curvature(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(i) on random symmetric matrices, where a falsifier looks, where it is met, and with another power."""
    sides = over_draws(_draw, key, size.draws)
    search = None
    if size is not Size.SMALL:
        search = falsify(_slack, _sample, key, tried=1000, climbed=size.starts // 4, steps=60).search
    name = f"Gaussian and graded {N} x {N}, m = {D}, n = {REST}, k = {K}, alpha 1 to 1000"
    U = jnp.eye(D)[:, :1]
    fast = jnp.zeros((N, N)).at[0, 0].set(3.0)  # dC = e_1 e_1^T, in the fast directions
    slow = jnp.zeros((N, N)).at[D * D, D * D].set(3.0)  # dMt = e_1 e_1^T
    at_fast, at_slow = (_sides(H, U, jnp.asarray(ALPHA)) for H in (fast, slow))
    other = _stretch(U, jnp.asarray(ALPHA), jnp.asarray(ALPHA**-1.9))
    return [
        inequality(CLAIM, name, sides["top"], sides["upper"], allowance=sides["allowance"],
                   scale=sides["upper"], search=search),
        inequality("a^-2 sigma_1(H_1) <= the same", name, sides["lower"], sides["top"],
                   allowance=sides["allowance"], scale=sides["upper"]),
        tight(CLAIM, "H_1 of rank one in the fast directions", at_fast["top"], at_fast["upper"],
              factor=1 + 1e-12, allowance=at_fast["allowance"]),
        tight("a^-2 sigma_1(H_1) <= the same", "H_1 of rank one in the deformed rows of Wt", at_slow["lower"],
              at_slow["top"], factor=1 + 1e-9, allowance=1e-12),
        refuted(f"{CLAIM} with C at c / a^1.9 is false", f"the same, a = {ALPHA:g}",
                sigma_1(other.T @ fast @ other), sigma_1(fast)),
    ]  # fmt: skip


def _operator(M: Array, U: Array, alpha: Array) -> Array:
    """Return the matrix of G -> Q_a G."""
    return linear_matrix(partial(bounds.two_step_velocity, M, U, alpha), M)


def _speed(key: PRNGKeyArray) -> dict[str, Array]:
    """Draw M, U, alpha, G and compare Q_a with its limit, with the frozen speeds and on a slow direction."""
    keys = jax.random.split(key, 6)
    shape = (n, m) = (4, 3)
    M = jnp.where(
        jax.random.bernoulli(keys[0]), jax.random.normal(keys[1], shape), rank_deficient(keys[1], shape)
    )
    U, G = orthonormal(keys[2], m, 2), jax.random.normal(keys[3], shape)
    alpha = 10 ** jax.random.uniform(keys[4], (), maxval=3)
    Q = _operator(M, U, alpha)
    in_fast = jnp.linalg.eigvalsh((M @ U) @ (M @ U).T)
    limit = jnp.sort((in_fast[:, None] + jnp.array([0.0, 0.0, 1.0])).ravel())
    rest = jnp.linalg.norm(M - M @ U @ U.T, 2) ** 2
    # E orthogonal to the range of M U, so that E U^T is slow.
    left = jnp.linalg.svd(M @ U)[0][:, 2:]
    E = left @ left.T @ jax.random.normal(keys[5], (n, 2))
    slow = E @ U.T
    frozen = bounds.frozen_velocity(U, alpha, G)
    return {
        "values": jnp.linalg.eigvalsh((Q + Q.T) / 2),
        "limit": limit,
        "more": (1 + rest) / alpha**2 * jnp.ones_like(limit),
        "allowance": (rounding(Q) + rounding(M) * jnp.linalg.norm(M)) * jnp.ones_like(limit),
        "slow": bounds.two_step_velocity(M, U, alpha, slow),
        "predicted": (slow + (M - M @ U @ U.T) @ M.T @ slow) / alpha**2,
        "slow_size": jnp.linalg.norm(slow) * (1 + jnp.linalg.norm(M) ** 2),
        "gain": jnp.sum(G * bounds.two_step_velocity(M, U, alpha, G)),
        "frozen": jnp.sum(G * frozen),
        "size": jnp.linalg.norm(G) ** 2 * (1 + jnp.linalg.norm(M) ** 2),
        "counted": jnp.sum(jnp.linalg.eigvalsh(_operator(M, U, jnp.asarray(1e6))) < 1e-9),
        "dimension": bounds.slow_dimension(M, U),
    }


def _speeds(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(ii) and (iii) on random layers, of full rank and of rank one."""
    s = over_draws(_speed, key, size.draws)
    name = "layers m = 3, n = 4, k = 2, of rank 3 and 1, alpha 1 to 1000"
    eps = np.finfo(np.float64).eps
    one, U = jnp.array([[1.0, 0.0], [0.0, 0.0]]), jnp.eye(2)[:, :1]
    G = jnp.array([[0.0, 0.0], [1.0, 1.0]])  # G orthogonal to the range of M
    both = bounds.frozen_velocity(U, ALPHA, G), bounds.two_step_velocity(one, U, ALPHA, G)
    met = [jnp.sum(G * velocity) for velocity in both]
    return [
        inequality("lambda(Q_inf) <= lambda(Q_a)", name, s["limit"], s["values"], allowance=s["allowance"]),
        inequality("lambda(Q_a) <= lambda(Q_inf) + a^-2 (1 + ||(I - U U^T) W||^2)", name, s["values"],
                   s["limit"] + s["more"], allowance=s["allowance"]),
        equality("the slow directions number k (n - rank U^T W)", name, s["counted"], s["dimension"],
                 allowance=0.0),
        equality("on U E^T, E orthogonal to row(U^T W): Q_a G = a^-2 (G + G W^T (I - U U^T) W)", name,
                 s["slow"], s["predicted"], scale=s["slow_size"], allowance=64 * eps),
        inequality("the loss falls as fast as with C frozen: <G, T(a^-2) G> <= <G, Q_a G>", name, s["frozen"],
                   s["gain"], allowance=64 * eps * s["size"], scale=s["size"]),
        tight("<G, T(a^-2) G> <= <G, Q_a G>", "G Wt^T = 0", *met, factor=1 + 1e-12),
    ]  # fmt: skip


def _runs(key: PRNGKeyArray, ks: tuple[int, ...]) -> list[Certificate]:
    """Compare the losses after 60 steps of gradient descent, each method at its best of eleven step sizes."""
    alphas, keys = jnp.array([16.0, 64.0, 256.0]), jax.random.split(key, 12)
    found = []
    for k in ks:
        two, frozen = np.asarray(_race(keys, alphas, k)).swapaxes(0, 1).reshape(2, -1)
        ratio, name = two / frozen, f"perceptron 4-5-4-3, k = {k}, 12 networks, a = 16, 64, 256"
        worse = float(np.mean(ratio > 1))
        note = f"median ratio {np.median(ratio):.3f}, from {ratio.min():.2g} to {ratio.max():.3g}"
        if k == 1:
            found.append(
                refuted(
                    "never a higher loss than with C frozen is false, over a run",
                    name,
                    two,
                    frozen,
                    allowance=1e-3 * frozen,
                    word=Word.ESTIMATED,
                    note=note,
                )
            )
        else:
            found.append(
                seen(
                    "share of runs that end higher than with C frozen, k = m",
                    name,
                    worse,
                    worse < 0.5,
                    note=note,
                )
            )
    return found  # fmt: skip


@partial(jax.jit, static_argnames="k")
def _race(keys: PRNGKeyArray, alphas: Array, k: int) -> Array:
    """Return the best final losses, (networks, [two step sizes, C frozen], alphas)."""
    steps, grid = 60, 2.0 ** jnp.linspace(-4, 3, 11)

    def on_one(key: PRNGKeyArray) -> Array:
        instance = mlp_instance(key)
        layer = instance.params["layer_1"]
        M, others = layer["w"], {**instance.params, "layer_1": {"b": layer["b"]}}
        U = jnp.linalg.svd(M)[2][:k].T

        def loss(trained: tuple[Array, Array, PyTree]) -> Array:
            weight, comp, rest = trained
            params = {**rest, "layer_1": {**rest["layer_1"], "w": weight @ comp}}
            return instance.loss(params, *instance.args)

        flat, unravel = ravel_pytree(instance.params)
        sharp = sigma_1(jax.hessian(lambda v: instance.loss(unravel(v), *instance.args))(flat))

        def run(alpha: Array, share: Array, step_size: Array) -> Array:
            T = jnp.eye(len(U)) + (alpha - 1) * U @ U.T
            inverse = jnp.eye(len(U)) + (1 / alpha - 1) * U @ U.T

            def step(trained: tuple, _: None) -> tuple[tuple, None]:
                weight, comp, rest = jax.grad(loss)(trained)
                update = (weight, share * comp / alpha**2, rest)
                return trees.axpy(-step_size / sharp, update, trained), None

            end = loss(jax.lax.scan(step, (M @ T, inverse, others), None, length=steps)[0])
            return jnp.where(jnp.isfinite(end), end, jnp.inf)

        def best(share: Array, alpha: Array) -> Array:
            return jnp.min(jax.vmap(run, (None, None, 0))(alpha, share, grid))

        return jax.vmap(jax.vmap(best, (None, 0)), (0, None))(jnp.array([1.0, 0.0]), alphas)

    return jax.vmap(on_one)(keys)
