"""The fast subspace: what gradient descent with a stable step can still move (THEORY.md 3.3).

At step c / alpha^2 the trajectory of a deformed network tends to gradient descent with step c on
W -> W + B U^T W alone (input side W + W V B^T). In matrix form both read M -> M + (M U) B^T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from specdef_jax import trees
from specdef_jax.errors import StructureError
from specdef_jax.parametrization import Problem, loss_on
from specdef_jax.parametrization import full_precision_matmul as matmul
from specdef_jax.spec import Layer, Plan


def fast_subspace(loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any) -> Problem:
    """Return the problem of training the fast set alone, scaled by the plan's alphas.

    Its parameters are {path: B (*stack, d, k)}, zero at the start, its loss is
    L(W + alpha B U^T W), and its Hessian at zero is the block of the deformed network's Hessian on
    the directions dC = B U^T: alpha_i alpha_j K_U (THEORY.md 2.2), for any loss and architecture,
    with weight sharing and several layers.

    Args:
      loss: loss(params, *args) of the plain network.
      params: plain parameters.
      plan: directions and alphas.
      args: data, to check the loss.

    Raises:
      StructureError: the plan names a leaf that `params` does not have as a plain array.
    """
    leaves = dict(trees.named_leaves(params))
    if missing := set(plan.layers) - set(leaves):
        raise StructureError(
            f"the plan names {sorted(missing)}, which are no plain leaves of the parameters; "
            "plan on the same tree, or merge it first (sd.merge)."
        )
    start = {path: jnp.zeros(layer.U.shape, jnp.result_type(leaves[path])) for path, layer in plan.items()}
    as_partial = loss_on(loss, params, *args)
    return Problem(
        start,
        Partial(_loss_in_fast_set, as_partial, params, plan),
        Partial(_move_in_fast_set, params, plan),
    )


def fast_subspace_loss(
    loss: Callable[..., Array],
    params: PyTree,
    plan: Plan,
    *args: Any,
    steps: int = 500,
    tol: float = 1e-6,
) -> Float[Array, ""]:
    """Return an upper estimate of the floor L*_U = inf_B L(W + B U^T W), by L-BFGS from B = 0.

    The infimum may lie lower (the problem need not be convex, and it may not be attained). alpha
    does not matter for the floor; it is set to 1.

    Args:
      loss: loss(params, *args) of the plain network.
      params: plain parameters.
      plan: directions.
      *args: data.
      steps: at most this many L-BFGS steps.
      tol: stop when the gradient norm falls below this.
    """
    task = fast_subspace(loss, params, plan.with_alpha(1.0), *args)
    return _minimize(task.loss, task.params, args, steps, tol)


def fast_limit_error(
    alpha: Float[Array, "..."] | float,
    step: Float[Array, "..."] | float,
    steps: Float[Array, "..."] | int,
    lipschitz: Float[Array, "..."] | float,
    gradient: Float[Array, "..."] | float,
) -> Float[Array, "..."]:
    """Return a bound on the distance between the deformed trajectory and the fast one after T steps.

    In the coordinates of alpha = 1 gradient descent at step c / alpha^2 is the fast iteration plus a drift
    of at most c gradient / alpha^2 a step, which the fast iteration may amplify by 1 + c lipschitz:
    the distance is at most gradient ((1 + c lipschitz)^T - 1) / (alpha^2 lipschitz).

    Args:
      alpha: >= 1.
      step: c.
      steps: T.
      lipschitz: largest singular value of the fast rows of the Hessian (all columns) where both run.
      gradient: largest norm of the slow part of the gradient on the deformed trajectory.

    Source: THEORY.md 3.3.
    """
    growth = jnp.expm1(steps * jnp.log1p(step * jnp.asarray(lipschitz)))
    return gradient * growth / (jnp.square(alpha) * lipschitz)


@jax.jit
def _minimize(loss: Partial, start: PyTree, args: tuple[Any, ...], steps: int, tol: float) -> Array:
    optimizer = optax.lbfgs()

    def value(params: PyTree) -> Array:
        return loss(params, *args)

    value_and_grad = optax.value_and_grad_from_state(value)

    def unfinished(carry: tuple) -> Array:
        _, _, step, gradient_norm, _ = carry
        return (step < steps) & (gradient_norm > tol)

    def advance(carry: tuple) -> tuple:
        params, state, step, _, best = carry
        current, gradient = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            gradient, state, params, value=current, grad=gradient, value_fn=value
        )
        best = jnp.fmin(best, current)
        return optax.apply_updates(params, updates), state, step + 1, trees.norm(gradient), best

    first = value(start)
    carry = (start, optimizer.init(start), 0, jnp.full((), jnp.inf, first.dtype), first)
    params, *_, best = jax.lax.while_loop(unfinished, advance, carry)
    return jnp.fmin(best, value(params))


def _loss_in_fast_set(loss: Partial, params: PyTree, plan: Plan, B: PyTree, *args: Any) -> Array:
    return loss(_move_in_fast_set(params, plan, B), *args)


def _move_in_fast_set(params: PyTree, plan: Plan, B: dict[str, Array]) -> PyTree:
    return trees.map_named(lambda name, leaf: _move(leaf, plan[name], B[name]) if name in B else leaf, params)


def _move(kernel: Array, layer: Layer, B: Array) -> Array:
    """Return the kernel of M + alpha (M U) B^T."""
    matrix = layer.axes.to_matrix(kernel, layer.side)
    U, alpha = layer.U.astype(kernel.dtype), layer.alpha.astype(kernel.dtype)
    step = matmul(matmul(matrix, U), jnp.swapaxes(alpha * B, -1, -2))
    return layer.axes.from_matrix(matrix + step, kernel.shape, layer.side)
