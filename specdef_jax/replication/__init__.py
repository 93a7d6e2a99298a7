"""The paper's experiments in miniature: what is withheld, who withstands, and what it takes to undo it."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdef_jax.certification.store import Progress, digest_of, dumps, plain
from specdef_jax.environment import describe
from specdef_jax.errors import SpecError
from specdef_jax.files import atomic_write_text
from specdef_jax.replication import sections
from specdef_jax.replication.config import Config
from specdef_jax.replication.figure import relearning
from specdef_jax.replication.gallery import painted, pictures
from specdef_jax.replication.networks import kept
from specdef_jax.replication.stages import Stages, at_once
from specdef_jax.replication.tables import every_table, legend, page, samples
from specdef_jax.replication.words import headline
from specdef_jax.report.pages import markup, rendered
from specdef_jax.tasks import images, text, vision
from specdef_jax.tasks.experiment import Experiment
from specdef_jax.tasks.training import Kept

__all__ = ["TASKS", "Config", "page", "prepared", "render", "replicate"]

TASKS: dict[str, Callable[[str, Kept], Experiment]] = {
    "text/llama": lambda size, kept: text.text("llama", text.SIZES[size], kept=kept),
    "text/gpt_oss": lambda size, kept: text.text("gpt_oss", text.SIZES[size], kept=kept),
    "vision/cnn": lambda size, kept: vision.vision("cnn", vision.SIZES[size], kept=kept),
    "vision/vit": lambda size, kept: vision.vision("vit", vision.SIZES[size], kept=kept),
    "diffusion": lambda size, kept: images.images("diffusion", images.SIZES[size], kept=kept),
    "style": lambda size, kept: images.images("style", images.STYLE_SIZES[size], kept=kept),
}
LONG = ("text/gpt_oss", "diffusion", "style")  # to compile


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
    config = Config.preset(size, lean=task in LONG) if config is None else config
    tell = progress or (lambda stage, done, total: None)
    keep = Stages(out, digest_of([task, size, asdict(config)]), fresh=fresh)
    tell("pretraining and unlearning", 0, 1)
    begin = time.time()
    experiment = prepared(task, size, out, fresh=fresh)
    keep("pretraining", lambda: None, began=begin)
    tell("pretraining and unlearning", 1, 1)
    folder = None if out is None else out / "state" / "races"
    given = experiment, config, keep, folder
    jobs = {
        "models": sections.measures(experiment, config, keep),
        "defences": sections.matrix(*given),
        "optimizers": sections.optimizers(*given),
        "LoRA": sections.adapters(*given),
        "attacks": sections.attacks(*given),
    }
    found = at_once(jobs, tell)
    results = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": asdict(config),
        "environment": describe(),
        **found["models"],
        "matrix": found["defences"],
        "optimizers": {
            arm: {name: found["optimizers"][arm, name] for name in config.optimizers} for arm in sections.ARMS
        },
        "lora": found["LoRA"],
        "attacks": [{"attack": name} | told for name, told in found["attacks"].items()],
        "seconds": keep.seconds,
        "spent": keep.spent,
    }
    results = plain(results)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out / "results.json", dumps(results))
        atomic_write_text(out / "tables.md", page(results))
        atomic_write_text(out / "report.html", render(results))
    return results


def prepared(task: str, size: str, out: Path | None = None, *, fresh: bool = False) -> Experiment:
    """Return an experiment, its networks trained or taken from the output directory; errors of replicate."""
    if task not in TASKS:
        raise SpecError(f"task {task!r}: must be one of {', '.join(TASKS)}.")
    key = digest_of([task, Config.preset(size).size])
    return TASKS[task](size, functools.partial(kept, out, key, fresh=fresh))


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
        legend=legend(results),
        figure=markup(relearning(results)),
        gallery=markup(painted(results)) if pictures(results) else None,
        tables=every_table(results),
        samples=samples(results),
    )
