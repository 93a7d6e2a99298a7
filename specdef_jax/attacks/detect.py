"""Detect: what the weights alone give away of a deformation, layer by layer (THEORY.md 5.6).

Scores are what they are, numbers of at least 1 without a threshold. A threshold comes from a statement:

    compensation   The singular values of C are 1/a (k times) and 1 (d - k times), whatever orthogonal matrix
                   stands between the factors. Another matrix has them to rounding with a chance of the order
                   of rounding to the power d - 1. Found while 1/a exceeds the rounding of C as a whole.
    imbalance      ||X||_F ||Y||_F / ||X Y||_* is at most sqrt(d) if either factor is a multiple of an
                   orthogonal matrix, as an inserted identity is: above it, something was done to the pair.
    gap, norm_jump, pencil_gap, ratio_jump
                   are multiplied by a, a, a^2, a^2, so that every deformation of at least `alpha` in the
                   directions that 5.6 names scores alpha (alpha^2) or more. This says nothing of layers that
                   were never deformed: many have large gaps of their own. Count false positives (roc).

Only an inserted pair is certain. A deformed weight by itself is the undeformed weight of another network.
After training nothing is exact any more, though gradient descent all but keeps the imbalance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from specdef_jax import trees
from specdef_jax.attacks.adjacent import AdjacentPair, factors_of, kernels_of
from specdef_jax.errors import LeafError
from specdef_jax.parametrization import Deformed, is_structured

Matrix = Float[np.ndarray, "_ _"]
NONE = math.nan  # a score that does not exist for the layer
ROUNDING = 1e-6  # relative, of a score that meets its limit exactly


@dataclass(frozen=True)
class Compensation:
    """A matrix whose singular values are one number (k times) and otherwise exactly 1.

    Attributes:
      alpha: the inverse of the number.
      k: how often it occurs.
      deviation: largest distance of a singular value from the two.
      tolerance: what storing the matrix once explains.
    """

    alpha: float
    k: int
    deviation: float
    tolerance: float


@dataclass(frozen=True)
class Scores:
    """What one layer, or one pair of adjacent maps, gives away; NaN where a score does not apply.

    Attributes:
      gap: largest quotient of consecutive singular values, those below rounding left out.
      norm_jump: largest quotient of consecutive sorted norms, of rows or of columns.
      imbalance: ||X||_F ||Y||_F / ||X Y||_*, of a pair; 1 if balanced.
      imbalance_limit: of an inserted pair, what it is not above if one factor is a multiple of an orthogonal
        matrix.
      pencil_gap: largest quotient of consecutive square roots of eigenvalues of (X^T X, Y Y^T), 1 if
        balanced.
      ratio_jump: largest quotient of consecutive sorted ||X column|| / ||Y row||, feature by feature.
      compensation: of the pair's factors, if one has the spectrum of a compensation.
    """

    gap: float = NONE
    norm_jump: float = NONE
    imbalance: float = NONE
    imbalance_limit: float = NONE
    pencil_gap: float = NONE
    ratio_jump: float = NONE
    compensation: Compensation | None = None

    @property
    def certain(self) -> bool:
        """Whether the sign was found that is no matter of degree."""
        return self.compensation is not None

    def signs(self, alpha: float) -> tuple[str, ...]:
        """Return the scores that reach what a deformation by at least alpha leaves (see the module).

        Not all is deformed that shows one: gaps and jumps are natural, too.
        """
        limits = {"gap": alpha, "norm_jump": alpha, "pencil_gap": alpha**2, "ratio_jump": alpha**2}
        found = [name for name, limit in limits.items() if getattr(self, name) >= (1 - ROUNDING) * limit]
        if self.imbalance > (1 + ROUNDING) * self.imbalance_limit:
            found.append("imbalance")
        return ("compensation", *found) if self.certain else tuple(found)


def detect(params: PyTree, pairs: Sequence[AdjacentPair] = ()) -> dict[str, Scores]:
    """Score every matrix of a tree, every Deformed leaf and every named pair, from the weights alone.

    Args:
      params: a released tree, deformed or not. Stacked layers score the largest of the stack.
      pairs: adjacent kernels of the architecture (value and output projections), whichever they are.

    Returns:
      Scores by name; of a pair, under "first + second". Leaves that are no matrices are left out. Kernels of
      convolutions are (window * in, out).

    Raises:
      LeafError: a matrix holds NaN or Inf.
      ProblemError, StructureError: a pair is not in the tree, or does not fit together.

    Example:
      >>> scores = detect({"w": jnp.diag(jnp.array([100.0, 1.0]))})
      >>> float(scores["w"].gap)
      100.0
    """
    leaves = dict(trees.named_leaves(params, is_leaf=is_structured))
    found = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, Deformed):
            weight, eps = leaf.axes.to_stack(leaf.weight, leaf.side), _eps(leaf.weight, leaf.comp)
            factors = zip(_wide(name, factors_of(leaf)[0]), _wide(name, factors_of(leaf)[1]), strict=True)
            found[name] = _largest(
                [_of_pair(X, Y, eps, M) for (X, Y), M in zip(factors, _wide(name, weight), strict=True)]
            )
        elif not is_structured(leaf) and _is_matrix(leaf):
            found[name] = _largest([_of_matrix(M, _eps(leaf)) for M in _wide(name, _stacked(leaf))])
    for pair in pairs:
        with jax.enable_x64(True):  # so that a float64 leaf stays float64
            X, Y = kernels_of(leaves, pair)
        eps = _eps(leaves[pair.first], leaves[pair.second])
        each = zip(_wide(pair.name, X), _wide(pair.name, Y), strict=True)
        found[pair.name] = _largest([_of_pair(x, y, eps) for x, y in each])
    return found


def compensation_of(matrix: Matrix, eps: float) -> Compensation | None:
    """Return alpha and k if a square matrix has the singular values of a compensation, else None.

    Values within the tolerance of 1 count as 1, and there must be one; the others must agree within it and
    exceed it. Storing C rounds each entry by eps/2 of itself, so moves each singular value by at most
    eps/2 ||C||_F (Weyl); the decomposition adds 8 d eps' ||C||, eps' that of float64. At k = d there is no
    value 1 to recognise it by, and of a 1 x 1 matrix nothing can be told.

    Args:
      matrix: (d, d).
      eps: of the dtype in which it was stored.
    """
    d = len(matrix)
    if matrix.shape != (d, d):
        return None
    values = np.linalg.svd(matrix, compute_uv=False)
    tolerance = (eps / 2) * np.linalg.norm(matrix) + 8 * d * np.finfo(float).eps * values[0]
    others = values[np.abs(values - 1) > tolerance]
    if others.size in (0, d) or others.min() <= tolerance or np.ptp(others) > 2 * tolerance:
        return None
    middle = float(np.mean(others))
    deviation = max(np.abs(values - 1)[np.abs(values - 1) <= tolerance].max(), np.abs(others - middle).max())
    return Compensation(1 / middle, others.size, float(deviation), float(tolerance))


def _of_matrix(matrix: Matrix, eps: float) -> Scores:
    jumps = (_largest_quotient(np.linalg.norm(matrix, axis=axis), 0.0) for axis in (0, 1))
    values = np.linalg.svd(matrix, compute_uv=False)
    return Scores(
        gap=_largest_quotient(values, _floor(matrix, values, eps)),
        norm_jump=max(jumps),
        compensation=compensation_of(matrix, eps),
    )


def _of_pair(X: Matrix, Y: Matrix, eps: float, weight: Matrix | None = None) -> Scores:
    """Score two factors, whichever is which, and the weight of an inserted pair as a matrix of its own."""
    product = np.linalg.svd(X @ Y, compute_uv=False).sum()
    alone = Scores() if weight is None else _of_matrix(weight, eps)
    found = [c for c in (compensation_of(X, eps), compensation_of(Y, eps)) if c is not None]
    norms = np.linalg.norm(X, axis=0), np.linalg.norm(Y, axis=1)
    used = (norms[0] > 0) & (norms[1] > 0)
    return Scores(
        gap=alone.gap,
        norm_jump=alone.norm_jump,
        imbalance=float(np.linalg.norm(X) * np.linalg.norm(Y) / product) if product > 0 else NONE,
        imbalance_limit=NONE if weight is None else math.sqrt(X.shape[1]),
        pencil_gap=_largest_quotient(_pencil(X, Y, eps), 0.0),
        ratio_jump=_largest_quotient(norms[0][used] / norms[1][used], 0.0),
        compensation=found[0] if found else None,
    )


def _pencil(X: Matrix, Y: Matrix, eps: float) -> Float[np.ndarray, " r"]:
    """Return the square roots of the eigenvalues of (X^T X, Y Y^T) on the features that are written and read.

    What X does not write, and then what Y does not read, is projected out: there the pencil is singular.
    """
    written = _range(X.T, eps)
    X, Y = X @ written, written.T @ Y
    read = _range(Y, eps)
    X, Y = X @ read, read.T @ Y
    R1, R2 = np.linalg.qr(X)[1], np.linalg.qr(Y.T)[1]
    return np.linalg.svd(np.linalg.solve(R2.T, R1.T), compute_uv=False) if R2.size else np.zeros(0)


def _range(matrix: Matrix, eps: float) -> Matrix:
    """Return an orthonormal basis of the column space, to rounding."""
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    return left[:, values > _floor(matrix, values, eps)]


def _floor(matrix: Matrix, values: Float[np.ndarray, " r"], eps: float) -> float:
    """Return what rounding makes of a singular value that is 0."""
    return max(matrix.shape) * eps * float(values.max(initial=0.0))


def _largest_quotient(values: Float[np.ndarray, " r"], floor: float) -> float:
    """Return the largest quotient of consecutive values above the floor; 1 of fewer than two."""
    kept = np.sort(values[values > floor])
    return float(np.max(kept[1:] / kept[:-1], initial=1.0))


def _largest(scores: list[Scores]) -> Scores:
    """Return, score by score, the largest of a stack."""
    numbers = ("gap", "norm_jump", "imbalance", "imbalance_limit", "pencil_gap", "ratio_jump")
    largest = {name: _maximum([getattr(s, name) for s in scores]) for name in numbers}
    return Scores(**largest, compensation=next((s.compensation for s in scores if s.certain), None))


def _maximum(numbers: list[float]) -> float:
    return max((x for x in numbers if not math.isnan(x)), default=NONE)


def _wide(name: str, stack: Any) -> Float[np.ndarray, "_ _ _"]:
    """Return a stack of matrices in float64; LeafError if it is not finite."""
    array = np.asarray(stack).astype(np.float64)
    if not np.all(np.isfinite(array)):
        raise LeafError(f"'{name}' holds NaN or Inf; repair the checkpoint before looking at it.")
    return array


def _stacked(leaf: Any) -> Any:
    """Return a kernel as (stack, rows, out): rank 4 is HWIO, of rank 3 the first axis runs over layers."""
    return leaf.reshape(1, -1, leaf.shape[-1]) if leaf.ndim != 3 else leaf


def _is_matrix(leaf: Any) -> bool:
    """Whether a leaf is a matrix, a stack of them or the kernel of a convolution, and holds numbers."""
    return jnp.ndim(leaf) in (2, 3, 4) and leaf.size > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _eps(*leaves: Any) -> float:
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)
