"""Statement 3.2 [ours]: Deforming is preconditioning, for methods linear in the gradient history.

STATEMENT. Let a method update by theta_{t+1} = sum_{i <= t} (r_ti theta_i - M_ti g_i), where r_ti and M_ti
are numbers, or at least linear maps that commute with phi, and read neither gradients nor parameters: GD,
heavy ball, Nesterov, their EMA forms, weight decay, any schedule. Started at theta_a = phi theta_1 it
gives, step for step,

    theta_a^t = phi theta~^t,     theta~ the same method on the identity-inserted network with every
                                  gradient g replaced by phi^-1 phi^-T g,

a preconditioner with the eigenvalues a^2 (m k of them per layer; n k on the input side), a^-2 (k times the
number of rows of the other factor: k n, k m) and 1. Clipping by the global norm keeps this iff that norm is
|phi^-T g|, the norm of g in the same metric: clip before preconditioning, measured there.

ASSUMPTIONS. Those of 2.1 for the losses (L(phi theta) = L(theta) for all theta; alpha > 0 suffices), and the
form of the method. Decay must stay behind the preconditioner: in front of it (an L2 penalty on the inserted
network) it is another method. Step sizes that differ from entry to entry of one tensor do not commute with
phi; steps per tensor do. Adam's updates are not linear in the gradients.

PROOF. By 2.1 g(phi theta) = phi^-T g_1(theta), where g_1 is the gradient of the inserted network. Assume
theta_a^i = phi theta~^i for i <= t. Then theta_a^{t+1} = sum (r_ti phi theta~^i - M_ti phi^-T
g_1(theta~^i)) = phi sum (r_ti theta~^i - M_ti phi^-1 phi^-T g_1(theta~^i)) = phi theta~^{t+1}, as r_ti and
M_ti commute with phi. Eigenvalues: phi^-1 is symmetric with eigenvalues a, 1/a, 1 (2.1). Clipping
multiplies the gradient by min(1, c / norm), which is the same scalar on both sides iff the norms are the
same wherever one exceeds c; on the deformed network it is |phi^-T g_1|. With another norm the factors
differ as soon as one of them clips and |phi^-T g_1| is not equal to that norm, and then so do the next
iterates. QED.

TIGHTNESS. An equality. That it fails for Adam, for clipping by |g_1| or by |phi^-1 phi^-T g_1|, for decay in
front, and for entrywise step sizes is shown by runs.

SOURCE. Ours; that a linear change of variables is a preconditioner for GD is textbook (Nocedal and Wright,
Numerical Optimization, 2nd ed., 2006, section 5.1 for CG).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds, trees
from specdef_jax.parametrization import Deformed, is_structured, loss_on
from specdef_jax.spec import Plan
from specdef_jax.words import Word
from theory.assumptions import require, require_invariance
from theory.certificate import (
    Certificate,
    Certificates,
    equality,
    refuses,
    refuted,
    under_assumptions,
)
from theory.forms import alternating, planned
from theory.hessians import linear_matrix
from theory.instances.networks import Instance, networks
from theory.paired_runs import CLIPPED, DIFFERENT, EQUAL, Optimizer, compare, per_entry
from theory.sizes import Size

ALPHA = 7.0
CLAIM = "theta_a^t = phi theta~^t, t = 0 ... 50"
LINEAR = "updates are linear in gradients and parameters"
COMMUTES = "with coefficients that commute with phi (the same for every entry of a tensor)"


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify the equality on networks, and that it fails where it should."""
    found: list[Certificate] = []
    instances = networks(size, key)
    for instance in instances:
        for form in alternating(size, instance is instances[0]):
            plan, name = planned(instance, ALPHA, form, key)
            found += on_network(instance.loss, instance.params, plan, *instance.args, name=name, key=key)
    first = instances[0]
    if size is not Size.SMALL:
        name = f"{first.name}, two layers at 3 and {ALPHA:g}"
        found += on_network(
            first.loss, first.params, _two_layers(first, key), *first.args, name=name, key=key
        )
    return (*found, *_negative(first, key))


def on_network(
    loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any, name: str, key: PRNGKeyArray
) -> Certificates:
    """Certify the equality for eight methods, and the preconditioner's spectrum, on anyone's network.

    Args:
      loss: loss(params, *args) on plain parameters.
      params: plain parameters.
      plan: what to deform.
      *args: data.
      name: of the instance.
      key: for the test of invariance.
    """

    def evaluate() -> list[Certificate]:
        inserted = sd.apply_plan(params, plan.with_alpha(1.0))
        as_partial = loss_on(loss, inserted, *args)
        require_invariance(as_partial, lambda t: bounds.phi(t, plan), inserted, *args, key=key)
        run = compare(as_partial, params, plan, args, tuple(EQUAL.values()))
        pairs = dict(zip(EQUAL, run, strict=True))
        clipped = np.mean(pairs[CLIPPED].norms > 0.8 * pairs[CLIPPED].norms[0])
        values = np.linalg.eigvalsh(jax.jit(_preconditioner)(inserted, plan))
        expected = np.sort(np.concatenate(_spectrum(inserted, plan)))
        return [
            *(
                equality(f"{CLAIM}: {method}", name, pair.deformed[None], pair.mapped[None],
                         note=f"clipped in {clipped:.0%} of the steps" if method == CLIPPED else "")
                for method, pair in pairs.items()
            ),
            equality("phi^-1 phi^-T has the eigenvalues a^2, 1, a^-2 with their multiplicities", name, values,
                     expected),
        ]  # fmt: skip

    return under_assumptions(CLAIM, name, evaluate)


def on_method(
    make: Callable[[Optimizer], Optimizer],
    loss: Callable[..., Array],
    params: PyTree,
    plan: Plan,
    *args: Any,
    name: str,
    key: PRNGKeyArray,
) -> Certificates:
    """Certify the equality for anyone's method, if it has the form that the statement asks for.

    Args:
      make: preconditioner -> the method with it put where it belongs; optax.identity() on the deformed net.
      loss: loss(params, *args) on plain parameters.
      params: plain parameters.
      plan: what to deform.
      *args: data.
      name: of the instance.
      key: for the test of the form.
    """

    def evaluate() -> Certificate:
        inserted = sd.apply_plan(params, plan.with_alpha(1.0))
        as_partial = loss_on(loss, inserted, *args)
        require_invariance(as_partial, lambda t: bounds.phi(t, plan), inserted, *args, key=key)
        require_form(make(optax.identity()), inserted, key)
        (pair,) = compare(as_partial, params, plan, args, (lambda step, P, clip, c: make(P),))
        return equality(CLAIM, name, pair.deformed[None], pair.mapped[None])

    return under_assumptions(CLAIM, name, evaluate)


def require_form(optimizer: Optimizer, like: PyTree, key: PRNGKeyArray) -> None:
    """Require updates linear in gradients and parameters, that commute with reflections of every tensor."""
    keys = jax.random.split(key, 3)
    a, b = (_history(k, like) for k in keys[:2])
    total = jax.tree.map(jnp.add, a, b)
    both = jax.tree.map(jnp.add, _updates(optimizer, *a), _updates(optimizer, *b))
    require(_close(_updates(optimizer, *total), both), LINEAR)
    mirror = _reflection(trees.normal_like(keys[2], like))
    mirrored = _updates(optimizer, *(jax.vmap(mirror)(one) for one in a))
    require(_close(mirrored, mirror(_updates(optimizer, *a))), COMMUTES)


def _preconditioner(inserted: PyTree, plan: Plan) -> Array:
    return linear_matrix(lambda tree: bounds.preconditioned(tree, plan), inserted)


def _history(key: PRNGKeyArray, like: PyTree) -> tuple[PyTree, PyTree]:
    """Return four random gradients and parameters, stacked."""
    draw = jax.vmap(lambda k: trees.normal_like(k, like))
    return draw(jax.random.split(key, 4)), draw(jax.random.split(jax.random.fold_in(key, 1), 4))


def _updates(optimizer: Optimizer, gradients: PyTree, params: PyTree) -> PyTree:
    """Return the updates along given gradients and parameters."""

    def one(state: PyTree, at: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        updates, state = optimizer.update(at[0], state, at[1])
        return state, updates

    first = jax.tree.map(lambda x: x[0], params)
    return jax.lax.scan(one, optimizer.init(first), (gradients, params))[1]


def _reflection(normal: PyTree) -> Callable[[PyTree], PyTree]:
    """Return the map that reflects every tensor at the hyperplane of its normal; over leading axes too."""

    def reflect(x: Array, n: Array) -> Array:
        along = jnp.sum(x * n, axis=tuple(range(x.ndim - n.ndim, x.ndim)), keepdims=True)
        return x - 2 * along * n / jnp.sum(n * n)

    return lambda tree: jax.tree.map(reflect, tree, normal)


def _close(found: PyTree, expected: PyTree) -> bool:
    a, b = (ravel_pytree(tree)[0] for tree in (found, expected))
    return bool(jnp.max(jnp.abs(a - b)) <= 1e-9 * jnp.max(jnp.abs(b)))


def _spectrum(inserted: PyTree, plan: Plan) -> list[np.ndarray]:
    """Return the predicted eigenvalues of phi^-1 phi^-T: a^2, a^-2 and 1 with their multiplicities."""
    values, total = [], trees.size(inserted)
    for path, layer in plan.items():
        (d, k), a = layer.U.shape, float(layer.alpha)
        pair = dict(trees.named_leaves(inserted, is_leaf=is_structured))[path]
        values += [np.full(d * k, a**2), np.full(k * pair.weight.size // d, a**-2)]
    return [*values, np.ones(total - sum(map(len, values)))]


def _two_layers(instance: Instance, key: PRNGKeyArray) -> Plan:
    spec = sd.SpecDef(alpha=3.0, k=1, side="output")
    first, second = instance.network.kernels[:2]
    made = sd.plan(instance.params, spec, where=[first, second], key=key)
    return Plan(
        {p: replace(one, alpha=one.alpha * (1 if p == first else ALPHA / 3)) for p, one in made.items()}
    )


def _negative(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """Methods of another form: the equality fails, and is refused to whoever asks for it."""
    plan = sd.plan(
        instance.params, sd.SpecDef(alpha=ALPHA, k=2, side="output"), where=instance.where, key=key
    )
    inserted = sd.apply_plan(instance.params, plan.with_alpha(1.0))
    loss = loss_on(instance.loss, inserted, *instance.args)
    pairs = compare(loss, instance.params, plan, instance.args, tuple(DIFFERENT.values()))

    def asked(optimizer: Optimizer) -> Certificates:
        def make(P: Optimizer) -> Optimizer:
            return optax.chain(P, optimizer)

        return on_method(
            make, instance.loss, instance.params, plan, *instance.args, name=instance.name, key=key
        )

    claim = "a method of another form is refused"
    return [
        *(
            refuted(f"{CLAIM} is false: {method}", instance.name,
                    np.abs(pair.deformed - pair.mapped).max() / np.abs(pair.deformed).max(), 0.0,
                    allowance=1e-3, word=Word.CHECKED,
                    note="the left side is the largest difference, relative to the way gone")
            for method, pair in zip(DIFFERENT, pairs, strict=True)
        ),
        *asked(optax.sgd(0.01, momentum=0.5, nesterov=True)),
        refuses(claim, "Adam", asked(optax.adam(0.01)), LINEAR),
        refuses(claim, "clipping by the global norm", asked(optax.clip_by_global_norm(1.0)), LINEAR),
        refuses(claim, "a step for every entry", asked(optax.stateless(per_entry)), COMMUTES),
        refuses(claim, "a tanh between the factors",
                on_network(_tanh_between, instance.params, plan, *instance.args, name="", key=key),
                "nothing nonlinear"),
    ]  # fmt: skip


def _tanh_between(params: PyTree, x: Array, y: Array) -> Array:
    """A perceptron that puts a nonlinearity between the two factors of its second layer."""
    pair = params["layer_1"]["w"]
    h = jnp.tanh(x @ params["layer_0"]["w"])
    h = jnp.tanh(h @ pair.weight) @ pair.comp if isinstance(pair, Deformed) else jnp.tanh(h @ pair)
    return jnp.mean((h @ params["layer_2"]["w"]) ** 2)
