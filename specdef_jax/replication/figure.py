"""The figure of a replication: how far each defence holds the attack off, and what is left of the network."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specdef_jax.replication.tables import Results
from specdef_jax.report import svg
from specdef_jax.report.axes import clean, log_axis

SHADES = ("blue", "orange", "green", "purple", "rose")
MARKS = ("o", "s", "^", "D", "v")


def relearning(results: Results) -> str:
    """Draw the figure as inline SVG."""
    return svg.inline(
        "relearning",
        "Relearning, defence by defence",
        "Left: steps of Adam to the target at each step size, hollow where some network did not reach it "
        "within the cap. Right: the capability at the end. The numbers are in the table of relearning.",
        (9.6, 0.9 + 0.32 * len(results["matrix"])),
        lambda figure, colours: draw(figure, colours, results),
    )


def draw(figure: Any, colours: dict[str, str], results: Results) -> None:
    """Put both panels on a figure."""
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(results["matrix"])
    cap, sizes = results["config"]["steps"], results["config"]["step_sizes"]
    log_axis(left, "x", 1, 1.3 * cap)
    for y, name in enumerate(names):
        for i, cell in enumerate(results["matrix"][name]["cells"]):
            shade, mark = colours[SHADES[i % len(SHADES)]], MARKS[i % len(MARKS)]
            place = y + 0.2 * (i - (len(sizes) - 1) / 2)
            steps = np.array(
                [cap if math.isnan(n["steps"]) else max(n["steps"], 1) for n in cell["networks"]]
            )
            missing = any(math.isnan(n["steps"]) for n in cell["networks"])
            fill = "none" if missing else shade
            left.plot([steps.min(), steps.max()], [place, place], color=shade, linewidth=1)
            left.plot(np.median(steps), place, mark, color=shade, markerfacecolor=fill, markersize=4.5)
            able = np.array([n["capability"] for n in cell["networks"]])
            right.plot([able.min(), able.max()], [place, place], color=shade, linewidth=1)
            right.plot(np.median(able), place, mark, color=shade, markersize=4.5)
    for variant, dash in (("known", "-"), ("ignorant", ":")):
        able = np.median([one["capability"] for one in results["task"]["variants"][variant]])
        right.axvline(able, color=colours["muted"], linewidth=0.8, linestyle=dash)
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.tick_params(axis="y", length=0, labelcolor=colours["ink"])
    left.set_xlabel(f"steps to the target (hollow: not within {cap})")
    right.set_xlim(0, 1)
    right.set_xlabel("capability at the end (line: who knows; dotted: who does not)")
    for panel in (left, right):
        clean(panel, colours)
    from matplotlib.lines import Line2D

    figure.legend(
        [
            Line2D([], [], color=colours[SHADES[i % len(SHADES)]], marker=MARKS[i % len(MARKS)], linestyle="")
            for i in range(len(sizes))
        ],
        [f"step size {s:g}" for s in sizes],
        loc="outside lower center",
        ncols=len(sizes),
    )


def standalone(results: Results) -> bytes:
    """Draw the figure as an SVG file on a light ground."""
    size = 9.6, 0.9 + 0.32 * len(results["matrix"])
    return svg.standalone("relearning", size, lambda figure, colours: draw(figure, colours, results))
