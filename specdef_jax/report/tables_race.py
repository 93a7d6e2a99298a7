"""The tables about training: ratios, steps, arms, attacks and their bills."""

from __future__ import annotations

from typing import Any

from specdef_jax.report import facts, plots_attacks
from specdef_jax.report.facts import Results
from specdef_jax.report.numbers import (
    MISSING,
    count,
    factor,
    grouped,
    interval,
    named,
    number,
    seconds,
    share,
    spread,
)
from specdef_jax.report.tables import Cell, Table


def ratios(results: Results) -> Table:
    """Tell every comparison of two arms, one column an optimizer."""
    names = facts.optimizers(results)
    arms = results["race"]["arms"]
    expected = {"null control": "1", "slowdown": "> 1", "positive control": "> 1", "attack": "1 if undone"}
    rows: list[list[Cell | str]] = []
    for kind, arm, baseline in facts.comparisons(results):
        cells = [facts.ratio(results, arm, baseline, n) for n in names]
        rows.append(
            [
                kind,
                named(arms[arm]["label"]),
                named(arms[baseline]["label"]),
                expected.get(kind, "—"),
                *(Cell(factor(c), "bound" if c["censored"] else "", interval(c)) for c in cells),
            ]
        )
    head = ("kind", "arm", "baseline", "expect", *(facts.optimizer_name(n) for n in names))
    return Table("Ratios of steps: geometric mean over seeds, 95% bootstrap interval", head, rows, 4)


def steps(results: Results) -> Table:
    """Tell the steps of every seed, with the best step sizes and what to know of the runs."""
    cap = grouped(results["race"]["steps_cap"])
    seeds = results["task"]["seeds"]
    rows: list[list[Cell | str]] = []
    for arm in results["race"]["arms"].values():
        for i, (name, run) in enumerate(arm["optimizers"].items()):
            taken = [f"> {cap}" if t != t else number(t) for t in run["steps"]]
            rows.append(
                [
                    named(arm["label"]) if i == 0 else "",
                    facts.optimizer_name(name),
                    ", ".join(facts.flags(run)),
                    spread(run["best_step_size"], 2),
                    *taken,
                    *[MISSING] * (seeds - len(taken)),
                ]
            )
    head = ("arm", "optimizer", "flags", "best step size", *(f"seed {i}" for i in range(seeds)))
    return Table(
        "Steps to the target, interpolated between evaluations, at the best step size of each seed",
        head,
        rows,
        3,
    )


def arms(results: Results) -> Table:
    """Tell the alpha and the sharpness of every arm."""
    rows: list[list[Cell | str]] = [
        [named(a["label"]), spread(a["alphas"]), spread(a["sharpness"]), seconds(a["seconds"])]
        for a in results["race"]["arms"].values()
    ]
    return Table("Arms of the race", ("arm", "α", "σ₁ at the start", "wall-clock time"), rows)


def attacks(results: Results) -> Table:
    """Tell what every attack left, and its bill."""
    names = facts.optimizers(results)
    rows: list[list[Cell | str]] = []
    for arm, label in plots_attacks.attack_rows(results):
        bill = results["race"]["arms"][arm]["bill"]
        left = [facts.ratio(results, arm, "original", n) for n in names]
        cells = [Cell(factor(c), "bound" if c["censored"] else "", interval(c)) for c in left]
        rows.append([label, bill["knowledge"].replace(" ", "\u00a0") if bill else "—", *cells, *_bill(bill)])
    head = (
        "attack",
        "must\u00a0know",
        *(facts.optimizer_name(n) for n in names),
        "conversion",
        "added parameters",
        "added FLOPs per step",
    )
    return Table("Steps relative to the original network, and the bill", head, rows, 2)


def _bill(bill: dict[str, Any] | None) -> list[Cell | str]:
    if bill is None:
        return ["—", "—", "—"]
    return [
        seconds(bill["conversion_seconds"]),
        Cell(grouped(bill["added_parameters"]), "", share(bill["added_share"])),
        Cell(count(bill["added_flops"]), "", share(bill["added_flops_share"])),
    ]
