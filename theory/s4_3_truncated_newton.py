"""Statement 4.3 [standard, ours]: Truncated Newton stops at the fast block, unless told to look at each.

SETTING. H, g of the identity-inserted network in coordinates in which phi^-1 = diag(s), s = a on the fast
block f (C's fast directions), 1 on the rest r, 1/a on the slow block s (U E^T). Truncated Newton on the
deformed network runs conjugate gradients (CG) on H_a p = -g_a until |H_a p + g_a| <= tol |g_a|, the
relative rule.

STATEMENT.
  (a) The step that solves the fast block and moves nothing else leaves |H_a p + g_a|^2 = |G_r|^2 + |G_s|^2 /
      a^2 with the REDUCED gradient G = g - H_.f H_ff^-1 g_f. So the rule accepts it iff
            |G_r|^2 + |G_s|^2 / a^2 <= tol^2 (a^2 |g_f|^2 + |g_r|^2 + |g_s|^2 / a^2),
      which it does for every large a if g_f != 0. (With |g_r| in place of |G_r|, "once tol a >= |g_r| /
      |g_f|", it is false.)
  (b) As a grows, CG's iterates tend to those of CG on the fast block alone, as long as that has not been
      solved: a step that is stopped there moves the rest by O(a^-2) and the slow block by O(a^-4) in
      original coordinates.
  (c) But the gradient after a step is its residual, on a quadratic: |g_a| falls by tol a step, so |g_a| <=
      target within log(|g_a^0| / target) / log(1/tol) steps. The rule delays the rest by at most about
      log(a) / log(1/tol) outer steps: a logarithm, no power of a.
  (d) A tolerance for each block, |residual| <= tol |gradient| in f, r and s by themselves, is the same
      before and after phi, and steps that meet it do not shrink with a.
  (e) CG itself, in exact arithmetic, for H_a > 0 with n_f eigenvalues above [low, high] and n_s at l_i
      below: energy error <= delta within n_f + n_s + ceil(arccosh(M / delta) / arccosh((high + low) / (high
      - low))) iterations, M = prod (high / l_i - 1). The large eigenvalues cost one iteration each, however
      large; the small ones, a^-2, enter M as a^2: the count grows at most as n_s sqrt(high / low) log(a),
      never beyond n.

ASSUMPTIONS. alpha >= 1. (a): H_ff invertible, g_f != 0. (b): H_ff > 0. (c): a quadratic. (e): H_a > 0.

PROOF. (a) p = phi d, d = (-H_ff^-1 g_f, 0, 0): H_a p + g_a = phi^-T (H d + g) = (0, G_r, G_s / a). (b) In
original coordinates CG's iterate j minimizes q(d) = d^T H d / 2 + g^T d over d in the span of (P H)^i P g,
i < j, P = diag(s^2). P / a^2 = diag(1, a^-2, a^-4), so these vectors tend to ((H_ff)^i g_f, 0, 0), with
rest and slow parts O(a^-2), O(a^-4); as long as these limits are independent the minimizer is continuous in
them. (c) g_a(x + p) = g_a + H_a p: the residual, at most tol |g_a|. Iterate. (d) phi multiplies each block
of residual and gradient by one number. (e) The energy error after j iterations is at most min over
polynomials q of degree j, q(0) = 1, of max |q(lambda)| over the spectrum. Take prod (1 - lambda / lambda_i)
over the outliers times a Chebyshev polynomial of [low, high], at most 1 / T_d((high + low) / (high - low))
there. The product vanishes on the outliers; on [low, high] a factor with lambda_i > high is in (0, 1), one
with l_i < low at most high / l_i - 1. arccosh(x) <= log(2 x), arccosh((k + 1)/(k - 1)) >= 2 / sqrt(k), k =
high / low. At most n by finite termination. QED.

TIGHTNESS. (e): low = high, all eigenvalues distinct: n_f + n_s + 1 iterations and no fewer. (c): residuals
of exactly tol. In float64 CG loses orthogonality and takes more iterations than (e).

SOURCE. (e) Axelsson and Lindskog (1986), Jennings (1977); the rest ours, on a remark that truncated Newton
is slowed (THEORY 4.3, seen).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds, optim
from specdef_jax.optim.conjugate_gradient import truncated_cg
from specdef_jax.parametrization import loss_on
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
    seen,
    tight,
    under_assumptions,
)
from theory.diagonal_phi import Blocks, blocks, stiff
from theory.draws import over_draws
from theory.falsifier import falsify
from theory.fits import exponent
from theory.forms import USUAL, planned
from theory.instances.networks import BUILDERS, Instance, mlp_instance
from theory.sizes import Size

ALPHAS = np.logspace(1.5, 4, 8)
TOL = 0.5
EPS = float(np.finfo(float).eps)
INVERTIBLE = "H_ff is invertible"


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify (a) to (e) on random matrices and on networks, and measure the package's optimizer."""
    found: list[Certificate] = []
    found += _stopping(key, size)
    found += _moved(key)
    found += _outer(key, size)
    found += _iterations(key, size)
    names = {Size.SMALL: ["linear tail"], Size.DEFAULT: ["linear tail", "cnn"], Size.FULL: list(BUILDERS)}
    for name in names[size]:
        found += on_instance(BUILDERS[name](key), key)
    found += _measured(mlp_instance(key), key)
    return tuple(found)


def on_instance(instance: Instance, key: PRNGKeyArray) -> Certificates:
    """Certify (a) at a point of a network.

    Args:
      instance: the network, its loss and its data.
      key: of the plan.
    """
    plan, name = planned(instance, 1.0, USUAL, key)
    own = blocks(instance.loss, instance.params, plan, *instance.args)
    return on_blocks(own, name)


def on_blocks(own: Blocks, name: str) -> Certificates:
    """Certify (a) on anyone's Hessian and gradient, given in phi's coordinates.

    Args:
      own: gradient, Hessian and the exponents of phi^-1 (theory.diagonal_phi).
      name: of the instance.
    """
    claim = "the relative rule accepts the fast block alone"

    def evaluate() -> list[Certificate]:
        fast = np.asarray(own.order) == 1
        H_ff = own.hessian[np.ix_(fast, fast)]
        values = jnp.abs(jnp.linalg.eigvalsh(H_ff))
        require(bool(jnp.min(values) > 1e-12 * jnp.max(values)), INVERTIBLE)
        reduced = own.gradient - own.hessian[:, fast] @ jnp.linalg.solve(H_ff, own.gradient[fast])
        size, reduced = own.sizes(own.gradient), own.sizes(reduced)
        left, whole, predicted = [], [], []
        for a in ALPHAS:
            found = bounds.fast_alone_residual(own.hessian, own.gradient, own.scales(a))
            left.append(found[0])
            whole.append(found[1])
            predicted.append(jnp.hypot(reduced["rest"], reduced["slow"] / a))
        ratio = np.asarray(left) / np.asarray(whole)
        return [
            equality("|H_a p + g_a|^2 = |G_r|^2 + |G_s|^2 / a^2, p the fast block's solution", name, left,
                     predicted, note="eight alphas from 32 to 1e4"),
            fit("the least tolerance that accepts it falls as a^-1", name, exponent(ALPHAS, ratio).slope, -1,
                tolerance=0.05, count=len(ALPHAS),
                note=f"accepted at tol = {TOL:g} from a = {_threshold(size, reduced):.3g}"),
        ]  # fmt: skip

    return under_assumptions(claim, name, evaluate)


def _threshold(size: dict[str, Array], reduced: dict[str, Array]) -> float:
    """Return the smallest alpha from which on the rule accepts the fast block alone, by bisection."""

    def slack(a: float) -> float:
        whole = (a * size["fast"]) ** 2 + size["rest"] ** 2 + (size["slow"] / a) ** 2
        return float(TOL**2 * whole - reduced["rest"] ** 2 - (reduced["slow"] / a) ** 2)

    grid = np.logspace(0, 8, 801)
    refused = [a for a in grid if slack(a) < 0]
    return float(refused[-1]) if refused else 1.0


def _stopping_draw(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 2)
    own = stiff(keys[0])
    alpha = 10 ** jax.random.uniform(keys[1], (), maxval=3)
    scales = own.scales(alpha)
    left, whole = bounds.fast_alone_residual(own.hessian, own.gradient, scales)
    H_ff = own.hessian[:2, :2]
    reduced = own.sizes(own.gradient - own.hessian[:, :2] @ jnp.linalg.solve(H_ff, own.gradient[:2]))
    size = own.sizes(own.gradient)
    # The rule as first noted: met from tol = |g_r| / (a |g_f|) on.
    noted = size["rest"] / (alpha * size["fast"])
    residual = jax.random.normal(keys[1], own.gradient.shape)
    same = [bounds.blocks_solved(s * residual, s * own.gradient, s, 1.0) for s in (scales, own.scales(2.0))]
    return {"left": left, "predicted": jnp.hypot(reduced["rest"], reduced["slow"] / alpha), "whole": whole,
            "noted": noted * whole, "one": same[0], "two": same[1]}  # fmt: skip


def _stopping(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(a) and (d) on random positive definite matrices."""
    sides = over_draws(_stopping_draw, key, size.draws)
    name = "random H > 0, 7 coordinates (2 fast, 2 slow), a 1 to 1000"
    agree = (sides["one"] == sides["two"]).astype(float)
    own = stiff(key)
    fast = jnp.diag(jnp.where(own.order == 1, 0.0, 1.0))
    singular = own._replace(hessian=fast @ own.hessian @ fast)
    return [
        equality("|H_a p + g_a|^2 = |G_r|^2 + |G_s|^2 / a^2, p the fast block's solution", name,
                 sides["left"], sides["predicted"], scale=sides["whole"]),
        refuted('"the rule is met by the fast block alone once tol a >= |g_r| / |g_f|" is false', name,
                sides["left"], sides["noted"], allowance=1e-9 * sides["whole"],
                note="the reduced gradient G_r takes the place of g_r; left: residual, right: tol |g_a|"),
        equality("a rule for every block says the same at a and at 2", name, agree, np.ones_like(agree),
                 note=f"met by {np.mean(sides['one']):.0%} of random residuals"),
        refuses("outside its assumptions the statement is refused", "H_ff = 0",
                on_blocks(singular, ""), INVERTIBLE),
    ]  # fmt: skip


def step_of(own: Blocks, alpha: Array | float, tol: float, per_block: bool = False) -> tuple[Array, Array]:
    """Return one truncated Newton step in original coordinates, and the CG iterations it took.

    Args:
      own: gradient and Hessian in phi's coordinates.
      alpha: of the deformation.
      tol: relative residual.
      per_block: ask for it in every block by itself.
    """
    scales = own.scales(alpha)
    H, g = scales[:, None] * own.hessian * scales, scales * own.gradient
    if not per_block:
        found = truncated_cg(lambda v: H @ v, -g, tol, 20 * len(g))
        return scales * found.step, found.products

    def unfinished(carry: tuple[Array, Array]) -> Array:
        count, step = carry
        return (count < 20 * len(g)) & ~bounds.blocks_solved(H @ step + g, g, scales, tol)

    def longer(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        count = carry[0] + 1
        return count, truncated_cg(lambda v: H @ v, -g, 0.0, count).step

    count, step = jax.lax.while_loop(unfinished, longer, (jnp.array(0), jnp.zeros_like(g)))
    return scales * step, count


def _moved(key: PRNGKeyArray) -> list[Certificate]:
    """(b), (d): what one step moves, by both rules, as alpha grows."""
    draws = 40
    own = jax.vmap(lambda k: stiff(k)._replace(order=jnp.zeros(7), basis=jnp.eye(7)))(
        jax.random.split(key, draws)
    )
    order = stiff(key).order

    @partial(jax.jit, static_argnames="per_block")
    def sizes(alpha: Array, per_block: bool) -> tuple[dict[str, Array], Array]:
        def one(g: Array, H: Array) -> tuple[dict[str, Array], Array]:
            each = Blocks(g, H, order, jnp.eye(7))
            step, count = step_of(each, alpha, TOL, per_block)
            return each.sizes(step), count

        return jax.vmap(one)(own.gradient, own.hessian)

    alphas = np.logspace(3, 5, 6)
    whole = [sizes(jnp.asarray(a), False) for a in alphas]
    per_block = [sizes(jnp.asarray(a), True) for a in alphas[:4]]
    name = f"{draws} random H > 0, 7 coordinates, six alphas from 1e3 to 1e5, median"

    def slope(found: list, part: str) -> float:
        x = alphas[: len(found)]
        each = [exponent(x, [s[part][i] for s, _ in found]).slope for i in range(draws)]
        return float(np.median(each))

    counts = np.asarray([c for _, c in whole])
    predicted = {"fast": 0.0, "rest": -2.0, "slow": -4.0}
    return [
        *(
            fit(f"relative rule, tol = {TOL:g}: the {part} part of a step goes as a^{order:g}", name,
                slope(whole, part), order, tolerance=0.02, count=draws * len(alphas))
            for part, order in predicted.items()
        ),
        *(
            fit(f"a tolerance for every block: the {part} part of a step does not depend on a", name,
                slope(per_block, part), 0.0, tolerance=0.05, count=draws * 4,
                note="up to 3e4, where CG still meets it in float64")
            for part in ("rest", "slow")
        ),
        inequality("the relative rule stops within n_f iterations", name, counts, 2.0, word=Word.CHECKED),
    ]  # fmt: skip


@partial(jax.jit, static_argnames=("steps", "per_block"))
def _run(own: Blocks, start: Array, alpha: Array, steps: int, per_block: bool = False) -> tuple[Array, Array]:
    """Return gradients (original coordinates) and products before each outer step on x^T H x / 2."""

    def one(x: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        here = own._replace(gradient=own.hessian @ x)
        step, count = step_of(here, alpha, TOL, per_block)
        return x + step, (here.gradient, count)

    return jax.lax.scan(one, start, None, length=steps)[1]


def _outer(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(c): outer steps on quadratics, and that they grow as a logarithm."""
    draws, steps = {Size.SMALL: 50, Size.DEFAULT: 200, Size.FULL: 1000}[size], 60
    order = stiff(key, (6, 6, 2)).order

    @jax.jit
    def outer(alpha: Array) -> tuple[Array, Array, Array]:
        def one(k: PRNGKeyArray) -> tuple[Array, Array, Array]:
            own = stiff(k, (6, 6, 2))
            path, _ = _run(own, jnp.linalg.solve(own.hessian, own.gradient), alpha, steps)
            norms = jnp.linalg.norm(own.scales(alpha) * path, axis=1)
            rest = jnp.linalg.norm(jnp.where(order == 0, path, 0), axis=1)
            needed = jnp.argmax(rest <= 1e-2 * rest[0])
            worst = jnp.max(norms[1:] / (TOL * norms[:-1]), where=norms[:-1] > 1e-8 * norms[0], initial=0)
            return worst, needed, bounds.outer_steps(norms[0], 1e-2 * rest[0], TOL)

        return jax.vmap(one)(jax.random.split(key, draws))

    alphas = np.logspace(0, 3.5, 8)
    found = [[np.asarray(x) for x in outer(jnp.asarray(a))] for a in alphas]
    worst, needed, allowed = (np.stack(x) for x in zip(*found, strict=True))
    name = (
        f"{draws} quadratics in 14 coordinates (6 fast, 2 slow), eight alphas from 1 to 3162, tol = {TOL:g}"
    )
    mean = needed.mean(axis=1)
    slope = np.polyfit(np.log(alphas), mean, 1)[0]
    return [
        inequality("|g_a| falls by tol in a step", name, worst, 1.0, allowance=1e-6, word=Word.PROVED,
                   note="allowance: CG updates its residual instead of computing it"),
        inequality("steps to 1% of |g_r| <= log(|g_a| / target) / log(1/tol)", name, needed, allowed,
                   note="the bound grows as log(a) / log(1/tol)"),
        tight("steps <= log(|g_a| / target) / log(1/tol)", "residuals of exactly tol", 10.0,
              bounds.outer_steps(2.0**10, 1.0, 0.5), factor=1 + 1e-12),
        seen("outer steps grow by so much per factor e of a, against 1 / log(1/tol)", name, slope,
             0 <= slope <= 1 / np.log(1 / TOL), against=1 / np.log(1 / TOL),
             note=f"on average {mean[0]:.1f} steps at a = 1, {mean[-1]:.1f} at a = 3162"),
        refuted("steps grow as a power a^0.5 or faster is false", name, 0.5, exponent(alphas, mean).slope,
                word=Word.ESTIMATED, note="right: the fitted exponent"),
    ]  # fmt: skip


def _energy_errors(values: Array, weights: Array, steps: int) -> Array:
    """Return CG's relative energy errors after 0, ..., steps iterations, with full reorthogonalization.

    The matrix is diag(values), the error at the start `weights` in the energy norm.
    """
    n = len(values)
    # In the variable H^1/2 x the error is minimized in the Euclidean norm over the span of H^j e, j >= 1.
    e = weights / jnp.linalg.norm(weights)

    def grow(carry: tuple[Array, Array, Array], i: Array) -> tuple[tuple, Array]:
        images, error, direction = carry
        image = values * direction
        for _ in range(2):
            image = image - images.T @ (images @ image)
        size = jnp.linalg.norm(image)
        alive = size > 1e-13 * jnp.max(values)
        image = jnp.where(alive, image / jnp.where(alive, size, 1), 0)
        images = images.at[i].set(image)
        error = error - image * jnp.dot(image, error)
        return (images, error, image), jnp.linalg.norm(error)

    start = (jnp.zeros((steps, n)), e, e)
    _, errors = jax.lax.scan(grow, start, jnp.arange(steps))
    return jnp.concatenate([jnp.ones(1), errors])


def _spectrum(key: PRNGKeyArray) -> dict[str, Array]:
    """Return CG's count on a spectrum with two large and two small outliers, and the bound."""
    keys = jax.random.split(key, 5)
    alpha = 10 ** jax.random.uniform(keys[0], (), maxval=2)
    above = alpha**2 * (3 + jax.random.uniform(keys[1], (2,)))
    below = alpha**-2 * (0.3 + 0.2 * jax.random.uniform(keys[2], (2,)))
    high = 1 + 1.9 * jax.random.uniform(keys[3], ())
    middle = jnp.linspace(1.0, 1.0, 8) + (high - 1) * jnp.linspace(0, 1, 8)
    values = jnp.concatenate([above, middle, below])
    errors = _energy_errors(values, jax.random.normal(keys[4], (12,)), 12)
    tol = 1e-3
    count = jnp.argmax(errors <= tol * (1 + 1e-6))
    return {"count": count, "bound": bounds.cg_iterations(2, below, 1.0, high, tol), "alpha": alpha}


def _iterations(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(e) on random spectra, where it is met, and how the bound grows."""
    sides = over_draws(_spectrum, key, size.draws)
    name = "2 eigenvalues of order a^2, 2 of order a^-2, 8 within a factor 2.9, a 1 to 100, error 1e-3"
    few = jnp.array([900.0, 400.0, 1.0, 0.01])
    errors = np.asarray(_energy_errors(few, jnp.ones(4), 4))
    needed = int(np.argmax(errors <= 1e-9))
    alphas = np.logspace(1, 5, 8)
    counts = [float(bounds.cg_iterations(2, 0.4 * a**-2.0 * jnp.ones(2), 1.0, 2.0, 1e-3)) for a in alphas]
    per_decade = 4 * np.log(10) / np.arccosh(3.0)  # of M ~ a^4
    search = falsify(_count_slack, _count_point, key, tried=size.draws, climbed=size.starts, steps=60).search
    claim = "CG meets the energy error within bounds.cg_iterations"
    return [
        inequality(claim, name, sides["count"], sides["bound"], search=search),
        tight(claim, "eigenvalues 900, 400, 1, 0.01, low = high = 1", needed,
              bounds.cg_iterations(2, few[3:], 1.0, 1.0, 1e-9), factor=1 + 1e-12),
        fit("the bound grows by n_s 2 log(10) / arccosh(3) per decade of a (high = 2 low)",
            "n_s = 2, a 10 to 1e5", np.polyfit(np.log10(alphas), counts, 1)[0], per_decade, tolerance=0.3,
            count=len(alphas)),
    ]  # fmt: skip


def _count_point(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 4)
    return {
        "weights": jax.random.normal(keys[0], (8,)),
        "log_alpha": jax.random.normal(keys[1], ()),
        "middle": jax.random.normal(keys[2], (4,)),
        "outer": jax.random.normal(keys[3], (4,)),
    }


def _count_slack(point: dict[str, Array]) -> Array:
    """Return the bound on the energy error less the error, at every iteration past the outliers."""
    alpha = jnp.exp(jnp.abs(point["log_alpha"]))
    spread = jax.nn.sigmoid(point["outer"])
    above, below = alpha**2 * (3 + spread[:2]), alpha**-2 * (0.3 + 0.2 * spread[2:])
    values = jnp.concatenate([above, 1 + 1.9 * jax.nn.sigmoid(point["middle"]), below])
    errors = _energy_errors(values, point["weights"], 7)[4:]
    degree = jnp.arange(4.0)
    bound = jnp.prod(2.9 / below - 1) / jnp.cosh(degree * jnp.arccosh(3.9 / 1.9))
    return jnp.min(bound - errors) + 1e-9


def _measured(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """Run the package's truncated Newton on a network: outer steps and products to a loss, against alpha."""
    alphas = np.array([1.0, 10.0, 100.0, 1000.0])
    plan, name = planned(instance, 1.0, USUAL, key)
    counts = np.asarray([_to_loss(instance, plan.with_alpha(a)) for a in alphas])
    told = ", ".join(f"{s:.0f} ({p:.0f})" for s, p in counts)
    growth = counts[-1, 1] / counts[0, 1]
    return [
        seen("products of optim.newton_cg to half the loss at a = 1000 over those at a = 1", name, growth,
             growth < 1000, against=1000.0,
             note=f"outer steps (products) at a = 1, 10, 100, 1000: {told}; tol = {TOL:g}, with halvings"),
    ]  # fmt: skip


def _to_loss(instance: Instance, plan: Any, most: int = 200) -> tuple[int, int]:
    start = sd.apply_plan(instance.params, plan)
    loss = loss_on(instance.loss, start, *instance.args)
    losses, products = (np.asarray(x) for x in _newton_cg(loss, start, instance.args, most))
    below = np.flatnonzero(losses <= 0.5 * losses[0])
    last = int(below[0]) if below.size else most
    return last, int(products[:last].sum())


@partial(jax.jit, static_argnames="steps")
def _newton_cg(loss: Any, start: PyTree, args: tuple[Any, ...], steps: int) -> tuple[Array, Array]:
    optimizer = optim.newton_cg(tol=TOL, superlinear=False, halvings=10)

    def value_fn(params: PyTree) -> Array:
        return loss(params, *args)

    def one(carry: tuple, _: None) -> tuple[tuple, tuple[Array, Array]]:
        params, state = carry
        value, gradient = jax.value_and_grad(value_fn)(params)

        def hvp(v: PyTree) -> PyTree:
            return jax.jvp(jax.grad(value_fn), (params,), (v,))[1]

        updates, state = optimizer.update(gradient, state, params, value=value, value_fn=value_fn, hvp=hvp)
        return (optax.apply_updates(params, updates), state), (value, state.products)

    return jax.lax.scan(one, (start, optimizer.init(start)), None, length=steps)[1]
