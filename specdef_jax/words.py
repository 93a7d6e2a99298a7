"""How strongly a number is known: one vocabulary for certificates, reports and tables."""

from __future__ import annotations

import enum


class Word(enum.StrEnum):
    """What stands behind a claim.

    PROVED: a theorem whose two sides and rounding allowance are derived.
    CHECKED: evaluated in float64 with an estimated allowance.
    ESTIMATED: everything else.
    """

    PROVED = "proved"
    CHECKED = "checked"
    ESTIMATED = "estimated"
