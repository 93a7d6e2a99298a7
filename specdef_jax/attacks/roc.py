"""How well a score tells deformed layers from others: receiver operating characteristic, nothing fitted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from specdef_jax.errors import ProblemError


@dataclass(frozen=True)
class Roc:
    """What each threshold costs.

    Attributes:
      thresholds: descending, from infinity; a layer is called deformed if its score is at least that.
      false_positives: share of the undeformed layers called deformed, at each threshold.
      true_positives: share of the deformed layers called deformed.
      area: the chance that a deformed layer scores above an undeformed one, ties counted half.
    """

    thresholds: Float[np.ndarray, " t"]
    false_positives: Float[np.ndarray, " t"]
    true_positives: Float[np.ndarray, " t"]
    area: float

    def at(self, threshold: float) -> tuple[float, float]:
        """Return the shares of false and of true positives at a threshold."""
        i = int(np.flatnonzero(self.thresholds >= threshold)[-1])
        return float(self.false_positives[i]), float(self.true_positives[i])


def roc(scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, "_"]) -> Roc:
    """Return the receiver operating characteristic of scores, the higher the more suspicious.

    Args:
      scores: one for each layer.
      labels: whether it was deformed.

    Raises:
      ProblemError: a score is NaN, the lengths differ, or one class is empty.

    Example:
      >>> roc(np.array([3.0, 1.0, 2.0]), np.array([True, False, True])).area
      1.0
    """
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ProblemError(f"scores {scores.shape} and labels {labels.shape}: give one label for each score.")
    if np.isnan(scores).any():
        raise ProblemError(f"{int(np.isnan(scores).sum())} scores are NaN; leave out what has no score.")
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        raise ProblemError(
            f"{positives} deformed and {negatives} undeformed layers: a comparison needs both."
        )
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # where ties end
    true = np.concatenate([[0], np.cumsum(labels[order])[last]]) / positives
    false = np.concatenate([[0], np.cumsum(~labels[order])[last]]) / negatives
    thresholds = np.concatenate([[np.inf], scores[order][last]])
    return Roc(thresholds, false, true, float(np.trapezoid(true, false)))
