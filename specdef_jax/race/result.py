"""What a race found: steps to the target per step size and seed, and ratios between races."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from specdef_jax.errors import ProblemError
from specdef_jax.race.runner import Outcome
from specdef_jax.race.statistics import Ratio, ratio_of_means


@dataclass(frozen=True)
class RaceResult:
    """Steps to the target of every optimizer, step size and seed.

    Attributes:
      names: optimizers.
      step_sizes: (optimizers, steps) grid of each optimizer, ascending.
      to_target: (optimizers, steps, seeds) steps to the target, interpolated between evaluations;
        NaN unless reached.
      outcome: same shape, values of Outcome.
      last: the loss at the last evaluation.
      peak: the largest loss met on the way (a run may pass a peak and recover).
      trace: (optimizers, steps, seeds, records) losses at record_at, NaN after the end.
      record_at: steps at which traces are recorded.
      cap: the largest number of steps.
      lanes: how many runs were in flight at once, per thread.
      seconds: wall-clock time, compilation apart.
      compile_seconds: time until the first result of each compiled function.
    """

    names: tuple[str, ...]
    step_sizes: Float[np.ndarray, "optimizers steps"]
    to_target: Float[np.ndarray, "optimizers steps seeds"]
    outcome: Int[np.ndarray, "optimizers steps seeds"]
    last: Float[np.ndarray, "optimizers steps seeds"]
    peak: Float[np.ndarray, "optimizers steps seeds"]
    trace: Float[np.ndarray, "optimizers steps seeds records"]
    record_at: Int[np.ndarray, "records"]
    cap: int
    lanes: int
    seconds: float
    compile_seconds: float

    def index(self, name: str) -> int:
        """Return the position of an optimizer; ProblemError if it was not raced."""
        if name not in self.names:
            raise ProblemError(f"optimizer {name!r} was not raced; raced: {', '.join(self.names)}.")
        return self.names.index(name)

    def steps(self, name: str) -> Float[np.ndarray, "seeds"]:
        """Return the steps to target at the best step size of each seed, NaN where none reached it."""
        steps = self.to_target[self.index(name)]
        best = np.min(np.where(np.isnan(steps), np.inf, steps), axis=0)
        return np.where(np.isinf(best), np.nan, best)

    @property
    def censored(self) -> dict[str, np.ndarray]:
        """Per optimizer, whether each seed reached the target at no step size within the cap."""
        return {name: np.isnan(self.steps(name)) for name in self.names}

    def best_index(self, name: str) -> Int[np.ndarray, "seeds"]:
        """Return the index of the best step size of each seed, -1 where none reached the target."""
        steps = self.to_target[self.index(name)]
        filled = np.where(np.isnan(steps), np.inf, steps)
        return np.where(np.isinf(filled.min(axis=0)), -1, filled.argmin(axis=0))

    def at_edge(self, name: str) -> bool:
        """Tell whether the best step size of some seed is the first or the last of the grid."""
        best = self.best_index(name)
        return bool(np.any((best == 0) | (best == self.step_sizes.shape[1] - 1)))

    def diverged(self, name: str) -> int:
        """Return how many runs turned non-finite."""
        return int(np.sum(self.outcome[self.index(name)] == Outcome.DIVERGED))

    def recovered(self, name: str) -> int:
        """Return how many runs reached the target after doubling their starting loss."""
        i = self.index(name)
        first = self.trace[i, :, :, 0]
        return int(np.sum((self.outcome[i] == Outcome.REACHED) & (self.peak[i] > 2 * first)))

    def slowdown(self, baseline: RaceResult) -> dict[str, Ratio]:
        """Return steps / baseline steps per optimizer, paired by seed.

        The baseline of SpecDef's slowdown is the race at alpha = 1 with the same basis, side, k and
        layers; that of the insertion effect is the original network.
        """
        return {
            name: ratio_of_means(self.steps(name), baseline.steps(name), self.cap)
            for name in self.names
            if name in baseline.names
        }
