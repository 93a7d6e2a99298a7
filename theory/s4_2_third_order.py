"""Statement 4.2 [ours]: Third derivatives grow as a^3, and what that does and does not say.

STATEMENT. Let D3_a be the third derivative of the deformed loss at phi theta, D3_1 that of the
identity-inserted one at theta, ||D3|| = max over |s| = 1 of |D3[s, s, s]| (for a symmetric tensor also its
largest value over three different unit directions); sup ||D3|| over a convex region is L2, the Lipschitz
constant of the Hessian there.
  (a) D3_a[s, s, s] = D3_1[phi^-1 s, ...]. With tau the third derivative of E -> L(W + E U^T W) at E = 0,
            a^3 ||tau|| <= ||D3_a|| <= a^3 ||D3_1||,
      so L2 grows exactly as a^3 where tau != 0, and no faster anywhere.
  (b) tau = 0 if the loss is quadratic in the layer's outputs: squared loss behind a linear tail, or behind a
      piecewise linear one (ReLU) off its kinks. Then ||D3_a|| grows as a^2 if two fast directions and one of
      the rest have a third derivative (other layers that are trained), and no faster than a if the pair and
      its bias are all there is to train.
  (c) By 3.6 the worst case over functions with that L2 is a factor a^1.5 (a in case (b)) in the steps of
      cubic-regularized Newton. It is no slowdown of one network: undamped Newton takes the same steps
      (4.1), and so does cubic regularization in the metric |phi s|.

ASSUMPTIONS. Those of 2.1, three derivatives at the point; alpha >= 1.

PROOF. (a) Differentiate L_a(phi theta) = L(theta) three times; phi is linear. Upper bound: |phi^-1 s| <= a
|s|. Lower: s = dC = E U^T has phi^-1 s = a s, and moves C Wt = W by a E U^T W. That diagonal values bound
mixed ones is Banach's theorem. (b) dC moves the outputs y linearly, so E -> L is quadratic if L is quadratic
in y. Expand D3_1[phi^-1 s]^3 in the fast, rest and slow parts of s, with factors a, 1, 1/a: the term of
order a^3 is tau, that of order a^2 is fast-fast-rest. Let the pair and its bias be all there is: y = (C +
dC)(Wt + dWt) h + b + db. A rest part is dWt with U^T dWt = 0, dC with dC U = 0, or db. Fast, fast and dC or
db: zero, as y is linear in (C, b) and L quadratic in y. Fast, fast and dWt: L_yy applied to dC Wt h and dC'
dWt h, and dC' dWt = E U^T dWt = 0. So order a is the largest left (fast-fast-slow: a a / a;
fast-rest-rest). (c) 3.6 with (a); 4.1 (a), (d). QED.

TIGHTNESS. (a): L = x^3 along a fast direction.

SOURCE. Ours; Banach (1938) for symmetric tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds, optim, trees
from specdef_jax.parametrization import loss_on
from specdef_jax.spec import Plan
from specdef_jax.words import Word
from theory.assumptions import require, require_alpha, require_congruence
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
from theory.diagonal_phi import blocks
from theory.draws import over_draws
from theory.falsifier import falsify
from theory.fits import exponent
from theory.forms import USUAL, alternating, planned
from theory.instances.networks import Instance, linear_tail_instance, mlp_instance, networks
from theory.sizes import Size

ALPHA = 7.0
ALPHAS = np.logspace(2, 4, 6)
CLAIM = "a^3 ||tau|| <= ||D3_a|| <= a^3 ||D3_1||"
CURVED = "the loss has a third derivative along C's fast directions"
EPS = float(np.finfo(float).eps)
FLAT = 1e-11  # a third derivative below this share of the second is rounding


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify (a) on networks and tensors, the orders of (b), and measure (c)."""
    found: list[Certificate] = []
    instances = networks(size, key, hard="linear tail")
    for instance in instances:
        for form in alternating(size, instance is instances[0]):
            plan, name = planned(instance, ALPHA, form, key)
            found += on_network(instance.loss, instance.params, plan, *instance.args, name=name, key=key)
    found += _tensors(key, size)
    found += _orders(key, size)
    found += _measured(key) if size is not Size.SMALL else []
    found += _outside(instances[0], key)
    return tuple(found)


def on_network(
    loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any, name: str, key: PRNGKeyArray
) -> Certificates:
    """Certify (a) in random directions of anyone's network, by three nested directional derivatives.

    Args:
      loss: loss(params, *args) on plain parameters.
      params: plain parameters.
      plan: what to deform; alphas equal and at least 1.
      *args: data.
      name: of the instance.
      key: of the directions, and for the test of invariance.
    """

    def evaluate() -> list[Certificate]:
        as_partial, inserted = require_congruence(loss, params, plan, *args, key=key)
        a = float(bounds.condition(plan))
        at_one, at_alpha, ratio = _along(as_partial, inserted, plan, args, jax.random.split(key, 32))
        own = blocks(loss, params, plan, *args)
        fast = own.basis[:, np.asarray(own.order) == 1]
        tau, along, bent = _along_fast(as_partial, loss, inserted, plan, args, fast.T[:32])
        found = [
            equality("D3_a[s, s, s] = D3_1[phi^-1 s, phi^-1 s, phi^-1 s]", name, at_alpha[None], at_one[None],
                     note="32 random directions"),
            inequality("|phi^-1 s| <= a |s|", name, ratio, a, allowance=1e-12 * a),
        ]  # fmt: skip
        if np.abs(tau).max() > FLAT * np.abs(bent).max():
            found.append(
                equality("along C's fast directions it is a^3 tau(E)", name, along[None], a**3 * tau[None],
                         note="tau: third derivatives of the plain network's L(W + E U^T W)")
            )  # fmt: skip
        else:
            found.append(
                equality("along C's fast directions it vanishes", name, along[None], 0 * along[None],
                         scale=a**3 * np.abs(bent).max(), note="against a^3 times the second derivatives")
            )  # fmt: skip
        return found

    return under_assumptions(CLAIM, name, evaluate)


def derivative(fn: Callable[[Array], Array], order: int) -> Array:
    """Return the derivative of some order of a function of one number, at 0."""
    for _ in range(order):
        fn = jax.jacfwd(fn)
    return fn(jnp.zeros(()))


@jax.jit
def _along(
    loss: Any, inserted: PyTree, plan: Plan, args: tuple[Any, ...], keys: PRNGKeyArray
) -> tuple[Array, Array, Array]:
    """Return D3_1[phi^-1 s]^3, D3_a[s]^3 and |phi^-1 s| / |s| for random s of norm 1."""
    deformed = bounds.phi(inserted, plan)

    def at(key: PRNGKeyArray) -> tuple[Array, Array, Array]:
        s = trees.normal_like(key, inserted)
        s = trees.scale(1 / trees.norm(s), s)
        back = bounds.phi_inverse(s, plan)
        one = derivative(lambda u: loss(trees.axpy(u, back, inserted), *args), 3)
        other = derivative(lambda u: loss(trees.axpy(u, s, deformed), *args), 3)
        return one, other, trees.norm(back)

    return jax.lax.map(at, keys)


@partial(jax.jit, static_argnames="plain_loss")
def _along_fast(
    loss: Any, plain_loss: Callable[..., Array], inserted: PyTree, plan: Plan, args: tuple[Any, ...],
    directions: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Return tau, D3_a[s]^3 and the second derivative belonging to tau, s the fast directions given."""
    deformed, unravel, start = bounds.phi(inserted, plan), ravel_pytree(inserted)[1], sd.merge(inserted)

    def at(direction: Array) -> tuple[Array, Array, Array]:
        s = unravel(direction)
        moved = trees.axpy(-1.0, start, sd.merge(trees.axpy(1.0, s, inserted)))  # E U^T W

        def on_plain(u: Array) -> Array:
            return plain_loss(trees.axpy(u, moved, start), *args)

        def on_deformed(u: Array) -> Array:
            return loss(trees.axpy(u, s, deformed), *args)

        return derivative(on_plain, 3), derivative(on_deformed, 3), derivative(on_plain, 2)

    return jax.lax.map(at, directions)


def _stretched(T: Array, scales: Array) -> Array:
    """Return T[S ., S ., S .] for diagonal S."""
    return T * scales[:, None, None] * scales[:, None] * scales


def unfolded_norm(T: Float[Array, "n n n"]) -> Array:
    """Return the spectral norm of the n x n^2 matrix: at least ||T||, at most sqrt(n) times it."""
    n = len(T)
    flat = T.reshape(n, -1)
    return jnp.sqrt(jnp.linalg.eigvalsh(flat @ flat.T)[-1])


def _symmetric(T: Array) -> Array:
    orders = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    return sum(jnp.transpose(T, order) for order in orders) / 6


ORDER = jnp.array([1.0, 1.0, 0.0, 0.0, -1.0])


def _cube(T: Array, s: Array) -> Array:
    return jnp.einsum("ijk,i,j,k->", T, s, s, s)


def _climb(T: Array, s: Array, steps: int = 10) -> Array:
    """Return a unit vector along which |T[s, s, s]| is large, by power iteration."""

    def one(s: Array, _: None) -> tuple[Array, None]:
        image = jnp.einsum("ijk,j,k->i", T, s, s)
        return image / jnp.maximum(jnp.linalg.norm(image), 1e-300), None

    return jax.lax.scan(one, s / jnp.linalg.norm(s), None, length=steps)[0]


def _draw(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 3)
    T = _symmetric(jax.random.normal(keys[0], (5, 5, 5)))
    alpha = 10 ** jax.random.uniform(keys[1], (), maxval=3)
    at = _stretched(T, alpha**ORDER)
    found = jnp.abs(_cube(at, _climb(at, jax.random.normal(keys[2], (5,)))))
    scale = alpha**3 * unfolded_norm(T)
    fast = jnp.zeros(5).at[:2].set(_climb(T[:2, :2, :2], jax.random.normal(keys[2], (2,))))
    tau = jnp.abs(_cube(T, fast))
    return {"found": found, "bound": scale, "tau": alpha**3 * tau, "unfolded": unfolded_norm(at)}


def _sample(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 3)
    return {
        "T": jax.random.normal(keys[0], (5, 5, 5)),
        "s": jax.random.normal(keys[1], (5,)),
        "log_alpha": jax.random.normal(keys[2], ()),
    }


def _slack(point: dict[str, Array]) -> Array:
    """Return 1 - |D3_a[s, s, s]| / (a^3 ||D3_1||_unfolded), rounding added."""
    T, s = _symmetric(point["T"]), point["s"] / jnp.linalg.norm(point["s"])
    alpha = jnp.exp(jnp.abs(point["log_alpha"]))
    found = jnp.abs(_cube(_stretched(T, alpha**ORDER), s))
    return 1 - found / (alpha**3 * unfolded_norm(T)) + 1e3 * EPS


def _tensors(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(a) on random symmetric tensors, under a falsifier, and where it is met."""
    sides = over_draws(_draw, key, size.draws)
    search = falsify(_slack, _sample, key, tried=size.draws, climbed=size.starts, steps=100).search
    name = "symmetric 5 x 5 x 5, two fast and one slow coordinate, a 1 to 1000"
    cube = jnp.zeros((5, 5, 5)).at[0, 0, 0].set(2.0)
    above, below = "|D3_a[s, s, s]| <= a^3 ||D3_1||", "a^3 ||tau|| <= ||D3_a||"
    at = _stretched(cube, ALPHA**ORDER)
    unit = jnp.eye(5)[0]
    return [
        inequality(above, name, sides["found"], sides["bound"], allowance=1e3 * EPS * sides["bound"],
                   scale=sides["bound"], search=search, note="s by power iteration"),
        inequality(below, name, sides["tau"], sides["unfolded"], allowance=1e3 * EPS * sides["unfolded"],
                   scale=sides["unfolded"]),
        tight(above, "x^3 along a fast direction", _cube(at, unit), ALPHA**3 * unfolded_norm(cube),
              factor=1 + 1e-12, allowance=1e-9),
        tight(below, "x^3 along a fast direction", ALPHA**3 * _cube(cube, unit), unfolded_norm(at),
              factor=1 + 1e-12, allowance=1e-9),
    ]  # fmt: skip


def third_tensor(loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any) -> tuple[Array, Array]:
    """Return the dense D3_1 in phi's coordinates (theory.diagonal_phi), and the exponents of phi^-1 there."""
    own = blocks(loss, params, plan, *args)
    inserted = sd.apply_plan(params, plan.with_alpha(1.0))
    T = _third(loss_on(loss, inserted, *args), inserted, args)
    return jnp.einsum("abc,ai,bj,ck->ijk", T, own.basis, own.basis, own.basis, optimize="greedy"), own.order


@jax.jit
def _third(loss: Any, params: PyTree, args: tuple[Any, ...]) -> Array:
    flat, unravel = ravel_pytree(params)
    return jax.jacfwd(jax.hessian(lambda v: loss(unravel(v), *args)))(flat)


def _pair_alone(instance: Instance) -> tuple[Callable[..., Array], PyTree, tuple[Any, ...]]:
    """Return the instance with the layers other than the deformed one among the data."""
    own = instance.where.removesuffix("/w")
    others = {name: layer for name, layer in instance.params.items() if name != own}

    def loss(params: PyTree, others: PyTree, *args: Any) -> Array:
        return instance.loss({**params, **others}, *args)

    return loss, {own: instance.params[own]}, (others, *instance.args)


def _orders(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(a), (b): exponents of ||D3_a||, and what is left of the fast cube."""
    curved, linear = mlp_instance(key), linear_tail_instance(key)
    kinked = mlp_instance(key, "relu", "squared")
    alone = (*_pair_alone(linear), linear.where, 1)
    relu = (kinked.loss, kinked.params, kinked.args, kinked.where, 2)
    cases = {
        f"{curved.name}": (curved.loss, curved.params, curved.args, curved.where, 3),
        "squared loss, linear tail": (linear.loss, linear.params, linear.args, linear.where, 2),
        **({"squared loss, ReLU tail": relu} if size is Size.FULL else {}),
        **({} if size is Size.SMALL else {"squared loss, linear tail, the pair alone": alone}),
    }
    found = []
    for name, (loss, params, args, where, order) in cases.items():
        plan = sd.plan(params, sd.SpecDef(alpha=ALPHA, k=2, side="output"), where=where, key=key)
        T, e = third_tensor(loss, params, plan, *args)
        norms = [unfolded_norm(_stretched(T, a**e)) for a in ALPHAS]
        found.append(
            fit(f"||D3_a|| grows as a^{order}", name, exponent(ALPHAS, norms).slope, order, tolerance=0.03,
                count=len(ALPHAS), note="six alphas from 100 to 1e4; the norm is that of the unfolded tensor")
        )  # fmt: skip
        if order < 3:
            fast = jnp.where(e == 1, 1.0, 0.0)
            found.append(
                equality("tau = 0", name, _stretched(T, fast)[None], 0 * T[None], scale=unfolded_norm(T))
            )
    worst = [float(jnp.sqrt(bounds.deformed_lipschitz(1.0, 1.0, a)[1])) for a in ALPHAS]
    found.append(
        equality("by 3.6 the worst case grows by a^1.5", "bounds.deformed_lipschitz", worst, ALPHAS**1.5)
    )
    return found


def _measured(key: PRNGKeyArray) -> list[Certificate]:
    """(c): steps of cubic-regularized Newton on one network, at a = 1 and a = 100."""
    instance = mlp_instance(key)
    plan, name = planned(instance, 100.0, USUAL, key)
    counts = [_steps(instance, plan.with_alpha(a)) for a in (1.0, 100.0)]
    return [
        seen("steps of cubic-regularized Newton at a = 100 over those at a = 1, against a^1.5", name,
             counts[1] / counts[0], counts[1] / counts[0] < 100, against=1000.0,
             note=f"{counts[0]} and {counts[1]} steps to half the loss; optim.cubic_newton, sigma adapted"),
    ]  # fmt: skip


def _steps(instance: Instance, plan: Plan, most: int = 400) -> int:
    """Return how many steps halve the loss."""
    start = sd.apply_plan(instance.params, plan)
    loss = loss_on(instance.loss, start, *instance.args)
    losses = _cubic_losses(loss, start, instance.args, most)
    below = np.flatnonzero(np.asarray(losses) <= 0.5 * float(losses[0]))
    return int(below[0]) if below.size else most


@partial(jax.jit, static_argnames="steps")
def _cubic_losses(loss: Any, start: PyTree, args: tuple[Any, ...], steps: int) -> Array:
    optimizer = optim.cubic_newton(1.0, krylov=40)

    def value_fn(params: PyTree) -> Array:
        return loss(params, *args)

    def one(carry: tuple, _: None) -> tuple[tuple, Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(value_fn)(params)

        def hvp(v: PyTree) -> PyTree:
            return jax.jvp(jax.grad(value_fn), (params,), (v,))[1]

        updates, state = optimizer.update(gradient, state, params, value=value, value_fn=value_fn, hvp=hvp)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(one, (start, optimizer.init(start)), None, length=steps)[1]


def check_growth(
    loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any, name: str
) -> Certificates:
    """Certify that ||D3_a|| grows as a^3 on anyone's small network, if tau is not 0.

    Args:
      loss: loss(params, *args) on plain parameters.
      params: plain parameters.
      plan: what to deform; its alphas are replaced.
      *args: data.
      name: of the instance.
    """
    claim = "||D3_a|| grows as a^3"

    def evaluate() -> Certificate:
        require_alpha(*(float(layer.alpha) for _, layer in plan.items()))
        T, e = third_tensor(loss, params, plan, *args)
        fast = _stretched(T, jnp.where(e == 1, 1.0, 0.0))
        require(bool(jnp.max(jnp.abs(fast)) > FLAT * jnp.max(jnp.abs(T))), CURVED)
        norms = [unfolded_norm(_stretched(T, a**e)) for a in ALPHAS]
        slope = exponent(ALPHAS, norms).slope
        return fit(claim, name, slope, 3, tolerance=0.1, count=len(ALPHAS))

    return under_assumptions(claim, name, evaluate)


def _outside(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """A loss that is quadratic in the layer's outputs, and alpha < 1, are refused; a^2 is too little."""
    linear = linear_tail_instance(key)
    plan, name = planned(instance, ALPHA, USUAL, key)
    linear_plan, _ = planned(linear, ALPHA, USUAL, key)
    T, e = third_tensor(instance.loss, instance.params, plan, *instance.args)
    claim = "outside its assumptions the statement is refused"
    return [
        refuted("||D3_a|| <= a^2 ||D3_1|| is false", f"{name}, a = 1e4",
                unfolded_norm(_stretched(T, 1e4**e)), 1e8 * unfolded_norm(T), word=Word.CHECKED),
        refuses(claim, "squared loss behind a linear tail",
                check_growth(linear.loss, linear.params, linear_plan, *linear.args, name=""), CURVED),
        refuses(claim, "alpha = 1/2",
                on_network(instance.loss, instance.params, plan.with_alpha(0.5), *instance.args, name="",
                           key=key), "alpha >= 1"),
    ]  # fmt: skip
