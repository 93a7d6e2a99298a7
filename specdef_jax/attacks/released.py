"""What an attacker finds in a released tree."""

from __future__ import annotations

from collections.abc import Callable

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
        raise ProblemError("no leaf of this tree is deformed; there is nothing to attack.")
    return pairs


def plain_problem(loss: Callable[..., Array], deformed: PyTree) -> Problem:
    """Return the problem of training the merged network itself."""
    partial = loss if isinstance(loss, Partial) else Partial(loss)
    return Problem(merge(deformed), partial, Partial(merge))
