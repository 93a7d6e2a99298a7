"""Certify a task: preservation, curvature, races and attacks in one results.json."""

from __future__ import annotations

import datetime
import functools
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from specdef_jax.certification import ledger_stage, race_stage, stages
from specdef_jax.certification.config import Config
from specdef_jax.certification.model_task import model_task
from specdef_jax.certification.store import SCHEMA, Progress, dumps, fingerprint, loads, plain, staged
from specdef_jax.certification.summary import summary_rows
from specdef_jax.environment import describe
from specdef_jax.errors import FileError
from specdef_jax.files import atomic_write_text
from specdef_jax.report import render
from specdef_jax.tasks import digits
from specdef_jax.tasks.networks import mlp
from specdef_jax.tasks.task import Task

log = logging.getLogger(__name__)

__all__ = ["Certification", "Config", "Progress", "certify", "load_results", "model_task"]


@dataclass(frozen=True)
class Certification:
    """Everything that was measured, as the plain values of results.json (docs/results-schema.md)."""

    results: dict[str, Any]

    @property
    def holds(self) -> bool:
        """Whether every certificate of preservation and curvature held."""
        return bool(self.results["preservation"]["holds"] and self.results["curvature"]["holds"])

    def summary_rows(self) -> list[dict[str, str]]:
        """Return the short table that the command prints."""
        return summary_rows(self.results)

    def to_json(self, path: Path | None = None) -> str:
        """Return results.json, and write it where a path is given."""
        text = dumps(self.results)
        if path is not None:
            atomic_write_text(Path(path), text)
        return text

    def to_html(self, path: Path | None = None) -> str:
        """Return the self-contained report, and write it where a path is given.

        Raises:
          MissingExtra: the extra `cli` is not installed.
        """
        text = render(self.results)
        if path is not None:
            atomic_write_text(Path(path), text)
        return text


def certify(
    out: Path | str | None = None,
    config: Config | None = None,
    *,
    task: Task | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Certification:
    """Certify a task, by default an MLP on handwritten digits attacked by fine-tuning to other labels.

    Args:
      out: directory for results.json, report.html and finished stages, from which a rerun with the
        same task, config and commit resumes; None keeps everything in memory.
      config: settings; None for the default ones (two minutes on two cores).
      task: networks of your own and an attack on them, in float64 (model_task makes one of a checkpoint).
      fresh: ignore finished stages.
      progress: progress(stage, done, total).

    Returns:
      A Certification.

    Raises:
      MissingExtra: the extra `cli` is not installed.
      FileError: the directory cannot be written.
    """
    config = config or Config()
    out = None if out is None else Path(out)
    if out is not None:
        _prepare(out)
    tell = progress or (lambda stage, done, total: None)
    with jax.enable_x64(True):
        if task is None:
            tell("pretraining", 0, 1)
            task, others = _task(config, 0), _task(config, config.seeds)
            tell("pretraining", 1, 1)
            results = _stages(task, others, config, out, fresh, tell)
        else:
            results = _stages(task, None, config, out, fresh, tell)
    header = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": asdict(config),
        "environment": describe(),
    }
    certification = Certification(plain(header | results))
    if out is not None:
        certification.to_json(out / "results.json")
        certification.to_html(out / "report.html")
    return certification


def _stages(
    task: Task, others: Task | None, config: Config, out: Path | None, fresh: bool, tell: Progress
) -> dict[str, Any]:
    keep = functools.partial(staged, out, fingerprint(config, task), fresh=fresh)
    results = {
        "task": keep("task", lambda: stages.task_facts(task, config)),
        "preservation": keep("preservation", lambda: stages.preserved(task, config, tell)),
        "curvature": keep("curvature", lambda: stages.curved(task, config, tell)),
        "race": race_stage.raced(task, others, config, tell, keep),
    }
    if task.released is not None:
        results["released"] = keep("released", lambda: stages.released(task, config))
    if config.ledger:
        folder = None if out is None else out / "state" / "ledger"
        results["ledger"] = keep("ledger", lambda: ledger_stage.accounted(task, config, tell, folder))
    return results


def load_results(path: Path | str) -> Certification:
    """Read a results.json.

    Raises:
      FileError: the file is missing, no JSON, or of another schema version.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}. Run specdef certify first.") from error
    results = loads(text, str(path))
    found = results.get("schema") if isinstance(results, dict) else None
    if found != SCHEMA:
        raise FileError(
            f"{path} has schema version {found!r}, this version reads {SCHEMA}; run specdef certify again."
        )
    return Certification(results)


def _task(config: Config, first_seed: int) -> Task:
    return digits.task(
        config.seeds,
        first_seed=config.seed + first_seed,
        examples=config.examples,
        network=mlp(config.widths),
        target=config.target,
    )


def _prepare(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{out} cannot be a results directory: {error.strerror}; choose another.") from error
