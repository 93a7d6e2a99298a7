"""The figures about the deformed network itself: preservation and curvature."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specdef_jax.report import facts, svg
from specdef_jax.report.axes import MARKERS, alpha_axis, clean, label_ends, limits, log_axis
from specdef_jax.report.facts import Results
from specdef_jax.report.numbers import alpha_is, given

_FORMAT_COLOURS = ("blue", "green", "ochre", "orange", "rose", "purple")


def preservation(results: Results) -> str:
    """Draw the error of the network against alpha, one line a number format."""

    def draw(figure: Any, colours: dict[str, str]) -> None:
        axes = figure.subplots()
        rows = results["preservation"]["formats"]
        low, high = limits([r[k] for r in rows for k in ("error", "baseline")], 2.5)
        low, high = max(low, 1e-17), min(high, 1e3)
        log_axis(axes, "y", low, high, most=9)
        alpha_axis(axes, sorted({r["alpha"] for r in rows}))
        ends = []
        for i, name in enumerate(facts.format_names(results)):
            mine = [r for r in rows if r["format"] == name]
            colour = colours[_FORMAT_COLOURS[i % len(_FORMAT_COLOURS)]]
            alphas = [r["alpha"] for r in mine]
            error, base, rule = (
                np.array([_positive(v) for v in values])
                for values in (
                    [r["error"] for r in mine],
                    [r["baseline"] for r in mine],
                    [max((layer["expected"] for layer in r["layers"]), default=math.nan) for r in mine],
                )
            )
            axes.plot(alphas, rule, color=colour, linewidth=0.7, dashes=(5, 3))
            axes.plot(alphas, base, color=colour, linewidth=1, linestyle=":")
            axes.plot(alphas, error, color=colour, marker=MARKERS[i % len(MARKERS)])
            lost = [r["alpha"] for r in mine if not math.isfinite(r["error"])]
            if lost:
                axes.plot(lost, [high] * len(lost), color=colour, marker="x", linestyle="none", clip_on=False)
            known = error[np.isfinite(error)]
            text = f"{name} (× overflow)" if lost else name
            ends.append((known[-1] if known.size else math.nan, text, colour))
        label_ends(axes, ends, gap=0.062)
        raced = facts.strongest(results)
        axes.axvline(raced, color=colours["muted"], linewidth=0.7)
        axes.annotate(
            f"largest α raced: {given(raced)}",
            (raced, 0.015),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            color=colours["muted"],
            va="bottom",
        )
        axes.set_ylabel("relative error of the network’s output")
        clean(axes, colours)

    return svg.inline(
        "preservation",
        "Error of the deformed network by number format",
        "Relative error of the output against alpha on log axes, one line a number format, with the error of "
        "the undeformed network in that format and the rule of thumb. The numbers are in the table below.",
        (9.6, 4.3),
        draw,
    )


def curvature(results: Results) -> str:
    """Draw the leading eigenvalues, and sigma_1 between the two bounds of the sandwich."""

    def draw(figure: Any, colours: dict[str, str]) -> None:
        left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
        _spectra(left, results["curvature"]["rows"], colours)
        _sandwich(right, results["curvature"]["rows"], colours)

    return svg.inline(
        "curvature",
        "Spectrum and sharpness of the Hessian",
        "Left: absolute leading eigenvalues by rank for each alpha. Right: the largest, sigma 1, against "
        "alpha between its lower and upper bound. The numbers are in the table below.",
        (9.6, 3.9),
        draw,
    )


def _spectra(axes: Any, rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    sizes = [abs(v) for r in rows for v in r["eigenvalues"]]
    log_axis(axes, "y", *limits(sizes, 1.6))
    ends = []
    for i, row in enumerate(rows):
        values = np.asarray(row["eigenvalues"], float)
        ranks = np.arange(1, values.size + 1)
        colour = colours["muted" if i == 0 else "purple"]
        strength = 1.0 if i == 0 else 0.4 + 0.6 * i / (len(rows) - 1)
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(ranks, np.abs(values), color=colour, alpha=strength, linewidth=1)
        for negative in (False, True):
            shown = (values < 0) == negative
            axes.plot(
                ranks[shown],
                np.abs(values[shown]),
                color=colour,
                alpha=strength,
                marker=marker,
                linestyle="none",
                markerfacecolor=colours["paper"] if negative else colour,
            )
        ends.append((abs(values[-1]), alpha_is(row["alpha"]), colours["ink"] if i else colour))
    label_ends(axes, ends, gap=0.08)
    count = max(len(r["eigenvalues"]) for r in rows)
    axes.set_xticks([r for r in range(1, count + 1) if count <= 6 or r == 1 or r % 2 == 0])
    axes.set_xlabel("rank")
    axes.set_title("leading |eigenvalues| of the Hessian (hollow: negative)", loc="left")
    clean(axes, colours)


def _sandwich(axes: Any, rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    alphas, measured, lower, upper = (
        np.array([_positive(r[k]) for r in rows]) for k in ("alpha", "sharpness", "lower", "upper")
    )
    log_axis(axes, "y", *limits([*measured, *lower, *upper], 1.6))
    alpha_axis(axes, list(alphas))
    axes.fill_between(alphas, lower, upper, color=colours["blue"], alpha=0.14, linewidth=0)
    axes.plot(alphas, upper, color=colours["blue"], linewidth=1, marker="v", markersize=4)
    axes.plot(alphas, lower, color=colours["blue"], linewidth=1, marker="^", markersize=4)
    axes.plot(alphas, measured, color=colours["purple"], marker="o", linestyle="none", zorder=3)
    label_ends(
        axes,
        [
            (upper[-1], "upper bound", colours["blue"]),
            (measured[-1], "measured σ₁", colours["purple"]),
            (lower[-1], "lower bound", colours["blue"]),
        ],
        gap=0.08,
    )
    axes.set_title("σ₁ of the Hessian and its bounds", loc="left")
    clean(axes, colours)


def _positive(value: Any) -> float:
    """Return the value, NaN where a log axis cannot show it."""
    value = float(value)
    return value if math.isfinite(value) and value > 0 else math.nan
