"""Optimizers followed step by step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from specdef_jax.parametrization import Problem


def trajectory(
    task: Problem, optimizer: optax.GradientTransformation, *args: Any, steps: int
) -> tuple[PyTree, Array]:
    """Return read_back(params) and the loss after 0, 1, ..., steps steps, leading axis steps + 1.

    The optimizer receives value, grad and value_fn, as a race hands them over.
    """
    return _run(task, args, optimizer, steps)


def plain(loss: Callable[..., Array], params: PyTree) -> Problem:
    """Return the problem of training params themselves."""
    return Problem(params, loss if isinstance(loss, Partial) else Partial(loss), Partial(_identity))


def _identity(tree: PyTree) -> PyTree:
    return tree


@partial(jax.jit, static_argnums=(2, 3))
def _run(
    task: Problem, args: tuple[Any, ...], optimizer: optax.GradientTransformation, steps: int
) -> tuple[PyTree, Array]:
    update = optax.with_extra_args_support(optimizer).update

    def objective(params: PyTree) -> Array:
        return task.loss(params, *args)

    def step(carry: tuple[PyTree, PyTree], _: None) -> tuple[tuple[PyTree, PyTree], tuple[PyTree, Array]]:
        params, state = carry
        value, grad = jax.value_and_grad(objective)(params)
        seen = task.read_back(params), value
        updates, state = update(grad, state, params, value=value, grad=grad, value_fn=objective)
        return (optax.apply_updates(params, updates), state), seen

    start = task.params, optimizer.init(task.params)
    (last, _), (path, losses) = jax.lax.scan(step, start, None, length=steps)
    end = task.read_back(last), objective(last)
    return jax.tree.map(lambda xs, x: jax.numpy.concatenate([xs, x[None]]), (path, losses), end)
