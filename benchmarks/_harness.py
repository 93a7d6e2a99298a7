"""What every benchmark shares: interleaved timings, and one JSON per question."""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from specdef_jax import environment

RESULTS = Path(__file__).resolve().parent / "results"  # of a CPU, and of accelerators in folders below


@dataclass(frozen=True)
class Paired:
    """Timings of two callables taken in turn.

    Attributes:
      a: median seconds of the first.
      b: median seconds of the second.
      ratios: seconds of the first over the second, one per pair.
    """

    a: float
    b: float
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Return the median of the per-pair ratios, which a drifting machine hardly moves."""
        return statistics.median(self.ratios)


def seconds(run: Callable[[], Any]) -> float:
    """Return the wall time of one call; the callable waits for its own results."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def paired(a: Callable[[], Any], b: Callable[[], Any], repeats: int) -> Paired:
    """Time a and b in turn, `repeats` times each, who goes first alternating."""
    pairs = []
    for i in range(repeats):
        if i % 2:
            second = seconds(b)
            pairs.append((seconds(a), second))
        else:
            pairs.append((seconds(a), seconds(b)))
    times_a, times_b = zip(*pairs, strict=True)
    ratios = tuple(x / y for x, y in pairs)
    return Paired(statistics.median(times_a), statistics.median(times_b), ratios)


def results() -> Path:
    """Return the folder for what is measured here: of an accelerator one of its own, named gpu or tpu."""
    backend = jax.default_backend()
    folder = RESULTS if backend == "cpu" else RESULTS / backend
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save(
    name: str, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> Path:
    """Write <name>.json among the results of this backend and return its path."""
    record = {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": dict(config),
        "summary": dict(summary),
        "rows": [dict(row) for row in rows],
        "environment": environment.describe(),
    }
    path = results() / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def machine(record: dict[str, Any]) -> str:
    """Say on what a saved record was measured."""
    found = record["environment"]
    return f"{found['cpu_count']} cores of {found['processor']}, jax {found['packages']['jax']}"
