"""Blocks of an operator: some leaves of the parameters against others, by key path.

A block takes and returns dictionaries name -> array, with the names of trees.named_leaves. It is chosen by
globs; a glob that matches an inner node means everything below it.

    block(loss, params, "dense_1", None, *args)          principal, symmetric: eigsh
    block(loss, params, "dense_1", "dense_2", *args)     off-diagonal: svds, rmv is another Hessian product
    restricted(op, rows, cols)                           the same of any operator on a tree
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from specdef_jax import trees
from specdef_jax.curvature.operators import Operator, layout
from specdef_jax.errors import SelectionError
from specdef_jax.parametrization import loss_on
from specdef_jax.select import matches

Globs = str | Sequence[str]


def block(
    loss: Callable[..., Array], params: PyTree, rows: Globs, cols: Globs | None = None, *args: Any
) -> Operator:
    """Return the block d2 L / d rows d cols of the Hessian of loss(params, *args).

    Only the chosen leaves are differentiated, so a block costs less than the whole Hessian.

    Args:
      loss: loss(params, *args) -> real scalar; one for plain parameters also takes a deformed tree.
      params: tree of float arrays, at which the Hessian is taken.
      rows: glob or globs of the leaves of the image.
      cols: of the domain; None is the principal block of `rows`, which is symmetric.
      *args: data of the loss.

    Raises:
      SelectionError: a glob matches no leaf.
      ProblemError: a chosen leaf is not a real float, or the loss does not evaluate to a real scalar.

    Example:
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
      >>> op = block(lambda p: jnp.sum(p["a"]) ** 2 * jnp.sum(p["b"]), params, "a", "b")
      >>> op.mv({"b": jnp.ones(3)})
      {'a': Array([12., 12.], dtype=float32)}
    """
    of_rows = chosen(params, rows)
    of_cols = of_rows if cols is None else chosen(params, cols)
    symmetric = of_rows == of_cols
    as_partial = loss_on(loss, params, *args)
    product = Partial(_HessianBlock(of_rows, of_cols), as_partial, params, *args)
    transpose = None if symmetric else _HessianBlock(of_cols, of_rows)
    return Operator(product, layout(_taken(params, of_cols)), "Hessian block", symmetric, transpose)


def restricted(op: Operator, rows: Globs, cols: Globs | None = None) -> Operator:
    """Return the block of any operator from a tree to trees of the same structure.

    Each product costs one of the whole operator, its transpose one of the transpose.

    Raises:
      SelectionError: a glob matches no leaf.
    """
    of_rows = chosen(op.image, rows)
    of_cols = of_rows if cols is None else chosen(op.template, cols)
    symmetric = op.symmetric and of_rows == of_cols
    product = Partial(_Restriction(of_rows, of_cols), op)
    transpose = None if symmetric else _TransposedRestriction(of_rows, of_cols)
    return Operator(
        product, layout(_taken(op.template, of_cols)), f"block of {op.kind}", symmetric, transpose
    )


def chosen(tree: PyTree, globs: Globs) -> tuple[str, ...]:
    """Return the names, in tree order, of the leaves that globs match or that lie below a match.

    Raises:
      SelectionError: a glob matches nothing; the names are listed.
    """
    globs = (globs,) if isinstance(globs, str) else tuple(globs)
    names = [name for name, _ in trees.named_leaves(tree)]
    found: set[str] = set()
    for glob in globs:
        hit = {name for name in names if any(glob == at or matches(glob, at) for at in _ancestry(name))}
        if not hit:
            raise SelectionError(f"no leaf matches {glob!r}; there are {', '.join(names)}.")
        found |= hit
    if not found:
        raise SelectionError(f"choose leaves by at least one glob; there are {', '.join(names)}.")
    return tuple(name for name in names if name in found)


def _ancestry(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


@dataclass(frozen=True)
class _HessianBlock:
    """(loss, params, *data, tangent of cols) -> rows; equal where the names are, so that it compiles once."""

    rows: tuple[str, ...]
    cols: tuple[str, ...]

    def __call__(self, loss: Partial, params: PyTree, *args: Any) -> dict[str, Array]:
        *data, tangent = args

        def gradient(at_cols: dict[str, Array]) -> dict[str, Array]:
            at = _replaced(params, at_cols)
            return jax.grad(lambda r: loss(_replaced(at, r), *data))(_taken(at, self.rows))

        return jax.jvp(gradient, (_taken(params, self.cols),), (tangent,))[1]


@dataclass(frozen=True)
class _Restriction:
    rows: tuple[str, ...]
    cols: tuple[str, ...]

    def __call__(self, op: Operator, tangent: dict[str, Array]) -> dict[str, Array]:
        return _taken(op.mv(_replaced(_zeros(op.template), tangent)), self.rows)


@dataclass(frozen=True)
class _TransposedRestriction:
    rows: tuple[str, ...]
    cols: tuple[str, ...]

    def __call__(self, op: Operator, cotangent: dict[str, Array]) -> dict[str, Array]:
        return _taken(op.rmv(_replaced(_zeros(op.image), cotangent)), self.cols)


def _zeros(template: PyTree) -> PyTree:
    return jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), template)


def _taken(tree: PyTree, names: tuple[str, ...]) -> dict[str, Any]:
    found = dict(trees.named_leaves(tree))
    return {name: found[name] for name in names}


def _replaced(tree: PyTree, leaves: dict[str, Any]) -> PyTree:
    return trees.map_named(lambda name, leaf: leaves.get(name, leaf), tree)
