"""`python -m theory`: run every statement and print its certificates; exit 1 if one fails."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from theory.catalogue import Report, Statement


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parse(arguments)
    _settle_on_cpu()
    from specdef_jax import environment
    from theory.catalogue import statements, to_dict
    from theory.sizes import Size
    from theory.table import block, summary

    size = Size.FULL if options.full else Size.SMALL if options.small else Size.DEFAULT
    chosen = [s for s in statements() if not options.only or s.number in options.only]
    if missing := set(options.only) - {s.number for s in chosen}:
        known = ", ".join(s.number for s in statements())
        print(f"no statement {', '.join(sorted(missing))}; statements: {known}", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    reports = []
    quiet = options.json == "-"
    for report in _run(chosen, options.seed, size, options.jobs):
        reports.append(report)
        if not quiet:
            print(block(report), end="\n\n", flush=True)
    wall = time.perf_counter() - begin
    if not quiet:
        print(f"{summary(map(to_dict, reports))}, {wall:.0f} s wall clock")
    if options.json:
        found = [to_dict(r) for r in reports]
        if options.only and not quiet:
            found = _among(Path(options.json), found, str(size), options.seed)
        record = {
            "schema": 1,
            "size": str(size),
            "seed": options.seed,
            "wall_seconds": round(wall, 1),  # of this run, whatever else the file holds
            "summary": summary(found),
            "environment": environment.describe(),
            "statements": found,
        }
        _write(options.json, record)
    return 0 if all(r.holds for r in reports) else 1


def _run(chosen: Sequence[Statement], seed: int, size: Any, jobs: int) -> Iterator[Report]:
    """Yield the reports in the order of the statements, several processes at work."""
    from theory.catalogue import run

    if jobs == 1 or len(chosen) == 1:
        yield from (run(s.module, seed, size) for s in chosen)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        yield from pool.map(run, [s.module for s in chosen], [seed] * len(chosen), [size] * len(chosen))


def _settle_on_cpu() -> None:
    """Choose, before jax is loaded here and in the workers, what suits float64 and small dense matrices.

    One thread per process, as there is a process for each core (NPROC sizes XLA's own pool: with two threads
    jaxlib 0.10.2 has been seen to wait for ever after batched decompositions, with one it has not), and XLA's
    cheap passes, as most of the time goes into compilation.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("NPROC", "1")
    flags = ("--xla_cpu_multi_thread_eigen=false", "--xla_backend_optimization_level=0")
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])


def _among(path: Path, found: list[dict[str, Any]], size: str, seed: int) -> list[dict[str, Any]]:
    """Return what a file holds of the same size and seed, with these statements instead of its own."""
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        return found
    if (held["size"], held["seed"]) != (size, seed):
        return found
    new = {s["statement"]: s for s in found}
    kept = [new.pop(s["statement"], s) for s in held["statements"]]
    return [*kept, *new.values()]


def _write(target: str, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=1)
    if target == "-":
        print(text)
    else:
        Path(target).write_text(text + "\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m theory", description="Check the theory by machine.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="every statement on every instance")
    size.add_argument("--small", action="store_true", help="few instances, for a quick look")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON (to stdout if no FILE); with --only into a FILE of the same size and seed",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NUMBER", help="statements, as 2.4")
    parser.add_argument("--seed", type=int, default=0, help="of every random instance")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
