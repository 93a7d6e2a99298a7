"""What an attacker finds in a released tree, and how he trains something else in its places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from specdef_jax import trees
from specdef_jax.errors import ProblemError
from specdef_jax.parametrization import Deformed, Problem, is_structured, merge


def pairs_of(deformed: PyTree) -> dict[str, Deformed]:
    """Return the deformed leaves by name; ProblemError when there are none to attack."""
    named = trees.named_leaves(deformed, is_leaf=is_structured)
    pairs = {name: leaf for name, leaf in named if isinstance(leaf, Deformed)}
    if not pairs:
        raise ProblemError(
            "no leaf of this tree is deformed; there is nothing to attack. What was deformed in its place "
            "(gauge) is undone by rebalance or blind, with the adjacent kernels named in pairs."
        )
    return pairs


def plain_problem(loss: Callable[..., Array], deformed: PyTree) -> Problem:
    """Return the problem of training the merged network itself."""
    return Problem(merge(deformed), as_partial(loss), Partial(merge))


def through(loss: Callable[..., Array], params: PyTree, read_back: Partial) -> Problem:
    """Return the problem of training `params` by the plain network's loss on what they read back as."""
    return Problem(params, Partial(_through, as_partial(loss), read_back), read_back)


def in_place(
    deformed: PyTree, start: Callable[[Deformed], PyTree], keep: Callable[[Deformed], PyTree]
) -> tuple[PyTree, PyTree]:
    """Return the trainable tree and, in a tree of the same form, what is held frozen in each place.

    Args:
      deformed: the released tree.
      start: what is trained in the place of a pair.
      keep: what is held of it. Every other place holds None.

    Raises:
      ProblemError: nothing is deformed.
    """
    pairs_of(deformed)

    def visit(of_pair: Callable[[Deformed], PyTree], of_leaf: Callable[[Any], Any]) -> PyTree:
        return jax.tree.map(
            lambda leaf: of_pair(leaf) if isinstance(leaf, Deformed) else of_leaf(leaf),
            deformed,
            is_leaf=is_structured,
        )

    return visit(start, lambda leaf: leaf), visit(keep, lambda leaf: None)


def kernels_in_place(
    held: PyTree, params: PyTree, kernel: Callable[[Any, PyTree], Array], kind: type = Deformed
) -> PyTree:
    """Return the plain network: kernel(held, trained) in the places of pairs (see in_place).

    Args:
      held: what is frozen, None in other places.
      params: the trainable tree.
      kernel: puts a kernel together.
      kind: type of what is held.
    """
    plain = jax.tree.map(
        lambda here, part: part if here is None else kernel(here, part),
        held,
        params,
        is_leaf=lambda node: node is None or isinstance(node, kind),
    )
    return merge(plain)


def check_invertible(deformed: PyTree) -> None:
    """Raise ProblemError if a compensation is singular to rounding, or not finite, or nothing is deformed."""
    for name, pair in pairs_of(deformed).items():
        values = jnp.linalg.svd(pair.comp, compute_uv=False)
        smallest, largest = float(values.min()), float(values.max())
        if not smallest > jnp.finfo(values.dtype).eps * largest:
            raise ProblemError(
                f"'{name}': the singular values of its compensation go from {largest:.3g} down to "
                f"{smallest:.3g}, or are not finite; no metric follows from it. Use fuse."
            )


def moved(task: Problem, params: PyTree) -> None:
    """Check that all that an attack trains has moved from where it started.

    Args:
      task: the problem of an attack.
      params: its parameters after training.

    Raises:
      ProblemError: leaves stayed where they were, or are not finite; they are named.
      StructureError: the trees differ.
    """
    trees.check_same_structure(task.params, params, "the trained parameters")
    pairs = zip(trees.named_leaves(task.params), jax.tree.leaves(params), strict=True)
    stuck = [name for (name, old), new in pairs if not bool(jnp.any(new != old) & jnp.all(jnp.isfinite(new)))]
    if stuck:
        raise ProblemError(
            f"{', '.join(map(repr, stuck))} did not move, or left the finite numbers: no gradient reaches "
            "there, or the step size is wrong by orders of magnitude."
        )


def as_partial(loss: Callable[..., Array]) -> Partial:
    """Return a function as a pytree of what it carries."""
    return loss if isinstance(loss, Partial) else Partial(loss)


def _through(loss: Partial, read_back: Partial, params: PyTree, *args: Any) -> Array:
    return loss(read_back(params), *args)
