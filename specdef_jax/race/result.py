"""What a race found: steps to the target per step size and seed, and ratios between races."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree

from specdef_jax.errors import ProblemError, SpecError
from specdef_jax.race.runs import Outcome
from specdef_jax.race.statistics import Ratio, Survival, ratio_of_means, survival

# The fields of one entry per (optimizer, step size, seed), and what stands where nothing was run.
CELLS = {
    "to_target": np.nan,
    "crossings": np.nan,
    "evaluations": np.nan,
    "spent": np.nan,
    "outcome": Outcome.ABSENT,
    "last": np.nan,
    "peak": np.nan,
    "trace": np.nan,
    "ends": np.nan,
}


@dataclass(frozen=True)
class RaceResult:
    """Steps to the target of every optimizer, step size and seed.

    Attributes:
      names: optimizers.
      step_sizes: (optimizers, steps) grid of each optimizer, ascending; NaN behind a shorter one.
      to_target: (optimizers, steps, seeds) steps to the target, interpolated between evaluations;
        NaN unless reached.
      crossings: (optimizers, steps, seeds, targets) the same for each milestone, and for the target at last.
      evaluations: same shape, gradient evaluations before the crossing; a Hessian product counts as two.
      spent: (optimizers, steps, seeds) gradient evaluations when the run ended.
      outcome: same shape, values of Outcome.
      last: the loss at the last evaluation.
      peak: the largest loss met on the way (a run may pass a peak and recover).
      trace: (optimizers, steps, seeds, records) losses at record_at, NaN after the end.
      targets: (seeds, targets) losses of the crossings, the target last.
      record_at: steps at which traces are recorded.
      cap: the largest number of steps.
      lanes: how many runs were in flight at once, per thread.
      seconds: wall-clock time, compilation apart.
      compile_seconds: time until the first result of each compiled function.
      step_seconds: (optimizers,) wall-clock time over steps taken, with the lanes that were in flight.
      ends: the parameters that each run was judged by last, every leaf with (optimizers, steps, seeds) in
        front; None unless asked for.
    """

    names: tuple[str, ...]
    step_sizes: Float[np.ndarray, "optimizers steps"]
    to_target: Float[np.ndarray, "optimizers steps seeds"]
    crossings: Float[np.ndarray, "optimizers steps seeds targets"]
    evaluations: Float[np.ndarray, "optimizers steps seeds targets"]
    spent: Float[np.ndarray, "optimizers steps seeds"]
    outcome: Int[np.ndarray, "optimizers steps seeds"]
    last: Float[np.ndarray, "optimizers steps seeds"]
    peak: Float[np.ndarray, "optimizers steps seeds"]
    trace: Float[np.ndarray, "optimizers steps seeds records"]
    targets: Float[np.ndarray, "seeds targets"]
    record_at: Int[np.ndarray, "records"]
    cap: int
    lanes: int
    seconds: float
    compile_seconds: float
    step_seconds: Float[np.ndarray, "optimizers"]
    ends: PyTree = None

    def index(self, name: str) -> int:
        """Return the position of an optimizer; ProblemError if it was not raced."""
        if name not in self.names:
            raise ProblemError(f"optimizer {name!r} was not raced; raced: {', '.join(self.names)}.")
        return self.names.index(name)

    def grid(self, name: str) -> Float[np.ndarray, "steps"]:
        """Return the step sizes raced of an optimizer, ascending."""
        steps = self.step_sizes[self.index(name)]
        return steps[np.isfinite(steps)]

    def steps(self, name: str) -> Float[np.ndarray, "seeds"]:
        """Return the steps to target at the best step size of each seed, NaN where none reached it."""
        return _best(self.to_target[self.index(name)])

    def gradients(self, name: str) -> Float[np.ndarray, "seeds"]:
        """Return the gradient evaluations to target at the step size of each seed that needs fewest."""
        return _best(self.evaluations[self.index(name), :, :, -1])

    def seconds_to_target(self, name: str) -> Float[np.ndarray, "seeds"]:
        """Return the steps at the best step size times the wall-clock time of a step in this race.

        Runs share cores and lanes, so this is throughput: what the runs cost, not how long one waits.
        """
        return self.steps(name) * self.step_seconds[self.index(name)]

    def at(self, milestone: int) -> RaceResult:
        """Return the race to another target: its index in `targets`, or -1 for the last."""
        crossings = self.crossings[..., milestone]
        reached = ~np.isnan(crossings)
        return replace(
            self,
            to_target=crossings,
            crossings=crossings[..., None],
            evaluations=self.evaluations[..., milestone, None],
            outcome=np.where(reached, Outcome.REACHED, self.outcome),
            targets=self.targets[:, milestone, None],
        )

    def end(self, name: str, step: int, seed: int) -> PyTree:
        """Return the parameters that one run was judged by last, as numpy arrays.

        Evaluations are `eval_every` steps apart. A run that arrived is told by the first one at or below the
        target: the parameters are those after ceil(to_target / eval_every) * eval_every steps. One that was
        censored ends with the last evaluation within the caps, a dominated one with that at which it was
        stopped, and one that diverged with the first whose loss is not finite, whatever its parameters are.

        Args:
          name: of the optimizer.
          step: index into its grid.
          seed: index of the seed.

        Raises:
          ProblemError: the optimizer was not raced, or the race kept no parameters.
          SpecError: its grid has no such step size, or there is no such seed.
        """
        i, shape = self.index(name), (self.grid(name).size, len(self.targets))
        if self.ends is None:
            raise ProblemError("this race kept no parameters; race with ends=True.")
        if not (0 <= step < shape[0] and 0 <= seed < shape[1]):
            raise SpecError(f"no run {(step, seed)} of {name!r}: there are {shape} step sizes and seeds.")
        return jax.tree.map(lambda x: x[i, step, seed], self.ends)

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
        return bool(np.any((best == 0) | (best == self.grid(name).size - 1)))

    def diverged(self, name: str) -> int:
        """Return how many runs turned non-finite."""
        return int(np.sum(self.outcome[self.index(name)] == Outcome.DIVERGED))

    def recovered(self, name: str) -> int:
        """Return how many runs reached the target after doubling their starting loss."""
        i = self.index(name)
        first = self.trace[i, :, :, 0]
        return int(np.sum((self.outcome[i] == Outcome.REACHED) & (self.peak[i] > 2 * first)))

    def survival(self, name: str) -> Survival:
        """Return the share of seeds still above the target (Kaplan-Meier), each at its best step size."""
        return survival(self.steps(name), self.cap)

    def slowdown(self, baseline: RaceResult, unit: str = "steps") -> dict[str, Ratio]:
        """Return steps / baseline steps per optimizer, paired by seed.

        The baseline of SpecDef's slowdown is the race at alpha = 1 with the same basis, side, k and
        layers; that of the insertion effect is the original network.

        Args:
          baseline: the race to compare with.
          unit: what is counted, "steps" or "evaluations". A seed without a crossing counts as what its
            runs took at the least.

        Raises:
          ProblemError: no optimizer ever reaches the target of the baseline: nothing to compare with.
          SpecError: unknown unit.
        """
        shared = [name for name in self.names if name in baseline.names]
        if shared and all(baseline.censored[name].all() for name in shared):
            raise ProblemError(
                f"the baseline reaches its target with none of {', '.join(shared)} within {baseline.cap} "
                "steps, so there is nothing to compare with; choose a higher target, more steps or other "
                "step sizes."
            )
        if unit == "steps":
            return {n: ratio_of_means(self.steps(n), baseline.steps(n), self.cap) for n in shared}
        if unit != "evaluations":
            raise SpecError(f"unit = {unit!r}: count 'steps' or 'evaluations'.")
        return {
            n: ratio_of_means(self.gradients(n), baseline.gradients(n), self.least_spent(n)) for n in shared
        }

    def least_spent(self, name: str) -> Float[np.ndarray, "seeds"]:
        """Return what a seed without a crossing needs at least: what the cheapest of its full runs spent."""
        i = self.index(name)
        full = self.outcome[i] == Outcome.CENSORED
        least = np.min(np.where(full, self.spent[i], np.inf), axis=0)
        return np.where(np.isinf(least), 1.0, least)


def merged(results: Mapping[str, list[RaceResult]]) -> RaceResult:
    """Return one race of all optimizers out of races of each, over all step sizes that were run.

    Args:
      results: per optimizer, races of it alone, of the same seeds and targets over disjoint grids.
    """
    one = next(iter(results.values()))[0]
    width = max(sum(race.grid(name).size for race in races) for name, races in results.items())
    columns: dict[str, list[Any]] = {field: [] for field in ("step_sizes", *CELLS)}
    seconds = []
    for name, races in results.items():
        steps = np.concatenate([race.grid(name) for race in races])
        order = np.argsort(steps)
        columns["step_sizes"].append(_padded(steps[order], width, np.nan))
        for field, empty in CELLS.items():

            def joined(*cells: np.ndarray, order: np.ndarray = order, empty: float = empty) -> np.ndarray:
                return _padded(np.concatenate([x[0] for x in cells])[order], width, empty)

            columns[field].append(jax.tree.map(joined, *(getattr(race, field) for race in races)))
        taken = [race.seconds / race.step_seconds[0] for race in races]  # races of one optimizer
        seconds.append(sum(race.seconds for race in races) / sum(taken))
    every = [race for races in results.values() for race in races]
    return replace(
        one,
        names=tuple(results),
        seconds=sum(race.seconds for race in every),
        compile_seconds=sum(race.compile_seconds for race in every),
        step_seconds=np.asarray(seconds),
        **{field: jax.tree.map(lambda *rows: np.stack(rows), *column) for field, column in columns.items()},
    )


def _padded(rows: np.ndarray, width: int, empty: float) -> np.ndarray:
    rest = np.full((width - len(rows), *rows.shape[1:]), empty, rows.dtype)
    return np.concatenate([rows, rest])


def _best(steps: Float[np.ndarray, "steps seeds"]) -> Float[np.ndarray, "seeds"]:
    best = np.min(np.where(np.isnan(steps), np.inf, steps), axis=0)
    return np.where(np.isinf(best), np.nan, best)
