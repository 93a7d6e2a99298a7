"""Statement 3.7 [ours]: Sign-like coordinatewise methods on the axis basis see alpha once, not squared.

STATEMENT. Call a method coordinatewise and scale-free if coordinate i moves by -eta u_i, with u_i a
function of the history g_(i,1), ..., g_(i,t) of its own gradients that stays the same when that history is
multiplied by a number s > 0: Adam, Nadam, AMSGrad, RMSProp with eps = 0, Lion, sign descent, signum. In the
AXIS basis phi = diag(phi_i). On the deformed network such a method is, step for step,

    theta_a,t = phi theta_t,      theta_(t+1) = theta_t - eta phi^-1 u_t,

the same method on the identity-inserted network with step sizes eta / phi_i: eta a on the k m fast entries
of C, eta / a on the k n deformed entries of Wt, eta elsewhere. Gradient descent has eta / phi_i^2 (3.2).
The gap is a where that of gradient descent is a^2: one step moves the original parameters by up to a eta,
and the largest step that lowers the loss falls as 1/a, against a^2 eta |g| and 1/a^2. Decoupled weight
decay, theta <- (1 - eta w) theta - eta u, changes nothing: the decay itself is not scaled by phi^-1.

Not so (each refuted below) in the symmetric basis, for parameter-scaled Adafactor and Muon, and for Adam or
Lion behind a clip by the global norm. Sign descent behind such a clip IS still scale-free: it has no
memory. With eps > 0 Adam is exactly the a = 1 run whose eps in coordinate i is eps phi_i, that is eps a on
the deformed entries of Wt and eps / a on the fast ones of C; the deviation is of first order in eps.

ASSUMPTIONS. alpha >= 1; the axis basis; nothing nonlinear between the factors (2.1); and u is defined: no
coordinate has a gradient that vanishes identically, where 0/0 or the sign of a rounding error would take
its place (key biases of attention, units that are never active).

PROOF. g_a = phi^-T g by 2.1, at every point, and phi is diagonal: g_(a,i) = g_i / phi_i. Induction: let
theta_a,s = phi theta_s for all s <= t. Then the history of g_(a,i) is that of g_i times 1/phi_i > 0, so
u_(a,i) = u_i and theta_a,t+1 = (1 - eta w) phi theta_t - eta u_t = phi ((1 - eta w) theta_t - eta phi^-1
u_t). The methods named are scale-free: Adam, Nadam, AMSGrad and RMSProp are quotients of a linear form
and the root of a quadratic one (or the largest of several) in the history, both homogeneous; Lion, signum
and sign descent take the sign of a linear form. A clip by the global norm multiplies g_t by a c_t > 0
that depends on |g_a| and so on phi; sign(c_t g_t) does not see it, an average of c_s g_s does. With eps,
m_a/(sqrt(v_a) + eps) = (m/phi_i)/(sqrt(v)/phi_i + eps) = m/(sqrt(v) + phi_i eps). The gap: max 1/phi_i =
a. The loss along -phi^-1 u is L - s <g, phi^-1 u> + s^2/2 <phi^-1 u, H phi^-1 u> + ...; where the
curvature of the fast block along u is positive, the first bracket grows as a and the second as a^2 (as
a^2 and a^4 for gradient descent, u = phi^-1 g), so the step at which the loss is back at L as 1/a
(1/a^2). QED.

TIGHTNESS. |u_i| = 1 at the first step of Adam, Lion and sign descent: a fast entry then moves by exactly a
eta.

SOURCE. Ours; scale invariance of Adam is in Kingma and Ba (2015), section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds, trees
from specdef_jax.parametrization import loss_on
from specdef_jax.spec import Plan
from specdef_jax.words import Word
from theory.assumptions import require, require_alpha
from theory.certificate import Certificate, Certificates, equality, fit, refuses, refuted, under_assumptions
from theory.fits import exponent
from theory.instances.networks import Instance, linear_tail_instance, networks, transformer_instance
from theory.sizes import Size

ALPHA = 7.0  # no power of two: both runs round
STEPS = 50
RATE = 1e-3
CLIP = optax.clip_by_global_norm(0.1)
CLAIM = "theta_a,t = phi theta_t with steps eta phi^-1"
# Each a function of eps, so that one program serves every eps.
Method = Callable[[Array | float], optax.GradientTransformation]
METHODS: dict[str, Method] = {
    "Adam": lambda eps: optax.adam(RATE, eps=eps),
    "RMSProp": lambda eps: optax.rmsprop(RATE, eps=eps),
    "Lion": lambda _: optax.lion(RATE, weight_decay=0.0),
    "Nadam": lambda eps: optax.nadam(RATE, eps=eps),
    "sign descent": lambda _: optax.sign_sgd(RATE),
    "clip, then sign descent": lambda _: optax.chain(CLIP, optax.sign_sgd(RATE)),
    "signum": lambda _: optax.signum(RATE),
    "AMSGrad": lambda eps: optax.amsgrad(RATE, eps=eps),
}
REFUTED: dict[str, Method] = {
    "clip, then Adam": lambda eps: optax.chain(CLIP, optax.adam(RATE, eps=eps)),
    "Muon": lambda _: optax.contrib.muon(RATE),
    "Adafactor": lambda _: optax.adafactor(RATE),
    "clip, then Lion": lambda _: optax.chain(CLIP, optax.lion(RATE, weight_decay=0.0)),
    "SGD": lambda _: optax.sgd(0.1),
}
TRIED = {  # methods, and methods refuted
    Size.SMALL: (["Adam", "clip, then sign descent"], ["clip, then Adam"]),
    Size.DEFAULT: (list(METHODS)[:6], list(REFUTED)[:3]),
    Size.FULL: (list(METHODS), list(REFUTED)),
}


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify the equality of trajectories, where it ends, and the gap a."""
    first, *others = networks(size, key, hard="cnn")
    methods, refuted_methods = TRIED[size]
    found: list[Certificate] = []
    for instance in (first, *others):
        names = methods if instance is first or size is Size.FULL else ["Adam"]
        for side in ("output", "input") if size is Size.FULL else ("output",):
            name = f"{instance.name}, {side} side, a = {ALPHA:g}"
            plan = _plan(instance, key, side=side)
            found += on_network(instance.loss, instance.params, plan, *instance.args, names=names, name=name)
    found += _refuted(first, key, refuted_methods)
    found += _epsilon(first, key)
    found += _gap(key)
    found += _outside(first, key, size)
    return tuple(found)


def on_network(
    loss: Callable[..., Array],
    params: PyTree,
    plan: Plan,
    *args: Any,
    name: str,
    names: Sequence[str] = tuple(METHODS),
    decay: float = 1e-3,
) -> Certificates:
    """Certify the equality of trajectories on anyone's network.

    Args:
      loss: loss(params, *args) on plain parameters.
      params: plain parameters.
      plan: what to deform, in the axis basis; alphas at least 1.
      *args: data.
      name: of the instance.
      names: which of METHODS.
      decay: eta w of decoupled weight decay, in every run.
    """

    def evaluate() -> list[Certificate]:
        require_alpha(*(float(layer.alpha) for _, layer in plan.items()))
        require(all(layer.basis == "axis" for _, layer in plan.items()), "the axis basis")
        found = []
        for method in names:
            error, least = deviation(loss, params, plan, METHODS[method], *args, decay=decay)
            require(least > 1e-12, "no coordinate's gradient vanishes identically")
            found.append(equality(f"{method}: {CLAIM}", f"{name}, {STEPS} steps", error, 0.0, scale=1.0))
        return found

    return under_assumptions(CLAIM, name, evaluate)


def deviation(
    loss: Callable[..., Array],
    params: PyTree,
    plan: Plan,
    method: Method,
    *args: Any,
    eps: float = 0.0,
    decay: float = 0.0,
) -> tuple[float, float]:
    """Return how far the two runs part, and the smallest gradient of a coordinate.

    The first is max_t |phi^-1 theta_a,t - theta_t| relative to the length of the path; the second, over
    coordinates, the largest gradient met, relative to the largest of all.
    """
    one = plan.with_alpha(1.0)
    inserted, deformed = sd.apply_plan(params, one), sd.apply_plan(params, plan)
    as_partial = loss_on(loss, inserted, *args)
    # One program for both runs: at alpha = 1 phi is the identity.
    starts, steps, backs = (
        jax.tree.map(lambda x, y: jnp.stack([x, y]), *pair)
        for pair in ((inserted, deformed), (plan, one), (one, plan))
    )
    paths, gradients = _run(as_partial, starts, steps, backs, args, method, eps, decay)
    paths, gradients = (
        jax.tree.map(np.asarray, x) for x in (jax.tree.leaves(paths), jax.tree.leaves(gradients))
    )
    moved = max(np.abs(x[0] - x[0, 0]).max() for x in paths)
    parted = max(np.abs(x[1] - x[0]).max() for x in paths)
    most = [np.abs(g[0]).max(0) for g in gradients]
    return float(parted / moved), float(min(g.min() for g in most) / max(g.max() for g in most))


@partial(jax.jit, static_argnames="method")
def _run(
    loss: Any,
    starts: PyTree,
    steps: Plan,
    backs: Plan,
    args: tuple[Any, ...],
    method: Method,
    eps: float,
    decay: float,
) -> tuple[PyTree, PyTree]:
    """Return phi^-1 (of backs) theta_t and the gradients of runs with steps eta phi^-1 (of steps)."""
    optimizer = method(eps)

    def run(start: PyTree, scale: Plan, back: Plan) -> tuple[PyTree, PyTree]:
        def step(carry: tuple, _: None) -> tuple[tuple, tuple]:
            params, state = carry
            gradient = jax.grad(loss)(params, *args)
            update, state = optimizer.update(gradient, state, params)
            params = trees.axpy(1 - decay, params, bounds.phi_inverse(update, scale))
            return (params, state), (bounds.phi_inverse(params, back), gradient)

        return jax.lax.scan(step, (start, optimizer.init(start)), None, length=STEPS)[1]

    return jax.vmap(run)(starts, steps, backs)


def _plan(instance: Instance, key: PRNGKeyArray, basis: str = "axis", side: str = "output") -> Plan:
    spec = sd.SpecDef(alpha=ALPHA, k=2, side=side, basis=basis)
    return sd.plan(instance.params, spec, where=instance.where, key=key)


def _refuted(instance: Instance, key: PRNGKeyArray, names: Sequence[str]) -> list[Certificate]:
    """Show the claim to be false for other methods, and for Adam in the symmetric basis."""
    axis, symmetric = _plan(instance, key), _plan(instance, key, basis="symmetric")
    tried = [(f"{name}, axis", axis, REFUTED[name]) for name in names]
    found = []
    for name, plan, method in [*tried, ("Adam, symmetric", symmetric, METHODS["Adam"])]:
        parted, _ = deviation(instance.loss, instance.params, plan, method, *instance.args)
        # A million times what an equality is held to.
        found.append(refuted(f"{name}: {CLAIM} is false", instance.name, parted, 1e-4, word=Word.CHECKED))
    return found


def _epsilon(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """Adam with eps > 0: the first step exactly, and how the deviation of a run depends on eps."""
    plan, eps = _plan(instance, key), 1e-2
    inserted, deformed = (sd.apply_plan(instance.params, p) for p in (plan.with_alpha(1.0), plan))
    gradient_of = jax.jit(jax.grad(loss_on(instance.loss, inserted, *instance.args)))
    gradient, at_alpha = (gradient_of(tree, *instance.args) for tree in (inserted, deformed))
    phi = bounds.phi(jax.tree.map(jnp.ones_like, inserted), plan)  # diagonal: what it does to ones
    optimizer = optax.scale_by_adam(eps=eps)
    update, _ = optimizer.update(at_alpha, optimizer.init(deformed))
    predicted = jax.tree.map(lambda g, d: g / (jnp.abs(g) + d * eps), gradient, phi)
    sizes = 10.0 ** np.arange(-10, -5)
    parted = [
        deviation(instance.loss, instance.params, plan, METHODS["Adam"], *instance.args, eps=e)[0]
        for e in sizes
    ]
    return [
        equality("Adam's first update is g / (|g| + eps phi_i)", f"{instance.name}, eps = {eps:g}",
                 *(ravel_pytree(t)[0] for t in (update, predicted)), count=1),
        fit("the deviation of Adam's run grows as eps^1", f"{instance.name}, eps 1e-10 to 1e-6",
            exponent(sizes, parted).slope, 1.0, tolerance=0.1, count=len(sizes),
            note=f"{parted[2]:.1e} of the path at eps = 1e-8"),
    ]  # fmt: skip


def _gap(key: PRNGKeyArray) -> list[Certificate]:
    """Measure how far one step moves the original parameters, and the largest step that lowers the loss."""
    instance = linear_tail_instance(key)  # squared loss on the deformed layer: its curvature is positive
    plan, alphas = _plan(instance, key), 2.0 ** np.arange(4, 13)
    measure = partial(_over_alphas, loss=instance.loss, params=instance.params, plan=plan, args=instance.args)
    (sign_step, sign_moved), (step, moved) = (measure(u, alphas=alphas) for u in (jnp.sign, jnp.positive))
    name = f"{instance.name}, nine alphas from 16 to 4096"

    def slope(claim: str, values: Array, order: float, tolerance: float) -> Certificate:
        found = exponent(alphas, values).slope
        return fit(claim, name, found, order, tolerance=tolerance, count=len(alphas))

    return [
        equality("sign descent: one step moves the original parameters by a eta at most", name, sign_moved,
                 alphas, count=len(alphas)),
        slope("gradient descent: one step moves them in proportion to a^2", moved, 2.0, 1e-6),
        slope("sign descent: the largest step that lowers the loss falls as 1/a", sign_step, -1.0, 0.05),
        slope("gradient descent: it falls as 1/a^2", step, -2.0, 0.05),
    ]  # fmt: skip


@partial(jax.jit, static_argnames=("update", "loss"))
def _over_alphas(
    update: Callable[[Array], Array],
    loss: Callable[..., Array],
    params: PyTree,
    plan: Plan,
    args: tuple[Any, ...],
    alphas: Array,
) -> tuple[Array, Array]:
    """Return, per alpha, the step size at which one step leaves the loss as it was, and |phi^-1 u|."""

    def at(alpha: Array) -> tuple[Array, Array]:
        here = plan.with_alpha(alpha)
        deformed = sd.apply_plan(params, here)

        def value(tree: PyTree) -> Array:
            return loss(sd.merge(tree), *args)

        start, gradient = jax.value_and_grad(value)(deformed)
        direction = jax.tree.map(update, gradient)

        def halve(bracket: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            low, high = bracket  # logarithms
            middle = (low + high) / 2
            lower = value(trees.axpy(-jnp.exp(middle), direction, deformed)) < start
            return (jnp.where(lower, middle, low), jnp.where(lower, high, middle)), None

        (low, _), _ = jax.lax.scan(halve, (jnp.log(1e-12), jnp.log(1e2)), None, length=60)
        moved = [jnp.abs(x).max() for x in jax.tree.leaves(bounds.phi_inverse(direction, here))]
        return jnp.exp(low), jnp.max(jnp.stack(moved))

    return jax.lax.map(at, alphas)


def _outside(instance: Instance, key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Refuse other bases, and coordinates on whose gradient only rounding has a say."""
    plan, (x, y) = _plan(instance, key), instance.args
    tried = {
        "the symmetric basis": (instance, _plan(instance, key, basis="symmetric"), "the axis basis"),
        "alpha = 1/2": (instance, plan.with_alpha(0.5), "alpha >= 1"),
        "an input that is always 0": (replace(instance, args=(x.at[:, 0].set(0.0), y)), plan, "vanishes"),
    }
    if size is not Size.SMALL:
        attention = transformer_instance(key)
        tried["a transformer, whose key bias moves nothing"] = attention, _plan(attention, key), "vanishes"
    found = []
    for name, (case, plan, which) in tried.items():
        certificates = on_network(case.loss, case.params, plan, *case.args, name=name, names=["Adam"])
        found.append(refuses("outside its assumptions the statement is refused", name, certificates, which))
    return found
