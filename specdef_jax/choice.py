"""Which kernels a selector means, checked before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import PRNGKeyArray

from specdef_jax import select
from specdef_jax.errors import LeafError, SelectionError
from specdef_jax.parametrization import Deformed, is_structured
from specdef_jax.precision import FORMATS


def choose_kernels(leaves: dict[str, Any], selector: select.Selector, key: PRNGKeyArray) -> list[str]:
    """Resolve the selector to names of matrices; say why when there is none.

    Args:
      leaves: name -> leaf of the whole tree.
      selector: what to choose.
      key: for random selectors.

    Raises:
      SelectionError: nothing matches, or nothing that is a kernel.
      LeafError: a chosen leaf is deformed already, or of a dtype that cannot be deformed.
    """
    candidates = [_candidate(name, leaf) for name, leaf in leaves.items()]
    chosen = selector.choose(candidates, key)
    if not chosen:
        names = ", ".join(repr(c.name) for c in candidates if c.is_matrix) or "none"
        raise SelectionError(f"{selector.description} matched nothing. Matrices in this tree: {names}.")
    for candidate in chosen:
        if is_structured(leaves[candidate.name]):
            raise LeafError(f"'{candidate.name}' is deformed already; merge it first (sd.merge).")
        if len(candidate.shape) >= 2:
            check_dtype(candidate.name, candidate.dtype)
    matrices = [c.name for c in chosen if c.is_matrix]
    if not matrices:
        refused = ", ".join(f"'{c.name}' {c.shape}" for c in chosen[:5])
        raise SelectionError(
            f"{selector.description} matched only leaves that are no kernels (vectors, biases, embeddings): "
            f"{refused}. Select a leaf of rank two or more that multiplies its input."
        )
    return matrices


def check_dtype(name: str, dtype: Any) -> None:
    """Raise LeafError unless a kernel of this dtype can be deformed."""
    if str(dtype) not in FORMATS:
        raise LeafError(
            f"'{name}' has dtype {dtype}: integer, quantized and complex tensors cannot be deformed; "
            "dequantize it to float16, bfloat16, float32 or float64 first."
        )


def _candidate(name: str, leaf: Any) -> select.Candidate:
    array = leaf.weight if isinstance(leaf, Deformed) else leaf
    dtype = array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype
    return select.Candidate(name, tuple(np.shape(array)), dtype)
