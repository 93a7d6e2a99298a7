"""Statement 3.6 [standard]: Complexity of a class of functions, and what a deformation does to the class.

THIS IS A STATEMENT ABOUT A CLASS, not about one network: how long the slowest member may take. eps is a
gradient norm in the coordinates in which the Lipschitz constants are measured.

STATEMENT. F(D, L1), F(D, L2): f(x_0) - inf f <= D, gradient L1-, Hessian L2-Lipschitz, any dimension.
  (a) Gradient descent at step 1/L1 meets |grad f| <= eps within 2 D L1 eps^-2 steps, on all of F(D, L1).
  (b) Cubic-regularized Newton (L2 |s|^3 / 6, model minimized globally) meets it within 12 D sqrt(L2)
      eps^-3/2 steps, on all of F(D, L2).
  (c) No method does essentially better: for every zero-respecting method of first order (of second: values,
      gradients and Hessians) a chain in F(D, L1) (in F(D, L2)) keeps |grad f| > eps for T = floor(D L1 / (12
      152 eps^2)) (floor(D sqrt(L2) / (12 sqrt(2100) eps^3/2))) queries. It has T dimensions.
  (d) Deforming, f_a = f o phi^-1, maps F(D, L1, L2) into F(D, a^2 L1, a^3 L2), and no smaller constants
      hold for all f. At the SAME eps in deformed coordinates (a), (c) grow by a^2 and (b), (c) by a^1.5;
      the lower bounds hold for deformed functions if the m k fast coordinates are at least T.
  (e) |grad f_a| = |phi^-T grad f| lies between |grad f| / a and a |grad f|: a deformed gradient of eps / a
      is what guarantees |grad f| <= eps, so for a target in ORIGINAL coordinates the upper bounds (a), (b)
      grow by a^4 and a^3. A single network may have none of these slowdowns: undamped Newton has none (4.1).

ASSUMPTIONS. (c): zero-respecting: a query has no coordinate on which all gradients (Hessian rows) seen
before vanish. Every deterministic method after a rotation of the chain (Carmon et al., proposition 1).
alpha >= 1.

PROOF. (a) f(x - g / L1) <= f(x) - |g|^2 / (2 L1). Sum. (b) The minimizer s, r = |s|, of g^T s + s^T H s / 2
+ L2 r^3 / 6 has g + H s + L2 r s / 2 = 0 and H + L2 r I / 2 >= 0, so its value is -(s^T H s + L2 r^3 / 2) /
2 - L2 r^3 / 12 <= -L2 r^3 / 12, and f falls by that much, the model being above f. |grad f(x + s)| <= |g +
H s| + L2 r^2 / 2 = L2 r^2: while it exceeds eps, r^3 > (eps / L2)^3/2 and f falls by more than eps^3/2 /
(12 sqrt(L2)). (c) f = chain (theory.zero_chain). (i) If x_i = x_(i+1) = ... = 0, grad f has no coordinate
beyond i, and the Hessian's rows beyond vanish, as Psi vanishes around 0: a query reveals one coordinate.
(ii) If |x_T| < 1, let j be the first with |x_j| < 1 (x_0 = 1). All terms of d_j f have one sign, one of
them is Psi(|x_(j-1)|) Phi'(x_j) >= Psi(1) sqrt(e) exp(-x_j^2 / 2) > 1. So |grad f| > 1 until x_T is found.
(iii) f(0) <= 0, f >= -T e sqrt(2 pi e) > -12 T. (iv) Psi(x) Psi(-x) = 0, so D^2 f[v, v] = sum over i of
three terms, at most |Psi''| |Phi| v_(i-1)^2 + 2 |Psi'| |Phi'| |v_(i-1) v_i| + |Psi| |Phi''| v_i^2: L1 <=
sup|Psi''| sup|Phi| + 2 sup|Psi'| sup|Phi'| + sup|Psi| sup|Phi''| <= 152, and so for the third derivative
with 1, 3, 3, 1: L2 <= 2100. With sigma = 152 eps / L1 (sqrt(2100 eps / L2)) the function eps sigma f(x /
sigma) has the constants, gradients above eps, and f(0) - inf <= 12 T eps sigma <= D. (d) H_a = phi^-T H
phi^-1, ||phi^-1|| = a; third derivatives by 4.2. An f of the fast coordinates alone is scaled by a: f_a(x)
= f(a x) attains both, and is any function of F(D, a^2 L1, a^3 L2) if f is any of F(D, L1, L2). (e) The
singular values of phi. QED.

TIGHTNESS. (a): a Huber function of slope eps takes D L1 / eps^2 steps, half the bound. (b): a linear slope
takes D sqrt(L2) eps^-3/2 / sqrt(2), 1/17 of it. (c) is smaller than (a), (b) by constants, 3648 and 6600.

SOURCE. Carmon, Duchi, Hinder and Sidford, Lower bounds for finding stationary points I (2020); (b) Nesterov
and Polyak (2006); the constant 2100, (d) and (e) ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from specdef_jax import bounds, optim
from specdef_jax.bounds import complexity
from specdef_jax.words import Word
from theory.assumptions import require, require_alpha
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
from theory.diagonal_phi import stiff
from theory.draws import over_draws
from theory.falsifier import falsify
from theory.fits import exponent
from theory.sizes import Size
from theory.zero_chain import big_phi, chain, extremes, psi, scaled

LENGTH = 8  # of the chains: coordinates, and queries that no method may do without
ALPHAS = 2.0 ** np.arange(0, 9)
EPS = float(np.finfo(float).eps)
RESPECTING = "the method is zero-respecting"
Optimizer = optax.GradientTransformation
METHODS: dict[str, Callable[[], Any]] = {
    "GD": lambda: optax.sgd(0.5),
    "heavy ball": lambda: optax.sgd(0.5, momentum=0.9),
    "Nesterov": lambda: optax.sgd(0.5, momentum=0.9, nesterov=True),
    "Adam": lambda: optax.adam(0.5),
    "newton_cg": lambda: optim.newton_cg(),
    "cubic_newton": lambda: optim.cubic_newton(0.1, adapt=False, krylov=LENGTH),
}


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify (a) to (e): upper bounds on random functions, the chain, and the powers of alpha."""
    return (
        *_upper(key, size),
        *_chain(key, size),
        *_lower(),
        *_deformed(key, size),
        *_slowdowns(),
        *_outside(),
    )


def _waves(point: dict[str, Array], x: Array) -> Array:
    """Return sum c_j cos(w_j^T x + b_j): smooth, not convex, with known constants."""
    return jnp.sum(point["c"] * jnp.cos(point["w"] @ x + point["b"]))


def _constants(point: dict[str, Array]) -> tuple[Array, Array, Array]:
    """Return a bound on f(0) - inf f, L1 and L2 of _waves."""
    sizes, c = jnp.linalg.norm(point["w"], axis=1), jnp.abs(point["c"])
    gap = _waves(point, jnp.zeros(point["w"].shape[1])) + jnp.sum(c)
    return gap, jnp.sum(c * sizes**2), jnp.sum(c * sizes**3)


def _wave(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 3)
    return {
        "c": jax.random.normal(keys[0], (4,)),
        "w": jax.random.normal(keys[1], (4, 3)),
        "b": 2 * jnp.pi * jax.random.uniform(keys[2], (4,)),
    }


def _descend(point: dict[str, Array], step: Callable[[Array, Array], Array], steps: int) -> Array:
    """Return the gradient norms at 0 and after each step; step maps (x, g) to the next x."""
    gradient = jax.grad(partial(_waves, point))

    def one(x: Array, _: None) -> tuple[Array, Array]:
        g = gradient(x)
        return step(x, g), jnp.linalg.norm(g)

    return jax.lax.scan(one, jnp.zeros(3), None, length=steps)[1]


def cubic_minimizer(H: Array, g: Array, L2: Array) -> Array:
    """Return the global minimizer of g^T s + s^T H s / 2 + L2 |s|^3 / 6, by bisection for |s|."""
    values, vectors = jnp.linalg.eigh(H)
    along = vectors.T @ g
    low = jnp.maximum(-2 * values[0] / L2, 0) * (1 + 1e-12) + 1e-12
    high = low + 1 + 4 * jnp.sqrt(jnp.linalg.norm(g) / L2) + 4 * jnp.max(jnp.abs(values)) / L2

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        longer = jnp.linalg.norm(along / (values + L2 * middle / 2)) > middle
        return jnp.where(longer, middle, ends[0]), jnp.where(longer, ends[1], middle)

    r = jax.lax.fori_loop(0, 60, halve, (low, high))[1]
    return -vectors @ (along / (values + L2 * r / 2))


def _upper_draw(key: PRNGKeyArray) -> dict[str, Array]:
    """Return the least gradient norms of both methods over some steps, and what (a), (b) promise."""
    point, steps = _wave(key), 20
    gap, L1, L2 = _constants(point)
    first = jnp.min(_descend(point, lambda x, g: x - g / L1, steps))
    hessian = jax.hessian(partial(_waves, point))
    # The first gradient is that before any step, of which (b) does not speak.
    second = jnp.min(_descend(point, lambda x, g: x + cubic_minimizer(hessian(x), g, L2), steps + 1)[1:])
    return {
        "first": first, "first_bound": jnp.sqrt(2 * gap * L1 / steps),
        "first_steps": bounds.first_order_upper(gap, L1, first),
        "second": second, "second_bound": (12 * gap * jnp.sqrt(L2) / steps) ** (2 / 3),
        "second_steps": bounds.second_order_upper(gap, L2, second), "steps": jnp.asarray(float(steps)),
    }  # fmt: skip


def _upper_slack(point: dict[str, Array]) -> Array:
    """Return the slack of (a) after eight steps, relative."""
    gap, L1, _ = _constants(point)
    least = jnp.min(_descend(point, lambda x, g: x - g / L1, 8))
    return 1 - least**2 * 8 / (2 * gap * L1 + 1e-300) + 1e-9


def _upper(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(a) and (b) on random functions, under a falsifier, and where they are met."""
    sides = over_draws(_upper_draw, key, size.draws)
    search = falsify(_upper_slack, _wave, key, tried=size.draws, climbed=size.starts, steps=50).search
    name = "sums of four cosines in three dimensions, 20 steps"
    eps, L, gap = 0.1, 4.0, 30.0
    slope = {"eps": eps, "L": L}
    huber = float(_huber_steps(jnp.asarray(eps), jnp.asarray(L), jnp.asarray(gap)))
    # On a linear slope cubic Newton moves by sqrt(2 eps / L2) a step, and f falls by eps times that.
    linear = gap / (slope["eps"] * np.sqrt(2 * slope["eps"] / slope["L"]))
    return [
        inequality("GD: min |grad f| <= sqrt(2 D L1 / T)", name, sides["first"], sides["first_bound"],
                   allowance=1e-12 * sides["first_bound"], scale=sides["first_bound"], search=search),
        inequality("T <= bounds.first_order_upper at the gradient reached", name, sides["steps"],
                   sides["first_steps"] * (1 + 1e-9)),
        inequality("cubic Newton: min |grad f| <= (12 D sqrt(L2) / T)^2/3", name, sides["second"],
                   sides["second_bound"], allowance=1e-9 * sides["second_bound"],
                   scale=sides["second_bound"]),
        inequality("T <= bounds.second_order_upper at the gradient reached", name, sides["steps"],
                   sides["second_steps"] * (1 + 1e-9)),
        tight("GD: steps <= 2 D L1 / eps^2", "Huber function of slope just above eps", huber,
              bounds.first_order_upper(gap, L, eps), factor=2.05),
        tight("cubic Newton: steps <= 12 D sqrt(L2) eps^-3/2", "linear slope eps, f falls by D", linear,
              bounds.second_order_upper(gap, L, eps), factor=12 * np.sqrt(2) * (1 + 1e-9)),
    ]  # fmt: skip


@jax.jit
def _huber_steps(eps: Array, L: Array, gap: Array) -> Array:
    """Return GD's steps at 1/L on eps |x| - eps^2 / 2L, quadratic within eps / L, to |grad| < eps."""
    start = gap / eps + eps / (2 * L)

    def unfinished(carry: tuple[Array, Array]) -> Array:
        return carry[0] > eps / L

    def step(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return carry[0] - eps / L, carry[1] + 1

    return jax.lax.while_loop(unfinished, step, (start, jnp.zeros(())))[1]


def _chain_draw(key: PRNGKeyArray) -> dict[str, Array]:
    """Return gradient and curvature of the chain at a random point that has not found the last coordinate."""
    keys = jax.random.split(key, 3)
    x = 1.5 * jax.random.normal(keys[0], (LENGTH,))
    x = x.at[-1].set(jax.random.uniform(keys[1], (), minval=-1, maxval=1))
    v = jax.random.normal(keys[2], (LENGTH,))
    v = v / jnp.linalg.norm(v)
    H = jax.hessian(chain)(x)
    third = jax.jvp(lambda y: jax.hessian(chain)(y) @ v @ v, (x,), (v,))[1]
    return {"gradient": jnp.linalg.norm(jax.grad(chain)(x)), "value": chain(x),
            "curvature": jnp.linalg.norm(H, 2), "third": jnp.abs(third)}  # fmt: skip


def _chain_sample(key: PRNGKeyArray) -> Array:
    return 1.5 * jax.random.normal(key, (LENGTH,))


def _chain_slack(x: Array) -> Array:
    """Return |grad f| - 1 at a point with |x_T| < 1."""
    return jnp.linalg.norm(jax.grad(chain)(x.at[-1].set(jnp.tanh(x[-1])))) - 1


def _chain(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(c): the chain's gradient, its depth and its Lipschitz constants."""
    sides = over_draws(_chain_draw, key, size.draws)
    search = falsify(
        _chain_slack, _chain_sample, key, tried=size.draws, climbed=size.starts, steps=100
    ).search
    name = f"chain of {LENGTH}, random points with |x_T| < 1"
    # Psi is increasing, with limit e; beyond 100 its derivatives fall. Phi' and so on fall beyond 10.
    P, Q = extremes(psi, 0.0, 100.0), extremes(big_phi, -10.0, 10.0)
    P[0], Q[0] = np.e, np.sqrt(2 * np.pi * np.e)
    L1 = P[2] * Q[0] + 2 * P[1] * Q[1] + P[0] * Q[2]
    L2 = P[3] * Q[0] + 3 * P[2] * Q[1] + 3 * P[1] * Q[2] + P[0] * Q[3]
    ends = jnp.full(LENGTH, 0.999999).at[0].set(0.999999)
    return [
        inequality("|grad f| > 1 while |x_T| < 1", name, 1.0, sides["gradient"], search=search),
        tight("|grad f| > 1 while |x_T| < 1", "T = 1, x_1 = 0.999999", 1.0,
              jnp.linalg.norm(jax.grad(chain)(ends[:1])), factor=1.00001),
        inequality("f(0) - f(x) <= 12 T", name, float(chain(jnp.zeros(LENGTH))) - sides["value"],
                   complexity.CHAIN_GAP * LENGTH, scale=LENGTH),
        tight("f(0) - inf f <= 12 T", f"x = (100, ..., 100), T = {LENGTH}",
              -chain(jnp.full(LENGTH, 100.0)), complexity.CHAIN_GAP * LENGTH, factor=1.3),
        inequality("sums of extremes of Psi and Phi: L1 <= 152, L2 <= 2100", "grids of spacing 1e-4",
                   [L1, L2], [complexity.CHAIN_L1, complexity.CHAIN_L2], word=Word.CHECKED,
                   note="each extreme raised by half a spacing times the next derivative's"),
        inequality("||Hessian f|| <= 152", name, sides["curvature"], complexity.CHAIN_L1),
        inequality("|D3 f[v, v, v]| <= 2100", name, sides["third"], complexity.CHAIN_L2),
    ]  # fmt: skip


def on_method(make: Callable[[], Any], name: str, order: int = 1) -> Certificates:
    """Certify that anyone's method needs more than T queries on the chain, if it is zero-respecting.

    Args:
      make: () -> an optax optimizer; hvp is handed over.
      name: of the method.
      order: of the chain's scaling: 1 for F(D, L1), 2 for F(D, L2).
    """
    eps, lipschitz = 1e-2, 3.0
    claim = "|grad f| > eps at the first T queries"

    def evaluate() -> list[Certificate]:
        norms, seen = (np.asarray(x) for x in _queries(make(), eps, lipschitz, order))
        allowed = np.arange(LENGTH)[:, None] <= np.arange(LENGTH)  # query t: coordinates t, t + 1, ... are 0
        require(not np.any(seen & allowed), RESPECTING)
        own = complexity.CHAIN_L1 if order == 1 else complexity.CHAIN_L2
        gap = complexity.CHAIN_GAP * LENGTH * eps * (own * eps / lipschitz) ** (1 / order)
        bound = bounds.first_order_lower if order == 1 else bounds.second_order_lower
        return [
            inequality(claim, f"{name}, chain of {LENGTH} in F(D, L{order})", eps, norms, scale=eps),
            equality("T is what bounds.*_order_lower gives for its D", f"{name}, order {order}",
                     bound(gap * (1 + 1e-9), lipschitz, eps), LENGTH),
        ]  # fmt: skip

    return under_assumptions(claim, name, evaluate)


def _queries(optimizer: Any, eps: float, lipschitz: float, order: int) -> tuple[Array, Array]:
    """Return the gradient norms at the first T queries, and which coordinates of each are not 0."""

    def fn(x: Array) -> Array:
        return scaled(x, eps, lipschitz, order)

    def one(carry: tuple, _: None) -> tuple[tuple, tuple[Array, Array]]:
        x, state = carry
        g = jax.grad(fn)(x)
        updates, state = optax.with_extra_args_support(optimizer).update(
            g, state, x, hvp=lambda v: jax.jvp(jax.grad(fn), (x,), (v,))[1]
        )
        return (x + updates, state), (jnp.linalg.norm(g), x != 0)

    start = jnp.zeros(LENGTH)
    return jax.jit(lambda: jax.lax.scan(one, (start, optimizer.init(start)), None, length=LENGTH)[1])()


def _lower() -> list[Certificate]:
    """(c) for first- and second-order methods; and one that looks where nothing has been seen."""
    found: list[Certificate] = []
    for name, make in METHODS.items():
        found += on_method(make, name, order=2 if "newton" in name else 1)
    noisy = on_method(lambda: optax.noisy_sgd(0.5, eta=1.0, gamma=0.0, key=0), "noise")
    return [
        *found,
        refuses("outside its assumptions the statement is refused", "a method that adds noise", noisy,
                RESPECTING),
    ]  # fmt: skip


def _deformed_draw(key: PRNGKeyArray) -> dict[str, Array]:
    """Return measured derivatives of a deformed function of waves, and the constants of its class."""
    keys = jax.random.split(key, 3)
    point = _wave(keys[0])
    alpha = 10 ** jax.random.uniform(keys[1], (), maxval=3)
    s = jnp.stack([alpha, jnp.ones(()), 1 / alpha])
    _, L1, L2 = _constants(point)
    up1, up2 = bounds.deformed_lipschitz(L1, L2, alpha)
    x = jax.random.normal(keys[2], (3,))
    H = jax.hessian(partial(_waves, point))(x)
    T = jax.jacfwd(jax.hessian(partial(_waves, point)))(x)
    T = T * s[:, None, None] * s[:, None] * s
    g = jax.grad(partial(_waves, point))(x)
    return {"H": jnp.linalg.norm(s[:, None] * H * s, 2), "L1": up1,
            "T": jnp.linalg.norm(T.reshape(3, -1), 2), "L2": up2,
            "g": jnp.linalg.norm(g), "g_a": jnp.linalg.norm(s * g), "alpha": alpha}  # fmt: skip


def check_class(L1: float, L2: float, alpha: float) -> Certificates:
    """Certify how the four bounds of a class of your own grow with alpha.

    Args:
      L1: Lipschitz constant of the gradient.
      L2: of the Hessian.
      alpha: of the deformation.
    """
    claim = "a^2 and a^1.5"

    def evaluate() -> list[Certificate]:
        require_alpha(alpha)
        up1, up2 = bounds.deformed_lipschitz(L1, L2, alpha)
        name, eps = f"L1 = {L1:g}, L2 = {L2:g}, a = {alpha:g}", 1e-4

        def grown(bound: Callable[..., Array], after: Any, before: float, target: float = eps) -> Array:
            return bound(1.0, after, target) / bound(1.0, before, eps)

        first, second = bounds.first_order_upper, bounds.second_order_upper
        return [
            equality("the first-order bound grows by a^2 at the same eps", name, grown(first, up1, L1),
                     alpha**2),
            equality("the second-order bound grows by a^1.5 at the same eps", name, grown(second, up2, L2),
                     alpha**1.5),
            equality("for a gradient of eps in ORIGINAL coordinates they grow by a^4 and a^3", name,
                     [grown(first, up1, L1, eps / alpha), grown(second, up2, L2, eps / alpha)],
                     [alpha**4, alpha**3]),
        ]  # fmt: skip

    return under_assumptions(claim, f"a = {alpha:g}", evaluate)


def _deformed(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(d), (e) on random functions and where they are met."""
    sides = over_draws(_deformed_draw, key, size.draws)
    name = "sums of four cosines, one fast and one slow coordinate, a 1 to 1000"
    a = 7.0
    cosine = {"c": jnp.ones(1), "w": jnp.eye(3)[:1], "b": jnp.zeros(1)}
    L1 = jnp.linalg.norm(jax.hessian(partial(_waves, cosine))(jnp.zeros(3)) * a**2, 2)
    slope = jax.jacfwd(jax.hessian(partial(_waves, cosine)))(jnp.array([jnp.pi / 2, 0.0, 0.0]))
    up1, up2 = bounds.deformed_lipschitz(1.0, 1.0, a)
    small = 1e3 * EPS
    return [
        inequality("L1(f_a) <= a^2 L1", name, sides["H"], sides["L1"], allowance=small * sides["L1"],
                   scale=sides["L1"]),
        inequality("L2(f_a) <= a^3 L2", name, sides["T"], sides["L2"], allowance=small * sides["L2"],
                   scale=sides["L2"]),
        tight("L1(f_a) <= a^2 L1", "cos(x), x fast", L1, up1, factor=1 + 1e-12),
        tight("L2(f_a) <= a^3 L2", "cos(x), x fast", jnp.max(jnp.abs(slope)) * a**3, up2, factor=1 + 1e-12),
        inequality("|grad f| / a <= |grad f_a|", name, sides["g"] / sides["alpha"], sides["g_a"],
                   allowance=small * sides["g"], scale=sides["g"]),
        inequality("|grad f_a| <= a |grad f|", name, sides["g_a"], sides["alpha"] * sides["g"],
                   allowance=small * sides["g_a"], scale=sides["g_a"]),
        *check_class(2.0, 3.0, a),
    ]  # fmt: skip


def _slowdowns() -> list[Certificate]:
    """(d) by runs on the fast coordinate of a hard member; and one member that Newton does not notice."""
    eps, L, gap = 0.5, 2.0, 40.0
    first, second = [], []
    for a in ALPHAS:
        L1, L2 = bounds.deformed_lipschitz(L, L, a)
        first.append(float(_huber_steps(jnp.asarray(eps), jnp.asarray(L1), jnp.asarray(gap))))
        second.append(float(_slope_steps(jnp.asarray(eps), jnp.asarray(L2), jnp.asarray(gap))))
    name = f"slope eps in a fast coordinate, the same eps in deformed coordinates, a = 1 to {ALPHAS[-1]:g}"
    own, alphas = stiff(jax.random.key(3)), ALPHAS

    def newton(a: float) -> float:
        """Return |theta - theta*| in original coordinates after one Newton step on a quadratic."""
        s = own.scales(a)
        p = s * jnp.linalg.solve(s[:, None] * own.hessian * s, s * own.gradient)
        exact = jnp.linalg.solve(own.hessian, own.gradient)
        return float(jnp.linalg.norm(p - exact) / jnp.linalg.norm(exact))

    return [
        fit("steps of GD at 1 / L1(f_a) on the slowest member grow as a^2", name,
            exponent(ALPHAS[2:], first[2:]).slope, 2.0, tolerance=0.02, count=len(ALPHAS) - 2),
        fit("steps of cubic Newton with L2(f_a) on it grow as a^1.5", name,
            exponent(ALPHAS[2:], second[2:]).slope, 1.5, tolerance=0.02, count=len(ALPHAS) - 2),
        inequality("steps of GD there stay below bounds.first_order_upper", name, first,
                   [float(bounds.first_order_upper(gap, L * a**2, eps)) for a in ALPHAS]),
        inequality("steps of cubic Newton there stay below bounds.second_order_upper", name, second,
                   [float(bounds.second_order_upper(gap, L * a**3, eps)) for a in ALPHAS]),
        refuted("one member: Newton on a deformed quadratic needs more steps as a grows is false",
                "one step from the start, seven coordinates", 1e-6, max(newton(a) for a in alphas),
                word=Word.CHECKED, note="right: the largest relative error after ONE step, a = 1 to 256"),
    ]  # fmt: skip


@jax.jit
def _slope_steps(eps: Array, L: Array, gap: Array) -> Array:
    """Return cubic Newton's steps down a slope eps until f has fallen by `gap`, model minimized exactly."""

    def unfinished(carry: tuple[Array, Array]) -> Array:
        return carry[0] < gap

    def step(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        s = cubic_minimizer(jnp.zeros((1, 1)), eps * jnp.ones(1), L)
        return carry[0] - eps * s[0], carry[1] + 1

    return jax.lax.while_loop(unfinished, step, (jnp.zeros(()), jnp.zeros(())))[1]


def _outside() -> list[Certificate]:
    """Refuse alpha < 1; and the two classes differ."""
    low = float(bounds.first_order_lower(1e4, 1.0, 1e-2)), float(bounds.second_order_lower(1e4, 1.0, 1e-2))
    return [
        refuses("outside its assumptions the statement is refused", "alpha = 1/2", check_class(1.0, 1.0, 0.5),
                "alpha >= 1"),
        refuted("the second-order class is as hard as the first-order one is false", "D = 1e4, eps = 0.01",
                *low),
    ]  # fmt: skip
