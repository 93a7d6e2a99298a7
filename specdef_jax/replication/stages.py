"""Stages of a replication: kept when they are done, and run as many at a time as there are cores.

Most of a stage is compiling, half of which one core does. What a stage gives does not depend on what runs
beside it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from specdef_jax.certification.store import Progress, staged
from specdef_jax.programs import in_this_precision
from specdef_jax.race.execution import cores

K = TypeVar("K")
T = TypeVar("T")


class Stages:
    """Results of named stages, of one output directory.

    Attributes:
      seconds: that each stage took, name -> seconds; those that ran side by side count each.
    """

    def __init__(self, out: Path | None, key: str, *, fresh: bool) -> None:
        """Look for finished stages of this key in `out`, unless fresh; None keeps nothing."""
        self.seconds: dict[str, float] = {}
        self._keep = functools.partial(staged, out, key, fresh=fresh)
        self._spans: list[tuple[float, float]] = []

    def __call__(self, name: str, compute: Callable[[], Any], began: float | None = None) -> Any:
        """Return what a stage gave when it was finished, or compute and keep it; it began now, or then."""
        found = self._keep(name, functools.partial(_timed, compute, time.time() if began is None else began))
        self.seconds[name] = found["seconds"]
        self._spans.append((found["began"], found["began"] + found["seconds"]))
        return found["value"]

    @property
    def spent(self) -> float:
        """Seconds in which any stage ran, over all the runs that it took."""
        total, until = 0.0, 0.0
        for begin, end in sorted(self._spans):
            total += max(0.0, end - max(begin, until))
            until = max(until, end)
        return total


def at_once(sections: Mapping[str, Mapping[K, Callable[[], T]]], progress: Progress) -> dict[str, dict[K, T]]:
    """Return what the jobs of every section give, in the order given, as many at a time as there are cores.

    Args:
      sections: name -> {what a job is of: function}; all of them are one queue.
      progress: progress(section, done, total), by this thread. An exception of a job or of this ends it all;
        jobs that run are waited for.
    """
    done = dict.fromkeys(sections, 0)
    with ThreadPoolExecutor(cores()) as pool:
        futures = {
            name: {of: pool.submit(in_this_precision(job)) for of, job in jobs.items()}
            for name, jobs in sections.items()
        }
        section_of = {future: name for name, jobs in futures.items() for future in jobs.values()}
        try:
            for future in as_completed(section_of):
                future.result()
                name = section_of[future]
                done[name] += 1
                progress(name, done[name], len(futures[name]))
        except BaseException:  # an interrupt too
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: {of: job.result() for of, job in jobs.items()} for name, jobs in futures.items()}


def _timed(compute: Callable[[], Any], began: float) -> dict[str, Any]:
    value = compute()
    return {"value": value, "began": began, "seconds": time.time() - began}
