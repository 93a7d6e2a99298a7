"""The paper's experiments in miniature: what is withheld, who withstands, and what it takes to undo it."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdef_jax.certification.store import Progress, digest_of, dumps, plain, staged
from specdef_jax.environment import describe
from specdef_jax.errors import SpecError
from specdef_jax.files import atomic_write_text
from specdef_jax.replication import sections
from specdef_jax.replication.config import Config
from specdef_jax.replication.figure import relearning
from specdef_jax.replication.tables import every_table, page, reading, samples
from specdef_jax.replication.words import headline
from specdef_jax.report.pages import markup, rendered
from specdef_jax.tasks import text, vision
from specdef_jax.tasks.experiment import Experiment

__all__ = ["TASKS", "Config", "page", "render", "replicate"]

TASKS: dict[str, Callable[[str], Experiment]] = {
    "text/llama": lambda size: text.text("llama", text.SIZES[size]),
    "text/gpt_oss": lambda size: text.text("gpt_oss", text.SIZES[size]),
    "vision/cnn": lambda size: vision.vision("cnn", vision.SIZES[size]),
    "vision/vit": lambda size: vision.vision("vit", vision.SIZES[size]),
}


def replicate(
    task: str,
    size: str = "small",
    out: Path | None = None,
    *,
    config: Config | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run one experiment at one size: defences by step sizes, utility, optimizers, LoRA, attacks.

    Args:
      task: a name of TASKS.
      size: "smoke", "small" or "full".
      out: directory for results.json, tables.md, report.html and finished stages, from which a rerun
        resumes; None keeps everything in memory.
      config: of the races; by default that of the size.
      fresh: ignore finished stages.
      progress: progress(stage, done, total).

    Raises:
      SpecError: no such task or size.
    """
    if task not in TASKS:
        raise SpecError(f"task {task!r}: must be one of {', '.join(TASKS)}.")
    config = Config.preset(size) if config is None else config
    tell = progress or (lambda stage, done, total: None)
    key = digest_of([task, size, asdict(config)])
    keep = functools.partial(staged, out, key, fresh=fresh)
    tell("pretraining and unlearning", 0, 1)
    experiment = TASKS[task](size)
    tell("pretraining and unlearning", 1, 1)
    folder = None if out is None else out / "state" / "races"
    given = experiment, config, keep, tell, folder
    results = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": asdict(config),
        "environment": describe(),
        "task": keep("task", lambda: sections.facts(experiment)),
        "matrix": sections.matrix(*given),
        "utility": keep("utility", lambda: sections.utility(experiment, config)),
        "optimizers": sections.optimizers(*given),
        "lora": sections.adapters(*given),
        "attacks": sections.attacks(*given),
    }
    results = plain(results)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out / "results.json", dumps(results))
        atomic_write_text(out / "tables.md", page(results))
        atomic_write_text(out / "report.html", render(results))
    return results


def render(results: dict[str, Any]) -> str:
    """Return the report as one HTML file that needs no network and runs no script.

    Args:
      results: as replicate returns them.

    Raises:
      MissingExtra: jinja2 or matplotlib, of the extra `cli`, is not installed.
    """
    return rendered(
        "replication.html.j2",
        results=results,
        headline=headline(results),
        reading=reading(results),
        figure=markup(relearning(results)),
        tables=every_table(results),
        samples=samples(results),
    )
