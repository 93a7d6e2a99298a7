"""Exponents from measurements."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.stats


class Exponent(NamedTuple):
    """A fitted power law y = c x^slope with its 95% t-interval (NaN for fewer than three points)."""

    slope: float
    low: float
    high: float


def exponent(x: object, y: object, level: float = 0.95) -> Exponent:
    """Fit log y = slope log x + const by least squares."""
    x, y = (np.log(np.asarray(v, float)) for v in (x, y))
    found = scipy.stats.linregress(x, y)
    if x.size < 3:
        return Exponent(float(found.slope), np.nan, np.nan)
    half = float(scipy.stats.t.ppf((1 + level) / 2, x.size - 2) * found.stderr)
    return Exponent(float(found.slope), float(found.slope) - half, float(found.slope) + half)
