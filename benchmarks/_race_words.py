"""What the race tables say, in words that are checked against the numbers before they are written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks._harness import RESULTS
from specdef_jax.race import Ratio

Ratios = dict[tuple[str, str, str], Ratio]  # (arm, optimizer, to)


@dataclass(frozen=True)
class Table:
    """A saved table and its ratios."""

    record: dict[str, Any]
    ratios: Ratios

    @classmethod
    def load(cls, name: str) -> Table | None:
        """Return benchmarks/results/race_NAME.json, or None before it was measured."""
        path = RESULTS / f"race_{name}.json"
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        fields = ("value", "low", "high", "censored", "seeds")
        found = {
            (r["arm"], r["optimizer"], r["to"]): Ratio(*(r[f] for f in fields))
            for r in record["summary"]["ratios"]
        }
        return cls(record, found)

    def ratio(self, arm: str, optimizer: str, to: str = "target") -> Ratio:
        """Return one ratio."""
        return self.ratios[arm, optimizer, to]

    def steps(self, arm: str, optimizer: str) -> dict[str, Any]:
        """Return the row of an arm and an optimizer."""
        return next(r for r in self.record["rows"] if (r["arm"], r["optimizer"]) == (arm, optimizer))


def verdict(ratio: Ratio) -> str:
    """Say what an interval lets one say."""
    if math.isnan(ratio.value):
        return "nothing to compare"
    if ratio.low > 1:
        return "slowed"
    return "faster" if ratio.high < 1 else "cannot tell"


def moved(first: Table, rerun: Table) -> list[str]:
    """Return what two tables of disjoint seeds say differently, of the arms that both have."""
    return [
        f"{optimizer}, {arm}: {verdict(a)} ({a}) and {verdict(rerun.ratios[arm, optimizer, to])} "
        f"({rerun.ratios[arm, optimizer, to]})"
        for (arm, optimizer, to), a in first.ratios.items()
        if to == "target"
        and (arm, optimizer, to) in rerun.ratios
        and verdict(a) != verdict(rerun.ratios[arm, optimizer, to])
    ]


def grid(table: Table, arms: Sequence[str], to: str = "target") -> list[str]:
    """Return a Markdown table: a row per optimizer, a column per arm."""
    lines = ["| optimizer | " + " | ".join(arms) + " |", "|---|" + "---|" * len(arms)]
    for name in table.record["config"]["optimizers"]:
        lines.append("| " + " | ".join([name, *(str(table.ratio(a, name, to)) for a in arms)]) + " |")
    return lines


@dataclass(frozen=True)
class Answer:
    """A question, the arms that answer it, and a sentence that holds of the numbers or is not written.

    Attributes:
      question: as the page prints it.
      arms: whose ratios are listed.
      says: two sentences at most.
      holds: tells whether the sentences are true of the table.
      to: what the ratios are of.
    """

    question: str
    arms: tuple[str, ...]
    says: str
    holds: Callable[[Table], bool]
    to: str = "target"


def answered(table: Table, answers: Sequence[Answer]) -> list[str]:
    """Return the answers as Markdown.

    Raises:
      ValueError: a sentence is not true of the numbers.
    """
    lines = []
    for answer in answers:
        if not answer.holds(table):
            raise ValueError(f"the numbers no longer say so: {answer.question}: {answer.says}")
        lines += [f"### {answer.question}", "", *grid(table, answer.arms, answer.to), "", answer.says, ""]
    return lines
