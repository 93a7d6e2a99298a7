"""The tables of a checkpoint's certification: the network as it is stored, and every attack with its bill."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specdef_jax.report import facts
from specdef_jax.report.facts import Results
from specdef_jax.report.numbers import MISSING, given, named, number, seconds, share
from specdef_jax.report.tables import Cell, Table

_RELEASED = {
    "error": "relative error of the output",
    "divergence": "divergence per token, nats",
    "largest_logit_change": "largest change of a logit",
    "same_top_token": "same likeliest token",
    "perplexity": "perplexity before",
    "perplexity_deformed": "perplexity after",
}


def released(results: Results) -> Table:
    """Tell what deforming changes in the stored number format, alpha by alpha."""
    rows = results["released"]["rows"]
    told = [field for field in _RELEASED if field in rows[0]]
    body: list[list[Cell | str]] = [
        [given(row["alpha"]), *(_value(field, row[field]) for field in told)] for row in rows
    ]
    head = ("α", *(_RELEASED[field] for field in told))
    return Table(f"Stored as {rows[0]['dtype']}", head, body, 0)


def ledger(results: Results) -> Table:
    """Tell what every attack recovers, and what it costs."""
    found = results["ledger"]
    strongest = set(found["strongest"].values())
    rows: list[list[Cell | str]] = []
    for entry in found["entries"]:
        label = Cell(
            named(entry["attack"].replace("_", " ")),
            "",
            "strongest of its rung" if entry["attack"] in strongest else "",
        )
        if entry["refused"]:
            rows.append([label, "", Cell("does not apply", "", entry["refused"]), *[MISSING] * 6])
            continue
        rows.append(
            [label, entry["knowledge"].replace(" ", "\u00a0"), *_recovered(entry), *_bill(entry["bill"])]
        )
    head = (
        "attack", "must\u00a0know", "optimizer", "steps", "over the original", "conversion", "added size",
        "added FLOPs", "peak memory",
    )  # fmt: skip
    return Table(
        f"Every attack at α = {given(found['alpha'])}, best optimizer and step size each", head, rows, 3
    )


def _recovered(entry: dict[str, Any]) -> list[Cell | str]:
    best = facts.recovered(entry)
    if best is None:
        return ["", "not reached", MISSING]
    name, ratio = best
    return [facts.optimizer_name(name), number(float(np.median(entry["steps"][name]))), str(ratio)]


def _bill(bill: dict[str, Any] | None) -> list[Cell | str]:
    if bill is None:
        return [MISSING] * 4
    peak = bill["peak_bytes"] / bill["plain_peak_bytes"] - 1
    return [
        seconds(bill["conversion_seconds"]), share(bill["added_share"]), share(bill["added_flops_share"]),
        MISSING if math.isnan(peak) else f"{peak:+.0%}",
    ]  # fmt: skip


def _value(field: str, value: float) -> str:
    return share(value) if field == "same_top_token" else number(value, 3)
