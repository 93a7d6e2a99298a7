"""Which step sizes to race next, so that the best one is found and not merely gridded."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from specdef_jax.errors import SpecError
from specdef_jax.race.result import RaceResult
from specdef_jax.race.runs import Outcome

ROUNDS = 16


def check_factor(factor: float | None) -> None:
    """Raise SpecError unless the factor is None or above 1."""
    if factor is not None and not (np.isfinite(factor) and factor > 1):
        raise SpecError(f"refine = {factor}: give a factor above 1, or None for the grid as it is.")


def wanted(result: RaceResult, factor: float) -> Float[np.ndarray, "new"]:
    """Return step sizes that would bracket the best one of each seed within a factor; empty when done.

    A best step size at the edge of the grid asks for one beyond it, as far off as its neighbour; one
    inside it for the geometric means of the gaps to its neighbours that are wider than `factor`.
    A seed that never reached the target is judged by its lowest last loss.

    Args:
      result: the race of one optimizer.
      factor: how close the neighbours of the best step size shall be.
    """
    grid = result.grid(result.names[0])
    count = grid.size
    ask: set[float] = set()
    for best in _best_or_lowest(result):
        if best in (0, count - 1) and count > 1:
            ask.add(grid[0] ** 2 / grid[1] if best == 0 else grid[-1] ** 2 / grid[-2])
        for i in (best - 1, best):
            if 0 <= i < count - 1 and grid[i + 1] / grid[i] > factor * (1 + 1e-9):
                ask.add(float(np.sqrt(grid[i] * grid[i + 1])))
    return np.array(sorted(ask))


def _best_or_lowest(result: RaceResult) -> list[int]:
    """Return the best index of each seed; where none arrived, that of the lowest finite last loss."""
    best = result.best_index(result.names[0])
    count = result.grid(result.names[0]).size
    full = result.outcome[0, :count] == Outcome.CENSORED
    last = np.where(full, result.last[0, :count], np.inf)
    return [int(b) if b >= 0 else int(np.argmin(last[:, seed])) for seed, b in enumerate(best)]
