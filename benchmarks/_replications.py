"""The kept replications, in the order of the documents."""

from __future__ import annotations

import math
from typing import Any

from benchmarks._harness import RESULTS
from specdef_jax.certification.store import loads
from specdef_jax.replication.reading import Results, capability, median
from specdef_jax.replication.rows import NAMES, SPECDEF, Way

SYSTEMS = {
    "text/llama": "Llama",
    "text/gpt_oss": "GPT-OSS",
    "diffusion": "Stable Diffusion",
    "style": "style transfer",
    "vision/vit": "ViT",
    "vision/cnn": "CNN",
}


def kept() -> list[Results]:
    """Return the results in benchmarks/results/replication_*.json, known systems first."""
    found = [loads(path.read_text(), str(path)) for path in sorted(RESULTS.glob("replication_*.json"))]
    known = list(SYSTEMS)
    return sorted(found, key=lambda r: known.index(r["task"]["name"]) if r["task"]["name"] in known else 99)


def label(results: Results) -> str:
    """Return the name of the system in the documents."""
    name = results["task"]["name"]
    return SYSTEMS.get(name, name)


def undefended(results: Results) -> dict[str, Any]:
    """Return the row of the variant that is defended, without the defence."""
    return results["matrix"][NAMES[results["task"]["defended"]]]


def taught(results: Results) -> tuple[float, float, float]:
    """Return the capability of who never learned it, after the undefended attack, and of who learned it."""
    known, ignorant = (capability(results, variant) for variant in ("known", "ignorant"))
    cells = results["matrix"][NAMES["ignorant"]]["cells"]
    return ignorant, max((median(cell, "capability") for cell in cells), default=math.nan), known


def learnable(results: Results) -> bool:
    """Tell whether the attack brings half of the capability where there is no defence."""
    ignorant, after, known = taught(results)
    return after > (known + ignorant) / 2


def headline_rows(results: Results) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return three rows of the matrix: without the defence, with the strongest, and with that fused."""
    name = f"{SPECDEF} {Way(results['config']['optimizer_alpha']).name}"
    return undefended(results), results["matrix"][name], results["matrix"][f"fuse on {name}"]
