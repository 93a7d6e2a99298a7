"""What does certification of the embedded default find, and how long does it take?

Runs `specdef certify` into a fresh directory as a newcomer would, and keeps its results.json and the
README's figure.

    python -m benchmarks.certify
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._harness import RESULTS
from specdef_jax.certification import load_results
from specdef_jax.report import hero_figure


def main() -> None:
    """Run the command, keep what it wrote."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "specdef_jax.cli", "certify", "--out", directory]
        begin = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - begin
        made = load_results(Path(directory) / "results.json")
    RESULTS.mkdir(exist_ok=True)
    made.results["wall_seconds"] = seconds
    made.to_json(RESULTS / "certify.json")
    (RESULTS / "certify.svg").write_bytes(hero_figure(made.results))
    print(json.dumps({"wall_seconds": seconds, "holds": made.holds}))


if __name__ == "__main__":
    main()
