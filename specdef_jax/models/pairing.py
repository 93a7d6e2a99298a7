"""Gauge placement on a model in memory: adjacent kernels deformed in place, nothing added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from specdef_jax.attacks.adjacent import AdjacentPair, check_disjoint
from specdef_jax.errors import StructureError
from specdef_jax.gauge import deform_pair
from specdef_jax.spec import SpecDef


def deform_pairs(
    params: dict[str, Any], pairs: Sequence[AdjacentPair], spec: SpecDef, *, key: PRNGKeyArray
) -> dict[str, Any]:
    """Return the network with T(a) in the first kernel of each pair and T(1/a) in the second.

    Args:
      params: name -> array, layers one by one.
      pairs: of the model (gauge_pairs).
      spec: how to deform; side is ignored.
      key: for randomized subspaces.

    Raises:
      StructureError: a pair names a leaf that is not there.
      ProblemError: a leaf stands in two pairs.
      LeafError, SpecError, BudgetError: as deform_pair.
    """
    check_disjoint(pairs)
    found = dict(params)
    for i, pair in enumerate(pairs):
        names = [pair.first, pair.second, *([] if pair.bias is None else [pair.bias])]
        if missing := [name for name in names if name not in params]:
            raise StructureError(
                f"the parameters lack {missing}, which a pair names; unstack the layers first."
            )
        made = deform_pair(
            params[pair.first],
            params[pair.second],
            spec,
            key=jax.random.fold_in(key, i),
            bias=None if pair.bias is None else params[pair.bias],
            groups=pair.groups,
        )
        found |= dict(zip(names, (made.first, made.second, made.bias), strict=False))
    return found
