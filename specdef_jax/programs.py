"""What a process keeps for its programs: memory maps, some 65,000 at most (Linux), and their precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")

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


def in_this_precision(fn: Callable[P, T]) -> Callable[P, T]:
    """Return fn for another thread, which a jax_enable_x64 context of this one would not reach."""
    x64 = jax.config.read("jax_enable_x64")

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.enable_x64(x64):
            return fn(*args, **kwargs)

    return run
