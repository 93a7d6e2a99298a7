"""Statement 3.5 [ours]: Adam's displacement per step is bounded whatever the gradients are.

STATEMENT. For one coordinate let m_t = b1 m_(t-1) + (1 - b1) g_t, v_t = b2 v_(t-1) + (1 - b2) g_t^2,
m_0 = v_0 = 0, 0 <= b1 < 1, 0 < b2 < 1, r = b1^2 / b2, m_hat = m / (1 - b1^t), v_hat = v / (1 - b2^t). Then

    |m_hat_t| / sqrt(v_hat_t)  <=  c_t = (1-b1) / sqrt((1-b2)(1-r)) sqrt((1-r^t)(1-b2^t)) / (1-b1^t).

(a) The gradients g_i = (b2/b1)^i attain it at EVERY t at once. (b) If b1^2 < b2, c_1 = 1 and c_t
increases (it stays 1 if b1 = b2) to (1-b1) / sqrt((1-b2)(1-r)), 7.270 for (.9, .999). If b1^2 >= b2 the
bound holds, with sum_(j<t) r^j for (1-r^t)/(1-r), but it and the displacement it allows grow without
limit.
(c) Any weights: |sum w_i g_i| / sqrt(v_hat_t) <= sqrt(sum w_i^2 b2^-(t-i)) sqrt((1-b2^t)/(1-b2)),
attained.
(d) Nadam as in optax, m_hat = b1 m_t/(1-b1^(t+1)) + (1-b1) g_t/(1-b1^t): c_1 = (1+2 b1)/(1+b1), c_t is
not monotone, its limit L = (1-b1) sqrt(((1+b1)^2 + b1^2 r/(1-r))/(1-b2)) is 8.415, and c_t <= L/(1-b1^t).
(e) eps, eps_root >= 0 only shorten the step: u = m_hat/(sqrt(v_hat + eps_root) + eps).
(f) A coordinate moves by at most sum_t eta_t c_t, attained by Adam; so the steps to a set of solutions
number at least min ||theta* - theta_0||_inf / (eta sup c_t), theta* over the set (the NEAREST solution).
(g) AdamW: a step is at most eta (c_t + w |theta_t|). With eta w <= 1 the distance from the start is at
most d_t = (1 - eta w) d_(t-1) + eta (w |theta_0| + c_t), attained by Adam; it stays below |theta_0| + sup
c_t / w.

ASSUMPTIONS. v_t > 0; b1^2 < b2 for a bound uniform in t; no further factor in front of the update.

PROOF. m_t = (1-b1) sum b1^(t-i) g_i = (1-b1) sum [(b1/sqrt b2)^(t-i)] [b2^((t-i)/2) g_i]. By Cauchy and
Schwarz |m_t| <= (1-b1) sqrt(sum r^(t-i)) sqrt(v_t/(1-b2)), and sum r^(t-i) = (1-r^t)/(1-r). Divide by
1-b1^t and by sqrt(v_t/(1-b2^t)). Equality iff b2^((t-i)/2) g_i is proportional to (b1/sqrt b2)^(t-i),
that is g_i to (b1/b2)^(t-i), hence to (b2/b1)^i, one sequence for all t: (a). With w_i in place of (1-b1)
b1^(t-i)/(1-b1^t) the same lines are (c), with equality iff g_i is proportional to w_i b2^-(t-i).
(b) Let r = e^-x, b2 = e^-y, so b1 = e^-(x+y)/2, x, y > 0. With 1 - e^-z = 2 e^(-z/2) sinh(z/2),
(1-r^t)(1-b2^t)/(1-b1^t)^2 = sinh(xt/2) sinh(yt/2)/sinh^2((x+y)t/4) = 1 -
[sinh((x-y)t/4)/sinh((x+y)t/4)]^2, by 2 sinh A sinh B = cosh(A+B) - cosh(A-B) and cosh 2z = 1 + 2 sinh^2
z. As |x-y| < x+y and z coth z increases on z > 0, the logarithm of sinh(pt)/sinh(qt) has derivative p
coth pt - q coth qt < 0 for 0 < p < q: the bracket falls to 0 and c_t rises to its limit; p = 0 is b1 =
b2. c_1^2 = (1-b1)^2 (1-r)(1-b2) / ((1-b2)(1-r)(1-b1)^2) = 1. If r = 1 the sum is t and c_t grows as sqrt
t, if r > 1 as r^(t/2).
(d) The weights are w_i = (1-b1) b1^(t-i+1)/(1-b1^(t+1)), plus (1-b1)/(1-b1^t) for i = t. By (c) c_t^2 =
(1-b1)^2 (1-b2^t)/(1-b2) [a^2 (1-r^t)/(1-r) + 2 a d + d^2], a = b1/(1-b1^(t+1)), d = 1/(1-b1^t). The
bracket tends to b1^2/(1-r) + 2 b1 + 1 = (1+b1)^2 + b1^2 r/(1-r); and a <= b1 d, so c_t <= L d.
(f) Add the steps; equality by (a), as the sign is constant. A point of the set is reached only if each of
its coordinates is within reach. (g) theta_(t+1) - theta_0 = (1 - eta w)(theta_t - theta_0) - eta w
theta_0 - eta u: take absolute values; equality when u and theta_0 have one sign throughout. The fixed
point of d -> (1 - eta w) d + eta (w |theta_0| + c) is |theta_0| + c/w, approached from below. QED.

TIGHTNESS. (a), (c), (f), (g) are equalities on the sequences named, in optax itself.

SOURCE. Ours; that Adam's step is of order eta is in Kingma and Ba (2015), section 2.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from specdef_jax import bounds
from specdef_jax.errors import SpecError
from theory.assumptions import require
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
from theory.instances.networks import mlp_instance
from theory.sizes import Size
from theory.trajectories import plain, trajectory

Sequence = Float[Array, " t"]
RATES = ((0.9, 0.999), (0.6, 0.5))  # in the second the first moment remembers longer
STEPS = 30
FORMS: dict[bool, tuple[str, Callable[..., Array]]] = {
    False: ("Adam", bounds.adam_displacement),
    True: ("Nadam", bounds.nadam_displacement),
}
EPS = float(np.finfo(np.float64).eps)
T = np.arange(1, STEPS + 1)


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify the bound, what attains it, limits, steps, decay, eps and conventions, all against optax."""
    found: list[Certificate] = []
    for nesterov in FORMS:
        for i, (b1, b2) in enumerate(RATES):
            found += _bounded(jax.random.fold_in(key, i), size, b1, b2, nesterov)
    forms = [False] if size is Size.SMALL else FORMS
    found += [_falsified(key, size, nesterov) for nesterov in forms]
    found += _formulas(key, size)
    found += _reached()
    found += _nearest(key)
    instance = mlp_instance(key)
    found += on_network(instance.loss, instance.params, *instance.args, name=instance.name)
    found += _epsilon()
    found += _outside()
    return tuple(found)


def on_network(
    loss: Callable[..., Array],
    params: PyTree,
    *args: Any,
    name: str,
    step_size: float = 1e-2,
    steps: int = 100,
) -> Certificates:
    """Certify on anyone's network that no coordinate leaves its reach under optax.adam.

    Args:
      loss: loss(params, *args).
      params: where the run starts.
      *args: data.
      name: of the instance.
      step_size: of Adam.
      steps: how many.
    """
    path, _ = trajectory(plain(loss, params), optax.adam(step_size), *args, steps=steps)
    flat = jnp.concatenate([leaf.reshape(steps + 1, -1) for leaf in jax.tree.leaves(path)], axis=1)
    farthest = jnp.max(jnp.abs(flat - flat[0]), axis=1)[1:]
    reach = bounds.adam_reach(jnp.full(steps, step_size))
    # Each addition theta + u rounds by eps |theta|, and u by what _rounding says.
    allowance = steps * EPS * jnp.max(jnp.abs(flat)) + reach * _rounding(np.asarray(steps), *RATES[0])
    claim = "max_i |theta_t - theta_0|_i <= sum_(s <= t) eta c_s"
    return (inequality(claim, f"{name}, {steps} steps", farthest, reach, allowance=allowance),)


@functools.partial(jax.jit, static_argnames="nesterov")
def _updates(
    gradients: Sequence,
    b1: float,
    b2: float,
    nesterov: bool = False,
    eps: float = 0.0,
    eps_root: float = 0.0,
) -> Sequence:
    """Return optax's u_1, ..., u_t for one coordinate."""
    optimizer = optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov)

    def step(state: optax.OptState, gradient: Array) -> tuple[optax.OptState, Array]:
        update, state = optimizer.update(gradient, state)
        return state, update

    return jax.lax.scan(step, optimizer.init(gradients[0]), gradients)[1]


@functools.partial(jax.jit, static_argnames="nesterov")
def _attaining(b1: float, b2: float, nesterov: bool) -> tuple[Float[Array, "t t"], Sequence]:
    """Return optax's weights w of g_1, ..., g_t in m_hat_t, and u_t on g_i = w_i b2^-(t-i), for every t.

    With an eps that dwarfs v_hat, eps u_t = sum w_i g_i is linear in the gradients.
    """
    huge, small = 1e12, jnp.full(STEPS, 1e-3)
    weights = jax.jacfwd(lambda g: huge * _updates(g, b1, b2, nesterov, huge))(small)
    sequences = weights * b2 ** (T - T[:, None].astype(float))
    return weights, jnp.diagonal(jax.vmap(lambda g: _updates(g, b1, b2, nesterov))(sequences))


def _rounding(t: Any, b1: float, b2: float) -> Any:
    """Return the relative rounding of u_t and c_t.

    A moment is a sum of terms that pass through at most 3 roundings a step, of one sign in v; in m their
    errors are at most those of sum w_i |g_i|, which c_t bounds too: (3t + 3) eps, and half for the root.
    1 - b^t as optax forms it loses 3 eps / (1 - b^t), and 1 - r in c_t as much.
    """
    lost = 3 / (1 - b1**t) + 3 / (1 - b2**t) + 3 / (1 - b1**2 / b2)
    return EPS * (5 * t + 10 + lost)


def _draw(nesterov: bool, key: PRNGKeyArray, b1: float, b2: float) -> Sequence:
    """Return u on gradients that are normal, or over many decades, or alternate, or nearly attain c_t."""
    which, noise_key, sign_key = jax.random.split(key, 3)
    noise = jax.random.normal(noise_key, (STEPS,))
    signs = jax.random.rademacher(sign_key, (STEPS,), noise.dtype)
    near = (b2 / b1) ** T * (1 + 0.1 * noise)
    kinds = jnp.stack([noise, signs * jnp.exp(3 * noise), (-1.0) ** T * (1 + noise**2), near])
    return _updates(kinds[jax.random.randint(which, (), 0, len(kinds))], b1, b2, nesterov)


DRAWS = {nesterov: functools.partial(_draw, nesterov) for nesterov in FORMS}


def _bounded(key: PRNGKeyArray, size: Size, b1: float, b2: float, nesterov: bool) -> list[Certificate]:
    """Compare u_t with c_t on random sequences, and on the ones that attain it."""
    name, displacement = FORMS[nesterov]
    u = over_draws(DRAWS[nesterov], key, size.draws, b1, b2)
    c = np.asarray(displacement(T, b1, b2))
    allowance = c * _rounding(T, b1, b2)
    weights, best = _attaining(b1, b2, nesterov)
    expected = np.stack([np.pad(_weights(nesterov, b1, t), (0, STEPS - t)) for t in T])
    rates = f"b = ({b1}, {b2})"
    return [
        inequality(f"{name}: |m_hat_t| / sqrt(v_hat_t) <= c_t", f"{rates}, {size.draws:,} sequences",
                   np.abs(u), np.broadcast_to(c, u.shape), allowance=allowance, scale=c),
        tight(f"{name}: c_t is attained", f"{rates}, g_i = w_i b2^-(t-i), every t <= {STEPS}", best, c,
              factor=1 + 1e-10, allowance=allowance),
        equality(f"{name}: optax's m_hat_t is sum w_i g_i", f"{rates}, t <= {STEPS}", weights, expected),
    ]  # fmt: skip


@functools.cache
def _slack(nesterov: bool) -> Callable[[Sequence], Array]:
    """Return (c_t - |u_t|) / c_t at the last step of a sequence, its rounding allowance added."""

    def slack(gradients: Sequence) -> Array:
        t = len(gradients)
        c = FORMS[nesterov][1](t, *RATES[0])
        return 1 + _rounding(t, *RATES[0]) - jnp.abs(_updates(gradients, *RATES[0], nesterov)[-1]) / c

    return slack


def _six_normals(key: PRNGKeyArray) -> Sequence:
    return jax.random.normal(key, (6,))


def _falsified(key: PRNGKeyArray, size: Size, nesterov: bool) -> Certificate:
    """Climb on the gradients themselves: the falsifier reaches the bound and gets no further."""
    found = falsify(_slack(nesterov), _six_normals, key, tried=size.draws, climbed=size.starts)
    (name, displacement), rates = FORMS[nesterov], RATES[0]
    u, c = jnp.abs(_updates(found.point, *rates, nesterov)[-1]), displacement(6, *rates)
    return inequality(
        f"{name}: u_6 <= c_6 where a falsifier looks", f"the worst six gradients it found, b = {rates}", u, c,
        allowance=c * _rounding(6, *rates), search=found.search, note=f"it reaches {float(u / c):.6f} of c_6",
    )  # fmt: skip


def _formulas(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Compare the closed forms with sums, with one another over t, and with their limits."""
    pairs = np.asarray(
        jax.random.uniform(key, (20 if size is Size.SMALL else 100, 2), minval=0.05, maxval=0.95)
    )
    # b2 stays away from b1^2, so that 1 - r does not cancel.
    rates = [(float(b1), float(b1**2 + (1 - b1**2) * share)) for b1, share in pairs]
    t, small = np.arange(1, 401), [2, 30]
    b1, b2 = np.array(rates).T
    over_rates = {n: jax.jit(jax.vmap(f, (None, 0, 0))) for n, (_, f) in FORMS.items()}
    c = {n: np.asarray(f(t, b1, b2)) for n, f in over_rates.items()}
    rounding = np.stack([_rounding(t, *b) for b in rates])
    limit = {n: np.array([[bounds.displacement_limit(*b, nesterov=n)] for b in rates]) for n in FORMS}
    sup = np.array([[bounds.displacement_supremum(*b, nesterov=True)] for b in rates])
    name = f"{len(rates)} pairs of rates, t <= 400"
    best = jax.jit(jax.vmap(bounds.weighted_displacement))
    found = []
    for n, (form, displacement) in FORMS.items():
        sums = [[_by_sum(_weights(n, b[0], s), b[1]) for s in small] for b in rates]
        weighted = [best(np.stack([_weights(n, b, s) for b in b1]), b2) for s in small]
        late = float(displacement(100_000, *RATES[0]))
        found += [
            equality(f"{form}: the closed form of c_t is the sum", name, c[n][:, np.array(small) - 1], sums),
            equality("sqrt(sum w_i^2 b2^-(t-i)) sqrt((1-b2^t)/(1-b2)) is a maximum", name,
                     np.stack(weighted, 1), sums),
            tight(f"{form}: the limit is approached", "b = (.9, .999), t = 1e5", late,
                  bounds.displacement_limit(*RATES[0], nesterov=n), factor=1 + 1e-9, allowance=1e-12),
            equality(f"{form}: the limit is {'8.4151' if n else '7.2703'}", "b = (.9, .999)", late,
                     8.4151 if n else 7.2703, allowance=1e-5),
        ]  # fmt: skip
    highest = np.maximum(c[True][:, :1], limit[True])
    return [
        *found,
        equality("Adam: c_1 = 1", name, c[False][:, 0], 1.0),
        equality("Nadam: c_1 = (1 + 2 b1)/(1 + b1)", name, c[True][:, 0], (1 + 2 * b1) / (1 + b1)),
        inequality("Adam: c_t <= c_(t+1)", name, c[False][:, :-1], c[False][:, 1:],
                   allowance=2 * (c[False] * rounding)[:, 1:]),
        inequality("Adam: c_t <= its limit", name, c[False], limit[False], allowance=c[False] * rounding),
        inequality("Nadam: c_t <= limit / (1 - b1^t)", name, c[True], limit[True] / (1 - b1[:, None] ** t),
                   allowance=c[True] * rounding),
        inequality("Nadam: c_t <= its supremum", name, c[True], sup, allowance=c[True] * rounding),
        seen("Nadam: sup c_t = max(c_1, limit), largest relative difference", name,
             float(np.abs(sup / highest - 1).max()), bool(np.abs(sup / highest - 1).max() < 1e-9)),
        refuted("Nadam's c_t increases is false", "b = (.9, .999), t = 1, 2",
                *(bounds.nadam_displacement(np.arange(1, 3)))),
    ]  # fmt: skip


def _weights(nesterov: bool, b1: float, t: int) -> np.ndarray:
    """Return the weights of g_1, ..., g_t in m_hat_t."""
    m = (1 - b1) * b1 ** np.arange(t - 1.0, -1.0, -1.0)
    if not nesterov:
        return m / (1 - b1**t)
    return b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * np.eye(t)[-1] / (1 - b1**t)


def _by_sum(weights: np.ndarray, b2: float) -> float:
    """Return the quotient sum w_i g_i / sqrt(v_hat) at its maximiser."""
    share = b2 ** np.arange(len(weights) - 1.0, -1.0, -1.0)
    g = weights / share
    return float((weights @ g) / np.sqrt((g**2 * share).sum() / share.sum()))


def _reached() -> list[Certificate]:
    """Follow optax on the one sequence that attains every c_t, and count steps."""
    (b1, b2), steps, start, decay, eta = RATES[1], 400, -0.7, 0.3, 0.05
    pushed = -((b2 / b1) ** jnp.arange(1.0, steps + 1))  # of the sign of theta_0, so that decay helps
    schedule = optax.cosine_decay_schedule(eta, steps)
    flat, etas = jnp.full(steps, eta), jax.vmap(schedule)(jnp.arange(steps))
    reach = functools.partial(bounds.adam_reach, b1=b1, b2=b2)
    with_decay = {"weight_decay": decay, "start": start}
    runs = {
        "adam": (optax.adam(eta, b1, b2, eps=0), reach(flat)),
        "adam, cosine schedule": (optax.adam(schedule, b1, b2, eps=0), reach(etas)),
        "adamw": (optax.adamw(eta, b1, b2, eps=0, weight_decay=decay), reach(flat, **with_decay)),
    }
    claim = "|theta_t - theta_0| is the reach: sum eta_s c_s, with decay its recursion"
    moved = {name: np.asarray(_fed(optimizer, start, pushed)) for name, (optimizer, _) in runs.items()}
    found = [equality(claim, name, moved[name], runs[name][1], count=steps) for name in runs]
    far = np.linspace(0.5, 0.95, 10) * moved["adamw"][-1]
    for name, more in (("adam", {}), ("adamw", with_decay)):
        needed = bounds.adam_min_steps(far, eta, b1, b2, **more)
        taken = np.searchsorted(moved[name], far) + 1.0
        found.append(
            tight("adam_min_steps <= steps taken", f"{name}, ten distances", needed, taken, factor=1.1)
        )
    cap = abs(start) + float(bounds.displacement_limit(b1, b2)) / decay
    enough = np.isfinite(bounds.adam_min_steps(np.array([0.999, 1.001]) * cap, eta, b1, b2, **with_decay))
    return [
        *found,
        inequality("AdamW stays below |theta_0| + sup c_t / w", "adamw", moved["adamw"], cap),
        equality(
            "beyond, no number of steps is enough", ".999 and 1.001 of it", enough, [True, False], count=2
        ),
    ]


@functools.partial(jax.jit, static_argnames="optimizer")
def _fed(optimizer: optax.GradientTransformation, theta: float, gradients: Sequence) -> Sequence:
    """Return |theta_t - theta_0| of one coordinate that is fed these gradients."""

    def step(carry: tuple, gradient: Array) -> tuple[tuple, Array]:
        here, state = carry
        update, state = optimizer.update(gradient, state, here)
        here = optax.apply_updates(here, update)
        return (here, state), jnp.abs(here - theta)

    begin = jnp.asarray(theta)
    return jax.lax.scan(step, (begin, optimizer.init(begin)), gradients)[1]


def _nearest(key: PRNGKeyArray) -> list[Certificate]:
    """Solve 2 equations in 6 unknowns by Adam: the nearest solution bounds the steps, another not."""
    A, step_size, tolerance, steps = jax.random.normal(key, (2, 6)), 0.02, 1e-2, 2000
    theta = jax.random.normal(jax.random.fold_in(key, 1), (6,))
    gap = jnp.array([3.0, -2.0])
    _, losses = trajectory(plain(_residual, theta), optax.adam(step_size), A, A @ theta + gap, steps=steps)
    met = np.asarray(losses) <= tolerance**2 / 2
    # The nearest point with |A d - gap| <= tolerance by components, a superset of where the run may end:
    # minimise s over -s <= d_i <= s, by linear programming.
    rows = np.block([[A, np.zeros((2, 1))], [np.eye(6), -np.ones((6, 1))]])
    rows = np.concatenate([rows, rows * np.append(-np.ones(6), 1)])
    limits = np.concatenate([tolerance + gap, np.zeros(6), tolerance - gap, np.zeros(6)])
    nearest = scipy.optimize.linprog(np.eye(7)[-1], A_ub=rows, b_ub=limits, bounds=[(None, None)] * 7).fun
    far = jnp.abs(jnp.linalg.lstsq(A, gap)[0] + 100 * jnp.linalg.svd(A)[2][-1]).max()
    needed = bounds.adam_min_steps(np.array([nearest, far]), step_size)
    taken = float(met.argmax()) if met.any() else np.nan
    claim, instance = "theta* in steps >= ||theta* - theta_0||_inf / (eta sup c_t)", f"residual {tolerance:g}"
    return [
        inequality(f"{claim}: the nearest solution", instance, needed[0], taken),
        refuted(f"{claim}: any solution is false", instance, needed[1], taken),
    ]


def _residual(theta: Array, A: Array, y: Array) -> Array:
    return 0.5 * jnp.sum((A @ theta - y) ** 2)


def _epsilon() -> list[Certificate]:
    """Say what optax's eps and eps_root do to the sequence that attains c_t."""
    b1, b2 = RATES[0]
    g = 1e-6 * (b2 / b1) ** T
    c = np.asarray(bounds.adam_displacement(T, b1, b2))
    share = np.tril(b2 ** (T[:, None] - T.astype(float)))
    v_hat = share @ g**2 / share.sum(1)
    u = np.asarray(_updates(g, b1, b2, eps=1e-4))
    rooted = _updates(g, b1, b2, eps_root=1e-8)
    instance = "g_i = 1e-6 (b2/b1)^i, "
    return [
        equality("eps: u_t = c_t sqrt(v_hat) / (sqrt(v_hat) + eps)", instance + "eps = 1e-4", u,
                 c * np.sqrt(v_hat) / (np.sqrt(v_hat) + 1e-4), count=STEPS),
        equality("eps_root: u_t = c_t sqrt(v_hat / (v_hat + eps_root))", instance + "eps_root = 1e-8", rooted,
                 c * np.sqrt(v_hat / (v_hat + 1e-8)), count=STEPS),
        inequality("eps only shortens the step", instance + "eps = 1e-4", u, c),
    ]  # fmt: skip


def _outside() -> list[Certificate]:
    """b1^2 >= b2: refused, and rightly, as the displacement grows without limit."""
    b1, b2, steps = 0.99, 0.9, 300
    u = float(_updates((b2 / b1) ** jnp.arange(1.0, steps + 1), b1, b2)[-1])
    finite = bounds.weighted_displacement(jnp.asarray(_weights(False, b1, steps)), b2)
    instance = f"b = ({b1}, {b2}), g_i = (b2/b1)^i, t = {steps}"
    return [
        *(refuses("a limit for b1^2 >= b2 is refused", f"b = {pair}", limited(*pair), "b1^2 < b2")
          for pair in ((b1, b2), (0.5, 0.25))),
        refuted("u_t <= 1000 for b1^2 > b2 is false, as any bound is", instance, u, 1e3),
        equality("the sum of Cauchy and Schwarz holds for b1^2 > b2 too", instance, u, finite),
    ]  # fmt: skip


def limited(b1: float, b2: float) -> Certificates:
    """Certify c_t <= lim c_t for a pair of rates; it needs b1^2 < b2."""
    claim, instance = "Adam: c_t <= its limit", f"b = ({b1}, {b2})"

    def evaluate() -> Certificate:
        try:
            limit = bounds.displacement_limit(b1, b2)
        except SpecError as error:
            require(False, str(error))
        c = bounds.adam_displacement(T, b1, b2)
        return inequality(claim, instance, c, limit, allowance=c * _rounding(T, b1, b2))

    return under_assumptions(claim, instance, evaluate)
