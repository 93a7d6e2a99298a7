"""The sentences of the verdict, each computed from the numbers."""

from __future__ import annotations

import math
from typing import Any

from specdef_jax.report import facts
from specdef_jax.report.facts import Results
from specdef_jax.report.numbers import (
    MISSING,
    alpha_is,
    factor,
    given,
    listed,
    multiple,
    named,
    number,
    seconds,
)

A_MINUTE = 60.0


def headline(results: Results) -> str:
    """Return the whole verdict in one line."""
    if failures(results):
        return "A certificate failed"
    names = facts.optimizers(results)
    slower = {facts.optimizer_name(n): _is_slower(facts.slowdown(results, n)) for n in names}
    if not any(slower.values()):
        return "No slowdown of training was measured"
    what = "training"
    if not all(slower.values()):
        yes, no = ([name for name in slower if slower[name] is wanted] for wanted in (True, False))
        what = f"{listed(yes)}, not {listed(no)}"
    attack = facts.cheapest(results)
    if attack is None:
        return f"The deformation slows {what}, and these attacks do not undo it all"
    bill = results["race"]["arms"][attack]["bill"]
    return f"The deformation slows {what}; undoing it takes {seconds(bill['conversion_seconds'])}"


def _is_slower(ratio: Any) -> bool:
    return bool(ratio["value"] > 1 and not ratio["low"] <= 1)


def verdict(results: Results) -> list[str]:
    """Return the paragraphs at the head: preserved, sharper, slower and undone; then the control."""
    first = [_preserved(results), _sharper(results), _slower(results), _undone(results)]
    last = [of_the_ledger(results)] if results.get("ledger") else []
    return [" ".join(first), *last, against_control(results)]


def failures(results: Results) -> list[str]:
    """Return a sentence for every certificate that failed, none if all held."""
    return _failures_of_preservation(results["preservation"]) + _failures_of_curvature(results["curvature"])


def against_control(results: Results) -> str:
    """Say whether top directions slow training more than the scalar control at the same sharpness."""
    names = facts.optimizers(results)
    control = {n: facts.ratio(results, "scalar", "original", n) for n in names}
    tops = {n: facts.slowdown(results, n, facts.matched(results)) for n in names}
    said = [
        f"{facts.optimizer_name(n)} {factor(control[n])} (top directions {factor(tops[n])})" for n in names
    ]
    outcome: dict[str, list[str]] = {"more": [], "less": [], "unclear": []}
    for n in names:
        known = not (math.isnan(tops[n]["value"]) or math.isnan(control[n]["value"]))
        outcome[facts.compare(tops[n], control[n]) if known else "unclear"].append(facts.optimizer_name(n))
    parts = []
    if outcome["more"]:
        parts.append(f"beat this control for {listed(outcome['more'])}")
    if outcome["less"]:
        parts.append(f"do not beat it for {listed(outcome['less'])}")
    if outcome["unclear"]:
        parts.append(f"cannot be told apart from it for {listed(outcome['unclear'])}")
    return (
        f"The sharpness of {alpha_is(facts.matched(results))} put on one bias slows {listed(said)}: "
        f"the paper’s top directions {listed(parts)}."
    )


def of_the_ledger(results: Results) -> str:
    """Say which attack is the strongest on each rung, and whether any takes more than seconds."""
    found = results["ledger"]
    entries = {e["attack"]: e for e in found["entries"]}
    applied = [e for e in found["entries"] if e["bill"] is not None and not e["refused"]]
    worst = max((e["bill"]["conversion_seconds"] for e in applied), default=math.nan)
    said = []
    for rung, attack in found["strongest"].items():
        best = facts.recovered(entries[attack])
        value = math.nan if best is None else best[1].value
        said.append(f"who knows {rung} needs {multiple(value)} the steps ({named(attack.replace('_', ' '))})")
    start = f"Of {len(applied)} attacks that apply, none takes longer to prepare than {seconds(worst)}"
    if not said:
        return f"{start}; none reached the target."
    return f"{start}; beside the original network, {listed(said)}."


def against_bottom(results: Results) -> str:
    """Say how bottom directions compare with top ones at the same sharpness."""
    names = facts.optimizers(results)
    ratios = {n: facts.ratio(results, "bottom", facts.top_arm(1.0), n) for n in names}
    tops = {n: facts.slowdown(results, n, facts.matched(results)) for n in names}
    more = [n for n in names if facts.compare(ratios[n], tops[n]) == "more"]
    less = [n for n in names if facts.compare(ratios[n], tops[n]) == "less"]
    said = []
    if more:
        said.append(f"slow {listed([facts.optimizer_name(n) for n in more])} more than top ones")
    if less:
        said.append(f"slow {listed([facts.optimizer_name(n) for n in less])} less than top ones")
    if not said:
        return "At equal sharpness, bottom and top directions cannot be told apart in these races."
    return f"At equal sharpness, bottom directions {listed(said)}."


def _failures_of_preservation(kept: dict[str, Any]) -> list[str]:
    found = []
    broken = [f"{r['format']} at {alpha_is(r['alpha'])}" for r in kept["formats"] if not r["holds"]]
    if broken:
        found.append(f"Failed: the error bound of preservation is broken in {listed(broken)}.")
    unequal = [f"{b['basis']} basis in {b['dtype']}" for b in kept["bit_identity"] if not b["identical"]]
    if unequal:
        found.append(f"Failed: the network is not bit-identical with the {listed(unequal)}.")
    return found or _unexplained("preservation", kept)


def _failures_of_curvature(curved: dict[str, Any]) -> list[str]:
    found = []
    for key, what in (
        ("sandwich_holds", "σ₁ is outside its bounds"),
        ("congruence_holds", "congruence is broken"),
    ):
        alphas = [given(r["alpha"]) for r in curved["rows"] if not r[key]]
        if alphas:
            found.append(f"Failed: {what} at α = {listed(alphas)}.")
    return found or _unexplained("curvature", curved)


def _unexplained(name: str, section: dict[str, Any]) -> list[str]:
    return [] if section["holds"] else [f"Failed: the certificate of {name} does not hold."]


def _preserved(results: Results) -> str:
    row = facts.formats_at(results, facts.strongest(results))[0]
    alpha = alpha_is(row["alpha"])
    if not results["preservation"]["holds"]:
        return "The function is not preserved as the theory demands: a certificate failed."
    if not math.isfinite(row["error"]):
        return f"In {row['format']} the deformed network overflows at {alpha}."
    how = f"to {number(row['error'], 2)}" if row["error"] else "exactly"
    return f"At {alpha} the function is preserved {how} in {row['format']}."


def _sharper(results: Results) -> str:
    return f"Sharpness grew {multiple(facts.median(facts.sharpening(results)))} (median over networks)."


def _slower(results: Results) -> str:
    names = facts.optimizers(results)
    said = [
        f"{facts.optimizer_name(n)} needed {factor(facts.slowdown(results, n))} the steps" for n in names[:1]
    ]
    said += [f"{facts.optimizer_name(n)} {factor(facts.slowdown(results, n))}" for n in names[1:]]
    original = [factor(facts.against_original(results, n)) for n in names]
    return (
        f"{listed(said)}, relative to the same network at {alpha_is(1)}; "
        f"relative to the original network, {listed(original)}."
    )


def _undone(results: Results) -> str:
    present = [a for a in ("fuse", "freeze") if a in facts.attacks(results)]
    if not present:
        return "No attack was raced."
    arms = results["race"]["arms"]
    how = {"fuse": "fusing the two stored factors", "freeze": "freezing the compensations"}
    left = {a: facts.left_by(results, a) for a in present}
    spent = {a: seconds(arms[a]["bill"]["conversion_seconds"]) for a in present}
    if all(facts.undone(one) for one in left.values()):
        slowest = max(arms[a]["bill"]["conversion_seconds"] for a in present)
        start = f"This is undone {'in seconds and ' if slowest < A_MINUTE else ''}without data: "
    elif any(facts.undone(one) for one in left.values()):
        start = "One attack undoes this without data: "
    else:
        start = "The attacks, which need no data, leave some of it: "
    said = [f"{how[a]} ({spent[a]}) left {_left(left[a])}" for a in present]
    return f"{start}{listed(said)} the steps of the original for every optimizer."


def _left(left: dict[str, Any]) -> str:
    if math.isnan(left["value"]):
        return MISSING
    return factor(left) if left["censored"] else f"at most {factor(left)}"
