"""Methods side by side: on the deformed network, and preconditioned on the identity-inserted one (3.2).

All methods of one network run in one compiled loop, on gradients that are taken together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

import specdef_jax as sd
from specdef_jax import bounds, trees
from specdef_jax.spec import Plan

STEPS, DECAY = 50, 0.03
Optimizer = optax.GradientTransformation
Maker = Callable[[Any, Optimizer, Optimizer, Array], Optimizer]


class Pair(NamedTuple):
    """What one method moved.

    Attributes:
      deformed: theta_a^t - theta_a^0, (steps + 1, n).
      mapped: phi of the same on the inserted network.
      norms: |g_a| before each step of the run on the deformed network.
    """

    deformed: np.ndarray
    mapped: np.ndarray
    norms: np.ndarray


def compare(
    loss: Any, params: PyTree, plan: Plan, args: tuple[Any, ...], makers: tuple[Maker, ...]
) -> list[Pair]:
    """Run each method on both networks, with steps at which the largest curvature of H_a is stable.

    Args:
      loss: a Partial, loss(deformed params, *args).
      params: plain parameters.
      plan: what to deform.
      args: data.
      makers: methods, from EQUAL or DIFFERENT.
    """
    inserted, deformed = (sd.apply_plan(params, at) for at in (plan.with_alpha(1.0), plan))
    norm, curvature = _start(loss, deformed, args)
    given = 0.03 / curvature, 0.8 * norm  # a larger step may amplify rounding where curvature grows
    path, norms = _paths(loss, deformed, args, plan, *given, makers, False)
    other, _ = _paths(loss, inserted, args, plan, *given, makers, True)
    path, other = (np.asarray(x) for x in _flattened(path, other, plan))
    return [
        Pair(path[:, i] - path[:1, i], other[:, i] - other[:1, i], np.asarray(norms)[:, i])
        for i in range(len(makers))
    ]


@jax.jit
def _start(loss: Any, params: PyTree, args: tuple[Any, ...]) -> tuple[Array, Array]:
    """Return |g| and, by ten power iterations from there, sigma_1 of the Hessian."""
    gradient = jax.grad(loss)

    def iterate(v: PyTree, _: None) -> tuple[PyTree, Array]:
        _, product = jax.jvp(lambda at: gradient(at, *args), (params,), (v,))
        size = trees.norm(product)
        return trees.scale(1 / size, product), size

    g = gradient(params, *args)
    norm = trees.norm(g)
    _, sizes = jax.lax.scan(iterate, trees.scale(1 / norm, g), None, length=10)
    return norm, jnp.max(sizes)


def preconditioning(plan: Plan) -> Optimizer:
    """Return the transformation g -> phi^-1 phi^-T g."""
    return optax.stateless(lambda g, _: bounds.preconditioned(g, plan))


def clipping(c: Array, plan: Plan | None) -> Optimizer:
    """Clip by the global norm, on the inserted network (given the plan) by that of phi^-T g."""
    if plan is None:
        return optax.clip_by_global_norm(c)

    def clip(g: PyTree, _: PyTree) -> PyTree:
        norm = optax.tree.norm(bounds.phi_inverse(g, plan))  # phi is self-adjoint
        return jax.tree.map(lambda x: x * jnp.minimum(1.0, c / norm), g)

    return optax.stateless(clip)


def per_tensor(g: PyTree, _: PyTree) -> PyTree:
    """Multiply each tensor by a factor of its own."""
    leaves, treedef = jax.tree.flatten(g)
    return treedef.unflatten([(1 + i % 3 / 5) * leaf for i, leaf in enumerate(leaves)])


def per_entry(g: PyTree, _: PyTree) -> PyTree:
    """Multiply the entries of each tensor by different factors."""
    return jax.tree.map(lambda x: x * jnp.linspace(0.5, 1.5, x.size).reshape(x.shape), g)


# Each maps (step, preconditioner, clipping in its metric, threshold) to a method; on the deformed network the
# preconditioner is the identity and the metric the Euclidean one.
EQUAL: dict[str, Maker] = {
    "GD": lambda s, P, clip, c: optax.chain(P, optax.sgd(s)),
    "heavy ball": lambda s, P, clip, c: optax.chain(P, optax.sgd(s, momentum=0.9)),
    "Nesterov": lambda s, P, clip, c: optax.chain(P, optax.sgd(s, momentum=0.9, nesterov=True)),
    "heavy ball with decoupled decay": lambda s, P, clip, c: optax.chain(
        P, optax.trace(0.9), optax.add_decayed_weights(DECAY), optax.scale(-s)
    ),
    "decay within the momentum, behind the preconditioner": lambda s, P, clip, c: optax.chain(
        P, optax.add_decayed_weights(DECAY), optax.sgd(s, momentum=0.9)
    ),
    "debiased EMA, cosine schedule": lambda s, P, clip, c: optax.chain(
        P, optax.ema(0.9), optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, STEPS)), optax.scale(-s)
    ),
    "a step for every tensor": lambda s, P, clip, c: optax.chain(
        P, optax.stateless(per_tensor), optax.sgd(s)
    ),
    "heavy ball clipped by |phi^-T g|": lambda s, P, clip, c: optax.chain(
        clip, P, optax.sgd(s, momentum=0.9)
    ),
}
DIFFERENT: dict[str, Maker] = {
    "Adam": lambda s, P, clip, c: optax.chain(P, optax.adam(s)),
    "clipped by |g_1|": lambda s, P, clip, c: optax.chain(optax.clip_by_global_norm(c), P, optax.sgd(s)),
    "clipped by |phi^-1 phi^-T g_1|": lambda s, P, clip, c: optax.chain(
        P, optax.clip_by_global_norm(c), optax.sgd(s)
    ),
    "decay in front of the preconditioner": lambda s, P, clip, c: optax.chain(
        optax.add_decayed_weights(DECAY), P, optax.sgd(s)
    ),
    "a step for every entry": lambda s, P, clip, c: optax.chain(P, optax.stateless(per_entry), optax.sgd(s)),
}
CLIPPED = "heavy ball clipped by |phi^-T g|"


@partial(jax.jit, static_argnames=("makers", "inserted"))
def _paths(
    loss: Any, start: PyTree, args: tuple[Any, ...], plan: Plan, step: Array, threshold: Array,
    makers: tuple[Maker, ...], inserted: bool,
) -> tuple[PyTree, Array]:  # fmt: skip
    """Return the parameters (steps + 1, methods, ...) and the norms of the gradients (steps, methods)."""
    P = preconditioning(plan) if inserted else optax.identity()
    clip = clipping(threshold, plan if inserted else None)
    optimizers = [make(step, P, clip, threshold) for make in makers]

    def one(carry: tuple, _: None) -> tuple[tuple, tuple]:
        points, states = carry
        gradients = jax.vmap(lambda point: jax.grad(loss)(point, *args))(points)
        after = []
        for i, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
            point, gradient = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in (points, gradients))
            updates, state = optimizer.update(gradient, state, point)
            after.append((optax.apply_updates(point, updates), state))
        moved, states = zip(*after, strict=True)
        moved = jax.tree.map(lambda *xs: jnp.stack(xs), *moved)
        return (moved, states), (moved, jax.vmap(trees.norm)(gradients))

    points = jax.tree.map(lambda x: jnp.stack([x] * len(makers)), start)
    states = tuple(optimizer.init(start) for optimizer in optimizers)
    _, (path, norms) = jax.lax.scan(one, (points, states), None, length=STEPS)
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), points, path), norms


@jax.jit
def _flattened(path: PyTree, other: PyTree, plan: Plan) -> tuple[Array, Array]:
    """Return both paths as (steps + 1, methods, n), the second after phi."""

    def flat(tree: PyTree) -> Array:
        return ravel_pytree(tree)[0]

    return jax.vmap(jax.vmap(flat))(path), jax.vmap(jax.vmap(lambda tree: flat(bounds.phi(tree, plan))))(
        other
    )
