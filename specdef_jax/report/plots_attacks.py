"""The figure of what attacks leave, and the key figure of the README."""

from __future__ import annotations

from typing import Any

from specdef_jax.report import facts, svg
from specdef_jax.report.axes import MARKERS, OPTIMIZER_COLOURS, legend, ratio_axis, ratio_points
from specdef_jax.report.facts import Results
from specdef_jax.report.numbers import alpha_is, named
from specdef_jax.report.plots_race import draw_slowdown


def attacks(results: Results) -> str:
    """Draw the steps that remain after each attack, relative to the original network."""
    return svg.inline(
        "attacks",
        "Steps after each attack, relative to the original network",
        "For each attack and for no attack, steps to the target relative to the undeformed network, by "
        "optimizer. The numbers are in the table below.",
        (9.6, 3.7),
        lambda figure, colours: draw_attacks(figure, figure.subplots(), results, colours),
    )


def hero(results: Results) -> bytes:
    """Draw slowdown and attacks side by side as an SVG file with a light ground of its own."""

    def draw(figure: Any, colours: dict[str, str]) -> None:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, wspace=0.04)
        draw_slowdown(left, results, colours)
        left.set_title("The deformation slows training …", loc="left", fontsize=11, pad=10)
        draw_attacks(figure, right, results, colours)
        right.set_title("… and this is what attacks leave of it", loc="left", fontsize=11, pad=10)

    return svg.standalone("hero", (9.6, 3.9), draw)


def draw_attacks(figure: Any, axes: Any, results: Results, colours: dict[str, str]) -> None:
    """Put the steps relative to the original on axes, for no attack and for each attack."""
    names = facts.optimizers(results)
    rows = attack_rows(results)
    table = [[facts.ratio(results, arm, "original", name) for name in names] for arm, _ in rows]
    ratio_axis(axes, [r for row in table for r in row], colours)
    for i in range(len(names)):
        colour = colours[OPTIMIZER_COLOURS[i % len(OPTIMIZER_COLOURS)]]
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
    legend(
        figure,
        colours,
        [
            (facts.optimizer_name(n), OPTIMIZER_COLOURS[i % len(OPTIMIZER_COLOURS)], MARKERS[i])
            for i, n in enumerate(names)
        ],
    )


def attack_rows(results: Results) -> list[tuple[str, str]]:
    """Return (arm, label) from the deformed networks to what each attack made of them."""
    strongest = facts.strongest(results)
    labels = {
        facts.top_arm(strongest): f"no attack: top, {alpha_is(strongest)}",
        "fuse": "fuse factors",
        "freeze": "freeze compensations",
        "inject": "inject a fresh matrix",
        "bottom": f"no attack: bottom, σ₁ of {alpha_is(facts.matched(results))}",
        "freeze_bottom": "freeze compensations (bottom)",
    }
    known = [(arm, label) for arm, label in labels.items() if arm in results["race"]["arms"]]
    others = [a for a in facts.attacks(results) if a not in labels]
    return known + [(a, named(results["race"]["arms"][a]["label"])) for a in others]
