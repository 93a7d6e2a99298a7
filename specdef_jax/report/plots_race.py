"""The figures about training: loss curves, slowdown against alpha, equal sharpness, attacks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specdef_jax.report import facts, svg
from specdef_jax.report.axes import MARKERS, alpha_axis, clean, label_ends, limits, log_axis, ratio_points
from specdef_jax.report.facts import Results
from specdef_jax.report.numbers import factor, number

_OPTIMIZER_COLOURS = ("blue", "orange", "green", "rose", "purple", "ochre")
_ARMS = (("original", "muted", "-"), ("top", "purple", "-"), ("bottom", "ochre", "--"), ("scalar", "rose", "-."))


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
            for (arm, _), (_, role, dash) in zip(arms, _ARMS, strict=True):
                _arm_curves(panel, results["race"]["arms"][arm], name, colours[role], dash)
            panel.axhline(target, color=colours["ink"], linewidth=0.8)
            panel.set_title(facts.optimizer_name(name), loc="left")
            panel.set_xlabel("step")
            panel.tick_params(labelleft=bool(panel is panels[0]))
            clean(panel, colours)
        panels[0].set_ylabel("attacker’s loss (nats)")
        panels[0].annotate(
            f"target {number(target)}", (1.1, target), xytext=(0, -3), textcoords="offset points", va="top",
            color=colours["ink"],
        )
        from matplotlib.lines import Line2D

        figure.legend(
            [Line2D([], [], color=colours[role], linestyle=dash) for _, role, dash in _ARMS],
            [label for _, label in arms],
            loc="outside lower center",
            ncols=len(arms),
        )

    return svg.inline(
        "curves",
        "Loss curves by optimizer",
        "Attacker's loss against steps on log axes at the best step size of each seed: original, top directions "
        "at the largest alpha, bottom directions and the scalar control at the same sharpness.",
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
    arms = shown_arms(results)[1:]

    def draw(figure: Any, colours: dict[str, str]) -> None:
        axes = figure.subplots()
        rows = [
            [facts.ratio(results, arm, "original" if arm == "scalar" else facts.top_arm(1.0), name) for name in names]
            for arm, _ in arms
        ]
        _ratio_axis(axes, [r for row in rows for r in row], colours)
        for i, (row, (_, role, _)) in enumerate(zip(rows, _ARMS[1:], strict=True)):
            places = [4 * j + i for j in range(len(names))]
            ratio_points(
                axes, places, row, colour=colours[role], marker=MARKERS[i + 1], paper=colours["paper"], along="x"
            )
            for place, one in zip(places, row, strict=True):
                axes.text(
                    1.03, place, factor(one), transform=axes.get_yaxis_transform(), va="center", color=colours[role]
                )
        axes.set_ylim(4 * len(names) - 1.2, -0.8)
        axes.set_yticks([4 * j + 1 for j in range(len(names))], [_two_lines(facts.optimizer_name(n)) for n in names])
        axes.tick_params(axis="y", length=0, labelcolor=colours["ink"])
        axes.set_xlabel("steps, relative to the same network at α = 1")
        _legend(figure, colours, [(label, role, MARKERS[i + 1]) for i, ((_, label), (_, role, _)) in
                                  enumerate(zip(arms, _ARMS[1:], strict=True))])

    return svg.inline(
        "equal-sharpness",
        "Three ways to the same sharpness",
        "Steps relative to alpha = 1 for top directions, bottom directions and one rescaled bias, all at the "
        "same sharpness, by optimizer.",
        (4.75, 4.1),
        draw,
    )


def attacks(results: Results) -> str:
    """Draw the steps that remain after each attack, relative to the original network."""
    return svg.inline(
        "attacks",
        "Steps after each attack, relative to the original network",
        "For each attack and for no attack, steps to the target relative to the undeformed network, by "
        "optimizer. The numbers are in the table below.",
        (9.6, 3.9),
        lambda figure, colours: draw_attacks(figure, figure.subplots(), results, colours),
    )


def hero(results: Results) -> bytes:
    """Draw slowdown and attacks side by side as an SVG file with a light ground of its own."""

    def draw(figure: Any, colours: dict[str, str]) -> None:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, wspace=0.04)
        draw_slowdown(left, results, colours)
        left.set_title("The deformation slows training ...", loc="left", fontsize=11, pad=10)
        draw_attacks(figure, right, results, colours)
        right.set_title("... until it is undone", loc="left", fontsize=11, pad=10)

    return svg.standalone("hero", (11.5, 4.4), draw)


def draw_slowdown(axes: Any, results: Results, colours: dict[str, str]) -> None:
    """Put slowdown against alpha on axes."""
    alphas = [float(a) for a in results["config"]["alphas"]]
    names = facts.optimizers(results)
    table = {
        name: [facts.ratio(results, facts.top_arm(a), facts.top_arm(1.0), name) for a in alphas] for name in names
    }
    low, high = limits([r[k] for row in table.values() for r in row for k in ("value", "low", "high")], 1.5)
    log_axis(axes, "y", min(low, 0.7), max(high * 1.6, 3.0))
    alpha_axis(axes, alphas)
    axes.axhline(1, color=colours["muted"], linewidth=0.8)
    reach = np.geomspace(alphas[0], alphas[-1], 2)
    for power, text in ((1, "∝ α"), (2, "∝ α²")):
        axes.plot(reach, reach**power, color=colours["muted"], linewidth=0.8, dashes=(1, 2.5))
        # The guide's own name, inside the axes at the last place where it is still within them.
        x = min(alphas[-1], (0.75 * axes.get_ylim()[1]) ** (1 / power)) ** 0.93
        axes.annotate(text, (x, x**power), xytext=(-5, 1), textcoords="offset points", ha="right", va="bottom",
                      color=colours["muted"])
    ends = []
    for i, name in enumerate(names):
        colour = colours[_OPTIMIZER_COLOURS[i % len(_OPTIMIZER_COLOURS)]]
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


def draw_attacks(figure: Any, axes: Any, results: Results, colours: dict[str, str]) -> None:
    """Put the steps relative to the original on axes, for no attack and for each attack."""
    names = facts.optimizers(results)
    rows = attack_rows(results)
    table = [[facts.ratio(results, arm, "original", name) for name in names] for arm, _ in rows]
    _ratio_axis(axes, [r for row in table for r in row], colours)
    for i, name in enumerate(names):
        colour = colours[_OPTIMIZER_COLOURS[i % len(_OPTIMIZER_COLOURS)]]
        offset = 0.22 * (i - (len(names) - 1) / 2)
        ratio_points(
            axes,
            [j + offset for j in range(len(rows))],
            [row[i] for row in table],
            colour=colour,
            marker=MARKERS[i],
            paper=colours["paper"],
            along="x",
        )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [label for _, label in rows])
    axes.tick_params(axis="y", length=0, labelcolor=colours["ink"])
    axes.set_xlabel("steps to the target, relative to the original network")
    for j, (arm, _) in enumerate(rows):
        if results["race"]["arms"][arm]["bill"] is None:
            axes.axhspan(j - 0.5, j + 0.5, color=colours["muted"], alpha=0.09, linewidth=0)
    _legend(figure, colours, [
        (facts.optimizer_name(n), _OPTIMIZER_COLOURS[i % len(_OPTIMIZER_COLOURS)], MARKERS[i])
        for i, n in enumerate(names)
    ])


def attack_rows(results: Results) -> list[tuple[str, str]]:
    """Return (arm, label) from the deformed networks to what each attack made of them."""
    strongest = facts.strongest(results)
    labels = {
        facts.top_arm(strongest): f"no attack: top, α = {number(strongest)}",
        "freeze": "freeze compensations",
        "fuse": "fuse factors",
        "inject": "inject a fresh matrix",
        "bottom": "no attack: bottom, same σ₁",
        "freeze_bottom": "freeze compensations (bottom)",
    }
    known = [(arm, label) for arm, label in labels.items() if arm in results["race"]["arms"]]
    others = [a for a in facts.attacks(results) if a not in labels]
    return known + [(a, results["race"]["arms"][a]["label"]) for a in others]


def shown_arms(results: Results) -> list[tuple[str, str]]:
    """Return (arm, label) of the arms whose curves are drawn."""
    strongest = facts.strongest(results)
    return [
        ("original", "original"),
        (facts.top_arm(strongest), f"top, α = {number(strongest)}"),
        ("bottom", "bottom, same σ₁"),
        ("scalar", "one bias, same σ₁"),
    ]


def _arm_curves(axes: Any, arm: dict[str, Any], name: str, colour: str, dash: str) -> None:
    """Draw one line a seed, that of the median steps heavier; a dot where the target is reached."""
    run = arm["optimizers"][name]
    steps = np.asarray(run["steps"], float)
    at = np.asarray(arm["record_at"], float)
    order = np.argsort(np.where(np.isnan(steps), np.inf, steps), kind="stable")
    middle = order[(len(order) - 1) // 2]
    for seed, losses in enumerate(run["curves"]):
        y = np.asarray(losses, float)
        shown = np.isfinite(y) & (y > 0) & (at > 0)
        heavy = seed == middle
        axes.plot(
            at[shown],
            y[shown],
            color=colour,
            linestyle=dash if heavy else "-",
            linewidth=1.7 if heavy else 0.6,
            alpha=1.0 if heavy else 0.45,
            zorder=3 if heavy else 2,
        )


def _ratio_axis(axes: Any, ratios: list[dict[str, Any]], colours: dict[str, str]) -> None:
    """Set the horizontal log axis of a dot plot of ratios, with a line at 1."""
    low, high = limits([r[k] for r in ratios for k in ("value", "low", "high")], 1.25)
    widest = max([r["value"] for r in ratios if r["censored"] and math.isfinite(r["value"])], default=1.0)
    low, high = min(low, 0.8), max(high, 1.3)
    # A censored point's arrow must stay inside.
    log_axis(axes, "x", low, max(high, widest * (high / low) ** 0.12), most=6)
    axes.axvline(1, color=colours["muted"], linewidth=0.8)
    clean(axes, colours, grid="x")
    axes.spines["left"].set_visible(False)


def _legend(figure: Any, colours: dict[str, str], entries: list[tuple[str, str, str]]) -> None:
    from matplotlib.lines import Line2D

    figure.legend(
        [Line2D([], [], color=colours[role], marker=marker, linestyle="none") for _, role, marker in entries],
        [label for label, _, _ in entries],
        loc="outside lower center",
        ncols=len(entries),
        columnspacing=1.4,
        handletextpad=0.3,
    )


def _two_lines(text: str) -> str:
    return text.replace(" ", "\n", 1)
