"""How much a statement is asked to evaluate."""

from __future__ import annotations

import enum


class Size(enum.StrEnum):
    """SMALL for tests and mutants, DEFAULT for `python -m theory`, FULL for every instance."""

    SMALL = "small"
    DEFAULT = "default"
    FULL = "full"

    @property
    def draws(self) -> int:
        """Random instances of each family of a matrix inequality."""
        return {"small": 1_000, "default": 10_000, "full": 50_000}[self]

    @property
    def starts(self) -> int:
        """Points from which a falsifier descends."""
        return {"small": 16, "default": 128, "full": 512}[self]
