"""`specdef certify`: certify the embedded default and write its report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from specdef_jax.cli.console import reporting, show_table


def certify(
    *,
    out: Path = Path("runs/certify"),
    size: Literal["smoke", "default", "full"] = "default",
    fresh: bool = False,
) -> int:
    """Certify an MLP on handwritten digits: preservation, curvature, races and attacks.

    Args:
      out: directory for results.json and report.html; a rerun resumes from what is finished there.
      size: "smoke" takes seconds, "default" minutes, "full" an hour.
      fresh: ignore finished stages.

    Returns:
      The exit code: 1 if a certificate failed.
    """
    from specdef_jax.certification import Config
    from specdef_jax.certification import certify as run

    with reporting() as report:
        certification = run(
            out,
            Config.preset(size),
            fresh=fresh,
            progress=lambda stage, done, total: report(stage, done, total),
        )
    rows = certification.summary_rows()
    columns = list(rows[0]) if rows else []
    show_table("certificates", columns, [[str(row[column]) for column in columns] for row in rows])
    print(f"report: {out / 'report.html'}")
    return 0 if certification.holds else 1
