"""Statement 3.3v [ours]: What sharpness can do: a ceiling for gradient descent, a floor for sign descent.

SETTING. A defence is a linear change of parameters phi with metric P = phi^-1 phi^-T: gradient descent on
the deformed network is gradient descent preconditioned by P (3.2). Its sharpness is s = sup
lambda_max(P^1/2 H P^1/2) over the sublevel set of the start. One rescaled scalar (b = a b~) has P = I +
(a^2 - 1) e e^T.

STATEMENT.
  (a) Ceiling. If P >= p I and |grad L|^2 >= 2 mu (L - L*) on the sublevel set (Polyak-Lojasiewicz),
      gradient descent at step 1/s reaches L_T - L* <= (1 - p mu / s)^T (L_0 - L*): no defence of
      sharpness s delays it beyond T = log(gap / target) / -log(1 - p mu / s) <= (s / (p mu)) log(gap /
      target).
  (b) The scalar comes within a factor four of it. On a quadratic, rescale a coordinate to curvature s and
      start in a direction of curvature mu that it does not touch: every stable step, eta < 2/s, needs T
      >= log(gap / target) / (-2 log(1 - 2 mu / s)) steps, and ceiling / that -> 4 as s / mu -> infinity.
      So, for GD and among defences that only speed directions up (p = 1), none is better than the scalar
      by more than a factor of four in the worst case over starts.
  (c) Not for every start: a defender who knows the attacker's start can do much better. H = diag(1, mu),
      start (1, 0): one speeded direction d that catches the error and turns it into the slow direction
      resists longer, at equal sharpness, than any rescaled coordinate; the ratio is unbounded as mu,
      target -> 0.
  (d) Without a normalisation sharpness says nothing: theta = b psi for ALL parameters has sharpness b^-2
      s and, at step eta / b^2, the same trajectory. "At given sharpness" must fix p (here p = 1).
  (e) Slow phase. Once the fast coordinates have settled, the rest descends on the Schur complement S =
      H_rr - H_rf H_ff^-1 H_fr, with lambda_min(S) >= lambda_min(H): letting the fast set settle never
      slows the rest in rate, and at sharpness s the slow phase takes about (s / 2) tau steps, tau the
      flow time of S. The directions matter through the floor (3.3iv) and through tau, not through s.
  (f) Sign descent (and, qualitatively, Adam) is different. Along a stiff unit direction u, u^T theta
      moves by exactly eta ||u||_1 a step, so the mean loss of two successive steps is at least s (eta
      ||u||_1)^2 / 8; to come to `target` a coordinate elsewhere that must travel D needs T >= D ||u||_1
      sqrt(s / (8 target)) steps: a slowdown of sqrt(s), not s, times ||u||_1. A rescaled coordinate has
      ||u||_1 = 1, the least possible; a direction spread over n coordinates has up to sqrt(n). So against
      sign methods a dense direction beats the scalar at equal sharpness, by up to sqrt(n), and (a) has no
      analogue.

ASSUMPTIONS. P positive definite; p mu <= s; (f): the travelling coordinate is not moved by u.

PROOF. (a) H_a <= s I along the segment gives L_(t+1) <= L_t - eta (1 - eta s / 2) |g_a|^2 = L_t - |g_a|^2
/ (2 s) at eta = 1/s (the segment stays in the sublevel set: at the first exit the inequality would be
strict). |g_a|^2 = g^T P g >= p |g|^2 >= 2 p mu (L_t - L*). And -log(1 - x) >= x. (b) The slow coordinate
is multiplied by 1 - eta mu > 1 - 2 mu / s a step, its loss by the square. The ratio is 2 log(1 - 2x) /
log(1 - x) -> 4, x = mu / s. (c) In x = H^1/2 theta a step along the fast direction v removes v v^T x;
with v = (cos f, -sin f) what is left of (1, 0) is sin f (sin f, cos f), which decays at rate sin^2 f + mu
cos^2 f < 1; a rescaled coordinate leaves the start's own rate: 1. (d) grad_psi = b grad_theta, so b psi
moves by b^2 (eta / b^2) times the gradient. (e) S^-1 is the rr block of H^-1, and a principal block has
no larger norm: lambda_min(S)^-1 <= lambda_min(H)^-1. (f) sign(s q u) = sign(q) sign(u), u^T sign(u) =
||u||_1. If q and q - d, d = eta ||u||_1, follow one another, q^2 + (q - d)^2 >= d^2 / 2. sum |u_i| >=
(sum u_i^2) = 1, <= sqrt(n) (Cauchy-Schwarz). QED.

WHAT IT SETTLES of the scalar control: for GD no defence with p = 1 beats the best scalar by more than
four in the worst case; particular starts are counterexamples to more; for sign methods a dense direction
does. SpecDef itself has p = a^-2 on U E^T with E across row(W), and speeds up every other direction of
its pair, which is why inserting the identity alone makes GD faster. Measured on networks:
benchmarks/directions.py.

SOURCE. (a) is Polyak (1963) in the metric P; the rest ours.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from specdef_jax import bounds
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
from theory.sizes import Size

DIMENSION = 5


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify (a) to (f) on quadratics and one nonconvex loss, with the counterexamples of (c) and (d)."""
    return (
        *_ceiling(key, size),
        *_scalar(),
        _trap(),
        *_normalisation(key),
        *_slow_phase(key, size),
        *_signs(key, size),
        *_outside(),
    )


def _ceiling(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(a) on random quadratics and metrics, under a falsifier, and on a loss that is PL and not convex."""
    sides = over_draws(_ceiling_sides, key, size.draws)
    found = falsify(_ceiling_slack, _ceiling_point, key, tried=size.draws, climbed=size.starts, steps=100)
    one = bounds.ceiling_steps(50.0, 1.0, 1.0, 0.1, metric=1.0)
    steps = np.log(10.0) / -np.log(1 - 1 / 50)
    return [
        inequality("L_T <= (1 - p mu / s)^T L_0 at step 1/s", "random H and P, 5 dimensions, T = 20",
                   sides["loss"], sides["bound"], allowance=sides["allowance"], scale=sides["start"],
                   search=found.search),
        inequality("steps to a tenth <= ceiling_steps", "the same", sides["steps"], sides["ceiling"] + 1,
                   allowance=1e-9, word=Word.CHECKED, note="one step for rounding up"),
        equality("ceiling_steps = log(gap / target) / -log(1 - p mu / s)", "s / mu = 50", one, steps),
        inequality("ceiling_steps <= (s / p mu) log(gap / target)", "s / mu = 50, p = 1/2",
                   bounds.ceiling_steps(50.0, 1.0, 1.0, 0.1, metric=0.5), 100 * np.log(10.0)),
        _not_convex(),
    ]  # fmt: skip


def check_ceiling(H: Array, P: Array, start: Array, steps: int = 20) -> Certificates:
    """Certify (a) on a quadratic of your own, x^T H x / 2 from `start` under the metric P.

    Args:
      H: (n, n), positive definite.
      P: (n, n), positive definite.
      start: (n,).
      steps: T.
    """
    claim = "L_T <= (1 - p mu / s)^T L_0 at step 1/s"

    def evaluate() -> Certificate:
        p, mu = float(jnp.linalg.eigvalsh(P)[0]), float(jnp.linalg.eigvalsh(H)[0])
        require(p > 0, f"P positive definite (p = {p:g})")
        require(mu > 0, f"mu > 0 (smallest eigenvalue of H {mu:g})")
        root = jnp.linalg.cholesky(P)
        s = jnp.linalg.eigvalsh(root.T @ H @ root)[-1]
        losses = _descend(H, P, start, 1 / s, steps)
        allowance = _rounding(H, P, mu, s, losses[0], steps)
        return inequality(claim, "", losses[-1], (1 - p * mu / s) ** steps * losses[0], allowance=allowance)

    return under_assumptions(claim, "", evaluate)


def _rounding(H: Array, P: Array, mu: Array | float, s: Array, start: Array, steps: int) -> Array:
    """Return by how much rounding may lift the loss after some steps.

    A step is off by 2 n u (|x| + |P| |H| |x| / s), |x|^2 <= 2 L_0 / mu, the loss then by |H| |x| times that;
    later steps contract in the norm of the loss.
    """
    n = len(H)
    size = jnp.linalg.norm(H) * (1 + jnp.linalg.norm(P) * jnp.linalg.norm(H) / s) * 2 * start / mu
    return 4 * steps * n * jnp.finfo(H.dtype).eps * size


def _not_convex() -> Certificate:
    """L = x^2 + 3 sin^2 x is PL with mu = 1/32 and not convex (Karimi, Nutini and Schmidt 2016)."""
    mu, s, steps = 1 / 32, 8.0, 400

    def step(x: Array, _: None) -> tuple[Array, Array]:
        return x - (2 * x + 3 * jnp.sin(2 * x)) / s, x**2 + 3 * jnp.sin(x) ** 2

    _, losses = jax.jit(lambda x: jax.lax.scan(step, x, None, length=steps))(jnp.asarray(4.0))
    bound = losses[0] * (1 - mu / s) ** jnp.arange(steps)
    return inequality("L_T <= (1 - mu / s)^T L_0", "x^2 + 3 sin^2 x, not convex, PL with mu = 1/32", losses,
                      bound, allowance=1e-13 * losses[0], scale=losses[0], word=Word.CHECKED)  # fmt: skip


def _ceiling_point(key: PRNGKeyArray) -> dict[str, Array]:
    """Free parameters of a quadratic, a metric and a start."""
    keys = jax.random.split(key, 3)
    n = DIMENSION
    return {
        "H": jax.random.normal(keys[0], (n, n)),
        "P": jax.random.normal(keys[1], (n, n)),
        "x": jax.random.normal(keys[2], (n,)),
    }


def _ceiling_problem(point: dict[str, Array]) -> tuple[Array, Array, Array, Array, Array]:
    """Return H, P and mu, p, s of a point: H >= mu I and P >= p I by construction."""
    eye = jnp.eye(DIMENSION)
    H = point["H"] @ point["H"].T / DIMENSION + 0.05 * eye
    P = eye + 3 * point["P"] @ point["P"].T
    root = jnp.linalg.cholesky(P)
    mu, p, s = (
        jnp.linalg.eigvalsh(H)[0],
        jnp.linalg.eigvalsh(P)[0],
        jnp.linalg.eigvalsh(root.T @ H @ root)[-1],
    )
    return H, P, mu, p, s


def _ceiling_slack(point: dict[str, Array]) -> Array:
    """Return the slack of (a) after 20 steps, relative to the loss at the start."""
    H, P, mu, p, s = _ceiling_problem(point)
    losses = _descend(H, P, point["x"], 1 / s, 20)
    return ((1 - p * mu / s) ** 20 - losses[-1] / losses[0]) + 1e-12


def _ceiling_sides(key: PRNGKeyArray) -> dict[str, Array]:
    point = _ceiling_point(key)
    H, P, mu, p, s = _ceiling_problem(point)
    losses = _descend(H, P, point["x"], 1 / s, 200)
    start = losses[0]
    reached = jnp.argmax(losses <= start / 10)
    ceiling = bounds.ceiling_steps(s, mu, start, start / 10, metric=p)
    known = losses[-1] <= start / 10
    return {
        "loss": losses[20],
        "bound": (1 - p * mu / s) ** 20 * start,
        "start": start,
        "allowance": _rounding(H, P, mu, s, start, 20),
        "steps": jnp.where(known, reached, 0),
        "ceiling": ceiling,
    }


def _descend(H: Array, P: Array, x: Array, step: Array | float, steps: int) -> Array:
    """Return the losses x^T H x / 2 of gradient descent preconditioned by P, steps + 1 of them."""

    def one(x: Array, _: None) -> tuple[Array, Array]:
        return x - step * (P @ (H @ x)), 0.5 * x @ (H @ x)

    return jax.lax.scan(one, x, None, length=steps + 1)[1]


def _scalar() -> list[Certificate]:
    """(b): every stable step beside the stiff scalar, and the factor four."""
    mu, target = 0.5, 1e-3
    found = []
    for s in (10.0, 100.0, 1000.0):
        etas = jnp.linspace(0.05, 0.9999, 400) * 2 / s
        # The slow coordinate alone: x <- (1 - eta mu) x; loss relative to the start (1 - eta mu)^(2T).
        steps = jnp.ceil(np.log(1 / target) / (-2 * jnp.log1p(-etas * mu)) - 1e-9)
        bound = bounds.stiff_scalar_steps(s, mu, 1.0, target)
        found.append(
            inequality(
                "stiff_scalar_steps <= steps at every stable step",
                f"s / mu = {s / mu:g}, 400 steps",
                bound,
                steps,
            )
        )
        found.append(
            tight(
                "the bound is attained at eta -> 2/s",
                f"s / mu = {s / mu:g}",
                bound,
                steps.min(),
                factor=1.01 + 1 / bound,
            )
        )
    ratio = [
        float(bounds.ceiling_steps(s, mu, 1.0, target) / bounds.stiff_scalar_steps(s, mu, 1.0, target))
        for s in (50.0, 5e3, 5e5)
    ]
    found.append(
        inequality("ceiling / scalar exceeds four only by O(mu / s)", "s / mu = 1e2, 1e4, 1e6", ratio,
                   [4 * (1 + 2 / kappa) for kappa in (1e2, 1e4, 1e6)], word=Word.CHECKED, allowance=1e-8)
    )  # fmt: skip
    found.append(
        tight("ceiling / scalar -> 4", "s / mu = 1e6", ratio[-1], 4.0, factor=1 + 1e-5, allowance=1e-4)
    )
    return found


def _trap() -> Certificate:
    """(c): at equal sharpness one speeded direction against both rescaled coordinates, best step of each."""
    mu, s, target, sin2 = 1e-3, 400.0, 1e-3, 1e-2
    root = jnp.diag(jnp.sqrt(jnp.array([1.0, mu])))
    v = jnp.array([jnp.sqrt(1 - sin2), -jnp.sqrt(sin2)])
    steps = [_best_steps(root, w, s, target) for w in (v, jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))]
    return refuted(
        "no single speeded direction resists longer than a rescaled coordinate is false",
        "H = diag(1, 1e-3), start (1, 0), s = 400, best of 600 steps",
        steps[0], max(steps[1:]),
        note=f"trap {steps[0]:.0f} steps, rescaled coordinates {steps[1]:.0f} and {steps[2]:.0f}",
        word=Word.CHECKED,
    )  # fmt: skip


def _best_steps(root: Array, w: Array, s: float, target: float) -> float:
    """Return the fewest steps over stable steps, w (in the coordinates of H^1/2) speeded up to sharpness s.

    In x = H^1/2 theta the iteration is x <- x - eta (H + c w w^T) x, c set so that the top eigenvalue is s.
    """
    H = root @ root
    low, high = 0.0, 2 * s
    for _ in range(100):
        middle = (low + high) / 2
        below = jnp.linalg.eigvalsh(H + middle * jnp.outer(w, w))[-1] < s
        low, high = (middle, high) if below else (low, middle)
    values, vectors = jnp.linalg.eigh(H + low * jnp.outer(w, w))
    start = vectors.T @ jnp.array([1.0, 0.0])
    etas = jnp.concatenate([jnp.linspace(0.01, 0.9999, 600)]) * 2 / s
    horizon = jnp.arange(1, 200_000, 50)
    losses = jnp.sum(((1 - etas[:, None, None] * values) ** (2 * horizon[:, None])) * start**2, axis=-1)
    reached = losses <= target
    first = jnp.where(reached.any(1), horizon[jnp.argmax(reached, axis=1)], jnp.inf)
    return float(first.min())


def _normalisation(key: PRNGKeyArray) -> list[Certificate]:
    """(d): a common rescaling changes the sharpness by b^-2 and nothing else."""
    point = _ceiling_point(key)
    H, _, _, _, _ = _ceiling_problem(point)
    b, eta, steps = 8.0, 0.1, 50
    plain = _descend(H, jnp.eye(DIMENSION), point["x"], eta, steps)
    scaled = _descend(H * b**-2, jnp.eye(DIMENSION), point["x"] * b, eta * b**2, steps)
    lambda_1, lambda_b = (jnp.linalg.eigvalsh(m)[-1] for m in (H, H / b**2))
    return [
        equality("theta = psi / b has the same losses at step b^2 eta", "a quadratic, b = 8", scaled, plain),
        equality("and b^-2 times the sharpness", "a quadratic, b = 8", lambda_b, lambda_1 / b**2),
    ]


def _slow_phase(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(e): the Schur complement, and the rate of the slow phase as a -> infinity."""
    sides = over_draws(_schur_sides, key, size.draws)
    H = _ceiling_problem(_ceiling_point(key))[0]
    fast = jnp.array([0, 2])
    S = jnp.linalg.eigvalsh(bounds.slow_curvature(H, fast))
    alphas = np.array([8.0, 16.0, 32.0, 64.0, 128.0, 256.0])
    errors = []
    for a in alphas:
        speeds = jnp.ones(DIMENSION).at[fast].set(a**2)
        values = jnp.sort(jnp.linalg.eigvals(speeds[:, None] * H).real)[: DIMENSION - 2]
        errors.append(float(jnp.abs(values - S).max()))
    block = jnp.diag(jnp.array([2.0, 3.0, 0.5, 1.0, 4.0]))
    return [
        inequality("lambda_min(H) <= lambda_min(S)", "random positive definite, 2 fast of 5", sides["full"],
                   sides["schur"], allowance=sides["allowance"], scale=sides["norm"]),
        equality("S^-1 is a block of H^-1", "against the inverse", sides["inverse"], sides["block"],
                 allowance=1e-8),
        fit("the slow eigenvalues of P H tend to those of S as alpha^-2", "random positive definite",
            exponent(alphas, errors).slope, -2.0, tolerance=0.1, count=len(alphas)),
        tight("lambda_min(H) = lambda_min(S)", "a diagonal H whose least entry is slow", 0.5,
              jnp.linalg.eigvalsh(bounds.slow_curvature(block, fast=jnp.array([0, 4])))[0], factor=1 + 1e-12),
    ]  # fmt: skip


def _schur_sides(key: PRNGKeyArray) -> dict[str, Array]:
    H = _ceiling_problem(_ceiling_point(key))[0]
    fast, rest = jnp.array([0, 3]), jnp.array([1, 2, 4])
    S = bounds.slow_curvature(H, fast)
    norm = jnp.linalg.norm(H)
    condition = norm / jnp.linalg.eigvalsh(H)[0]
    return {
        "full": jnp.linalg.eigvalsh(H)[0],
        "schur": jnp.linalg.eigvalsh(S)[0],
        "allowance": 8 * DIMENSION * jnp.finfo(H.dtype).eps * norm * condition,
        "norm": norm,
        "inverse": jnp.linalg.inv(S),
        "block": jnp.linalg.inv(H)[jnp.ix_(rest, rest)],
    }


def _signs(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(f): optax's sign descent on a stiff direction, sparse and dense."""
    n, s, eta, target, distance = 16, 100.0, 1e-2, 1e-3, 1.0
    sides = over_draws(functools.partial(_sign_sides, n, s, eta), key, size.draws)
    axis, dense = jnp.eye(n)[0], (-1.0) ** jnp.arange(n) / jnp.sqrt(n)
    measured = {name: _sign_steps(u, s, target, distance) for name, u in (("axis", axis), ("dense", dense))}
    bound = {
        name: bounds.sign_min_steps(distance, s, u, target) for name, u in (("axis", axis), ("dense", dense))
    }
    half_a_step = eta * jnp.sum(jnp.abs(dense)) / 2
    symmetric = jnp.mean(_sign_losses(dense, s, eta, half_a_step * dense)[-2:])
    sharp = np.array([10.0, 40.0, 160.0, 640.0, 2560.0, 10240.0])
    steps = [_sign_steps(dense, float(v), target, distance) for v in sharp]
    return [
        inequality("sign_noise_floor <= mean loss of two successive steps", "random unit u in 16 dimensions",
                   sides["floor"], sides["mean"], allowance=1e-12 * sides["floor"], scale=sides["floor"]),
        tight("a symmetric oscillation attains the floor", "u dense", bounds.sign_noise_floor(eta, s, dense),
              symmetric, factor=1 + 1e-9, allowance=1e-15),
        inequality("sign_min_steps <= measured steps", "axis and dense, sign descent by optax",
                   [bound["axis"], bound["dense"]], [measured["axis"], measured["dense"]], word=Word.CHECKED),
        equality("at a target that is the floor of a step, distance / step", "dense, eta = 0.01",
                 bounds.sign_min_steps(distance, s, dense, bounds.sign_noise_floor(eta, s, dense)),
                 distance / eta),
        equality("a dense direction needs sqrt(n) times the steps of a scalar", "n = 16, bound",
                 bound["dense"] / bound["axis"], 4.0),
        fit("and measured", "n = 16, sign descent by optax", measured["dense"] / measured["axis"], 4.0,
            tolerance=0.4, count=2),
        fit("steps grow as sqrt(s), not s", "dense, six sharpnesses", exponent(sharp, steps).slope, 0.5,
            tolerance=0.05, count=len(sharp)),
    ]  # fmt: skip


def _sign_sides(n: int, s: float, eta: float, key: PRNGKeyArray) -> dict[str, Array]:
    u = orthonormal(key, n, 1)[:, 0]
    losses = _sign_losses(u, s, eta, jax.random.normal(key, (n,)) * 0.1)
    return {"floor": bounds.sign_noise_floor(eta, s, u), "mean": jnp.min((losses[1:] + losses[:-1]) / 2)}


def _sign_losses(u: Array, s: float, eta: float | Array, start: Array, steps: int = 60) -> Array:
    optimizer = optax.sign_sgd(eta)

    def one(carry: tuple, _: None) -> tuple[tuple, Array]:
        theta, state = carry
        loss, grad = jax.value_and_grad(lambda t: 0.5 * s * (u @ t) ** 2)(theta)
        updates, state = optimizer.update(grad, state)
        return (optax.apply_updates(theta, updates), state), loss

    return jax.lax.scan(one, (start, optimizer.init(start)), None, length=steps)[1]


def _sign_steps(u: Array, s: float, target: float, distance: float) -> float:
    """Return the fewest steps of optax's sign descent, over 80 step sizes and 9 phases of the oscillation.

    Loss s (u^T theta)^2 / 2 + |x - distance|: a run has arrived once x is within a step of its goal and the
    mean of the stiff part over two successive steps is at most the target.
    """
    least = float(bounds.sign_min_steps(distance, s, u, target))
    etas = distance / least * jnp.geomspace(0.3, 3.0, 80)
    return float(_simulate_signs(u, s, target, distance, etas, steps=int(4 * least) + 10))


@functools.partial(jax.jit, static_argnames="steps")
def _simulate_signs(u: Array, s: float, target: float, distance: float, etas: Array, *, steps: int) -> Array:
    def first_arrival(eta: Array, phase: Array) -> Array:
        optimizer = optax.sign_sgd(eta)

        def loss(params: dict[str, Array]) -> Array:
            return 0.5 * s * (u @ params["theta"]) ** 2 + jnp.abs(params["x"] - distance)

        def one(carry: tuple, t: Array) -> tuple[tuple, None]:
            params, state, before, arrived = carry
            stiff = 0.5 * s * (u @ params["theta"]) ** 2
            near = jnp.abs(params["x"] - distance) <= eta
            done = near & ((stiff + before) / 2 <= target)
            arrived = jnp.where(done & jnp.isinf(arrived), t, arrived)
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state, stiff, arrived), None

        start = {"theta": phase * eta * jnp.sum(jnp.abs(u)) * u, "x": jnp.zeros(())}
        carry = start, optimizer.init(start), jnp.asarray(jnp.inf), jnp.asarray(jnp.inf)
        (_, _, _, arrived), _ = jax.lax.scan(one, carry, jnp.arange(steps, dtype=float))
        return arrived + 1  # x may be one step short of its goal

    phases = jnp.linspace(0.1, 0.9, 9)
    return jnp.min(jax.vmap(lambda e: jax.vmap(lambda f: first_arrival(e, f))(phases))(etas))


def _outside() -> Certificates:
    """A metric or a Hessian that is not positive has no ceiling."""
    H, x = jnp.diag(jnp.array([1.0, 0.5])), jnp.ones(2)
    claim = "outside its assumptions the statement is refused"
    return (
        refuses(claim, "P singular", check_ceiling(H, jnp.diag(jnp.array([1.0, 0.0])), x), "P positive"),
        refuses(claim, "H with a negative eigenvalue", check_ceiling(-H, jnp.eye(2), x), "mu > 0"),
    )
