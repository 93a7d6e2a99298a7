"""Figures of race tables: slowdown against alpha, or arm by arm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

COLOURS = ("#3b6ea8", "#c2542d", "#4f8a4c", "#8c5fa8", "#b08a2e", "#4a9aa5", "#a34a6f", "#6b6b6b")
Rows = list[dict[str, Any]]


def draw(config: dict[str, Any], ratios: Rows, path: Path) -> None:
    """Write the figure of a table."""
    over_alpha = [arm["alpha"] for arm in config["arms"] if "alpha" in arm and "baseline" in arm]
    if config.get("figure", "alphas") == "alphas" and len(over_alpha) > 2:
        figure = _small_multiples(config, ratios)
    else:
        figure = _by_arm(config, ratios)
    figure.savefig(path)
    plt.close(figure)


def _small_multiples(config: dict[str, Any], ratios: Rows) -> Any:
    """Draw slowdown over alpha, one panel per optimizer, to the target and to each milestone."""
    names = config["optimizers"]
    columns = min(4, len(names))
    count = -(-len(names) // columns)
    figure, axes = plt.subplots(
        count, columns, figsize=(2.9 * columns, 2.3 * count), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    alphas = {arm["name"]: arm["alpha"] for arm in config["arms"] if "alpha" in arm}
    levels = ["target", *(f"{m:g}" for m in config["race"].get("milestones", ()))]
    base = next(arm["baseline"] for arm in reversed(config["arms"]) if "alpha" in arm and "baseline" in arm)
    for ax, name in zip(axes.flat, names, strict=False):
        for level, colour in zip(levels, COLOURS, strict=False):
            mine = [r for r in ratios if r["optimizer"] == name and r["to"] == level and r["arm"] in alphas]
            mine = [r for r in mine if r["baseline"] == base]
            label = f"to {config['task']['target']:g} nats" if level == "target" else f"to {level} nats"
            _curve(ax, [alphas[r["arm"]] for r in mine], mine, colour, label)
        ax.set_title(name, fontsize=9, loc="left")
        ax.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=7)
    figure.supylabel("steps over steps at alpha 1", fontsize=9)
    figure.supxlabel("alpha (shaded: 95% intervals; triangles: lower bounds)", fontsize=9)
    return figure


def _curve(ax: Axes, x: list[float], ratios: Rows, colour: str, label: str) -> None:
    value = np.array([r["value"] for r in ratios], float)
    low = np.array([r["low"] for r in ratios], float)
    high = np.array([r["high"] for r in ratios], float)
    bound = np.array([r["censored"] for r in ratios], bool)
    ax.plot(x, value, color=colour, linewidth=1.2, label=label)
    ax.fill_between(x, low, np.where(np.isfinite(high), high, value), color=colour, alpha=0.2, linewidth=0)
    for marker, chosen in (("o", ~bound), ("^", bound)):
        ax.plot(np.array(x)[chosen], value[chosen], marker, color=colour, markersize=3.5)


def _by_arm(config: dict[str, Any], ratios: Rows) -> Any:
    """Draw the ratio of every arm to its baseline, one column of dots per optimizer."""
    names = config["optimizers"]
    shown = [arm["name"] for arm in config["arms"] if "baseline" in arm]
    figure, axes = plt.subplots(
        1, len(names), figsize=(3 + 2.2 * len(names), 1.0 + 0.3 * len(shown)), sharey=True, sharex=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for ax, name in zip(axes[0], names, strict=True):
        mine = {r["arm"]: r for r in ratios if r["optimizer"] == name and r["to"] == "target"}
        for y, arm in enumerate(reversed(shown)):
            ratio = mine[arm]
            if not np.isfinite(ratio["value"]):
                ax.text(1, y, "n/a", fontsize=7, va="center", color="#888888")
                continue
            high = ratio["high"] if np.isfinite(ratio["high"]) else ratio["value"]
            colour = COLOURS[1] if ratio["censored"] else COLOURS[0]
            ax.plot([ratio["low"], high], [y, y], color=colour, linewidth=1.4, alpha=0.5)
            ax.plot(ratio["value"], y, ">" if ratio["censored"] else "o", color=colour, markersize=4.5)
        ax.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
        ax.set_xscale("log")
        ax.set_title(name, fontsize=9, loc="left")
        ax.set_yticks(range(len(shown)), reversed(shown), fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("steps over the baseline's (95% intervals; arrows are lower bounds)", fontsize=9)
    return figure
