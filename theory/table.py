"""Certificates as a table for people."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from theory.catalogue import Report
from theory.certificate import Certificate, Verdict

_MARKS = {Verdict.HOLDS: "holds", Verdict.FAILS: "FAILS", Verdict.VIOLATED: "n/a"}
WIDTH = 110


def table(reports: Iterable[Report]) -> str:
    """Return the whole table, one block per statement."""
    return "\n\n".join(map(block, reports))


def block(report: Report) -> str:
    """Return one statement: a title, then two lines per certificate."""
    s = report.statement
    lines = [f"{s.number}  {s.title}  [{s.standing}]  {report.seconds:.1f} s", "-" * WIDTH]
    if report.error:
        lines.append(f"  FAILS  {report.error}")
    for c in report.certificates:
        lines.append(f"  {_MARKS[c.verdict]:6} {c.word:9} {c.claim}")
        lines += _indented(f"{_sides(c)}  on {c.instance}")
        for told in (c.violated and f"assumption violated: {c.violated}", c.note, _searched(c)):
            lines += _indented(told) if told else []
    return "\n".join(lines)


def summary(statements: Iterable[Mapping[str, Any]]) -> str:
    """Return one line, how many of what, on statements as catalogue.to_dict gives them."""
    statements = list(statements)
    found = [c for s in statements for c in s["certificates"]]
    words = Counter(c["word"] for c in found if c["verdict"] == Verdict.HOLDS)
    told = ", ".join(f"{n} {word}" for word, n in sorted(words.items(), reverse=True))
    verdicts = Counter(c["verdict"] for c in found)
    failed = verdicts[Verdict.FAILS] + sum(bool(s["error"]) for s in statements)
    instances, seconds = sum(c["count"] for c in found), sum(s["seconds"] for s in statements)
    return (
        f"{len(statements)} statements, {len(found)} certificates on {instances:,} instances: {told}; "
        f"{failed} fail; {verdicts[Verdict.VIOLATED]} outside the assumptions; {seconds:.0f} s of work"
    )


def _sides(c: Certificate) -> str:
    count = f", {c.count:,} instances" if c.count > 1 else ""
    if c.verdict is Verdict.VIOLATED:
        return ""
    if c.kind == "equality":
        return f"relative error {_n(c.slack)} (allowed {_n(c.allowance)}){count}"
    if c.kind == "fit":
        return f"{_n(c.lhs)}, predicted {_n(c.rhs)} within {_n(c.bar)}{count}"
    if c.kind == "seen":
        return f"{_n(c.lhs)}" + ("" if math.isnan(c.rhs) else f" against {_n(c.rhs)}") + count
    if c.kind == "refuted" and math.isnan(c.lhs):
        return "refused"
    sign = ">" if c.kind == "refuted" else "<="
    told = f"{_n(c.lhs)} {sign} {_n(c.rhs)}, slack {_n(c.slack)} (allowance {_n(c.allowance)})"
    return told + (f", within a factor {_n(c.bar)}" if c.kind == "tight" else "") + count


def _searched(c: Certificate) -> str:
    if c.search is None:
        return ""
    s = c.search
    return (
        f"falsifier: smallest slack {_n(s.worst)} over {s.tried:,} random points and {s.climbed} descents "
        f"of {s.steps} steps (evidence, no proof)"
    )


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * 19, subsequent_indent=" " * 19)


def _n(x: float) -> str:
    return f"{x:.4g}"
