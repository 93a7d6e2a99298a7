"""The tables of the report as plain rows of text; the template lays them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specdef_jax.report import facts
from specdef_jax.report.facts import Results
from specdef_jax.report.numbers import (
    MISSING,
    alpha_is,
    given,
    listed,
    number,
    spread,
)


@dataclass(frozen=True)
class Cell:
    """A text with a tone ("proved", "checked", "estimated", "failed", "note") and small print below it."""

    text: str
    tone: str = ""
    small: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a head; columns from `numeric` on are right-aligned."""

    caption: str
    head: tuple[str, ...]
    rows: list[list[Cell | str]]
    numeric: int = 1


def preservation(results: Results) -> Table:
    """Tell per number format and layer the errors and the derived bound at the largest alpha raced."""
    rows: list[list[Cell | str]] = []
    at = facts.formats_at(results, facts.strongest(results))
    for row in at:
        for layer in row["layers"]:
            rows.append(
                [
                    row["format"],
                    layer["path"],
                    _word(layer["word"] if row["holds"] else "failed"),
                    number(row["error"]),
                    number(row["baseline"]),
                    number(layer["error"]),
                    number(layer["expected"]),
                    number(layer["bound"]),
                    number(layer["bound_ratio"], 2),
                ]
            )
    head = (
        "format",
        "layer",
        "standing",
        "network",
        "undeformed",
        "layer",
        "rule of thumb",
        "bound",
        "error / bound",
    )
    return Table(f"Relative errors at {alpha_is(at[0]['alpha'])}", head, rows, 3)


def bits(results: Results) -> Table:
    """Tell which deformations are identical to the bit."""
    rows: list[list[Cell | str]] = [
        [
            b["basis"],
            "the undeformed network" if b["basis"] == "axis" else "itself at α = 1",
            b["dtype"],
            given(b["alpha"]),
            "identical" if b["identical"] else _word("failed"),
        ]
        for b in results["preservation"]["bit_identity"]
    ]
    return Table(
        "Bit identity at a power of two", ("basis", "compared with", "format", "α", "result"), rows, 5
    )


def limits(results: Results) -> Table:
    """Tell the largest alpha by number format and basis."""
    found = results["preservation"]["alpha_max"]
    bases = list(dict.fromkeys(r["basis"] for r in found))
    value = {(r["dtype"], r["basis"]): number(r["alpha_max"]) for r in found}
    rows: list[list[Cell | str]] = [
        [name, *(value.get((name, basis), MISSING) for basis in bases)]
        for name in dict.fromkeys(r["dtype"] for r in found)
    ]
    budgets = listed(sorted({given(r["budget"]) for r in found}))
    return Table(f"Largest α for an expected layer error of {budgets}", ("format", *bases), rows)


def curvature(results: Results) -> Table:
    """Tell sharpness, bounds and congruence at every alpha."""
    section = results["curvature"]
    rows: list[list[Cell | str]] = [
        [
            given(r["alpha"]),
            number(r["sharpness"], 4),
            number(r["lower"], 4),
            number(r["upper"], 4),
            number(r["allowance"], 2),
            number(r["congruence_error"], 2),
            number(max(r["residuals"]), 2),
            number(r["max_stable_step"], 2),
            r["status"],
            _word(section["word"] if r["sandwich_holds"] and r["congruence_holds"] else "failed"),
        ]
        for r in section["rows"]
    ]
    head = (
        "α",
        "σ₁",
        "lower",
        "upper",
        "allowance",
        "congruence error",
        "residual",
        "GD stable below",
        "Lanczos",
        "standing",
    )
    return Table("Sharpness between its bounds, and the error of congruence", head, rows, 0)


def eigenvalues(results: Results) -> Table:
    """Tell the leading eigenvalues at every alpha."""
    rows = results["curvature"]["rows"]
    count = max(len(r["eigenvalues"]) for r in rows)
    body: list[list[Cell | str]] = [
        [
            str(i + 1),
            *(number(r["eigenvalues"][i], 4) if i < len(r["eigenvalues"]) else MISSING for r in rows),
        ]
        for i in range(count)
    ]
    return Table("Leading eigenvalues by |λ|", ("rank", *(alpha_is(r["alpha"]) for r in rows)), body)


def layers(results: Results) -> Table:
    """Tell which layers were deformed, and how well their subspace is resolved."""
    rows: list[list[Cell | str]] = [
        [
            layer["path"],
            layer["directions"],
            layer["side"],
            layer["status"],
            str(layer["features"]),
            str(layer["k"]),
            spread(layer["singular_values"]),
            number(layer["residual"], 2),
        ]
        for layer in results["task"]["layers"]
    ]
    head = ("layer", "directions", "side", "subspace", "features", "k", "singular values", "residual")
    return Table("Deformed layers of the first network", head, rows, 4)


def settings(results: Results) -> Table:
    """Tell the configuration."""
    return _pairs("Configuration", results["config"])


def environment(results: Results) -> Table:
    """Tell where and with what the results were made."""
    found = results["environment"]
    flat = {k: v for k, v in found.items() if k != "packages"} | dict(found.get("packages", {}))
    return _pairs("Environment", flat | {"results schema": results["schema"], "created": results["created"]})


def _pairs(caption: str, values: dict[str, Any]) -> Table:
    rows: list[list[Cell | str]] = [[str(k).replace("_", " "), _plain(v)] for k, v in values.items()]
    return Table(caption, ("field", "value"), rows, 2)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return given(value)


def _word(word: str) -> Cell:
    return Cell(word, str(word))
