"""Two step sizes: C at c / a^2, everything else at c (THEORY.md 5.2b).

Nothing is added but one number a layer. Top curvature in that metric is at most that of the identity-inserted
network, whatever a; only few directions of a layer stay slow. a is read off the released weights: T(1/a) has
no singular value below 1/a, and an orthogonal matrix between the factors changes none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from specdef_jax.attacks.bill import Attack, Factory, carry_out
from specdef_jax.attacks.released import check_invertible
from specdef_jax.parametrization import Deformed, Problem, is_structured, problem


def two_steps(loss: Callable[..., Array], deformed: PyTree, *args: Any) -> Attack:
    """Return the attack that trains the released tree as it is, by an optimizer with two step sizes.

    Args:
      loss: loss(params, *args) of the plain network.
      deformed: the deformed tree.
      args: data of one step, for the bill.

    Raises:
      ProblemError: nothing is deformed, or a compensation is singular or not finite.
    """
    convert = functools.partial(_problem, loss, deformed, *args)
    return carry_out("two_steps", convert, loss, deformed, *args, wrap=TwoSteps)


@dataclass(frozen=True)
class TwoSteps:
    """An optimizer whose updates of every compensation are divided by a^2; call it with a step size.

    Attributes:
      factory: step_size -> optax transformation.
    """

    factory: Factory

    def __call__(self, step_size: Array | float) -> optax.GradientTransformation:
        """Return the transformation at a step size."""
        inner = optax.with_extra_args_support(self.factory(step_size))

        def init(params: PyTree) -> TwoStepsState:
            return TwoStepsState(inner.init(params), shares(params))

        def update(
            updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
        ) -> tuple[PyTree, TwoStepsState]:
            updates, after = inner.update(updates, state.inner, params, **extra)
            slowed = jax.tree.map(lambda u, share: (u * share).astype(u.dtype), updates, state.shares)
            return slowed, TwoStepsState(after, state.shares)

        return optax.GradientTransformationExtraArgs(init, update)


class TwoStepsState(NamedTuple):
    """State of the optimizer inside, and the share of its step that each leaf takes."""

    inner: PyTree
    shares: PyTree


def shares(params: PyTree) -> PyTree:
    """Return 1 for every leaf but compensations, for them a^-2, (*stack, 1, 1), from the weights alone.

    1/a is the smallest singular value, at most 1: that of an identity is 1, and of another defence's factor
    above it nothing is known.

    Args:
      params: a tree, deformed or not, as it was released.
    """

    def visit(leaf: Any) -> Any:
        ones = jax.tree.map(lambda x: jnp.ones((), x.dtype), leaf)
        if not isinstance(leaf, Deformed):
            return ones
        smallest = jnp.linalg.svd(leaf.comp, compute_uv=False)[..., -1, None, None]
        return replace(ones, comp=jnp.minimum(jnp.square(smallest), 1))

    return jax.tree.map(visit, params, is_leaf=is_structured)


def _problem(loss: Callable[..., Array], deformed: PyTree, *args: Any) -> Problem:
    check_invertible(deformed)
    return problem(loss, deformed, *args)
