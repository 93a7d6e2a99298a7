"""The figures about training: loss curves, slowdown against alpha, equal sharpness."""

from __future__ import annotations

from typing import Any

import numpy as np

from specdef_jax.report import facts, svg
from specdef_jax.report.axes import (
    MARKERS,
    OPTIMIZER_COLOURS,
    alpha_axis,
    clean,
    label_ends,
    legend,
    limits,
    log_axis,
    ratio_axis,
    ratio_points,
)
from specdef_jax.report.facts import Results
from specdef_jax.report.numbers import alpha_is, factor, given


def curves(results: Results) -> str:
    """Draw the loss at the best step size of each seed, one panel an optimizer."""
    names = facts.optimizers(results)

    def draw(figure: Any, colours: dict[str, str]) -> None:
        panels = np.atleast_1d(figure.subplots(1, len(names), sharey=True))
        arms = shown_arms(results)
        last = results["race"]["steps_cap"]
        target = results["task"]["target"]
        start = max(results["task"]["start_loss"])
        for panel, name in zip(panels, names, strict=True):
            log_axis(panel, "y", target / 1.6, start * 3)
            log_axis(panel, "x", 1, last * 1.1)
            for arm, _, role, dash in arms:
                _arm_curves(panel, results["race"]["arms"][arm], name, target, colours[role], dash)
            panel.axhline(target, color=colours["ink"], linewidth=0.8)
            panel.set_title(facts.optimizer_name(name), loc="left")
            panel.set_xlabel("step")
            panel.tick_params(labelleft=bool(panel is panels[0]))
            clean(panel, colours)
        panels[0].set_ylabel("attacker’s loss")
        panels[0].annotate(
            f"target {given(target)}",
            (1.1, target),
            xytext=(0, -3),
            textcoords="offset points",
            va="top",
            color=colours["ink"],
        )
        from matplotlib.lines import Line2D

        figure.legend(
            [Line2D([], [], color=colours[role], linestyle=dash) for _, _, role, dash in arms],
            [label for _, label, _, _ in arms],
            loc="outside lower center",
            ncols=len(arms),
        )

    return svg.inline(
        "curves",
        "Loss curves by optimizer",
        "Attacker's loss against steps on log axes at the best step size of each seed: the "
        "original, three arms of equal sharpness, and top directions at the largest alpha.",
        (9.6, 3.7),
        draw,
    )


def slowdown(results: Results) -> str:
    """Draw the slowdown against alpha, one series an optimizer."""
    return svg.inline(
        "slowdown",
        "Slowdown against alpha",
        "Steps to the target relative to alpha = 1 on log axes, one series an optimizer, with guides "
        "proportional to alpha and to its square. The numbers are in the table of ratios.",
        (4.75, 4.1),
        lambda figure, colours: draw_slowdown(figure.subplots(), results, colours),
    )


def equal_sharpness(results: Results) -> str:
    """Draw how three ways to the same sharpness slow each optimizer."""
    names = facts.optimizers(results)
    arms = matched_arms(results)

    def draw(figure: Any, colours: dict[str, str]) -> None:
        axes = figure.subplots()
        rows = [
            [
                facts.ratio(results, arm, "original" if arm == "scalar" else facts.top_arm(1.0), name)
                for name in names
            ]
            for arm, *_ in arms
        ]
        ratio_axis(axes, [r for row in rows for r in row], colours)
        for i, (row, (_, _, role, _)) in enumerate(zip(rows, arms, strict=True)):
            places = [4 * j + i for j in range(len(names))]
            ratio_points(
                axes,
                places,
                row,
                colour=colours[role],
                marker=MARKERS[i + 1],
                paper=colours["paper"],
                along="x",
            )
            for place, one in zip(places, row, strict=True):
                axes.text(
                    1.03,
                    place,
                    factor(one),
                    transform=axes.get_yaxis_transform(),
                    va="center",
                    color=colours[role],
                )
        axes.set_ylim(4 * len(names) - 1.2, -0.8)
        axes.set_yticks(
            [4 * j + 1 for j in range(len(names))], [_two_lines(facts.optimizer_name(n)) for n in names]
        )
        axes.tick_params(axis="y", length=0, labelcolor=colours["ink"])
        axes.set_xlabel("steps, relative to the same network at α = 1")
        legend(
            figure,
            colours,
            [(label, role, MARKERS[i + 1]) for i, (_, label, role, _) in enumerate(arms)],
        )

    return svg.inline(
        "equal-sharpness",
        "Three ways to the same sharpness",
        "Steps relative to alpha = 1 for top directions, bottom directions and one rescaled bias, all at the "
        "same sharpness, by optimizer.",
        (4.75, 4.1),
        draw,
    )


def draw_slowdown(axes: Any, results: Results, colours: dict[str, str]) -> None:
    """Put slowdown against alpha on axes."""
    alphas = [float(a) for a in results["config"]["alphas"]]
    names = facts.optimizers(results)
    table = {
        name: [facts.ratio(results, facts.top_arm(a), facts.top_arm(1.0), name) for a in alphas]
        for name in names
    }
    low, high = limits([r[k] for row in table.values() for r in row for k in ("value", "low", "high")], 1.5)
    log_axis(axes, "y", min(low, 0.7), max(high * 1.6, 3.0))
    alpha_axis(axes, alphas)
    axes.axhline(1, color=colours["muted"], linewidth=0.8)
    reach = np.geomspace(alphas[0], alphas[-1], 2)
    ends = []
    for power, text in ((1, "∝ α"), (2, "∝ α²")):
        axes.plot(reach, reach**power, color=colours["muted"], linewidth=0.8, dashes=(1, 2.5))
        if alphas[-1] ** power <= axes.get_ylim()[1]:
            ends.append((alphas[-1] ** power, text, colours["muted"]))
            continue
        # The guide leaves through the top, so its name stands beside it there.
        top = axes.get_ylim()[1]
        axes.annotate(
            text,
            (top ** (1 / power), top),
            xytext=(-8, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            color=colours["muted"],
        )
    for i, name in enumerate(names):
        colour = colours[OPTIMIZER_COLOURS[i % len(OPTIMIZER_COLOURS)]]
        shift = (alphas[-1] / alphas[0]) ** (0.008 * (i - (len(names) - 1) / 2))
        places = [a * shift for a in alphas]
        values = [r["value"] for r in table[name]]
        axes.plot(places, values, color=colour, linewidth=1.2)
        ratio_points(
            axes, places, table[name], colour=colour, marker=MARKERS[i], paper=colours["paper"], along="y"
        )
        ends.append((values[-1], f"{facts.optimizer_name(name)}\n{factor(table[name][-1])}", colour))
    label_ends(axes, ends, gap=0.125, x=1.04)
    axes.set_ylabel("slowdown: steps relative to α = 1")
    clean(axes, colours)


def matched_arms(results: Results) -> list[tuple[str, str, str, Any]]:
    """Return (arm, label, colour role, dash) of the three arms of equal sharpness."""
    alpha = facts.matched(results)
    return [
        (facts.top_arm(alpha), f"top, {alpha_is(alpha)}", "purple", "-"),
        ("bottom", "bottom, same σ₁", "ochre", "--"),
        ("scalar", "one bias, same σ₁", "rose", "-."),
    ]


def shown_arms(results: Results) -> list[tuple[str, str, str, Any]]:
    """Return the arms whose curves are drawn: the original, those of equal sharpness, the strongest."""
    strongest = facts.strongest(results)
    last = (facts.top_arm(strongest), f"top, {alpha_is(strongest)}", "blue", ":")
    arms = [("original", "original", "muted", "-"), *matched_arms(results)]
    return arms if strongest == facts.matched(results) else [*arms, last]


def _arm_curves(axes: Any, arm: dict[str, Any], name: str, target: float, colour: str, dash: Any) -> None:
    """Draw one line a seed, that of the median steps heavier, up to where it reaches the target."""
    run = arm["optimizers"][name]
    steps = np.asarray(run["steps"], float)
    at = np.asarray(arm["record_at"], float)
    order = np.argsort(np.where(np.isnan(steps), np.inf, steps), kind="stable")
    middle = order[(len(order) - 1) // 2]
    for seed, losses in enumerate(run["curves"]):
        y = np.asarray(losses, float)
        end = steps[seed]
        shown = np.isfinite(y) & (y > 0) & (at > 0) & ~(at >= end)
        reached = not np.isnan(end)
        heavy = seed == middle
        axes.plot(
            [*at[shown], *([end] if reached else [])],
            [*y[shown], *([target] if reached else [])],
            color=colour,
            linestyle=dash if heavy else "-",
            linewidth=1.7 if heavy else 0.6,
            alpha=1.0 if heavy else 0.45,
            zorder=3 if heavy else 2,
        )


def _two_lines(text: str) -> str:
    return text.replace(" ", "\n", 1)
