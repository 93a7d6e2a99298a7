"""What the figures share: log axes with readable ticks, series with intervals, labels beside their lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from specdef_jax.report.numbers import given, grouped, power_of_ten

OPTIMIZER_COLOURS = ("blue", "orange", "green", "rose", "purple", "ochre")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def clean(axes: Any, colours: dict[str, str], *, grid: str = "y") -> None:
    """Leave the two axes that carry ticks, and hair lines to read values along."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=colours["rule"], linewidth=0.6)
    axes.set_axisbelow(True)


def limits(values: Iterable[float], margin: float = 1.3) -> tuple[float, float]:
    """Return log limits a margin around the finite positive values, (0.1, 10) if there are none."""
    kept = [float(v) for v in values if math.isfinite(float(v)) and float(v) > 0]
    if not kept:
        return 0.1, 10.0
    return min(kept) / margin, max(kept) * margin


def log_axis(axes: Any, which: str, low: float, high: float, most: int = 7) -> None:
    """Make an axis logarithmic, ticks at 1, 2, 5 over a short range and at powers of ten over a long one."""
    from matplotlib import ticker

    axis = axes.xaxis if which == "x" else axes.yaxis
    if which == "x":
        axes.set_xscale("log")
        axes.set_xlim(low, high)
    else:
        axes.set_yscale("log")
        axes.set_ylim(low, high)
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first >= 2:
        stride = math.ceil((last - first + 1) / most)
        ticks = [10.0**p for p in range(first, last + 1) if p % stride == 0]
    else:
        every = [m * 10.0**p for p in range(first - 1, last + 1) for m in (1, 2, 5)]
        ticks = [t for t in every if low <= t <= high]
    axis.set_major_locator(ticker.FixedLocator(ticks))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _tick(value)))
    axis.set_minor_locator(ticker.NullLocator())


def alpha_axis(axes: Any, alphas: Sequence[float]) -> None:
    """Make the horizontal axis logarithmic with a tick at every alpha."""
    from matplotlib import ticker

    axes.set_xscale("log")
    reach = max(max(alphas) / min(alphas), 2.0) ** 0.05
    axes.set_xlim(min(alphas) / reach, max(alphas) * reach)
    axes.xaxis.set_major_locator(ticker.FixedLocator(list(alphas)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: given(value)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("deformation α")


def label_ends(
    axes: Any, ends: Sequence[tuple[float, str, str]], *, gap: float = 0.075, x: float = 1.02
) -> None:
    """Write (y, text, colour) beside the right edge, moved apart where they would touch.

    Call it after the limits of the vertical log axis are set. Text whose y is not finite is left out.
    """
    low, high = np.log(axes.get_ylim())
    kept = sorted(
        ((math.log(y) - low) / (high - low), text, colour)
        for y, text, colour in ends
        if math.isfinite(y) and y > 0
    )
    places = apart([k[0] for k in kept], gap)
    for place, (_, text, colour) in zip(places, kept, strict=True):
        axes.text(
            x, place, text, color=colour, transform=axes.transAxes, va="center", ha="left", clip_on=False
        )


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Return ascending places moved as little as a sweep can until neighbours are a gap apart."""
    groups: list[tuple[float, int]] = []  # (centre, members): members stand a gap apart about the centre
    for place in places:
        groups.append((place, 1))
        while len(groups) > 1:
            (a, n), (b, m) = groups[-2:]
            if b - a >= gap * (n + m) / 2:
                break
            groups[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return [centre + gap * (i - (n - 1) / 2) for centre, n in groups for i in range(n)]


def ratio_points(
    axes: Any,
    places: Sequence[float],
    ratios: Sequence[dict[str, Any]],
    *,
    colour: str,
    marker: str,
    paper: str,
    along: str,
) -> None:
    """Draw ratios with their intervals; a censored one is an arrow from its lower bound outwards.

    Args:
      axes: with its log axis set.
      places: positions on the other axis.
      ratios: fields of race.statistics.Ratio.
      colour: of the series.
      marker: of the series.
      paper: colour of the page, which fills the marker of a lower bound.
      along: the axis on which the ratio is read, "x" or "y".
    """
    for place, ratio in zip(places, ratios, strict=True):
        value, low, high = (float(ratio[k]) for k in ("value", "low", "high"))
        if not math.isfinite(value) or value <= 0:
            continue
        low = value if math.isnan(low) else low
        high = value if not math.isfinite(high) else high
        ends = ([place, place], [low, high]) if along == "y" else ([low, high], [place, place])
        axes.plot(*ends, color=colour, linewidth=1.3, solid_capstyle="butt")
        at = (place, value) if along == "y" else (value, place)
        axes.plot(
            *at,
            marker=marker,
            color=colour,
            markersize=6,
            markerfacecolor=paper if ratio["censored"] else colour,
            markeredgewidth=1.3,
            linestyle="none",
            zorder=3,
        )
        if ratio["censored"]:
            axes.annotate(
                "",
                xy=at,
                xytext=(0, 18) if along == "y" else (18, 0),
                textcoords="offset points",
                arrowprops={
                    "arrowstyle": "<|-",
                    "color": colour,
                    "linewidth": 1.3,
                    "shrinkA": 0,
                    "shrinkB": 3.5,
                },
                annotation_clip=False,
            )


def ratio_axis(axes: Any, ratios: list[dict[str, Any]], colours: dict[str, str]) -> None:
    """Set the horizontal log axis of a dot plot of ratios, with a line at 1."""
    low, high = limits([r[k] for r in ratios for k in ("value", "low", "high")], 1.25)
    widest = max([r["value"] for r in ratios if r["censored"] and math.isfinite(r["value"])], default=1.0)
    low, high = min(low, 0.8), max(high, 1.3)
    # A censored point's arrow must stay inside.
    log_axis(axes, "x", low, max(high, widest * (high / low) ** 0.12), most=6)
    axes.axvline(1, color=colours["muted"], linewidth=0.8)
    clean(axes, colours, grid="x")
    axes.spines["left"].set_visible(False)


def legend(figure: Any, colours: dict[str, str], entries: list[tuple[str, str, str]]) -> None:
    """Name (label, colour role, marker) of every series below the axes, clear of the data."""
    from matplotlib.lines import Line2D

    figure.legend(
        [Line2D([], [], color=colours[role], marker=marker, linestyle="none") for _, role, marker in entries],
        [label for label, _, _ in entries],
        loc="outside lower center",
        ncols=len(entries),
        columnspacing=1.4,
        handletextpad=0.3,
    )


def _tick(value: float) -> str:
    if value >= 10_000 or value < 0.001:
        return power_of_ten(round(math.log10(value)))
    return grouped(round(value)) if value >= 1 else f"{value:g}"
