"""What a replication found, in sentences computed from its numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Results = dict[str, Any]


def headline(results: Results) -> str:
    """Say whether the attack is held off, and whether it comes back by undoing the defence."""
    task = results["task"]
    able, unable = (_able(task["variants"][v]) for v in ("known", "ignorant"))
    if not able > unable:
        return "The capability is not learned even by who was taught it: nothing can be told from this run"
    defences = {name: row for name, row in results["matrix"].items() if name.startswith("SpecDef")}
    held = [name for name, row in defences.items() if not _reached(row)]
    undone = [a for a in results["attacks"] if not a["refused"] and _arrives(a)]
    first = (
        f"Adam does not reach the target under {len(held)} of {len(defences)} deformations"
        if held
        else "Adam reaches the target under every deformation"
    )
    return f"{first}; {len(undone)} of {len(results['attacks'])} attacks bring it back"


def _able(networks: list[dict[str, float]]) -> float:
    return float(np.median([one["capability"] for one in networks]))


def _reached(row: dict[str, Any]) -> bool:
    """Tell whether some step size brings more than half of the networks to the target."""
    return any(
        np.mean([not math.isnan(one["steps"]) for one in cell["networks"]]) > 0.5 for cell in row["cells"]
    )


def _arrives(attack: dict[str, Any]) -> bool:
    return bool(np.mean([not math.isnan(s) for s in attack["adam"]["steps"]]) > 0.5)
