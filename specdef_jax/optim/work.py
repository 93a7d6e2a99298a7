"""The work of a step, counted in gradients, read from the state that an optimizer leaves behind.

An optimizer of ours says in its state what its last step took beside the gradient it was given, in the fields

    products    Hessian or Gauss-Newton products
    gradients   further gradients of the loss
    values      further values of the loss

each present where it can be other than 0. optax's line searches and Sophia are read by their own types.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree
from optax.contrib import SophiaState

from specdef_jax.optim.adahessian import AdaHessianState
from specdef_jax.optim.cubic_newton import CubicState
from specdef_jax.optim.kfac import KfacState
from specdef_jax.optim.levenberg_marquardt import DampedState
from specdef_jax.optim.newton_cg import NewtonCGState

# In gradients, by passes through the network: one forward and one back; a product takes both twice.
PRODUCT, VALUE = 2.0, 0.5

_OURS = (NewtonCGState, DampedState, CubicState, AdaHessianState, KfacState)
_KNOWN = (
    *_OURS,
    SophiaState,
    optax.ScaleByZoomLinesearchState,
    optax.ScaleByBacktrackingLinesearchState,
)


def work(state: PyTree, *, sophia_every: int = 10) -> Float[Array, ""]:
    """Return how many gradients the last step was worth, as a traced scalar.

    1 for the gradient itself, 2 for a Hessian or Gauss-Newton product, 1 for a further value with gradient,
    .5 for a further value. Not counted: linear algebra of the optimizer's own, what vmap adds by taking both
    branches of a cond, and the gradient that optax.value_and_grad_from_state saves. States may be nested,
    chained or masked; one that is of no type known here, such as a first-order state, adds nothing. Before
    the first step it is 1.

    Args:
      state: of any optax transformation, after a step.
      sophia_every: the update_interval of optax's Sophia, which its state does not tell.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, _KNOWN))
    extra = [_extra(node, sophia_every) for node in nodes if isinstance(node, _KNOWN)]
    return jnp.asarray(1.0 + sum(extra), jnp.result_type(float))


def _extra(node: Any, sophia_every: int) -> Any:
    if isinstance(node, SophiaState):  # its product comes after steps 1, 1 + every, ...
        return jnp.where((node.count > 0) & ((node.count - 1) % sophia_every == 0), PRODUCT, 0.0)
    if isinstance(node, optax.ScaleByZoomLinesearchState):
        return node.info.num_linesearch_steps
    if isinstance(node, optax.ScaleByBacktrackingLinesearchState):
        tried = jnp.asarray(
            node.info.num_linesearch_steps
        )  # forward each, and back once if the gradient is kept
        return VALUE * tried + (0 if node.grad is None else jnp.where(tried > 0, 1 - VALUE, 0))
    products, gradients, values = (getattr(node, f, 0) for f in ("products", "gradients", "values"))
    return PRODUCT * products + gradients + VALUE * values
