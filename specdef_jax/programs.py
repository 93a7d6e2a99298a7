"""Compiled programs, which take memory maps, of which a process may hold some 65,000 (Linux)."""

from __future__ import annotations

from pathlib import Path

import jax

_MOST = 30_000
_MAPS = Path("/proc/self/maps")


def free_when_many() -> None:
    """Forget every compiled program when the process holds many memory maps."""
    try:
        with _MAPS.open("rb") as maps:
            held = sum(1 for _ in maps)
    except OSError:  # another system
        return
    if held > _MOST:
        jax.clear_caches()
