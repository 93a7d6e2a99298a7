"""The tables of a replication: medians over networks, ranges beside them, censoring marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from specdef_jax.race import Ratio, ratio_of_means
from specdef_jax.replication.reading import Results, best
from specdef_jax.report.tables import Table

RUINED = 2.0  # times the perplexity on the retained domain


def page(results: Results) -> str:
    """Return every table of a replication as Markdown."""
    task = results["task"]
    lines = [f"# {task['name']}", "", task["description"], "", legend(results), ""]
    for table in every_table(results):
        head = ["| " + " | ".join(table.head) + " |", "|" + "---|" * len(table.head)]
        lines += [
            f"## {table.caption}",
            "",
            *head,
            *("| " + " | ".join(map(str, row)) + " |" for row in table.rows),
            "",
        ]
    for name, made in samples(results).items():
        if all(isinstance(text, str) for text in made):
            lines += [f"{name}:", "", "```text", *map(repr, made), "```", ""]
    return "\n".join(lines)


def legend(results: Results) -> str:
    """Say how to read the tables."""
    task, raced = results["task"], results["config"]["seeds"]
    few = f" ({raced} outside the headline rows)" if raced < task["seeds"] else ""
    return (
        f"{task['seeds']} networks{few}. Capability: {task['capability']}, held out. Perplexity is on the "
        f"retained domain, held out; † marks where it grew more than {RUINED:g} times over that of the "
        "network attacked. Ranges are over networks."
    )


def every_table(results: Results) -> list[Table]:
    """Return every table of a replication."""
    made = (variants, matrix, utility, optimizers, adapters, attacks)
    return [make(results) for make in made]


def variants(results: Results) -> Table:
    """Tell what each network can do before any attack."""
    rows = [
        [
            name,
            _spread([one["capability"] for one in found]),
            _spread([math.exp(min(one["retained"], 700.0)) for one in found]),
        ]
        for name, found in results["task"]["variants"].items()
    ]
    return _table("Before any attack", ("network", "capability", "perplexity"), rows)


def matrix(results: Results) -> Table:
    """Tell steps to the target, and the capability at the end, by defence and step size."""
    sizes = results["config"]["step_sizes"]
    rows = []
    for name, row in results["matrix"].items():
        if row["refused"]:
            rows.append([name, *[f"not raced: {row['refused']}"] + [""] * (len(sizes) - 1)])
            continue
        rows.append([name, *(_cell(cell, row["start"], results) for cell in row["cells"])])
    head = ("defence", *(f"step size {s:g}" for s in sizes))
    return _table(
        f"Relearning with Adam: steps to the target / capability at the end, at most "
        f"{results['config']['steps']} steps",
        head,
        rows,
    )


def utility(results: Results) -> Table:
    """Tell what deforming does to the perplexity on the retained domain, by alpha and format."""
    found = results["utility"]
    formats = list(dict.fromkeys(row["format"] for row in found))
    rows = []
    for basis, alpha in dict.fromkeys((row["basis"], row["alpha"]) for row in found):
        here = {r["format"]: r for r in found if (r["basis"], r["alpha"]) == (basis, alpha)}
        rows.append([f"{basis}, {alpha:g}", *(_change(here[name]) for name in formats)])
    return _table("Perplexity after deforming, over before", ("basis, alpha", *formats), rows)


def optimizers(results: Results) -> Table:
    """Tell how each optimizer fares without and with the defence."""
    found, cap = results["optimizers"], results["config"]["steps"]
    rows = []
    for name in found["undefended"]:
        before, after = found["undefended"][name], found["SpecDef"][name]
        rows.append([name, fastest(before, name), fastest(after, name), _ratio(after, before, name, cap)])
    alpha = results["config"]["optimizer_alpha"]
    return _table(
        f"Optimizers: steps at the best step size of each network, SpecDef at alpha {alpha:g}",
        ("optimizer", "undefended", "SpecDef", "over undefended"),
        rows,
    )


def adapters(results: Results) -> Table:
    """Tell how LoRA fares."""
    rows = [[name, fastest(found, "adam")] for name, found in results["lora"].items()]
    return _table("LoRA with Adam: steps to the target", ("adapters", "steps"), rows)


def attacks(results: Results) -> Table:
    """Tell what every attack leaves of the defence and costs."""
    base, cap = results["optimizers"]["undefended"]["adam"], results["config"]["steps"]
    rows = []
    for found in results["attacks"]:
        name, bill = found["attack"].replace("_", " "), found["bill"]
        if found["refused"]:
            rows.append([name, "", "does not apply", "", "", ""])
            continue
        rows.append(
            [
                name,
                bill["knowledge"],
                fastest(found, "adam"),
                _ratio(found, base, "adam", cap),
                f"{bill['conversion_seconds']:.2g}",
                f"{bill['added_share']:.0%}",
            ]
        )
    head = ("attack", "must know", "steps", "over undefended", "conversion, s", "added parameters")
    return _table("Attacks on SpecDef, with Adam", head, rows)


def samples(results: Results) -> dict[str, list[Any]]:
    """Return what the first network makes before any attack, and after it in the headline rows."""
    found = {f"{name}, before": made for name, made in results["task"]["samples"].items()}
    for name, row in results["matrix"].items():
        cell = best(row)
        made = None if cell is None else cell["networks"][0].get("samples")
        if made is not None:
            found[f"{name}, after"] = made
    return found


def _table(title: str, head: Sequence[str], rows: list[list[str]]) -> Table:
    return Table(title, tuple(head), rows)  # type: ignore[arg-type]


def _cell(cell: dict[str, Any], start: list[dict[str, float]], results: Results) -> str:
    networks = cell["networks"]
    cap = results["config"]["steps"]
    steps = _steps([one["steps"] for one in networks], cap)
    grown = [one["retained"] - before["retained"] for one, before in zip(networks, start, strict=True)]
    ruined = not np.median(grown) <= math.log(RUINED)
    return f"{steps} / {_spread([one['capability'] for one in networks])}{' †' if ruined else ''}"


def _steps(steps: Sequence[float], cap: int) -> str:
    filled = [cap if math.isnan(s) else s for s in steps]
    missing = sum(map(math.isnan, steps))
    if missing == len(steps):
        return f"> {cap}"
    told = f"{np.median(filled):.0f} [{min(filled):.0f}, {max(filled):.0f}]"
    return f"{told}, {missing} not" if missing else told


def fastest(found: dict[str, Any], name: str) -> str:
    """Tell the steps of an optimizer at the best step size of each network."""
    if found["refused"]:
        return f"not raced: {found['refused']}"
    one = found[name]
    known = [s for s in one["steps"] if not math.isnan(s)]
    if not known:
        return "not reached"
    told = f"{np.median(known):.0f} [{min(known):.0f}, {max(known):.0f}]"
    missing = len(one["steps"]) - len(known)
    return told + (f", {missing} not" if missing else "") + (" (edge)" if one["at_edge"] else "")


def _ratio(one: dict[str, Any], base: dict[str, Any], name: str, cap: int) -> str:
    if one["refused"] or base["refused"]:
        return ""
    ratio: Ratio = ratio_of_means(np.array(one[name]["steps"]), np.array(base[name]["steps"]), cap)
    return str(ratio)


def _change(row: dict[str, Any]) -> str:
    change = math.exp(min(row["after"] - row["before"], 700.0)) if math.isfinite(row["after"]) else math.inf
    return f"{change:.4g}"


def _spread(values: Sequence[float]) -> str:
    return f"{np.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"
