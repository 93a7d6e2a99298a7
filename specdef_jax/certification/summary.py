"""A certification in a table of four questions."""

from __future__ import annotations

from typing import Any

from specdef_jax.race import Ratio
from specdef_jax.report import facts


def summary_rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """Return rows of question, answer and word, as strings."""
    return [_preserved(results), *_curved(results), *_ratios(results)]


def _preserved(results: dict[str, Any]) -> dict[str, str]:
    formats = facts.formats_at(results, facts.strongest(results))
    told = ", ".join(f"{row['format']} {row['error']:.1e}" for row in formats)
    return _row(f"function preserved at alpha {formats[0]['alpha']:g}?", told, results["preservation"])


def _curved(results: dict[str, Any]) -> list[dict[str, str]]:
    return [
        _row(
            f"sharpness at alpha {row['alpha']:g}, between its bounds?",
            f"{row['lower']:.4g} <= {row['sharpness']:.4g} <= {row['upper']:.4g}",
            {
                "holds": row["sandwich_holds"] and row["congruence_holds"],
                "word": results["curvature"]["word"],
            },
        )
        for row in results["curvature"]["rows"]
    ]


def _ratios(results: dict[str, Any]) -> list[dict[str, str]]:
    told: dict[tuple[str, str, str], list[str]] = {}
    for row in results["race"]["ratios"]:
        ratio = Ratio(**{f: row[f] for f in ("value", "low", "high", "censored", "seeds")})
        told.setdefault((row["kind"], row["arm"], row["baseline"]), []).append(f"{row['optimizer']} {ratio}")
    return [
        {"question": f"{kind}: {arm} / {baseline}", "answer": ", ".join(parts), "": "estimated"}
        for (kind, arm, baseline), parts in told.items()
    ]


def _row(question: str, answer: str, certificate: dict[str, Any]) -> dict[str, str]:
    return {
        "question": question,
        "answer": answer,
        "": certificate["word"] if certificate["holds"] else "FAILED",
    }
