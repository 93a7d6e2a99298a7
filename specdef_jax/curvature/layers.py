"""Curvature layer by layer: the principal Hessian block of each leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from jaxtyping import Array, PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.curvature.blocks import Globs, block, chosen
from specdef_jax.curvature.lanczos import eigsh
from specdef_jax.curvature.restart import Which
from specdef_jax.curvature.result import Eigen


def by_leaf(
    loss: Callable[..., Array],
    params: PyTree,
    *args: Any,
    key: PRNGKeyArray,
    where: Globs = "**",
    k: int = 1,
    which: Which = "LM",
    tol: float = 1e-4,
    max_matvecs: int = 2000,
) -> Iterator[tuple[str, Eigen]]:
    """Yield (name, extreme eigenpairs of the Hessian block of that leaf), leaf by leaf.

    The largest magnitude of a block is a lower bound on that of the whole Hessian (Cauchy interlacing), so
    the table says where the sharpness sits.

    Args:
      loss: loss(params, *args) -> real scalar; one for plain parameters also takes a deformed tree, whose
        weights and compensations are leaves of their own.
      params: tree of float arrays.
      *args: data of the loss.
      key: seeds the start vectors.
      where: globs of the leaves, all of them by default.
      k: pairs of each, fewer where the leaf has fewer entries.
      which: as in eigsh.
      tol: as in eigsh.
      max_matvecs: budget of products for each leaf.

    Raises:
      SelectionError: a glob matches no leaf.
      ProblemError: a chosen leaf is not a real float, or the loss does not evaluate to a real scalar.
    """
    sizes = {name: leaf.size for name, leaf in trees.named_leaves(params)}
    for name in chosen(params, where):
        op = block(loss, params, name, None, *args)
        yield name, eigsh(op, min(k, sizes[name]), which, tol, key=key, max_matvecs=max_matvecs)
