"""Operators as a preconditioned optimizer sees them: P^-1/2 A P^-1/2 (THEORY.md 3.2).

A step theta -= eta P^-1 grad L is a gradient step in P^1/2 theta, where the Hessian is P^-1/2 H P^-1/2; its
largest eigenvalue, not that of H, decides which eta is stable.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import PyTree

from specdef_jax import trees
from specdef_jax.curvature.operators import Operator
from specdef_jax.errors import ProblemError


def preconditioned(op: Operator, diagonal: PyTree) -> Operator:
    """Return P^-1/2 A P^-1/2 for a diagonal P > 0.

    Args:
      op: square operator on a tree.
      diagonal: the diagonal of P, a tree like op.template; adam_diagonal gives Adam's.

    Raises:
      StructureError: the diagonal has another structure or other shapes.
      ProblemError: an entry is not positive and finite (its leaf is named; not looked at under jit).
    """
    trees.check_same_structure(op.template, diagonal, "diagonal of P")
    for name, leaf in trees.named_leaves(diagonal):
        if not isinstance(leaf, Tracer) and not bool(jnp.all((leaf > 0) & jnp.isfinite(leaf))):
            raise ProblemError(f"diagonal of P: leaf '{name}' has entries that are not positive and finite.")
    product = Partial(_product, op, jax.tree.map(jax.lax.rsqrt, diagonal))
    return Operator(product, op.domain, f"preconditioned {op.kind}", op.symmetric, _transpose)


def adam_diagonal(state: PyTree, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0) -> PyTree:
    """Return P = sqrt(v_hat + eps_root) + eps of the next division by Adam, from an optax state.

    Args:
      state: state of any optax chain that holds one optax.ScaleByAdamState (adam, adamw, nadam, ...).
      b2: decay rate of the second moment, which the state does not keep.
      eps: added to the root, as given to the optimizer.
      eps_root: added below the root.

    Raises:
      ProblemError: the state holds no such state or several, or no step was taken yet.
    """
    found = [s for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s)]
    if len(found) != 1:
        raise ProblemError(f"the optimizer state holds {len(found)} of optax's ScaleByAdamState, not one.")
    count = found[0].count
    if not isinstance(count, Tracer) and int(count) == 0:
        raise ProblemError("Adam has taken no step yet, so its second moment says nothing.")
    correction = 1 - b2 ** jnp.asarray(count, jnp.result_type(float))
    return jax.tree.map(lambda v: jnp.sqrt(v / correction.astype(v.dtype) + eps_root) + eps, found[0].nu)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _product(op: Operator, root: PyTree, tree: PyTree) -> PyTree:
    return _scaled(root, op.mv(_scaled(root, tree)))


def _transpose(op: Operator, root: PyTree, tree: PyTree) -> PyTree:
    return _scaled(root, op.rmv(_scaled(root, tree)))


def _scaled(root: PyTree, tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.multiply, root, tree)
