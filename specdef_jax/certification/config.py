"""What a certification computes; every number of it is in results.json."""

from __future__ import annotations

from dataclasses import dataclass

from specdef_jax.errors import SpecError


@dataclass(frozen=True)
class Config:
    """Settings of a certification.

    Attributes:
      size: name of the preset these settings came from.
      seeds: pretrained networks of the embedded default.
      alphas: deformations raced with top directions, ascending, starting at 1.
      matched: the alpha whose sharpness bottom directions and the scalar control are given.
      k: directions per layer.
      widths: layer widths of the embedded MLP.
      examples: size of its attacker's data set.
      target: loss that its attacker has to reach, in nats; other tasks bring their own.
      steps: cap on steps of a run.
      decades, per_decade: grid of step sizes around 2 / lambda_max as measured.
      refine: how close the neighbours of the best step size shall be, as a factor, in the ledger.
      ledger: whether to race every attack there is, beside fuse, freeze and inject.
      error_alphas: alphas at which preservation is measured, in each number format.
      eigenvalues: how many leading eigenvalues the spectra show.
      seed: of every random choice.
    """

    size: str = "default"
    seeds: int = 5
    alphas: tuple[float, ...] = (1.0, 4.0, 8.0, 16.0)
    matched: float = 8.0
    k: int = 1
    widths: tuple[int, ...] = (64, 32, 32, 10)
    examples: int = 128
    target: float = 0.1
    steps: int = 1500
    decades: float = 7.0
    per_decade: int = 2
    refine: float = 2.0
    ledger: bool = False
    error_alphas: tuple[float, ...] = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 8192.0, 65536.0)
    eigenvalues: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.alphas or self.alphas[0] != 1 or list(self.alphas) != sorted(set(self.alphas)):
            raise SpecError(f"alphas = {self.alphas}: give ascending values that start at 1, the baseline.")

        if self.matched not in self.alphas:
            raise SpecError(f"matched = {self.matched}: must be one of the alphas {self.alphas}.")

    @classmethod
    def preset(cls, size: str) -> Config:
        """Return the settings called "smoke" (tests), "default", "full", or "model" (a checkpoint).

        Raises:
          SpecError: no such preset.
        """
        presets = {
            "smoke": cls(
                size="smoke",
                seeds=2,
                alphas=(1.0, 4.0),
                matched=4.0,
                widths=(64, 8, 8, 10),
                examples=32,
                target=1.0,
                steps=120,
                per_decade=1,
                error_alphas=(1.0, 16.0),
                eigenvalues=4,
            ),
            "default": cls(),
            "model": cls(
                size="model",
                seeds=1,
                alphas=(1.0, 4.0, 16.0),
                matched=16.0,
                steps=400,
                decades=5.0,
                per_decade=1,
                ledger=True,
                error_alphas=(1.0, 16.0, 256.0, 4096.0),
            ),
            "full": cls(
                size="full",
                seeds=10,
                alphas=(1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0),
                steps=16000,
                per_decade=4,
            ),
        }
        if size not in presets:
            raise SpecError(f"size {size!r}: must be one of {', '.join(presets)}.")
        return presets[size]
