"""Gradient descent in a narrow format: what moves, and which updates change nothing (statement 1.5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from specdef_jax import trees

STEPS = 50


class Frozen(NamedTuple):
    """What fifty steps did.

    Attributes:
      comp: share of the compensation's entries that moved.
      rest: share of all others that moved.
      lost: share of their updates, not zero, that changed nothing.
    """

    comp: float
    rest: float
    lost: float


def cast(tree: PyTree, dtype: str) -> PyTree:
    """Return the tree with its floats in another dtype."""

    def narrow(leaf: Array) -> Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(narrow, tree)


def descend(
    loss: Callable[..., Array], tree: PyTree, args: tuple[Any, ...], step: float, *, master: bool
) -> tuple[PyTree, PyTree]:
    """Return the parameters after STEPS steps and, per entry, how many updates changed nothing.

    With master weights the gradient is taken at the parameters rounded to bfloat16.
    """

    @jax.jit
    def run(tree: PyTree, args: tuple[Any, ...]) -> tuple[PyTree, PyTree]:
        def advance(carry: tuple[PyTree, PyTree], _: None) -> tuple[tuple[PyTree, PyTree], None]:
            here, lost = carry
            gradient = jax.grad(loss)(cast(here, "bfloat16") if master else here, *args)
            updates = jax.tree.map(lambda x, g: (-step * g).astype(x.dtype), here, gradient)
            after = optax.apply_updates(here, updates)
            lost = jax.tree.map(lambda n, x, d, y: n + ((x == y) & (d != 0)), lost, here, updates, after)
            return (after, lost), None

        start = tree, jax.tree.map(lambda x: jnp.zeros(x.shape, int), tree)
        return jax.lax.scan(advance, start, None, length=STEPS)[0]

    return run(tree, args)


def moved(before: PyTree, ran: tuple[PyTree, PyTree]) -> Frozen:
    """Sum up what descend returned, for a tree with leaves named "comp"."""
    after, lost = (dict(trees.named_leaves(tree)) for tree in ran)
    start = dict(trees.named_leaves(before))
    comp = [np.asarray(start[p] != after[p]).ravel() for p in start if p.endswith("comp")]
    rest = [np.asarray(start[p] != after[p]).ravel() for p in start if not p.endswith("comp")]
    share = [np.asarray(lost[p]).ravel() / STEPS for p in start if not p.endswith("comp")]
    return Frozen(*(float(np.concatenate(part).mean()) for part in (comp, rest, share)))
