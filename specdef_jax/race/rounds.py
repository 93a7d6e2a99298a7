"""One optimizer over one grid: laid out as runs, in chunks of whole seeds, stored as they are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Float, PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.parametrization import Problem
from specdef_jax.race import execution
from specdef_jax.race.result import RaceResult
from specdef_jax.race.runs import Factory, Runs
from specdef_jax.race.store import Store
from specdef_jax.sharding import placed, sharding_of


@dataclass(frozen=True)
class Rounds:
    """Everything about a race but the optimizer and the step sizes.

    Attributes:
      problems: stacked.
      sample: sample(key) -> args of one step.
      eval_args: args of the evaluation, or None.
      targets: (problems, targets) losses, descending.
      orders: data orders per problem.
      record_at: steps at which traces are recorded.
      steps: cap on steps.
      evaluations: cap on gradient evaluations.
      eval_every: steps between evaluations.
      prune: whether to stop dominated runs.
      ends: whether to keep the parameters that each run was judged by last.
      key: of the data orders.
      lanes: runs in flight.
      chunk: seeds raced, and stored, at a time.
      mesh: devices to spread over, or None.
      store: where chunks are kept, or None.
    """

    problems: Problem
    sample: Partial
    eval_args: PyTree
    targets: Float[np.ndarray, "problems targets"]
    orders: int
    record_at: np.ndarray
    steps: int
    evaluations: float
    eval_every: int
    prune: bool
    ends: bool
    key: PRNGKeyArray
    lanes: int
    chunk: int
    mesh: Mesh | None
    store: Store | None

    @property
    def seeds(self) -> int:
        """How many problems x data orders there are."""
        return len(self.targets) * self.orders

    def with_lanes(self, lanes: int) -> Rounds:
        """Return the same with so many runs in flight."""
        return replace(self, lanes=lanes)

    def runs(self, grid: np.ndarray, seeds: np.ndarray, best: np.ndarray) -> Runs:
        """Lay out (step size, seed) as a flat list of runs, step sizes slowest.

        Its problems and seeds are as many as a chunk has room for, so that its program is that of any race in
        such chunks.
        """
        dtype = jnp.result_type(float)
        room = max(self.chunk, seeds.size)
        step, seed = np.divmod(np.arange(grid.size * seeds.size), seeds.size)
        index, order = np.divmod(seeds[seed], self.orders)
        first, problems = self._problems(index.min(), room)
        return Runs(
            problems=problems,
            sample=self.sample,
            eval_args=self.eval_args,
            problem=jnp.asarray(index - first, jnp.int32),
            seed=jnp.asarray(seed, jnp.int32),
            keys=jax.random.split(self.key, self.orders)[order],
            step_sizes=jnp.asarray(grid[step], trees.result_dtype(self.problems.params)),
            targets=jnp.asarray(self.targets[index], dtype),
            count=jnp.asarray(step.size),
            steps=jnp.asarray(self.steps, jnp.int32),
            evaluations=jnp.asarray(self.evaluations, dtype),
            record_at=jnp.asarray(self.record_at),
            best=jnp.asarray(np.resize(best[seeds], room), dtype),
            prune=jnp.asarray(self.prune),
            ends=self.ends,
        )

    def race(
        self,
        name: str,
        factory: Factory,
        grid: np.ndarray,
        best: np.ndarray,
        report: Callable[[int], None] | None,
    ) -> RaceResult:
        """Race one optimizer over one grid.

        Args:
          name: of the optimizer.
          factory: the optimizer.
          grid: step sizes, ascending.
          best: (seeds,) fewest steps in which each seed has arrived before, infinite where it has not.
          report: report(runs done).
        """
        chunks: list[execution.Finished] = []
        before = 0
        for first in range(0, self.seeds, self.chunk):
            seeds = np.arange(first, min(first + self.chunk, self.seeds))
            runs = self.runs(grid, seeds, best)
            told = None if report is None else _shifted(report, before)

            def race(runs: Runs = runs, told: Callable[[int], None] | None = told) -> execution.Finished:
                return execution.race_one(runs, factory, self.eval_every, self.lanes, told, self.mesh)

            chunks.append(
                race()
                if self.store is None
                else self.store.keep(name, factory, runs, self.eval_every, self.lanes, race)
            )
            before += grid.size * seeds.size
            if report is not None:
                report(before)
        return self._result(name, grid, chunks)

    def _problems(self, first: int, room: int) -> tuple[int, Problem]:
        """Return the stacked problems that `room` seeds may have, and which of all is their first."""
        total, most = len(self.targets), (room + self.orders - 2) // self.orders + 1
        if most >= total:
            return 0, self.problems
        chosen = jnp.minimum(jnp.arange(first, first + most), total - 1)  # the last again, to fill up
        found = execution.rows(self.problems, chosen)
        return first, jax.tree.map(lambda x, whole: placed(x, sharding_of(whole)), found, self.problems)

    def _result(self, name: str, grid: np.ndarray, chunks: list[execution.Finished]) -> RaceResult:
        def joined(*parts: np.ndarray) -> np.ndarray:
            return np.concatenate([x.reshape(grid.size, -1, *x.shape[1:]) for x in parts], axis=1)[None]

        def column(field: str) -> Any:
            return jax.tree.map(joined, *(getattr(chunk.results, field) for chunk in chunks))

        crossings = column("steps")
        seconds = sum(chunk.seconds for chunk in chunks)
        return RaceResult(
            names=(name,),
            step_sizes=grid[None],
            to_target=crossings[..., -1],
            crossings=crossings,
            targets=np.repeat(self.targets, self.orders, axis=0),
            record_at=self.record_at,
            cap=self.steps,
            lanes=self.lanes,
            seconds=seconds,
            compile_seconds=sum(chunk.compile_seconds for chunk in chunks),
            step_seconds=np.array([seconds / max(sum(chunk.steps for chunk in chunks), 1)]),
            **{f: column(f) for f in ("evaluations", "spent", "outcome", "last", "peak", "trace", "ends")},
        )


def _shifted(report: Callable[[int], None], before: int) -> Callable[[int], Any]:
    return lambda done: report(before + done)
