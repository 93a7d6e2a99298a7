"""What a placement hands to the writer of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import PRNGKeyArray

from specdef_jax.hub.manifest import StoredLayer
from specdef_jax.hub.rewrite import Group
from specdef_jax.hub.shards import Shards
from specdef_jax.hub.working import Step
from specdef_jax.parametrization import KernelAxes, Side
from specdef_jax.spec import Layer
from specdef_jax.subspace import top_subspace
from specdef_jax.subspace_result import Status


@dataclass(frozen=True)
class Placed:
    """A planned deformation.

    Attributes:
      names: of what is deformed.
      groups: tensors to write.
      config: entries of config.json to change.
      headers: metadata of shards, where it changes.
      measure: measure(written, workers, tell) measures what was written, against the source.
    """

    names: tuple[str, ...]
    groups: list[Group]
    config: dict[str, Any]
    headers: dict[str, dict[str, str]]
    measure: Callable[[Shards, int, Step], dict[str, StoredLayer]]


def statuses(layer: Layer) -> str:
    """Return how the directions of a layer were found, of a stack every way."""
    return ", ".join(sorted({Status(int(value)).name.lower() for value in np.ravel(layer.status)}))


def leading(
    array: np.ndarray, axes: KernelAxes, k: int, key: PRNGKeyArray, side: Side = "output"
) -> list[float]:
    """Return the k leading singular values, descending; of a stack those of the largest matrix."""
    found = []
    for matrix in axes.to_stack(array, side):
        flipped = matrix.strides[0] < matrix.strides[1]
        values = top_subspace(matrix.T if flipped else matrix, k, key=key, transposed=flipped).singular_values
        found.append(sorted(np.asarray(values, float).tolist(), reverse=True))
    return max(found)
