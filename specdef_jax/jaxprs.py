"""Reading the programs that JAX traces, whichever of its versions wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def scan_operands(params: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many operands of a scan are constants, and how many are carried; the others are sliced."""
    if "num_consts" in params:  # up to jax 0.10
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))
