"""The top of a tensor's spectrum, and what in it looks like a deformation.

A suspicion is no proof: trained layers with correlated features show gaps of a hundred undeformed, and a
small alpha hides among them (THEORY.md 5.6).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import PRNGKeyArray

from specdef_jax.hub.measuring import group_of
from specdef_jax.hub.placing import leading
from specdef_jax.parametrization import KernelAxes, Side
from specdef_jax.precision import in_rows

LOOK = 33  # values looked at: the paper deforms 25 directions
SHOWN = 3
JUMP = 30.0  # ratio of neighbours from which a deformation is suspected


@dataclass(frozen=True)
class Spectrum:
    """The leading singular values of a kernel.

    Attributes:
      values: descending, the first few; None if there are none to give.
      gap: largest ratio of neighbours among the first LOOK, leaving out what is zero to rounding.
      suspected: what looks like a deformation, empty if nothing does.
      note: why there are no values.
    """

    values: list[float] | None = None
    gap: float | None = None
    suspected: str = ""
    note: str = ""


def spectrum_of(array: np.ndarray, axes: KernelAxes, key: PRNGKeyArray) -> Spectrum:
    """Return the spectrum of a kernel; of a stack that of the matrix with the largest first value."""
    if not array.size:
        return Spectrum(note="empty")
    if not bool(jnp.isfinite(jnp.asarray(array)).all()):
        return Spectrum(note="holds NaN or Inf")
    shape = axes.to_stack(array, "output").shape
    values = leading(array, axes, min(LOOK, *shape[1:]), key)
    floor = float(jnp.finfo(array.dtype).eps) * max(shape[1:]) ** 0.5
    gap, place = _jump(values, floor)
    found = [f"gap {gap:.3g} after {place}"] if gap >= JUMP else []
    for side in get_args(Side):
        each = (_feature_norms(matrix) for matrix in axes.to_stack(array, side))
        jump, count = max(_jump(sorted(norms.tolist(), reverse=True)[:LOOK], floor) for norms in each)
        if jump >= JUMP:
            found.append(f"{count} {side} feature{'s' * (count > 1)} {jump:.3g} times the others")
    return Spectrum(values[:SHOWN], gap if len(values) > 1 and gap else None, "; ".join(found))


def suspect_gauge(first: np.ndarray, second: np.ndarray, groups: int) -> str:
    """Tell whether features between two adjacent maps are out of balance, as a gauge deformation leaves them.

    Args:
      first: (in, groups * d).
      second: (heads * d, out).
      groups: number of key-value heads.
    """
    worst = 0.0
    for i in range(groups):
        V, W = (x.astype(np.float64) for x in group_of(first, second, i, groups))
        if not (np.isfinite(V).all() and np.isfinite(W).all()):
            return ""
        A, B = V.T @ V, W @ W.T
        tiny = 1e-15 * max(float(np.trace(A)), float(np.trace(B)), np.finfo(float).tiny)
        imbalance = np.sqrt(np.abs(scipy.linalg.eigh(A, B + tiny * np.eye(len(B)), eigvals_only=True)))
        worst = max(worst, _jump(sorted(imbalance.tolist(), reverse=True)[:LOOK], 0.0)[0])
    return f"value and output features out of balance, {worst:.3g} times the others" if worst >= JUMP else ""


def _jump(values: Sequence[float], floor: float) -> tuple[float, int]:
    """Return the largest ratio of neighbours above the floor, and after how many values it stands."""
    pairs = enumerate(itertools.pairwise(values), 1)
    ratios = ((a / b, i) for i, (a, b) in pairs if b > floor * values[0] and b > 0)
    return max(ratios, default=(0.0, 0))


def _feature_norms(matrix: np.ndarray) -> np.ndarray:
    """Return the norm of each column."""
    return np.sqrt(sum((np.square(x).sum(axis=0) for (x,) in in_rows(matrix)), np.zeros(matrix.shape[1])))
