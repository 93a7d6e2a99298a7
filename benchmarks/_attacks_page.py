"""The README's section on attacks: the ledgers of three networks, and from when on a deformation shows."""

from __future__ import annotations

import json
import math
from typing import Any

from benchmarks._harness import RESULTS, machine
from specdef_jax.race import Ratio

Row = dict[str, Any]
RUNGS = ("black box", "weights", "which layers", "everything")


def attacks() -> str:
    """Tell what every attack leaves and costs, and what the weights give away."""
    ledger, seen = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("ledger", "visibility"))
    return "\n".join([*_ledger(ledger), *_visibility(seen)])


def _ledger(record: Row) -> list[str]:
    config, rows = record["config"], record["rows"]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    names = list(dict.fromkeys(row["attack"] for row in rows))
    slowest = max(row["bill"]["conversion_seconds"] for row in rows if row["bill"])
    lines = [
        f"**What undoing costs.** Every attack on a direction of one layer at alpha {config['alpha']:g}: "
        "steps over those of fine-tuning the undefended network, best of "
        f"{' and '.join(config['optimizers'])}, each at the best step size of each network "
        f"({config['seeds']} networks each, at most {config['steps']} steps, {machine(record)}). None takes "
        f"longer than {slowest:.2g} s to prepare; the strongest of each rung is bold.",
        "",
        "| attack | must know | "
        + " | ".join(networks)
        + " | conversion, s | added parameters | added FLOPs |",
        "|---|---|" + "---|" * (len(networks) + 3),
    ]
    for name in names:
        found = {row["network"]: row for row in rows if row["attack"] == name}
        cells = [_left(found[n]) if n in found else "" for n in networks]
        knows = min(
            (row["knowledge"] for row in found.values() if not row["refused"]), key=RUNGS.index, default=""
        )
        bills = [row["bill"] for row in found.values() if row["bill"]]
        costs = [
            f"{max(b['conversion_seconds'] for b in bills):.2g}",
            f"{max(b['added_share'] for b in bills):.0%}",
            f"{max(b['added_flops_share'] for b in bills):.0%}",
        ] if bills else ["", "", ""]  # fmt: skip
        lines.append(f"| {name.replace('_', ' ')} | {knows} | " + " | ".join([*cells, *costs]) + " |")
    return [*lines, "", "![What each attack leaves](benchmarks/results/ledger.svg)", ""]


def _left(row: Row) -> str:
    if row["refused"]:
        return "n/a"
    ratios = [Ratio(**r) for r in row["recovered"].values()]
    arrived = [r for r in ratios if not r.censored and not math.isnan(r.value)]
    if not arrived:
        bounds = [r for r in ratios if not math.isnan(r.value)]
        return (
            str(min(bounds, key=lambda r: r.value)).replace(">=", "≥ ").replace("inf", "∞")
            if bounds
            else "none"
        )
    told = str(min(arrived, key=lambda r: r.value))
    return f"**{told}**" if row["strongest"] else told


def _visibility(record: Row) -> list[str]:
    area, found = record["config"]["seen"], record["summary"]["seen_from"]
    parts = []
    for state in ("released", "trained"):
        for placement in ("insert", "gauge"):
            rows = [r for r in found if (r["state"], r["placement"]) == (state, placement)]
            certain = [r.get("certain") for r in rows]
            best = [_first(r) for r in rows]
            told = f"{placement}, {state}: {_range(best)}"
            if placement == "insert":
                told += f", the compensation itself recognised {_range(certain)}"
            parts.append(told)
    return [
        "**When a deformation shows.** From which alpha on some score of the weights alone tells deformed "
        f"layers from others (area under the ROC curve at least {area:g}), over networks, bases, top "
        f"and bottom directions: {'; '.join(parts)}. Fine-tuning blurs the exact sign and leaves the others.",
        "",
        "![What the weights give away](benchmarks/results/visibility.svg)",
        "",
    ]


def _first(row: Row) -> float | None:
    names = ("imbalance", "pencil_gap", "ratio_jump", "gap", "norm_jump", "certain")
    return min((row[n] for n in names if row.get(n) is not None), default=None)


def _range(alphas: list[float | None]) -> str:
    known = sorted(a for a in alphas if a is not None)
    if not known:
        return "never"
    span = f"from {known[0]:g}" if known[0] == known[-1] else f"from {known[0]:g} to {known[-1]:g}"
    missing = len(alphas) - len(known)
    return f"{span} on" + (f" (never in {missing} of {len(alphas)})" if missing else "")
