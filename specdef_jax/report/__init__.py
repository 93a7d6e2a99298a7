"""One self-contained offline HTML file from results.json, and the key figure of the README."""

from __future__ import annotations

from typing import Any

from specdef_jax.report import (
    cards,
    notes,
    plots,
    plots_attacks,
    plots_race,
    tables,
    tables_ledger,
    tables_race,
    words,
)
from specdef_jax.report.pages import markup, rendered

__all__ = ["hero_figure", "render"]


def render(results: dict[str, Any]) -> str:
    """Return the report as one HTML file that needs no network and runs no script.

    Args:
      results: what results.json holds, non-finite numbers as Python floats (load_results(path).results).

    Raises:
      MissingExtra: jinja2 or matplotlib, of the extra `cli`, is not installed.
    """
    figures = {
        "preservation": plots.preservation,
        "curvature": plots.curvature,
        "curves": plots_race.curves,
        "slowdown": plots_race.slowdown,
        "equal_sharpness": plots_race.equal_sharpness,
        "attacks": plots_attacks.attacks,
    }
    return rendered(
        "template.html.j2",
        results=results,
        figures={name: markup(draw(results)) for name, draw in figures.items()},
        cards=cards,
        notes=notes,
        tables=tables,
        tables_ledger=tables_ledger,
        tables_race=tables_race,
        words=words,
    )


def hero_figure(results: dict[str, Any]) -> bytes:
    """Return the key figure as an SVG file on a light ground: slowdown against alpha, and what attacks leave.

    Args:
      results: as for render.

    Raises:
      MissingExtra: matplotlib, of the extra `cli`, is not installed.
    """
    return plots_attacks.hero(results)
