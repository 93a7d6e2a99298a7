"""Statement 4.4 [ours, standard]: K-FAC, natural gradient, diagonals: who undoes the deformation.

STATEMENT.
  (a) K-FAC, undamped, with invertible factors is equivariant [standard]: A_C -> T A_C T, G_Wt -> T^-1 G_Wt
      T^-1, all other factors stay, and its step is phi times the original's.
  (b) Natural gradient with the full Fisher matrix F_a = phi^-T F_1 phi^-1 is NOT defined undamped: a pair C
      Wt has F t_A = 0 along the GL(m) orbit (4.1 (e)) at EVERY point, as the function is constant there:
      rank F <= n - m^2. What it does to the function is the same: J_a F_a^+ g_a = J_1 F_1^+ g_1.
  (c) Damped K-FAC (factored Tikhonov, A + pi sqrt(lambda), G + sqrt(lambda) / pi, pi^2 = (tr A / dim) / (tr
      G / dim)) moves every layer outside the pair exactly as without the deformation. Inside, in original
      coordinates, it damps A_C by pi_C sqrt(lambda) T^-2, with pi_C growing as a, and G_Wt by sqrt(lambda) /
      pi_Wt T^2: C's slow inputs are slowed as 1/a, the slow outputs of Wt as a^-2, its fast directions tend
      to the step without damping. A KL clip or any other length common to all layers couples them again.
  (d) A diagonal preconditioner |diag(H)|, exact, undoes the deformation where phi is diagonal (axis,
      rotated): with momentum and running squares, eps = 0, theta_a,t = phi theta_t. Not in the symmetric
      basis.
  (e) Hutchinson's estimate z_i (H z)_i, random signs z, has mean H_ii, variance sum_(j != i) H_ij^2, and so
      the root mean square |H e_i|, the norm of a ROW. (Normal z: 2 H_ii^2 more.) For H >= 0 the variance is
      at most H_ii sum_(j != i) H_jj.
  (f) On the deformed network, phi^-1 = diag(s): variance s_i^2 sum s_j^2 H_ij^2. Noise over diagonal stays
      on the fast directions, grows as a on the rest and as a^2 on the slow directions of Wt; as many probes
      as a^2, a^4 are needed. AdaHessian, whose running mean of squares tends to |H_a e_i|^2, steps as (s_i
      / a) g_i / |H_i,fast| in original coordinates: 1/a on the rest, 1/a^2 on the slow ones. Averaging N
      probes first (Sophia's running mean: about 2 / (1 - b2)) divides noise by sqrt(N) and leaves the
      powers.

ASSUMPTIONS. Those of 2.1. (a): invertible factors. (d): no H_ii that vanishes, H_ii finite. (f): H_i,fast
!= 0.

PROOF. (a) C reads u_a = T u, and its outputs are unchanged; Wt reads h and writes T u, so d_a = T^-1 d.
Gradients: grad_C T, T^-1 grad_Wt. Hence G^-1 grad_C T (T A T)^-1 = (G^-1 grad_C A^-1) T^-1 = dC T(1/a), and
T G^-1 T T^-1 grad A^-1 = T dWt: phi. (b) F = J^T J, J t_A = 0 since the outputs do not change along the
orbit, of dimension m^2 (4.1). J_a = J_1 phi^-1, g_a = J_a^T e: J F^+ J^T is the projector onto range(J_a) =
range(J_1). (c) Factors outside the pair do not change, and blocks do not mix: equal steps. C: G^-1 grad_C T
(T A T + d)^-1 T = G^-1 grad_C (A + d T^-2)^-1; Wt: T^-1 (T^-1 G T^-1 + d)^-1 T^-1 grad = (G + d T^2)^-1
grad. tr(T A T) = a^2 tr(U^T A U) + O(1), so pi_C ~ a; tr(T^-1 G T^-1) tends to its value on U's complement
(k < m), and pi_Wt to a number. pi_C T^-2 is of order a on the complement, 1/a on U. (d) diag(H_a) = s_i^2
H_ii, m_a = s m, sqrt(v_a) = s^2 sqrt(v): the update is s^-1 u = phi u. Induction as in 3.7. (e) z_i z_j, j
!= i, are uncorrelated with mean 0 and variance 1. H_ij^2 <= H_ii H_jj for H >= 0. (f) Insert s_i H_ij s_j.
The sum is a^2 |H_i,fast|^2 + O(1); divide by s_i^2 H_ii; |H_a e_i| ~ s_i a |H_i,fast|, and phi^-1 of the
step is s_i (s_i g_i) / (s_i a |H_i,fast|). QED.

TIGHTNESS. (e): H = v v^T attains the bound in every entry.

SOURCE. (a) Martens and Grosse (2015), theorem 1; (e) Hutchinson (1990), Bekas, Kokiopoulou and Saad (2007);
the rest ours.
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
from specdef_jax import bounds, optim
from specdef_jax.parametrization import loss_on
from specdef_jax.spec import Plan
from specdef_jax.words import Word
from theory import kronecker
from theory.assumptions import require, require_congruence
from theory.certificate import (
    Certificate,
    Certificates,
    equality,
    fit,
    inequality,
    refuses,
    refuted,
    seen,
    tight,
    under_assumptions,
)
from theory.draws import over_draws
from theory.falsifier import falsify
from theory.fits import exponent
from theory.forms import planned
from theory.hessians import curvature_of, linear_matrix
from theory.instances.networks import Instance, networks
from theory.kronecker import LAYERS, Net
from theory.sizes import Size

ALPHA = 7.0
ALPHAS = np.logspace(3, 5, 6)
DIAGONAL = "phi is diagonal (the axis or the rotated basis)"
EPS = float(np.finfo(float).eps)
CLAIM = "diag(H_a) = phi^-2 diag(H_1)"
ENTRIES = 6


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify (a) to (c) on a written-out perceptron, (d) and (f) on networks, (e) on random matrices."""
    found: list[Certificate] = []
    found += on_kronecker(kronecker.network(key), "perceptron 4-5-4-3, squared loss")
    instances = networks(size, key)
    for instance in instances:
        both = size is Size.FULL or (size is Size.DEFAULT and instance is instances[0])
        bases = ("axis", "rotated") if both else ("axis",)
        for basis in bases:
            plan, name = planned(instance, ALPHA, ("output", basis), key)
            found += on_network(instance.loss, instance.params, plan, *instance.args, name=name, key=key)
    first = instances[0]
    found += _running(first, key)
    found += _estimates(key, size)
    found += _noise_laws(first, key)
    found += _package(first, key)
    found += _outside(first, key)
    return tuple(found)


def on_kronecker(net: Net, name: str) -> Certificates:
    """Certify (a) to (c) on a perceptron of theory.kronecker.

    Args:
      net: weights, data and directions.
      name: of the instance.
    """
    before, after = net.weights, net.deformed(ALPHA)
    T, inverse = net.T(ALPHA), net.T(1 / ALPHA)
    one, at = (kronecker.factors(w, net.x, net.y) for w in (before, after))
    predicted = [(f.A, f.G) for f in one]
    predicted[1] = one[1].A, inverse @ one[1].G @ inverse
    predicted[2] = T @ one[2].A @ T, one[2].G
    found = [
        equality(f"the factors of {layer}: {rule}", name, jnp.concatenate([f.A.ravel(), f.G.ravel()])[None],
                 jnp.concatenate([p.ravel() for p in pair])[None])
        for layer, f, pair, rule in zip(
            LAYERS, at, predicted, ("unchanged", "G -> T^-1 G T^-1", "A -> T A T", "unchanged"), strict=True)
    ]  # fmt: skip
    undamped = kronecker.phi(net, kronecker.steps(before, net.x, net.y, 0.0), ALPHA)
    worst = max(float(jnp.linalg.cond(M)) for f in at for M in (f.A, f.G))
    for layer, step, expected in zip(
        LAYERS, kronecker.steps(after, net.x, net.y, 0.0), undamped, strict=True
    ):
        found.append(
            equality(f"undamped K-FAC: the step of {layer} is phi times the original's", name, step[None],
                     expected[None], allowance=64 * EPS * worst, note="allowance: 64 u times the condition")
        )  # fmt: skip
    return (*found, *_natural(net, name), *_damped(net, name))


def _natural(net: Net, name: str) -> list[Certificate]:
    """(b): the Fisher matrix of a pair is singular; the function's velocity is the same."""
    J, J_a = (kronecker.jacobian(w, net.x) for w in (net.weights, net.deformed(ALPHA)))
    errors = jax.vmap(lambda x: kronecker.outputs(net.weights, x)[0])(net.x) - net.y
    target = errors.ravel() / len(net.x) ** 0.5
    velocities = [M @ jnp.linalg.lstsq(M, target, rcond=1e-11)[0] for M in (J, J_a)]
    values = np.linalg.svd(np.asarray(J), compute_uv=False)
    n, orbit = J.shape[1], 16
    steps = [jnp.linalg.pinv(M, rtol=1e-11) @ target for M in (J, J_a)]
    sizes = [w.size for w in net.weights]
    split = jnp.split(steps[0], np.cumsum(sizes)[:-1])
    mapped = kronecker.phi(net, tuple(p.reshape(w.shape) for p, w in zip(split, net.weights, strict=True)),
                           ALPHA)  # fmt: skip
    mapped = jnp.concatenate([w.ravel() for w in mapped])
    return [
        equality("rank F = n - m^2: singular at every point", name, float(np.sum(values > 1e-10 * values[0])),
                 n - orbit, note=f"n = {n}, m^2 = {orbit}"),
        equality("the function moves alike: J_a F_a^+ g_a = J_1 F_1^+ g_1", name, velocities[1][None],
                 velocities[0][None], allowance=1e-9, note="allowance: u times the condition of J_a"),
        refuted("F_a^+ g_a = phi F_1^+ g_1 is false", name,
                jnp.linalg.norm(steps[1] - mapped) / jnp.linalg.norm(mapped), 0.0, allowance=1e-3,
                word=Word.CHECKED),
    ]  # fmt: skip


def _damped(net: Net, name: str) -> list[Certificate]:
    """(c): what factored damping does outside and inside the pair."""
    damping = 1e-2
    one = kronecker.factors(net.weights, net.x, net.y)
    at = kronecker.factors(net.deformed(ALPHA), net.x, net.y)
    before = kronecker.steps(net.weights, net.x, net.y, damping)
    after = kronecker.phi(net, kronecker.steps(net.deformed(ALPHA), net.x, net.y, damping), 1 / ALPHA)
    (on_A, on_G), (in_A, in_G) = kronecker.tikhonov(at[2], damping), kronecker.tikhonov(at[1], damping)
    T = net.T(ALPHA)
    comp = kronecker.step(one[2], on_A * net.T(ALPHA**-2.0), on_G)
    pair = kronecker.step(one[1], in_A, in_G * T @ T)
    claims = [
        ("damped K-FAC: W_0 moves as in the original", after[0], before[0]),
        ("damped K-FAC: W_2 moves as in the original", after[3], before[3]),
        ("damped K-FAC in original coordinates: C damped by pi sqrt(lambda) T^-2 on A", after[2], comp),
        ("damped K-FAC in original coordinates: Wt damped by sqrt(lambda) / pi T^2 on G", after[1], pair),
    ]
    found = [equality(claim, name, x[None], y[None]) for claim, x, y in claims]
    off = [float(jnp.linalg.norm(after[i] - before[i]) / jnp.linalg.norm(before[i])) for i in (1, 2)]
    found.append(
        refuted("damped K-FAC moves the pair as in the original is false", f"{name}, lambda = {damping:g}",
                min(off), 0.0, allowance=1e-2, word=Word.CHECKED,
                note=f"off by {off[0]:.0%} (Wt) and {off[1]:.0%} (C) at a = {ALPHA:g}")
    )  # fmt: skip
    return [*found, *_damped_laws(net, name, damping)]


def _damped_laws(net: Net, name: str, damping: float) -> list[Certificate]:
    """(c): powers of alpha in the step of the pair, original coordinates."""
    Q, _ = np.linalg.qr(np.concatenate([np.asarray(net.U), np.eye(4)], axis=1))
    U, V = net.U, jnp.asarray(Q[:, net.U.shape[1] :])

    @jax.jit
    def parts(alpha: Array) -> dict[str, Array]:
        at = net.deformed(alpha)
        _, pair, comp, _ = kronecker.phi(net, kronecker.steps(at, net.x, net.y, damping), 1 / alpha)
        pi, _ = kronecker.tikhonov(kronecker.factors(at, net.x, net.y)[2], 1.0)
        return {"pi_C": pi, "C's fast part": jnp.linalg.norm(comp @ U), "C's part off U":
                jnp.linalg.norm(comp @ V), "Wt's part on U": jnp.linalg.norm(U.T @ pair),
                "Wt's part off U": jnp.linalg.norm(V.T @ pair)}  # fmt: skip

    found = [parts(jnp.asarray(a)) for a in ALPHAS]
    orders = {"pi_C": 1.0, "C's fast part": 0.0, "C's part off U": -1.0, "Wt's part on U": -2.0,
              "Wt's part off U": 0.0}  # fmt: skip
    return [
        fit(f"damped K-FAC: {part} goes as a^{order:g}", f"{name}, lambda = {damping:g}",
            exponent(ALPHAS, [x[part] for x in found]).slope, order, tolerance=0.05, count=len(ALPHAS))
        for part, order in orders.items()
    ]  # fmt: skip


def on_network(
    loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any, name: str, key: PRNGKeyArray
) -> Certificates:
    """Certify (d) for one step, and (f)'s variance, on anyone's network in the axis or rotated basis.

    Args:
      loss: loss(params, *args) on plain parameters.
      params: plain parameters.
      plan: what to deform; alphas at least 1.
      *args: data.
      name: of the instance.
      key: for the test of invariance.
    """

    def evaluate() -> list[Certificate]:
        require(all(layer.basis != "symmetric" for _, layer in plan.items()), DIAGONAL)
        as_partial, inserted = require_congruence(loss, params, plan, *args, key=key)
        s = _scales(inserted, plan)
        one, at = (curvature_of(as_partial, t, *args) for t in (inserted, bounds.phi(inserted, plan)))
        d, d_a = jnp.diagonal(one.hessian), jnp.diagonal(at.hessian)
        alive = np.abs(d) > 1e-5 * np.abs(d).max()
        steps = [jnp.where(alive, c.gradient / jnp.abs(jnp.where(alive, x, 1)), 0)
                 for c, x in ((one, d), (at, d_a))]  # fmt: skip
        variance = bounds.diagonal_variance(at.hessian)
        off = one.hessian - jnp.diag(d)
        return [
            equality(CLAIM, name, (d_a / s**2)[None], d[None]),
            equality("the step by the exact diagonal is phi times the original's", name, (steps[1] * s)[None],
                     steps[0][None], allowance=1e-8, count=1,
                     note=f"{int(alive.sum())} entries whose diagonal is above 1e-5 of the largest; the "
                     "allowance: n u times 1e5, and a few"),
            equality("the variance of an estimate is s_i^2 sum_(j != i) s_j^2 H_ij^2", name,
                     (variance / s**2)[None], jnp.sum((s * off) ** 2, axis=1)[None]),
        ]  # fmt: skip

    return under_assumptions(CLAIM, name, evaluate)


def _scales(inserted: PyTree, plan: Plan) -> Array:
    """Return the diagonal of phi^-1."""
    matrix = linear_matrix(lambda tree: bounds.phi_inverse(tree, plan), inserted)
    return jnp.diagonal(matrix)


def _running(instance: Instance, key: PRNGKeyArray, steps: int = 20) -> list[Certificate]:
    """(d): momentum and running squares over some steps; and the symmetric basis."""
    found = []
    for basis in ("axis", "rotated", "symmetric"):
        plan, name = planned(instance, ALPHA, ("output", basis), key)
        inserted = sd.apply_plan(instance.params, plan.with_alpha(1.0))
        loss = loss_on(instance.loss, inserted, *instance.args)
        paths = [
            np.asarray(_diagonal_newton(loss, start, instance.args, steps))
            for start in (inserted, bounds.phi(inserted, plan))
        ]
        back = linear_matrix(lambda tree, plan=plan: bounds.phi_inverse(tree, plan), inserted)
        one, at = paths[0] - paths[0][0], (paths[1] - paths[1][0]) @ np.asarray(back).T
        if basis == "symmetric":
            found.append(
                refuted("the symmetric basis: theta_a,t = phi theta_t is false", name,
                        np.abs(at - one).max() / np.abs(one).max(), 0.0, allowance=1e-2, word=Word.CHECKED)
            )  # fmt: skip
        else:
            found.append(
                equality("exact |diag H| with momentum and running squares: theta_a,t = phi theta_t, "
                         f"{steps} steps", name, at[None], one[None], allowance=1e-8,
                         note="allowance: rounding, amplified by small diagonals")
            )  # fmt: skip
    return found


@partial(jax.jit, static_argnames="steps")
def _diagonal_newton(loss: Any, start: PyTree, args: tuple[Any, ...], steps: int) -> Array:
    """Return the path of AdaHessian with the exact diagonal, eps = 0."""
    flat, unravel = ravel_pytree(start)

    def value(v: Array) -> Array:
        return loss(unravel(v), *args)

    def one(carry: tuple[Array, Array, Array], t: Array) -> tuple[tuple, Array]:
        v, m, squares = carry
        diagonal = jnp.diagonal(jax.hessian(value)(v))
        m = 0.9 * m + 0.1 * jax.grad(value)(v)
        squares = 0.99 * squares + 0.01 * diagonal**2
        root = jnp.sqrt(squares / (1 - 0.99 ** (t + 1)))
        step = jnp.where(root > 0, 1e-3 * (m / (1 - 0.9 ** (t + 1))) / jnp.where(root > 0, root, 1), 0)
        return (v - step, m, squares), v

    zeros = jnp.zeros_like(flat)
    return jax.lax.scan(one, (flat, zeros, zeros), jnp.arange(steps))[1]


def _signs(n: int) -> Array:
    """Return all 2^n vectors of signs."""
    return 1.0 - 2.0 * ((jnp.arange(2**n)[:, None] >> jnp.arange(n)) & 1)


def _draw(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 2)
    root = jax.random.normal(keys[0], (ENTRIES, ENTRIES)) * 10 ** jax.random.uniform(keys[1], (ENTRIES, 1))
    H = root @ root.T
    G = root + root.T  # indefinite
    estimates = jax.vmap(lambda z: z * (G @ z))(_signs(ENTRIES))
    d = jnp.diagonal(H)
    bound = d * (jnp.sum(d) - d)
    return {
        "mean": jnp.mean(estimates, axis=0), "diagonal": jnp.diagonal(G),
        "variance": jnp.var(estimates, axis=0), "formula": bounds.diagonal_variance(G),
        "rms": jnp.sqrt(jnp.mean(estimates**2, axis=0)), "rows": bounds.estimated_diagonal(G),
        "scale": jnp.max(jnp.abs(G)), "square": jnp.max(jnp.abs(G)) ** 2,
        "share": jnp.max(bounds.diagonal_variance(H) / bound),
    }  # fmt: skip


def _slack(root: Array) -> Array:
    """Return 1 - max_i variance_i / (H_ii sum_(j != i) H_jj), rounding added."""
    H = root @ root.T
    d = jnp.diagonal(H)
    return 1 - jnp.max(bounds.diagonal_variance(H) / (d * (jnp.sum(d) - d))) + 1e3 * EPS


def _sample(key: PRNGKeyArray) -> Array:
    return jax.random.normal(key, (ENTRIES, ENTRIES))


def _estimates(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(e) over all sign vectors of random matrices, and normal probes by their moments."""
    sides = over_draws(_draw, key, size.draws)
    name = f"symmetric {ENTRIES} x {ENTRIES}, all {2**ENTRIES} sign vectors"
    search = falsify(_slack, _sample, key, tried=size.draws, climbed=size.starts, steps=100).search
    v = jnp.arange(1.0, 5.0)
    rank_one = jnp.outer(v, v)
    d = jnp.diagonal(rank_one)
    claim = "variance_i <= H_ii sum_(j != i) H_jj for H >= 0"
    H = jnp.array([[2.0, 1.0], [1.0, -1.0]])
    # Moments of normals: E z_i^4 = 3, so var(z_i (H z)_i) = 2 H_ii^2 + sum_(j != i) H_ij^2.
    points, weights = np.polynomial.hermite_e.hermegauss(6)
    z = np.stack(np.meshgrid(points, points, indexing="ij"), -1).reshape(-1, 2)
    w = np.outer(weights, weights).ravel() / (2 * np.pi)
    normal = z * (z @ np.asarray(H).T)
    variance = w @ normal**2 - (w @ normal) ** 2
    return [
        equality("E[z * H z] = diag(H)", name, sides["mean"], sides["diagonal"], scale=sides["scale"]),
        equality("Var[z_i (H z)_i] = sum_(j != i) H_ij^2", name, sides["variance"], sides["formula"],
                 scale=sides["square"]),
        equality("its root mean square is the norm of row i", name, sides["rms"], sides["rows"]),
        equality("normal probes: 2 H_ii^2 more", "2 x 2, by Gauss-Hermite quadrature", variance,
                 bounds.diagonal_variance(H, normal=True)),
        inequality(claim, f"H = R R^T, {ENTRIES} x {ENTRIES}", sides["share"], 1.0, allowance=1e3 * EPS,
                   search=search, note="both sides divided by the right one"),
        tight(claim, "H = v v^T", bounds.diagonal_variance(rank_one), d * (jnp.sum(d) - d),
              factor=1 + 1e-12, allowance=1e-12),
    ]  # fmt: skip


def _noise_laws(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """(f): powers of alpha of the noise and of AdaHessian's step, entry by entry, median."""
    plan, name = planned(instance, 2.0, ("output", "axis"), key)
    inserted = sd.apply_plan(instance.params, plan.with_alpha(1.0))
    one = curvature_of(instance.loss, inserted, *instance.args)
    order = np.rint(np.log2(np.asarray(_scales(inserted, plan))))
    H, g = one.hessian, one.gradient
    noise, step, exact = [], [], []
    for a in ALPHAS:
        s = jnp.asarray(a**order)
        H_a = s[:, None] * H * s
        noise.append(jnp.sqrt(bounds.diagonal_variance(H_a)) / jnp.abs(jnp.diagonal(H_a)))
        step.append(jnp.abs(s * s * g) / bounds.estimated_diagonal(H_a))
        exact.append(jnp.abs(s * s * g / jnp.diagonal(H_a)))
    alive = np.abs(np.asarray(jnp.diagonal(H))) > 1e-9
    where = f"{name}, six alphas from 1e3 to 1e5, median over entries"
    found = []
    for part, e in {"fast": 1, "rest": 0, "slow": -1}.items():
        entries = np.flatnonzero((order == e) & alive)

        def slope(values: list, entries: np.ndarray = entries) -> float:
            each = [exponent(ALPHAS, [float(v[i]) for v in values]).slope for i in entries]
            return float(np.median(each))

        count = len(entries) * len(ALPHAS)
        found += [
            fit(f"noise over diagonal, {part} entries: a^{1 - e}", where, slope(noise), 1 - e, tolerance=0.05,
                count=count),
            fit(f"AdaHessian's step, {part} entries, original coordinates: a^{e - 1}", where, slope(step),
                e - 1, tolerance=0.05, count=count),
            fit(f"a step by the exact diagonal, {part} entries: a^0", where, slope(exact), 0.0,
                tolerance=0.05, count=count),
        ]  # fmt: skip
    probes = [float(np.median(np.asarray(bounds.probes_needed(
        jnp.asarray(a**order)[:, None] * H * jnp.asarray(a**order), 0.1))[(order == 0) & alive]))
        for a in ALPHAS]  # fmt: skip
    found.append(
        fit("probes for a diagonal entry of the rest to 10%: a^2", where, exponent(ALPHAS, probes).slope, 2.0,
            tolerance=0.05, count=len(ALPHAS), note=f"{probes[0]:.2g} at a = 1000")
    )  # fmt: skip
    return found


def _package(instance: Instance, key: PRNGKeyArray, probes: int = 4000) -> list[Certificate]:
    """(f): the mean square that optim.adahessian keeps, at one point, against the rows of H_a."""
    plan, name = planned(instance, 100.0, ("output", "axis"), key)
    deformed = sd.apply_plan(instance.params, plan)
    at = curvature_of(instance.loss, deformed, *instance.args)
    squares = np.asarray(_kept(at.hessian, key, probes))
    expected = np.asarray(bounds.estimated_diagonal(at.hessian)) ** 2
    alive = expected > 1e-12 * expected.max()
    ratio = np.sqrt(squares[alive] / expected[alive])
    diagonal = np.abs(np.asarray(jnp.diagonal(at.hessian)))[alive]
    worst = float(np.max(np.sqrt(squares[alive]) / np.maximum(diagonal, 1e-300)))
    return [
        fit("what optim.adahessian divides by is the norm of a row of H_a", f"{name}, a = 100",
            float(np.median(ratio)), 1.0, tolerance=0.05, count=probes,
            note=f"{probes} probes; between {ratio.min():.3f} and {ratio.max():.3f} of it over entries"),
        seen("the same over the diagonal entry, largest", f"{name}, a = 100", worst, worst > 100),
    ]  # fmt: skip


@partial(jax.jit, static_argnames="probes")
def _kept(H: Array, key: PRNGKeyArray, probes: int) -> Array:
    """Return AdaHessian's mean of squares after some steps of length 0."""
    b2 = 1 - 1e-6
    optimizer = optim.adahessian(0.0, b2=b2, key=key)
    g = jnp.zeros(len(H))

    def one(state: Any, _: None) -> tuple[Any, None]:
        return optimizer.update(g, state, g, hvp=lambda z: H @ z)[1], None

    state, _ = jax.lax.scan(one, optimizer.init(g), None, length=probes)
    return state.nu / (1 - b2**probes)


def _outside(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """The symmetric basis is refused, and its diagonal is another one; so is alpha < 1."""
    symmetric, name = planned(instance, ALPHA, ("output", "symmetric"), key)
    axis, _ = planned(instance, 0.5, ("output", "axis"), key)
    inserted = sd.apply_plan(instance.params, symmetric.with_alpha(1.0))
    one, at = (
        curvature_of(instance.loss, tree, *instance.args)
        for tree in (inserted, sd.apply_plan(instance.params, symmetric))
    )
    # If the step by the diagonal were equivariant, phi^-1 of it would be the original's.
    back = linear_matrix(lambda tree: bounds.phi_inverse(tree, symmetric), inserted)
    floor = 1e-12 * jnp.max(jnp.abs(jnp.diagonal(one.hessian)))
    p, p_a = (c.gradient / jnp.maximum(jnp.abs(jnp.diagonal(c.hessian)), floor) for c in (one, at))
    claim = "outside its assumptions the statement is refused"

    def run(plan: Plan) -> Certificates:
        return on_network(instance.loss, instance.params, plan, *instance.args, name="", key=key)

    return [
        refuted("symmetric basis: the step by the exact diagonal is phi times the original's is false", name,
                jnp.linalg.norm(back @ p_a - p) / jnp.linalg.norm(p), 0.0, allowance=1e-2,
                word=Word.CHECKED),
        refuses(claim, "the symmetric basis", run(symmetric), DIAGONAL),
        refuses(claim, "alpha = 1/2", run(axis), "alpha >= 1"),
    ]  # fmt: skip
