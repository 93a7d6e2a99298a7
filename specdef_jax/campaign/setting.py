"""How every arm of a campaign is raced: one place, so that arms differ in nothing but what they train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from specdef_jax import curvature, race
from specdef_jax.errors import ProblemError
from specdef_jax.parametrization import Problem
from specdef_jax.programs import free_when_many
from specdef_jax.race.result import RaceResult
from specdef_jax.race.runs import Factory


@dataclass(frozen=True)
class Setting:
    """The races of a campaign.

    Attributes:
      args: the attacker's data, all of it in every step.
      target: loss at which an attack has succeeded.
      optimizers: name -> step_size -> optax transformation.
      steps: cap on steps.
      decades: powers of ten of step sizes around 2 / sharpness, before refinement.
      refine: how close the neighbours of the best step size shall be.
      seed: of the random choices.
      folder: where finished races are kept.
    """

    args: tuple[Any, ...]
    target: float
    optimizers: Mapping[str, Factory] = field(default_factory=lambda: dict(race.DEFAULT))
    steps: int = 2000
    decades: float = 5.0
    refine: float = 1.5
    seed: int = 0
    folder: Path | None = None

    def run(self, problems: Sequence[Problem], optimizers: Mapping[str, Factory] | None = None) -> RaceResult:
        """Race problems of one structure, a problem per network."""
        free_when_many()  # a campaign compiles thousands
        center = float(np.median([2 / self.sharpness(p) for p in problems]))
        return race.run_problems(
            problems,
            optimizers or self.optimizers,
            sample=race.full_batch(*self.args),
            steps=self.steps,
            step_sizes=race.log_grid(center, decades=self.decades, per_decade=1),
            target=self.target,
            refine=self.refine,
            prune=True,
            lanes=1,
            folder=self.folder,
            chunk=len(problems),
        )

    def sharpness(self, one: Problem) -> float:
        """Return the largest |eigenvalue| of the Hessian at the start.

        Raises:
          ProblemError: it is zero or not finite, so that no step size is a natural one.
        """
        op = curvature.hessian(one.loss, one.params, *self.args)
        found = curvature.eigsh(op, tol=1e-2, key=jax.random.key(self.seed))
        sharp = float(jnp.abs(found.values[0]))
        if not (np.isfinite(sharp) and sharp > 0):
            raise ProblemError(f"a start has largest Hessian eigenvalue {sharp}; repair the parameters.")
        return sharp

    def trained(self, one: Problem, factory: Factory, step_size: float, steps: float) -> PyTree:
        """Return the plain parameters at the end of one run."""
        key = jax.random.split(jax.random.key(0), 1)[0]
        params = race.replay(
            one, factory, step_size, int(np.ceil(steps)), sample=race.full_batch(*self.args), key=key
        )
        return one.read_back(params)
