"""What the sections of the report read off a results.json: names, ratios, and the verdicts they support."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specdef_jax.race.statistics import Ratio, ratio_of_means

Results = dict[str, Any]
UNDONE = 1.25  # an attack that leaves at most this factor for every optimizer has undone the slowdown
SHORT_BASELINE = 50  # steps; below this the resolution of one step shows in a ratio

_NAMES = {"sgd": "SGD", "momentum": "momentum SGD", "adam": "Adam"}
_KINDS = ("slowdown", "positive control", "insertion", "null control", "attack")


def optimizer_name(key: str) -> str:
    """Return how sentences and legends call an optimizer."""
    return _NAMES.get(key, key)


def optimizers(results: Results) -> list[str]:
    """Return the optimizers raced, in their order."""
    return list(results["race"]["arms"]["original"]["optimizers"])


def headline_optimizer(results: Results) -> str:
    """Return the optimizer the verdict speaks of first: plain SGD if it was raced."""
    names = optimizers(results)
    return "sgd" if "sgd" in names else names[0]


def strongest(results: Results) -> float:
    """Return the largest alpha raced."""
    return float(results["config"]["alphas"][-1])


def matched(results: Results) -> float:
    """Return the alpha whose sharpness bottom directions and the scalar control were given."""
    return float(results["config"]["matched"])


def top_arm(alpha: float) -> str:
    """Return the key of the arm with top directions at this alpha."""
    return f"top_{alpha:g}"


def ratio(results: Results, arm: str, baseline: str, optimizer: str) -> dict[str, Any]:
    """Return the ratio of two arms: as stored, else computed from their stored steps, else NaN."""
    if arm == baseline:
        return _fields(Ratio(1.0, 1.0, 1.0, False, len(steps(results, arm, optimizer))))
    for row in results["race"]["ratios"]:
        if (row["arm"], row["baseline"], row["optimizer"]) == (arm, baseline, optimizer):
            return row
    if not {arm, baseline} <= set(results["race"]["arms"]):
        return _fields(Ratio(math.nan, math.nan, math.nan, False, 0))
    found = ratio_of_means(
        steps(results, arm, optimizer), steps(results, baseline, optimizer), results["race"]["steps_cap"]
    )
    return _fields(found)


def steps(results: Results, arm: str, optimizer: str) -> np.ndarray:
    """Return the steps to the target per seed, NaN where censored."""
    return np.asarray(results["race"]["arms"][arm]["optimizers"][optimizer]["steps"], float)


def slowdown(results: Results, optimizer: str, alpha: float | None = None) -> dict[str, Any]:
    """Return the slowdown of top directions against alpha = 1, at the largest alpha raced by default."""
    return ratio(results, top_arm(alpha or strongest(results)), top_arm(1.0), optimizer)


def against_original(results: Results, optimizer: str) -> dict[str, Any]:
    """Return the steps at the largest alpha raced against those of the original network."""
    return ratio(results, top_arm(strongest(results)), "original", optimizer)


def median(values: np.ndarray) -> float:
    """Return the median of the values that are not NaN, NaN if there are none."""
    kept = np.asarray(values, float)
    kept = kept[~np.isnan(kept)]
    return float(np.median(kept)) if kept.size else math.nan


def comparisons(results: Results) -> list[tuple[str, str, str]]:
    """Return (kind, arm, baseline) of every stored ratio, once per optimizer, by kind."""
    seen = dict.fromkeys((r["kind"], r["arm"], r["baseline"]) for r in results["race"]["ratios"])
    order = {kind: i for i, kind in enumerate(_KINDS)}
    return sorted(seen, key=lambda c: order.get(c[0], len(order)))


def attacks(results: Results) -> list[str]:
    """Return the arms that carry a bill."""
    return [name for name, arm in results["race"]["arms"].items() if arm["bill"] is not None]


def left_by(results: Results, attack: str) -> dict[str, Any]:
    """Return the worst ratio to the original, over optimizers, that an attack leaves; NaN if one is NaN."""
    ratios = [ratio(results, attack, "original", o) for o in optimizers(results)]
    return max(ratios, key=lambda r: (math.isnan(r["value"]), r["censored"], r["value"]))


def undone(left: dict[str, Any]) -> bool:
    """Tell whether the steps an attack leaves are close to those of the original."""
    return bool(left["value"] <= UNDONE and not left["censored"])


def cheapest(results: Results) -> str | None:
    """Return the attack that undoes the slowdown with the fewest added parameters, then the least time."""
    arms = results["race"]["arms"]
    found = [a for a in attacks(results) if undone(left_by(results, a))]
    return min(
        found,
        key=lambda a: (arms[a]["bill"]["added_parameters"], arms[a]["bill"]["conversion_seconds"]),
        default=None,
    )


def recovered(entry: dict[str, Any]) -> tuple[str, Ratio] | None:
    """Return the optimizer by which an entry of the ledger recovers most, and what; None if none arrives."""
    ratios = {name: Ratio(**r) for name, r in entry["recovered"].items()}
    arrived = {n: r for n, r in ratios.items() if not r.censored and not math.isnan(r.value)}
    return min(arrived.items(), key=lambda item: item[1].value, default=None)


def sharpening(results: Results) -> np.ndarray:
    """Return sigma_1 at the largest alpha raced over sigma_1 at alpha = 1, per network."""
    arms = results["race"]["arms"]
    after, before = (
        np.asarray(arms[top_arm(alpha)]["sharpness"], float) for alpha in (strongest(results), 1.0)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return after / before


def compare(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Compare two ratios by their intervals: "more", "less" or "unclear"."""
    if _low(one) > _high(other):
        return "more"
    return "less" if _high(one) < _low(other) else "unclear"


def formats_at(results: Results, alpha: float) -> list[dict[str, Any]]:
    """Return the preservation rows, one a number format, at the first alpha measured that is no smaller."""
    rows = results["preservation"]["formats"]
    measured = {r["alpha"] for r in rows}
    chosen = min((a for a in measured if a >= alpha), default=max(measured))
    return [r for r in rows if r["alpha"] == chosen]


def format_names(results: Results) -> list[str]:
    """Return the number formats measured, in their order."""
    return list(dict.fromkeys(r["format"] for r in results["preservation"]["formats"]))


def flags(run: dict[str, Any]) -> list[str]:
    """Return in words what a reader must know of the runs of one optimizer on one arm."""
    found = []
    if run["censored"]:
        found.append(f"{run['censored']} censored")
    if run["at_edge"]:
        found.append("best step at the edge of the grid")
    if run["diverged"]:
        found.append(f"{run['diverged']} diverged")
    if run["recovered"]:
        found.append(f"{run['recovered']} recovered")
    return found


def _fields(found: Ratio) -> dict[str, Any]:
    return {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "censored": found.censored,
        "seeds": found.seeds,
    }


def _low(one: dict[str, Any]) -> float:
    return one["value"] if math.isnan(one["low"]) else one["low"]


def _high(one: dict[str, Any]) -> float:
    if one["censored"]:
        return math.inf
    return one["value"] if math.isnan(one["high"]) else one["high"]
