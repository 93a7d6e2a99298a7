"""The four questions a reader comes with, answered by one figure each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from specdef_jax.report import facts
from specdef_jax.report.facts import Results
from specdef_jax.report.numbers import (
    MISSING,
    alpha_is,
    factor,
    given,
    interval,
    multiple,
    named,
    number,
    seconds,
    share,
    spread,
)


@dataclass(frozen=True)
class Card:
    """One question: a large figure, what it is, lines of detail, the word for its standing, a link."""

    question: str
    answer: str
    meaning: str
    details: tuple[str, ...]
    word: str
    target: str


def cards(results: Results) -> list[Card]:
    """Return the four questions with their answers."""
    return [_card_preserved(results), _card_sharper(results), _card_slower(results), _card_undone(results)]


def _card_preserved(results: Results) -> Card:
    section = results["preservation"]
    rows = facts.formats_at(results, facts.strongest(results))
    ratios = [layer["bound_ratio"] for r in section["formats"] for layer in r["layers"]]
    kept = [r for r in ratios if math.isfinite(r)]
    return Card(
        "Is the function preserved?",
        number(rows[0]["error"], 2),
        f"relative error of the output in {rows[0]['format']} at {alpha_is(rows[0]['alpha'])}",
        (
            "; ".join(f"{r['format']}\u00a0{number(r['error'], 2)}" for r in rows[1:]),
            f"largest error, as a share of its derived bound: {number(max(kept), 2) if kept else MISSING}",
        ),
        section["word"] if section["holds"] else "failed",
        "preservation",
    )


def _card_sharper(results: Results) -> Card:
    section, alpha = results["curvature"], facts.strongest(results)
    growth = facts.sharpening(results)
    inside = sum(bool(r["sandwich_holds"]) for r in section["rows"])
    worst = max((float(r["congruence_error"]) for r in section["rows"]), default=math.nan)
    return Card(
        "How much sharper, and do the bounds hold?",
        multiple(facts.median(growth)),
        f"growth of σ₁ of the Hessian from {alpha_is(1)} to {given(alpha)}, median over networks",
        (
            f"range {spread(growth)}; α² = {given(alpha**2)}",
            f"within its bounds at {inside} of {len(section['rows'])} values of α",
            f"error of congruence at most {number(worst, 2)}",
        ),
        section["word"] if section["holds"] else "failed",
        "curvature",
    )


def _card_slower(results: Results) -> Card:
    first, alpha = facts.headline_optimizer(results), facts.strongest(results)
    one = facts.slowdown(results, first)
    lines = []
    for name in facts.optimizers(results):
        ratio = facts.slowdown(results, name)
        whole = f"{factor(facts.against_original(results, name))} of the original"
        lines.append(
            f"{facts.optimizer_name(name)} {factor(ratio)} {interval(ratio)}; {whole}".replace(" ;", ";")
        )
    return Card(
        "How much slower is training?",
        factor(one),
        f"steps of {facts.optimizer_name(first)} at {alpha_is(alpha)}, relative to {alpha_is(1)}",
        tuple(lines),
        "estimated",
        "race",
    )


def _card_undone(results: Results) -> Card:
    arms = results["race"]["arms"]
    lines = []
    for attack in facts.attacks(results):
        left, bill = facts.left_by(results, attack), arms[attack]["bill"]
        lines.append(f"{named(arms[attack]['label'])} {factor(left)}, {seconds(bill['conversion_seconds'])}")
    first = facts.cheapest(results) or next(iter(facts.attacks(results)), None)
    if first is None:
        return Card("What does it cost to undo?", MISSING, "no attack was raced", (), "estimated", "attacks")
    bill = arms[first]["bill"]
    return Card(
        "What does it cost to undo?",
        seconds(bill["conversion_seconds"]),
        f"to {first}, without data; it adds {_added(bill)} and leaves "
        f"{factor(facts.left_by(results, first))} the steps of the original",
        tuple(lines),
        "estimated",
        "attacks",
    )


def _added(bill: dict[str, Any]) -> str:
    return f"{share(bill['added_share'])} of parameters" if bill["added_parameters"] else "no parameters"
