"""Step-size grids."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from specdef_jax.errors import SpecError


def log_grid(center: float, *, decades: float = 7.0, per_decade: int = 2) -> Float[np.ndarray, "steps"]:
    """Return step sizes spaced evenly in the logarithm, symmetric around a center.

    Args:
      center: usually 2 / lambda_max as measured.
      decades: how many powers of ten the grid spans.
      per_decade: points per power of ten.

    Raises:
      SpecError: the center is not positive and finite, or the grid has no width.

    Example:
      >>> log_grid(1.0, decades=2, per_decade=1).tolist()
      [0.1, 1.0, 10.0]
    """
    if not (np.isfinite(center) and center > 0):
        raise SpecError(f"center = {center}: a grid of step sizes needs a positive finite center.")
    if decades <= 0 or per_decade < 1:
        raise SpecError(f"decades = {decades}, per_decade = {per_decade}: both must be positive.")
    half = round(decades * per_decade) / 2 / per_decade
    return center * np.logspace(-half, half, round(decades * per_decade) + 1)


def check_grid(name: str, step_sizes: object) -> Float[np.ndarray, "steps"]:
    """Return a grid as an array, or raise SpecError if it is not positive and ascending."""
    try:
        grid = np.atleast_1d(np.asarray(step_sizes, float))
    except (TypeError, ValueError) as error:
        raise SpecError(f"{name}: step sizes {step_sizes!r}: give a list of numbers.") from error
    if grid.ndim != 1 or grid.size == 0:
        raise SpecError(f"{name}: step sizes have shape {grid.shape}; give a list of numbers.")
    if not np.isfinite(grid).all() or (grid <= 0).any():
        raise SpecError(f"{name}: step sizes {grid.tolist()} must be positive and finite.")
    if (np.diff(grid) <= 0).any():
        raise SpecError(f"{name}: step sizes {grid.tolist()} must be ascending and distinct.")
    return grid
