"""The README's section on races, and the page with the answers, from the saved tables."""

from __future__ import annotations

from typing import Any

from benchmarks._harness import machine
from benchmarks._race_answers import ANSWERS
from benchmarks._race_words import Table, answered, grid, moved


def races() -> str:
    """Tell how much slower each optimizer becomes, and what a rerun says of it."""
    lines: list[str] = []
    first, second = Table.load("first_order"), Table.load("second_order")
    if first is not None:
        lines += _headline(first)
    if second is not None:
        lines += _second_order(second)
    lines += ["Question by question, with intervals: [docs/optimizers.md](docs/optimizers.md).", ""]
    return "\n".join(lines)


def _headline(table: Table) -> list[str]:
    config = table.record["config"]
    task, race = config["task"], config["race"]
    scalar = [arm["name"] for arm in config["arms"] if arm.get("scalar")]
    minutes = table.record["summary"]["seconds"] / 60
    lines = [
        f"**Who is slowed.** Steps to {task['target']:g} nats over steps at alpha 1, each at the best step "
        f"size of each network; {task['seeds']} pretrained networks, full batch, at most {race['steps']} "
        "steps, float64. The scalar control, one output bias rescaled to the sharpness of the largest alpha, "
        f"is over the original. ({minutes:.0f} minutes, {machine(table.record)}.)",
        "",
        *grid(table, [*_alphas(table)[1:], *scalar]),
        "",
        "![Slowdown by alpha, optimizer by optimizer](benchmarks/results/race_first_order.svg)",
        "",
    ]
    rerun = Table.load("first_order_rerun")
    if rerun is not None:
        changed = moved(table, rerun)
        count = sum(to == "target" for _, _, to in rerun.ratios)
        said = "moves no verdict" if not changed else f"moves {len(changed)}: {'; '.join(changed)}"
        if changed and not any("slowed" in one and "faster" in one for one in changed):
            said += ". None turns slowed into faster: in each, one of the two cannot tell"
        lines += [f"A rerun with disjoint pretraining seeds, {count} verdicts, {said}.", ""]
    return lines


def _second_order(table: Table) -> list[str]:
    task, race = table.record["config"]["task"], table.record["config"]["race"]
    return [
        "Curvature-aware optimizers: gradients over gradients at alpha 1, a Hessian product worth two; "
        f"{task['seeds']} networks, at most {race['max_evaluations']:g} gradients or {race['steps']} steps.",
        "",
        *grid(table, _alphas(table)[1:], "evaluations"),
        "",
        "![Curvature-aware optimizers by alpha](benchmarks/results/race_second_order.svg)",
        "",
    ]


def _alphas(table: Table) -> list[str]:
    return [arm["name"] for arm in table.record["config"]["arms"] if "alpha" in arm]


def page() -> str:
    """Return docs/optimizers.md."""
    lines = [
        "# What decides the slowdown",
        "",
        "Written by `python -m benchmarks.readme` from `benchmarks/results/race_*.json`; every sentence is",
        "checked against the numbers before it is written. Ratios are steps over the baseline's, at the best",
        "step size of each network, with 95% intervals over pretrained networks; `>=` is a lower bound,",
        "`n/a` a baseline that does not reach the target.",
        "",
    ]
    answers, exponents = Table.load("answers"), Table.load("exponents")
    if answers is not None:
        lines += answered(answers, ANSWERS)
        lines += ["![All arms](../benchmarks/results/race_answers.svg)", ""]
    if exponents is not None:
        lines += _exponents(exponents.record["summary"]["exponents"])
    return "\n".join(lines)


def _exponents(fitted: list[dict[str, Any]]) -> list[str]:
    told = [row for row in fitted if row["agrees"] is not None]
    missed = sum(not row["agrees"] for row in told)
    lines = [
        "## Exponents: predicted and measured",
        "",
        f"Of {len(told)} predictions {missed} are not met, that is within 0.1 and inside the interval, over",
        "the alphas raced. 3.1 and 3.3 are limits of large alpha, and at the small ones the sharpness of the",
        "start is not yet that of the deformed direction: the last step of alpha shows where a fit goes.",
        "3.7 says by how much the steps of a coordinatewise method on axis differ between coordinates, not",
        "that a race at the best step size is slowed by as much. Where no statement predicts, none is given.",
        "",
        "| basis | optimizer | quantity | predicted | fitted | last octave | networks | agrees |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in fitted:
        told = "" if row["prediction"] is None else f"{row['prediction']:g} ({row['statement']})"
        agrees = {None: "", True: "yes", False: "no"}[row["agrees"]]
        lines.append(
            f"| {row['basis']} | {row['optimizer']} | {row['quantity']} | {told} | {row['fit']:.2f} "
            f"[{row['low']:.2f}, {row['high']:.2f}] | {row['last']:.2f} | {row['seeds']} | {agrees} |"
        )
    return [*lines, "", "![Exponents](../benchmarks/results/race_exponents.svg)", ""]
