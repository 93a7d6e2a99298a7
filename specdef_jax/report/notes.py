"""What limits the reading of the races: short baselines, null controls off 1, grid edges, caps."""

from __future__ import annotations

import math
from typing import Any

from specdef_jax.report import facts
from specdef_jax.report.facts import Results
from specdef_jax.report.numbers import factor, grouped, interval, listed, named, number


def race_notes(results: Results) -> list[str]:
    """Return what limits the reading of the races: short baselines, null controls off 1, grid edges, caps."""
    notes = []
    names, arms = facts.optimizers(results), results["race"]["arms"]
    for arm in (facts.top_arm(1.0), "original"):
        short = [n for n in names if facts.median(facts.steps(results, arm, n)) < facts.SHORT_BASELINE]
        if short:
            medians = [
                f"{facts.optimizer_name(n)} {number(facts.median(facts.steps(results, arm, n)))}"
                for n in short
            ]
            notes.append(
                f"The baseline “{named(arms[arm]['label'])}” takes fewer than {facts.SHORT_BASELINE} steps "
                f"(median: {listed(medians)}), so ratios to it are coarse."
            )
    for kind, arm, baseline in facts.comparisons(results):
        if kind != "null control":
            continue
        ratios = {n: facts.ratio(results, arm, baseline, n) for n in names}
        off = [n for n in names if not _near_one(ratios[n])]
        if off:
            said = listed(
                [f"{facts.optimizer_name(n)} {factor(ratios[n])} {interval(ratios[n])}" for n in off]
            )
            notes.append(
                f"The null control “{named(arms[arm]['label'])}” should be 1 and is not: {said}. "
                "Effects of this size are not evidence."
            )
    edges = [
        f"{named(arm['label'])} ({facts.optimizer_name(n)})"
        for arm in arms.values()
        for n, run in arm["optimizers"].items()
        if run["at_edge"]
    ]
    if edges:
        notes.append(
            f"The best step size lies at the edge of the grid, so a better one may exist: {listed(edges)}."
        )
    censored = sum(run["censored"] for arm in arms.values() for run in arm["optimizers"].values())
    if censored:
        cap = grouped(results["race"]["steps_cap"])
        notes.append(
            f"{censored} of the races reached the target at no step size within the cap of {cap} steps. "
            "A ratio with such a run is a lower bound, set by the cap."
        )
    return notes


def _near_one(ratio: dict[str, Any]) -> bool:
    """Tell whether 1 is in the interval as printed, or the value within rounding of it."""
    value, low, high = (float(ratio[k]) for k in ("value", "low", "high"))
    return (
        abs(value - 1) < 1e-3 or (math.isnan(low) and not math.isnan(value)) or (low < 1.005 and high > 0.995)
    )
