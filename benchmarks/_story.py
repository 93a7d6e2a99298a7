"""The figure of the README's first screen: every system without the defence, with it, and with it undone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from benchmarks._replications import headline_rows, label, learnable, taught
from specdef_jax.replication.reading import Results, best, capability, median, typical
from specdef_jax.report import svg
from specdef_jax.report.axes import clean, log_axis

ARMS = {
    "no defence, Adam": ("blue", "o"),
    "SpecDef, Adam": ("orange", "s"),
    "SpecDef, the best other optimizer": ("purple", "^"),
    "SpecDef, the two factors multiplied out, Adam": ("green", "D"),
}


@dataclass(frozen=True)
class Mark:
    """What an attacker needs, and what he has in the end.

    Attributes:
      steps: median over networks at their best step sizes; NaN where half of them or more do not arrive.
      capability: median at the end, at the best step size of the matrix; NaN if the matrix has no such row.
    """

    steps: float
    capability: float


def marks(results: Results) -> dict[str, Mark]:
    """Return what each arm of ARMS comes to."""
    raced, plain, defended, undone = results["optimizers"], *headline_rows(results)
    fused = next((a for a in results["attacks"] if a["attack"] == "fuse"), None)
    others = [arrived(raced["SpecDef"][name], name) for name in raced["SpecDef"] if name != "adam"]
    found = (
        Mark(arrived(raced["undefended"]["adam"], "adam"), _end(plain)),
        Mark(arrived(raced["SpecDef"]["adam"], "adam"), _end(defended)),
        Mark(min([s for s in others if not math.isnan(s)], default=math.nan), math.nan),
        Mark(arrived(fused, "adam"), _end(undone)),
    )
    return dict(zip(ARMS, found, strict=True))


def arrived(found: dict[str, Any] | None, name: str) -> float:
    """Return the median steps of an optimizer; NaN where half of the networks or more do not arrive."""
    if found is None or found["refused"]:
        return math.nan
    return typical(found[name]["steps"])


def told(found: list[Results]) -> str:
    """Say in a few sentences what the figure shows.

    A system whose capability the attack does not bring back without a defence is named, and not counted.
    """
    shown = [results for results in found if learnable(results)]
    every = [marks(results) for results in shown]
    plain, defended, other, fused = ([m[arm] for m in every] for arm in ARMS)
    pairs = list(zip(plain, defended, fused, strict=True))
    stopped = sum(math.isnan(d.steps) and not math.isnan(p.steps) for p, d, _ in pairs)
    slowed = sum(d.steps > 1.5 * p.steps for p, d, _ in pairs)
    open_ = sum(not math.isnan(o.steps) for o in other)
    undone = sum(f.steps <= 1.1 * p.steps for p, _, f in pairs)
    config, count = found[0]["config"], len(shown)
    others = ", ".join(name for name in config["optimizers"] if name != "adam")
    return (
        f"A capability is withheld in {count} systems in miniature; an attacker fine-tunes to get it back. "
        f"SpecDef at alpha {config['optimizer_alpha']:g} stops Adam in {stopped} of them and slows it in "
        f"{slowed} more; another optimizer ({others}; not all in each) arrives in {open_}; with the two "
        f"factors multiplied out Adam is as fast as without the defence in {undone}."
    ) + "".join(_not_counted(results) for results in found if not learnable(results))


def _not_counted(results: Results) -> str:
    before, after, known = taught(results)
    return (
        f" Not counted is {label(results)}: there the attacker's loss reaches its target before the "
        f"capability is back, without a defence too ({after:.2f}; {before:.2f} before, {known:.2f} of who "
        "was taught it)."
    )


def figure(found: list[Results]) -> bytes:
    """Draw the figure as an SVG file."""
    size = 9.6, 1.5 + 0.42 * len(found)
    return svg.standalone("story", size, lambda canvas, colours: draw(canvas, colours, found))


def draw(canvas: Any, colours: dict[str, str], found: list[Results]) -> None:
    """Put both panels on a figure."""
    left, right = canvas.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    cap = max(results["config"]["steps"] for results in found)
    log_axis(left, "x", 2, 1.6 * cap)
    left.axvline(cap, color=colours["muted"], linewidth=0.8, linestyle=":")
    for y, results in enumerate(found):
        for i, (arm, mark) in enumerate(marks(results).items()):
            shade, shape = colours[ARMS[arm][0]], ARMS[arm][1]
            place = y + 0.17 * (i - (len(ARMS) - 1) / 2)
            missing = math.isnan(mark.steps)
            steps = cap if missing else max(mark.steps, 2)
            left.plot(steps, place, shape, color=shade, markerfacecolor="none" if missing else shade)
            if missing:
                left.annotate(
                    "",
                    (1.45 * cap, place),
                    (1.06 * cap, place),
                    arrowprops={"arrowstyle": "->", "color": shade},
                )
            if not math.isnan(mark.capability):
                right.plot(mark.capability, place, shape, color=shade)
        for variant, dash in ((results["task"]["defended"], ":"), ("known", "-")):
            able = capability(results, variant)
            right.plot([able, able], [y - 0.4, y + 0.4], dash, color=colours["muted"], linewidth=1)
    left.set_yticks(range(len(found)), [label(r) + "*" * (not learnable(r)) for r in found])
    left.set_ylim(len(found) - 0.5, -0.5)
    left.tick_params(axis="y", length=0, labelcolor=colours["ink"])
    left.set_xlabel(f"steps until the attack's loss is at its target (hollow: not within {cap})")
    right.set_xlim(-0.03, 1.03)
    right.set_xlabel("capability after the attack")
    for panel in (left, right):
        clean(panel, colours, grid="x")
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colours[c], marker=m, linestyle="") for c, m in ARMS.values()]
    for dash in (":", "-"):
        handles.append(Line2D([], [], color=colours["muted"], linestyle=dash, linewidth=1))
    labels = [*ARMS, "capability before the attack", "of who was taught it"]
    canvas.legend(handles, labels, loc="outside lower center", ncols=3)


def _end(row: dict[str, Any]) -> float:
    cell = best(row)
    return math.nan if cell is None else median(cell, "capability")
