"""The positive control: a sharp reparametrization that is no defence of the weights (THEORY.md 3.3 (v)).

One entry of one leaf, usually an output bias, is written b = alpha b~ and b~ is trained. The function
is unchanged, nothing is inserted, and the sharpness grows as alpha^2 along a single direction. A
defence that does not resist longer than this at equal sharpness owes its effect to sharpness alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree
from scipy.optimize import brentq

from specdef_jax import trees
from specdef_jax.errors import ProblemError, SelectionError, SpecError
from specdef_jax.parametrization import Problem, loss_on

_STEPS = 8


def scalar_control(
    loss: Callable[..., Array],
    params: PyTree,
    path: str,
    alpha: float | Float[Array, ""],
    *args: Any,
    index: int = 0,
) -> Problem:
    """Return the problem in which entry `index` of the leaf at `path` is rescaled by alpha.

    Args:
      loss: loss(params, *args).
      params: plain parameters.
      path: name of the leaf.
      alpha: the factor; its square multiplies the curvature along this entry.
      args: data, to check the loss.
      index: position in the flattened leaf.

    Raises:
      SelectionError: no leaf has this name, or it has no such entry.
      SpecError: alpha is known, and not positive and finite.
    """
    if not isinstance(alpha, Tracer) and not (math.isfinite(alpha) and alpha > 0):
        raise SpecError(f"alpha = {alpha}: must be positive and finite.")
    leaves = dict(trees.named_leaves(params))
    if path not in leaves or not 0 <= index < leaves[path].size:
        raise SelectionError(f"no entry {index} of a leaf '{path}'; leaves: {', '.join(map(repr, leaves))}.")
    leaf = leaves[path]
    scale = jnp.ones(leaf.size, leaf.dtype).at[index].set(alpha).reshape(leaf.shape)
    scales = {path: scale}
    start = trees.map_named(lambda name, x: x / scale if name == path else x, params)
    as_partial = loss_on(loss, params, *args)
    return Problem(start, Partial(_rescaled_loss, as_partial, scales), Partial(_rescale, scales))


def match_sharpness(
    sharpness: Callable[[float], float], target: float, guess: float, *, rtol: float = 0.01
) -> tuple[float, float]:
    """Return (alpha, sharpness(alpha)) with the sharpness within about rtol of the target.

    Args:
      sharpness: alpha -> sigma_1, not decreasing; as alpha^2 up to a constant for large alpha.
      target: the sharpness to reach.
      guess: an alpha to start from, >= 1.
      rtol: how close to come.

    Raises:
      ProblemError: the target is not positive and finite, the sharpness at alpha = 1 exceeds it by
        more than rtol, or no alpha up to 2^20 guesses reaches it.
    """
    if not (math.isfinite(target) and target > 0):
        raise ProblemError(f"target sharpness {target}: must be positive and finite.")
    measured: dict[float, float] = {}

    def excess(log_alpha: float) -> float:
        alpha = math.exp(log_alpha)
        if alpha not in measured:
            measured[alpha] = sharpness(alpha)
        return math.log(measured[alpha] / target) if measured[alpha] > 0 else -math.inf

    low, high = 0.0, math.log(max(guess, 1.0))
    limit = high + 20 * math.log(2)
    # The slope of one rescaled coordinate is twice its share of the eigenvector squared, from 0 to 2: steps
    # of half the excess approach from one side, and arrive at once where the coordinate is most of it.
    for _ in range(_STEPS):
        if abs(excess(high)) <= rtol / 2 or not 0 < high < limit:
            break
        high = min(max(high - excess(high) / 2, 0.0), limit)
    if abs(excess(high)) <= rtol / 2:
        return math.exp(high), measured[math.exp(high)]
    while excess(high) < 0 and high < limit:
        low, high = high, high + math.log(2)
    if low == 0 and 0 <= excess(low) <= rtol:
        return 1.0, measured[1.0]
    if measured[math.exp(high)] < target or (low == 0 and excess(low) > 0):
        alpha, found = min(measured.items(), key=lambda item: abs(math.log(max(item[1], 1e-300) / target)))
        raise ProblemError(
            f"no alpha gives sharpness {target:.4g}; the closest is {found:.4g} at alpha = {alpha:.4g}. "
            "Choose other directions, or an entry with curvature."
        )
    root = brentq(excess, low, high, xtol=rtol / 4) if high > low else high
    alpha = math.exp(root)  # type: ignore[arg-type]  # brentq returns a float unless full_output is asked
    return alpha, measured[alpha] if alpha in measured else sharpness(alpha)


def _rescaled_loss(loss: Partial, scales: dict[str, Array], params: PyTree, *args: Any) -> Array:
    return loss(_rescale(scales, params), *args)


def _rescale(scales: dict[str, Array], params: PyTree) -> PyTree:
    return trees.map_named(lambda name, leaf: leaf * scales[name] if name in scales else leaf, params)
