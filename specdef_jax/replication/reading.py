"""What one reads off a row of the matrix: its best step size, and how it ends there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Results = dict[str, Any]


def best(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the cell of the attacker's best step size: fewest steps, or where none arrives most capability.

    None where the row was not raced.
    """
    cells = row["cells"]
    arrived = [cell for cell in cells if not math.isnan(steps(cell))]
    if arrived:
        return min(arrived, key=steps)
    return max(cells, key=lambda cell: median(cell, "capability"), default=None)


def steps(cell: dict[str, Any] | None) -> float:
    """Return the median steps to the target; NaN where half of the networks or more do not arrive."""
    return math.nan if cell is None else typical([one["steps"] for one in cell["networks"]])


def typical(steps: Sequence[float]) -> float:
    """Return the median of those that arrive; NaN where half of the networks or more do not."""
    taken = np.array(steps)
    return float(np.nanmedian(taken)) if np.isnan(taken).mean() < 0.5 else math.nan


def median(cell: dict[str, Any], field: str) -> float:
    """Return the median over networks of "capability", "retained" or "peak"."""
    return float(np.median([one[field] for one in cell["networks"]]))


def capability(results: Results, variant: str) -> float:
    """Return the median capability of a variant before any attack."""
    return float(np.median([one["capability"] for one in results["task"]["variants"][variant]]))


def reached(row: dict[str, Any]) -> bool:
    """Tell whether some step size brings more than half of the networks to the target."""
    return not math.isnan(steps(best(row)))
