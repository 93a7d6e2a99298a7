"""What a replication races; every number of it is in its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specdef_jax.attacks import ATTACKS
from specdef_jax.errors import SpecError
from specdef_jax.spec import Directions

LEAN: dict[str, Any] = {
    "optimizers": ("adam", "muon", "kfac"),
    "ranks": (4,),
    "attacks": ("fuse", "freeze", "inject", "blind", "precondition", "lora"),
}


@dataclass(frozen=True)
class Config:
    """Settings of a replication.

    Attributes:
      size: name of the preset these settings came from.
      step_sizes: of the matrix, Adam's.
      steps: cap on steps of a run.
      judge_every: steps between evaluations of the attacker's loss.
      alphas: of the deformations in single precision.
      wide_alphas: of those in double precision.
      exact_alpha: of the one in the axis basis, a power of two, in single precision.
      k: directions per layer.
      optimizers: raced with and without the defence, at `optimizer_alpha`.
      optimizer_alpha: of the deformation that optimizers, LoRA and attacks meet.
      grid: step sizes of the optimizers, LoRA and attacks, to begin with.
      refine: how close the neighbours of the best of them shall be, as a factor; None for the grid alone.
      ranks: of LoRA.
      attacks: names of attacks.ATTACKS.
      directions: of the deformations in single precision.
      seeds: networks raced; in the headline rows of the matrix, all there are.
      seed: of every random choice.
    """

    size: str = "small"
    step_sizes: tuple[float, ...] = (1e-4, 1e-3, 3e-3, 1e-2)
    steps: int = 150
    judge_every: int = 5
    alphas: tuple[float, ...] = (1e2, 1e4)
    wide_alphas: tuple[float, ...] = (1e6, 1e9)
    exact_alpha: float = 2.0**20
    k: int = 1
    optimizers: tuple[str, ...] = ("adam", "muon", "sophia", "adahessian", "kfac")
    optimizer_alpha: float = 1e4
    grid: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    refine: float | None = 3.2
    ranks: tuple[int, ...] = (1, 8)
    attacks: tuple[str, ...] = tuple(ATTACKS)
    directions: tuple[Directions, ...] = ("top", "resistant")
    seeds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if list(self.step_sizes) != sorted(self.step_sizes) or not self.step_sizes or self.step_sizes[0] <= 0:
            raise SpecError(f"step_sizes = {self.step_sizes}: give ascending positive numbers.")

    @classmethod
    def preset(cls, size: str, *, lean: bool = False) -> Config:
        """Return the settings called "smoke" (tests), "small" or "full".

        Args:
          size: name of the preset.
          lean: for models that take long to compile: the small size then races fewer optimizers and attacks.

        Raises:
          SpecError: no such preset.
        """
        presets = {
            "smoke": cls(
                size="smoke", step_sizes=(1e-2,), steps=10, alphas=(1e2,), wide_alphas=(1e6,),
                optimizers=("adam",), optimizer_alpha=1e2, grid=(3e-3,), refine=None, ranks=(4,),
                attacks=("fuse", "blind"),
            ),
            "small": cls(**LEAN) if lean else cls(),
            "full": cls(
                size="full", step_sizes=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1), steps=1000, refine=1.5,
                ranks=(1, 4, 16), seeds=5,
            ),
        }  # fmt: skip
        if size not in presets:
            raise SpecError(f"size {size!r}: must be one of {', '.join(presets)}.")
        return presets[size]
