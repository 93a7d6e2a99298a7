"""What a replication found, in sentences computed from its numbers."""

from __future__ import annotations

import math
from typing import Any

from specdef_jax.replication.reading import Results, capability, reached, typical
from specdef_jax.replication.rows import SPECDEF


def headline(results: Results) -> str:
    """Say whether the attack is held off, and whether it comes back by undoing the defence."""
    able, unable = (capability(results, variant) for variant in ("known", "ignorant"))
    if not able > unable:
        return "The capability is not learned even by who was taught it: nothing can be told from this run"
    defences = {name: row for name, row in results["matrix"].items() if name.startswith(SPECDEF)}
    held = [name for name, row in defences.items() if not reached(row)]
    undone = [a for a in results["attacks"] if not a["refused"] and _arrives(a)]
    first = (
        f"Adam does not reach the target under {len(held)} of {len(defences)} deformations"
        if held
        else "Adam reaches the target under every deformation"
    )
    return f"{first}; {len(undone)} of {len(results['attacks'])} attacks bring it back"


def _arrives(attack: dict[str, Any]) -> bool:
    return not math.isnan(typical(attack["adam"]["steps"]))
