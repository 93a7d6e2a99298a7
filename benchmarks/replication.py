"""The paper's experiments in miniature: run some, keep their results.

    python -m benchmarks.replication TASK ... [--size small]

Runs `specdef certify --task` for each, resuming what was interrupted, and keeps results.json as
benchmarks/results/replication_TASK.json with the figure beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from benchmarks._harness import RESULTS
from specdef_jax.certification.store import dumps
from specdef_jax.replication import TASKS, figure, replicate

STATE = Path("results/state/replication")  # ignored by git


def main() -> None:
    """Run the tasks in turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("tasks", nargs="+", choices=sorted(TASKS))
    parser.add_argument("--size", default="small")
    options = parser.parse_args()
    for task in options.tasks:
        name = task.replace("/", "_")
        begin = time.perf_counter()
        results = replicate(task, options.size, STATE / f"{name}_{options.size}", progress=_told)
        results["seconds"] = time.perf_counter() - begin
        if options.size == "small":
            keep(name, results)
        print(json.dumps({"task": task, "seconds": results["seconds"]}))


def keep(name: str, results: dict) -> None:
    """Write what the documents read."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"replication_{name}.json").write_text(dumps(results))
    (RESULTS / f"replication_{name}.svg").write_bytes(figure.standalone(results))


def _told(stage: str, done: int, total: int) -> None:
    print(f"  {stage}: {done} of {total}", flush=True)


if __name__ == "__main__":
    main()
