"""How long the compiled race runs between two visits to the host."""

from __future__ import annotations

FIRST = 16  # iterations before the first visit
VISIT_SECONDS = 0.5


def paced(iterations: int, elapsed: float) -> int:
    """Return how many iterations to run next, so that a visit comes about twice a second."""
    return int(min(max(iterations * VISIT_SECONDS / max(elapsed, 1e-6), 1), 4 * iterations))
