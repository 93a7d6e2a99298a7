"""Statement 3.3vi [ours]: Below the floor: how many steps a nonlinear deformed network needs at least.

SETTING. f: the fast parameters of the deformed network, C U (3.3); s: all the others. B = a (f - f_0), so
that at s_0 the network is W + B U^T W. N = {|B| <= rho, |s - s_0| <= R}, G >= sup over N of |dL/ds|, floor =
inf over |B| <= rho of L(f, s_0), free of a.

STATEMENT. Let f and s follow gradient descent with steps <= eta, any schedule, or minibatches whose slow
gradients on N are <= G too; let T be the first step with L <= floor - gap. As long as |B| <= rho:
  (a) T >= min(gap / G, R) / (eta G).
  (b) Perceptron with tanh, cross-entropy, its LAST kernel deformed on the output side: G, free of data but
      for the largest input, in closed form (bounds.slow_constants). G(a) does not increase with a, and tends
      to a positive limit. L is convex in B at s_0, so floor is enclosed (bounds.ball_floor).
  (c) eta <= 2 c / lambda_max(H_a) at the start gives T >= min(gap / G, R) a^2 lambda_max(K_U) / (2 c G): the
      order is a^2 / c.
  (d) |B| <= rho need not be assumed. Let |g| <= e be the gradient in B at (B^, s_0), 2 |B^| <= rho, l and
      beta as in SlowConstants.
      Full batches, steps <= 2 / (a^2 beta): |B| <= rho for T with c e T + c^2 l G T^2 / (2 a^2) <= rho - 2
      |B^|, c = a^2 eta (bounds.confined_steps): order a.
      Steps <= 1 / (a^2 beta) and (e + l R) / mu <= rho - |B^|, mu > 0 the convexity in B on N across the
      shift of all logits (bounds.fast_convexity), B^ across it too: |B| <= rho until |s - s_0| > R, and (a)
      holds unconditionally: order a^2.

IT BOUNDS RUNS OF BOUNDED STEP SIZE ONLY. A step beyond 2 / lambda_max that does not diverge escapes it in
proportion: L = 1 - exp(-a^2 f^2 / 2) - G s below; so does any method that is not gradient descent.

PROOF. (a) Let T be that step. If some s_t, t <= T, is outside the ball, the first such has R < |s_t - s_0| <=
t eta G, since the gradients before it are taken in N. Otherwise (f_T, s_0) is in N, L(f_T, s_0) >= floor >=
L(f_T, s_T) + gap, and along the segment between, which is in N (a product of balls), L falls by at most
G |s_T - s_0|: gap / G <= |s_T - s_0| <= T eta G.
(b) Kernels (in, out): weight A = A_U U^T + A P, comp K = U F + P K, F = f^T, P = I - U U^T, from A_0 = M T(a)
and K_0 = T(1/a). With x, y, z the displacements of A_U, A P, P K,
    A K - M = M U B^T + dA_U F + dA_P (P + dK_P) + M P dK_P,      |F| <= (1 + rho) / a,
so |A K| <= q = |M| + rho |M U| + ((1 + rho) x / a + y + |M P| z) + y z, the bracket <= R sqrt(((1 + rho) /
a)^2 + 1 + |M P|^2), y z <= R^2 / 2. |K| <= |K_0| + |dK| <= 1 + sqrt(R^2 + rho^2 / a^2), |A P| <= |M P| + R,
|h| <= H = sqrt(width). A change of (A, P K, b, h) changes the logits by at most H |K|, H |A P|, 1, q times
it; a change of a lower kernel and its bias changes h by sqrt(1 + |h_below|^2) times the norms |W| + R of the
kernels between, as |tanh'| <= 1. J^2 is the sum of the squares (Cauchy-Schwarz), and |p - y|^2 = (1 - p_y)^2
+ (sum of the others' squares) <= 2 (1 - p_y)^2 <= 2: G = sqrt(2) J, for every example, so for every batch. a
enters by (1 + rho) / a and rho / a alone: G does not increase. B -> logits is affine, log-sum-exp convex.
(c) lambda_max(H_a) >= a^2 lambda_max(K_U) (2.2, 2.3).
(d) B moves by -c g(B, s). For convex beta-smooth functions B -> B - c g(B, s) moves no two points apart if
c <= 2 / beta (Baillon-Haddad), and B^ by c |g(B^, s)| <= c (e + l |s - s_0|), |s_j - s_0| <= j c G / a^2; the
sum over j < T of j is below T^2 / 2, and |B_0 - B^| = |B^|. g = E[z^T (p - y)] with z = h A_U / a, |z| <= H
(|M U| + R / a), |dz/ds| <= D = H / a + (|M U| + R / a) |dh/ds|; the softmax has derivative diag p - p p^T,
between 0 and 1/2: beta = |z|^2 / 2, l = sqrt(2) D + |z| J / 2. If c <= 1 / beta the map contracts by 1 - c mu
across 1 while in the ball, so |B - B^| <= max(|B^|, (e + l R) / mu) by induction. QED.

TIGHTNESS. (a) is attained: L = a^2 f^2 / 2 - G s. G is a product of norms, and loose on networks: see the
certificates.

SOURCE. Ours; Baillon and Haddad 1977.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds, trees
from specdef_jax.parametrization import Deformed, KernelAxes
from specdef_jax.tasks import digits
from specdef_jax.tasks.networks import Network, mlp
from specdef_jax.words import Word
from theory.assumptions import require
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
from theory.draws import over_draws
from theory.falsifier import falsify
from theory.fits import exponent
from theory.instances.matrices import orthonormal
from theory.instances.networks import loss_of, tokens_mlp
from theory.sizes import Size

SMALL = mlp((3, 4, 4, 3))
DIGITS = mlp((64, 16, 10))
SAMPLES, STEPS = 6, 40
ROUNDING = 1e-9  # relative; the trajectories are a few thousand float64 steps at most


class Setting(NamedTuple):
    """A plain perceptron, what is deformed, and the data."""

    params: PyTree
    U: Array
    x: Array
    y: Array


class Run(NamedTuple):
    """Gradient descent seen from its start, at steps 0, 1, ..., T."""

    losses: Array
    fast: Array  # |B|
    slow: Array  # |s - s_0|
    gradients: Array  # |dL/ds| of the full batch


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify (a) to (d) on random perceptrons, the digits and by hand, with the claims that are false."""
    return (
        *_by_hand(),
        *_random(key, size),
        *_constants(key, size),
        *_confined(key, size),
        *_orders(key),
        *_digits(key, size),
        _outside(key),
    )


def _by_hand() -> list[Certificate]:
    """(a) attained, in powers of two: nothing is rounded. And what escapes it."""
    a, G, gap, far = 8.0, 2.0, 0.5, 8.0
    eta = 0.5 / a**2

    def first(eta: float, f: float, fast: Any, gap: float) -> int:
        def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
            f, s = carry
            return (f - eta * jax.grad(fast)(f), s + eta * G), fast(f) - G * s

        start = jnp.asarray(f), jnp.zeros(())
        losses = np.asarray(jax.lax.scan(step, start, None, length=2000)[1])
        return int(np.argmax(losses <= -gap))

    bound = bounds.below_floor_steps(gap, G, eta, jnp.inf)
    steps = first(eta, 0.0, lambda f: a**2 * f**2 / 2, gap)
    faster = first(20 / a**2, 0.5 / a, lambda f: 1 - jnp.exp(-(a**2) * f**2 / 2), far)
    stable = bounds.below_floor_steps(far, G, 2 / a**2, jnp.inf)
    return [
        tight("T >= gap / (eta G^2) is attained", "L = a^2 f^2 / 2 - G s", bound, steps, factor=1.0),
        refuted("T >= gap / (eta G) is false", "the same, G = 2", gap / (eta * G), steps),
        refuted("the bound at 2 / lambda_max for every step that does not diverge is false",
                "L = 1 - exp(-a^2 f^2 / 2) - G s, step 20 / lambda_max", stable, faster, word=Word.CHECKED,
                note=f"{faster} steps"),
        inequality("it obeys the bound at its own step", "the same",
                   bounds.below_floor_steps(far, G, 20 / a**2, jnp.inf), faster, word=Word.CHECKED),
    ]  # fmt: skip


def _random(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(a) with (b)'s constants on random perceptrons, full batches and single examples at random steps."""
    found: list[Certificate] = []
    full, single = (over_draws(fn, key, size.draws // 2) for fn in (_full, _stochastic))
    for batches, sides in (("full batches", full), ("single examples, random steps", single)):
        below = float(np.mean(sides["most"] > 0))
        found += [
            inequality("floor - L_t <= eta G^2 t within N", f"perceptrons 3-4-4-3, {batches}",
                       sides["most"], 1.0, allowance=1e-7, word=Word.CHECKED,
                       note=f"{below:.0%} of the runs come below the floor within N"),
            inequality("|s_t - s_0| <= eta G t within N", "the same", sides["moved"], 1.0, allowance=1e-7,
                       word=Word.CHECKED),
        ]  # fmt: skip
    sides = full
    reached = sides["reached"] > 0
    found.append(
        inequality("below_floor_steps <= steps taken", f"of {reached.size:,} those below it within N",
                   sides["bound"][reached], sides["reached"][reached], allowance=ROUNDING, word=Word.CHECKED,
                   note=f"{reached.sum()} runs, median ratio "
                        f"{np.median(sides['reached'][reached] / sides['bound'][reached]):.0f}")
    )  # fmt: skip
    found.append(
        inequality("ball_floor encloses", "the same, lower <= upper", sides["lower"], sides["upper"],
                   allowance=1e-12, word=Word.CHECKED,
                   note=f"largest width {(sides['upper'] - sides['lower']).max():.1e}")
    )  # fmt: skip
    return found


def _full(key: PRNGKeyArray) -> dict[str, Array]:
    return _sides(key, stochastic=False)


def _stochastic(key: PRNGKeyArray) -> dict[str, Array]:
    return _sides(key, stochastic=True)


def _sides(key: PRNGKeyArray, stochastic: bool) -> dict[str, Array]:
    setting, a, rho, R = _perceptron(key)
    G = _constants_of(setting, a, rho, R).gradient
    fast_loss, smoothness = _fast_problem(SMALL, setting)
    floor = bounds.ball_floor(fast_loss, _no_step(setting), rho, smoothness=smoothness)
    step_key, run_key = jax.random.split(jax.random.fold_in(key, 7))
    eta = jax.random.uniform(step_key, minval=0.1, maxval=1.9) / (a**2 * smoothness)
    run = _follow(SMALL, setting, a, eta, STEPS, run_key if stochastic else None)
    inside = jnp.cumprod((run.fast <= rho) & (run.slow <= R)).astype(bool)
    t = jnp.arange(STEPS + 1)
    per_step = jnp.maximum(t, 1) * eta * G
    short = jnp.where(inside & (t > 0), floor.lower - run.losses, -jnp.inf)
    gap = jnp.where(short.max() > 1e-9, short.max() / 2, jnp.inf)
    reached = jnp.where(jnp.isfinite(gap), jnp.argmax(short >= gap), 0)
    radii = R * jnp.logspace(-4, 0, 33)  # the statement holds with each
    less = _constants_of(setting, a, rho, radii).gradient
    return {
        "most": (short / (per_step * G)).max(),
        "moved": jnp.where(inside, run.slow / per_step, 0.0).max(),
        "bound": bounds.below_floor_steps(gap, less, eta, radii).max(),
        "reached": reached,
        "lower": floor.lower,
        "upper": floor.upper,
    }


def _constants(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(b) and (d): no point of N has a larger slope than the constants say, and what would be too little."""
    sides = over_draws(_slopes, key, size.draws)
    found = falsify(
        _slope_slack, _slope_point, key, tried=size.draws, climbed=size.starts, steps=100, step_size=0.1
    )
    name = "perceptrons 3-4-4-3, random points of N and its boundary"
    return [
        inequality("|dL/ds| <= G on N", name, sides["gradient"], 1.0, allowance=ROUNDING, word=Word.CHECKED,
                   search=found.search, note=f"largest ratio {sides['gradient'].max():.2f}, "
                   f"after climbing {1 - found.search.worst:.2f}"),
        inequality("|d logits / ds| <= J on N", name, sides["logits"], 1.0, allowance=ROUNDING,
                   word=Word.CHECKED),
        inequality("|d (dL/dB) / ds| <= l on N", name, sides["lipschitz"], 1.0, allowance=ROUNDING,
                   word=Word.CHECKED),
        inequality("lambda_max in B <= beta on N", name, sides["smoothness"], 1.0, allowance=ROUNDING,
                   word=Word.CHECKED),
        inequality("mu <= the least curvature in B across the shift, on N", name, sides["convexity"],
                   sides["least"], allowance=1e-12, word=Word.CHECKED),
        refuted("G without the terms in R and rho is false", name, sides["far"], 1.0,
                word=Word.CHECKED),
    ]  # fmt: skip


def _slopes(key: PRNGKeyArray) -> dict[str, Array]:
    """Slopes at a random point of N over their bounds."""
    setting, a, rho, R = _perceptron(key)
    point_key, share_key = jax.random.split(jax.random.fold_in(key, 11))
    start = _deformed(setting, a)
    direction = trees.normal_like(point_key, start)
    shares = jnp.minimum(1.0, 2 * jax.random.uniform(share_key, (2,)))  # half of them on the boundary
    tree = _into(start, direction, setting.U, shares[0] * rho / a, shares[1] * R)
    far = _into(start, direction, setting.U, 10 * rho / a, 10 * R)
    constants, narrow = _constants_of(setting, a, rho, R), _constants_of(setting, a, 0.0, 0.0)
    value = functools.partial(_loss, SMALL, setting)

    def out(tree: PyTree) -> Array:
        return SMALL.apply(sd.merge(tree), setting.x[:1])[0]

    def in_B(tree: PyTree) -> Array:
        return (setting.U.T @ jax.grad(value)(tree)[_layer(SMALL)]["w"].comp / a).ravel()

    def along(B: Array) -> Array:
        layer = tree[_layer(SMALL)]
        moved = Deformed(layer["w"].weight, layer["w"].comp + setting.U @ B / a, "output", layer["w"].axes)
        return value({**tree, _layer(SMALL): {**layer, "w": moved}})

    shape = setting.U.shape[::-1]
    H = jax.hessian(along)(jnp.zeros(shape)).reshape(shape[0] * shape[1], -1)
    m = shape[1]
    across = jnp.linalg.svd(jnp.ones((1, m)))[2][1:].T
    across = jnp.kron(jnp.eye(shape[0]), across)
    z, logits = _features(SMALL, setting)
    return {
        "gradient": _slow_norm(jax.grad(value)(tree), setting.U) / constants.gradient,
        "far": _slow_norm(jax.grad(value)(far), setting.U) / narrow.gradient,
        "logits": _slow_slope(out, tree, setting.U) / constants.logits,
        "lipschitz": _slow_slope(in_B, tree, setting.U) / constants.lipschitz,
        "smoothness": jnp.linalg.eigvalsh(H)[-1] / constants.smoothness,
        "convexity": bounds.fast_convexity(z, logits, constants, fast_radius=rho, radius=R),
        "least": jnp.linalg.eigvalsh(across.T @ H @ across)[0],
    }


def _slow_slope(fn: Any, tree: PyTree, U: Array) -> Array:
    """Return the spectral norm of the derivative of fn in the slow parameters."""
    jacobian = jax.jacrev(fn)(tree)
    flat = jax.vmap(lambda row: jnp.concatenate([x.ravel() for x in jax.tree.leaves(_slow_part(row, U))]))
    return jnp.linalg.norm(flat(jacobian), 2)


def _slope_point(key: PRNGKeyArray) -> dict[str, Any]:
    setting, a, rho, R = _perceptron(key)
    tree = _deformed(setting, a)
    return {
        "params": setting.params,
        "U": setting.U,
        "x": setting.x,
        "radii": jnp.log(jnp.stack([a, rho, R])),
        "direction": trees.normal_like(key, tree),
    }


def _slope_slack(point: dict[str, Any]) -> Array:
    a, rho, R = jnp.exp(jnp.clip(point["radii"], -5.0, 6.0))
    a = jnp.maximum(a, 1.0)
    U = jnp.linalg.qr(point["U"])[0]
    setting = Setting(point["params"], U, point["x"], jnp.arange(SAMPLES) % 3)
    tree = _into(_deformed(setting, a), point["direction"], U, rho / a, R)
    gradient = jax.grad(functools.partial(_loss, SMALL, setting))(tree)
    return 1 - _slow_norm(gradient, U) / _constants_of(setting, a, rho, R).gradient + ROUNDING


def _confined(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(d): the fast parameters stay as long as promised, without convexity and with it."""
    weak = over_draws(_stays, key, size.draws // 4)
    strong = over_draws(_stays_for_good, key, size.draws // 4)
    known = strong["known"]
    return [
        inequality("|B| <= rho for confined_steps", f"perceptrons 3-4-4-3, blind, up to {STEPS} steps",
                   weak["far"], weak["rho"], allowance=ROUNDING, word=Word.CHECKED,
                   note=f"promised {np.median(weak['promised']):.0f} steps (median)"),
        inequality("|B| <= rho until |s - s_0| > R, if (e + l R) / mu <= rho - |B^|",
                   f"the same, {known.sum():,} of {known.size:,} whose R is so", strong["far"][known],
                   strong["rho"][known], allowance=ROUNDING, word=Word.CHECKED,
                   note=f"median R {np.median(strong['R'][known]):.0e}"),
    ]  # fmt: skip


def _stays(key: PRNGKeyArray) -> dict[str, Array]:
    """Along a blind direction, at alphas so large that the promise is of some steps."""
    setting, a, rho, R = _perceptron(key)
    setting, a = _blind(SMALL, setting), 1e3 * a
    constants = _constants_of(setting, a, rho, R)
    centre, noise = _centre(setting, rho / 3)
    c = 2 / constants.smoothness
    drift = constants.lipschitz * c * constants.gradient / a**2
    promised = bounds.confined_steps(rho - 2 * jnp.linalg.norm(centre), c, drift, noise)
    promised = jnp.minimum(promised, R / (c / a**2 * constants.gradient))
    run = _follow(SMALL, setting, a, c / a**2, STEPS)
    far = jnp.where(jnp.arange(STEPS + 1) <= promised, run.fast, 0.0).max()
    return {"far": far, "rho": rho, "promised": promised}


def _stays_for_good(key: PRNGKeyArray) -> dict[str, Array]:
    """The largest R of a grid for which the condition is met, along a blind direction."""
    setting, a, rho, R = _perceptron(key)
    setting = _blind(SMALL, setting)
    centre, noise = _centre(setting, rho / 3)
    met, radii = jax.vmap(functools.partial(_condition, setting, a, rho, centre, noise))(
        R * jnp.logspace(-10, 0, 21)
    )
    R = jnp.where(met, radii, 0.0).max()
    constants = _constants_of(setting, a, rho, R)
    run = _follow(SMALL, setting, a, 1 / (a**2 * constants.smoothness), STEPS)
    inside = jnp.concatenate([jnp.ones(1, bool), jnp.cumprod(run.slow <= R).astype(bool)[:-1]])
    return {"far": jnp.where(inside, run.fast, 0.0).max(), "rho": rho, "R": R, "known": met.any()}


def _condition(
    setting: Setting, a: Array, rho: Array, centre: Array, noise: Array, R: Array
) -> tuple[Array, Array]:
    constants = _constants_of(setting, a, rho, R)
    z, logits = _features(SMALL, setting)
    mu = bounds.fast_convexity(z, logits, constants, fast_radius=rho, radius=R)
    return noise + constants.lipschitz * R <= mu * (rho - jnp.linalg.norm(centre)), R


def _centre(setting: Setting, radius: Array) -> tuple[Array, Array]:
    """Return B^ and the norm of the gradient there."""
    fast_loss, smoothness = _fast_problem(SMALL, setting)
    point = bounds.ball_floor(fast_loss, _no_step(setting), radius, smoothness=smoothness).point
    return point, jnp.linalg.norm(jax.grad(fast_loss)(point))


def _orders(key: PRNGKeyArray) -> list[Certificate]:
    """G does not grow with alpha; the bound grows as alpha^2 / c, what (d) promises alone as alpha."""
    setting, _, _, _ = _perceptron(key)
    rho, R, gap, c = 1.0, 0.1, 0.05, 0.5
    alphas = jnp.logspace(1, 6, 6)
    constants = _constants_of(setting, alphas, rho, R)
    G = np.asarray(constants.gradient)
    conditional = bounds.below_floor_steps(gap, constants.gradient, 2 * c / alphas**2, R)
    alone = bounds.confined_steps(0.5, c, constants.lipschitz * c * constants.gradient / alphas**2)
    limit = float(_constants_of(setting, np.inf, rho, R).gradient)
    return [
        inequality("G(a) does not increase", "a perceptron, alpha = 10, ..., 1e6", G[1:], G[:-1],
                   word=Word.CHECKED),
        inequality("G(a) <= 1.01 G(inf) from alpha = 100 on", "the same", G[1:], 1.01 * limit,
                   word=Word.CHECKED, note=f"limit {limit:.2f}"),
        fit("T >= ... grows as alpha^2", "the same", exponent(alphas[1:], conditional[1:]).slope, 2.0,
            tolerance=0.01, count=5),
        fit("confined_steps grows as alpha", "the same", exponent(alphas[1:], alone[1:]).slope, 1.0,
            tolerance=0.02, count=5),
    ]  # fmt: skip


def _digits(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """A perceptron on handwritten digits, alpha 1e2, 1e3, 1e4: bound against steps taken."""
    data = digits.load()
    params, x, y = DIGITS.init(key), data.x[:100], data.y[:100]
    setting = _blind(DIGITS, Setting(params, jnp.eye(10), x, y))
    cap = {"small": 1000, "default": 4000, "full": 40_000}[size]
    found: list[Certificate] = []
    for a in (1e2, 1e3, 1e4):
        found += check_below_floor(DIGITS, *setting, alpha=a, gap=0.05, fast_radius=4.0, cap=cap,
                                   name=f"digits, 64-16-10, blind direction, alpha = {a:g}")  # fmt: skip
    G = _constants_of(setting, jnp.array([1e2, 1e3, 1e4]), 4.0, 1e-3).gradient
    found.append(equality("G is the same at alpha = 1e2, 1e3, 1e4", "digits", G, jnp.full(3, G[-1]),
                          allowance=1e-2, note=f"G = {float(G[-1]):.1f}"))  # fmt: skip
    return found


def check_below_floor(
    network: Network,
    params: PyTree,
    U: Array,
    x: Array,
    y: Array,
    *,
    alpha: float,
    gap: float,
    fast_radius: float,
    cap: int = 4000,
    name: str = "",
) -> Certificates:
    """Certify (a) on a tanh perceptron of your own, at a quarter, a half and the whole of 2 / lambda_max.

    Args:
      network: from specdef_jax.tasks.networks.mlp, activation tanh.
      params: plain.
      U: (m, k), orthonormal directions of the logits.
      x: (N, features).
      y: (N,), labels.
      alpha: >= 1.
      gap: how far below the floor.
      fast_radius: rho; the run is checked to stay in it.
      cap: at most this many steps are run.
      name: of the instance.
    """
    claim = "below_floor_steps <= steps taken"
    setting = Setting(params, U, x, y)

    def evaluate() -> list[Certificate]:
        require(network.name == "MLP (tanh)", f"a tanh perceptron whose last kernel is deformed "
                f"({network.name})")  # fmt: skip
        require(alpha >= 1, f"alpha >= 1 (alpha = {alpha:g})")
        fast_loss, smoothness = _fast_problem(network, setting)
        floor = jax.jit(
            lambda: bounds.ball_floor(
                fast_loss, _no_step(setting), fast_radius, smoothness=smoothness, steps=2000
            )
        )()
        tree = _deformed(setting, alpha)
        operator = sd.curvature.hessian(functools.partial(_loss, network, setting), tree)
        top = float(sd.curvature.eigsh(operator, 1, key=jax.random.key(0)).values[0])
        radii = jnp.logspace(-6, 1, 141)
        step = 2 / top
        G = _constants_of(setting, alpha, fast_radius, radii).gradient
        within = bounds.below_floor_steps(gap, G, step, radii)
        best = int(within.argmax())
        bound = float(within[best])
        runs = jax.jit(jax.vmap(lambda share: _follow(network, setting, alpha, share * step, cap)))(
            jnp.array([0.25, 0.5, 1.0])
        )
        inside = np.maximum.accumulate(np.asarray(runs.fast), axis=1) <= fast_radius
        losses = np.where(inside, np.asarray(runs.losses), np.inf)
        below = losses <= float(floor.lower) - gap
        told = f"bound {bound:.3g}, L_0 = {losses[0, 0]:.4f}, floor {float(floor.lower):.4f} to "
        told += (
            f"{float(floor.upper):.4f}, |B^| = {float(jnp.linalg.norm(floor.point)):.2f}, step {step:.1e}, "
        )
        told += f"within N for {', '.join(map(str, inside.sum(axis=1) - 1))} of {cap} steps"
        if not below.any():
            return [
                inequality("L > floor - gap within N, as long as the bound says", name,
                           float(floor.lower) - gap, losses[:, : int(min(cap, bound)) + 1].min(),
                           word=Word.CHECKED, note=f"{told}; not reached")
            ]  # fmt: skip
        fewest = int(below.argmax(axis=1)[below.any(axis=1)].min())
        share = float((G[best] / runs.gradients[0, 0]) ** 2)
        return [
            inequality(claim, name, bound, fewest, word=Word.CHECKED,
                       note=f"{told}; taken {fewest}, {fewest / bound:.0f} times the bound; "
                            f"(G / |dL/ds| at the start)^2 = {share:.0f}")
        ]  # fmt: skip

    return under_assumptions(claim, name, evaluate)


def _outside(key: PRNGKeyArray) -> Certificate:
    """A network that is no tanh perceptron is refused."""
    network = tokens_mlp(3, 3, 4, 3)
    setting, _, _, _ = _perceptron(key)
    return refuses(
        "outside its assumptions the statement is refused", "a shared perceptron",
        check_below_floor(network, *setting, alpha=10.0, gap=0.1, fast_radius=1.0), "tanh perceptron",
    )  # fmt: skip


def _perceptron(key: PRNGKeyArray) -> tuple[Setting, Array, Array, Array]:
    """Draw a perceptron, k = 1 direction, data, alpha, rho and R over decades."""
    keys = jax.random.split(key, 7)
    params = SMALL.init(keys[0])
    scale = jnp.exp(jax.random.uniform(keys[1], minval=-1.0, maxval=1.0))
    params = jax.tree.map(lambda x: scale * x, trees.axpy(0.3, trees.normal_like(keys[2], params), params))
    x = jax.random.normal(keys[3], (SAMPLES, 3))
    y = jax.random.randint(keys[4], (SAMPLES,), 0, 3)
    U = orthonormal(keys[5], 3, 1)
    a, rho, R = jnp.exp(
        jax.random.uniform(
            keys[6], (3,), minval=jnp.array([0.7, -1.0, -3.0]), maxval=jnp.array([6.0, 1.5, 1.0])
        )
    )
    return Setting(params, U, x, y), a, rho, R


def _blind(network: Network, setting: Setting) -> Setting:
    """Return the setting with a direction that E[(p - y) z^T] does not see: B^ = 0, floor = L_0 (3.3iv).

    There is one, as 1^T (p - y) = 0.
    """
    classes = len(setting.params[_last(setting)]["b"])
    z, logits = _features(network, setting._replace(U=jnp.eye(classes)))
    residuals = jax.nn.softmax(logits) - jax.nn.one_hot(setting.y, classes)
    return setting._replace(U=jnp.linalg.svd(residuals.T @ z)[2][-1:].T)


def _layer(network: Network) -> str:
    return network.kernels[-1].split("/")[0]


def _last(setting: Setting) -> str:
    return f"layer_{len(setting.params) - 1}"


def _deformed(setting: Setting, a: Array | float) -> PyTree:
    """Return the tree with its last kernel as the pair M T(a), T(1/a)."""
    last = _last(setting)
    M, UUt = setting.params[last]["w"], setting.U @ setting.U.T
    eye = jnp.eye(len(UUt))
    pair = Deformed(M + (a - 1) * (M @ UUt), eye + (1 / a - 1) * UUt, "output", KernelAxes((0,), (1,)))
    return {**setting.params, last: {**setting.params[last], "w": pair}}


def _loss(network: Network, setting: Setting, tree: PyTree, rows: Array | None = None) -> Array:
    x, y = (setting.x, setting.y) if rows is None else (setting.x[rows], setting.y[rows])
    return loss_of(network, "cross-entropy")(sd.merge(tree), x, y)


def _slow_part(tree: PyTree, U: Array) -> PyTree:
    """Return a tangent without its part along the fast parameters U^T comp."""

    def strip(leaf: Any) -> Any:
        if not isinstance(leaf, Deformed):
            return leaf
        return Deformed(leaf.weight, leaf.comp - U @ (U.T @ leaf.comp), leaf.side, leaf.axes)

    return jax.tree.map(strip, tree, is_leaf=lambda leaf: isinstance(leaf, Deformed))


def _slow_norm(tree: PyTree, U: Array) -> Array:
    return trees.norm(_slow_part(tree, U))


def _into(tree: PyTree, direction: PyTree, U: Array, fast: Array, slow: Array) -> PyTree:
    """Return tree moved along `direction`, by `fast` in f and by `slow` in s."""
    slow_part = _slow_part(direction, U)
    fast_part = trees.axpy(-1.0, slow_part, direction)
    moved = trees.axpy(slow / trees.norm(slow_part), slow_part, tree)
    return trees.axpy(fast / trees.norm(fast_part), fast_part, moved)


def _constants_of(
    setting: Setting, a: Array | float, rho: Array | float, R: Array | float
) -> bounds.SlowConstants:
    kernels = [setting.params[f"layer_{i}"]["w"] for i in range(len(setting.params))]
    inputs = jnp.linalg.norm(setting.x, axis=1).max()
    return bounds.slow_constants(kernels, setting.U, inputs, alpha=a, fast_radius=rho, radius=R)


def _features(network: Network, setting: Setting) -> tuple[Array, Array]:
    """Return z = h M U and the logits, at the start."""
    last = _last(setting)
    M, b = setting.params[last]["w"], setting.params[last]["b"]
    into_last = {**setting.params, last: {"w": jnp.eye(len(M)), "b": jnp.zeros(len(M))}}
    h = network.apply(into_last, setting.x)
    return h @ M @ setting.U, h @ M + b


def _fast_problem(network: Network, setting: Setting) -> tuple[Any, Array]:
    """Return L(M + M U B^T) as a function of B^T (k, m), and the smoothness of it."""
    z, logits = _features(network, setting)

    def loss(B: Array) -> Array:
        out = logits + z @ B
        return jnp.mean(jax.nn.logsumexp(out, axis=1) - jnp.take_along_axis(out, setting.y[:, None], 1)[:, 0])

    return loss, jnp.linalg.eigvalsh(z.T @ z / len(z))[-1] / 2


def _no_step(setting: Setting) -> Array:
    return jnp.zeros(setting.U.shape[::-1])


def _follow(
    network: Network,
    setting: Setting,
    a: Array | float,
    eta: Array | float,
    steps: int,
    key: PRNGKeyArray | None = None,
) -> Run:
    """Descend on the deformed network; with a key on single examples, at random steps up to eta."""
    start = _deformed(setting, a)
    value = functools.partial(_loss, network, setting)

    def step(tree: PyTree, i: Array) -> tuple[PyTree, Run]:
        loss, gradient = jax.value_and_grad(value)(tree)
        away = trees.axpy(-1.0, start, tree)
        slow = _slow_norm(away, setting.U)
        fast = a * jnp.linalg.norm(setting.U.T @ away[_last(setting)]["w"].comp)
        seen_here = Run(loss, fast, slow, _slow_norm(gradient, setting.U))
        size = eta
        if key is not None:
            row_key, size_key = jax.random.split(jax.random.fold_in(key, i))
            gradient = jax.grad(value)(tree, jax.random.randint(row_key, (1,), 0, len(setting.y)))
            size = eta * jax.random.uniform(size_key)
        return trees.axpy(-size, gradient, tree), seen_here

    return jax.lax.scan(step, start, jnp.arange(steps + 1))[1]
