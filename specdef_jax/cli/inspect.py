"""`specdef inspect`: what a checkpoint holds, and the top of each matrix's spectrum."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jaxtyping import PyTree

from specdef_jax import hub
from specdef_jax.cli.console import Report, reporting, show_table
from specdef_jax.errors import SelectionError, SpecError
from specdef_jax.layout import axes_of
from specdef_jax.parametrization import Deformed, KernelAxes, is_structured
from specdef_jax.select import Candidate
from specdef_jax.subspace import top_subspace
from specdef_jax.trees import named_leaves

_COLUMNS = ("tensor", "shape", "dtype", "deformed", "top singular values", "gap")
_TOP = 3


def inspect(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    /,
    *,
    layers: tuple[str, ...] = (),
    layout: Literal["auto", "hf", "jax"] = "auto",
    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
    seed: int = 0,
) -> int:
    """List the tensors of a checkpoint, which are deformed, and their leading singular values.

    A deformed kernel is listed with the values of its stored weight, compensation left out. The gap
    is the largest ratio of neighbouring values listed: a deformation shows as a large one. Of
    stacked matrices the one with the largest first value is listed.

    Args:
      source: .safetensors file, or directory of an Orbax PyTree checkpoint.
      layers: globs on tensor names; list only these.
      layout: as in `specdef deform`.
      as_json: print JSON instead of a table.
      seed: of the randomized subspace iteration.

    Returns:
      The exit code.
    """
    with reporting() as report:
        report("reading", 0, 0)
        checkpoint = hub.read_tree(source)
        rows = _rows(checkpoint, layers, layout, jax.random.key(seed), report)
    if as_json:
        print(json.dumps({"path": str(source), "tensors": rows}, indent=1, allow_nan=False))
    else:
        show_table(f"{len(rows)} tensors in {source}", _COLUMNS, map(_cells, rows))
    return 0


def _rows(
    checkpoint: hub.Checkpoint, globs: tuple[str, ...], layout: hub.Layout, key: jax.Array, report: Report
) -> list[dict[str, Any]]:
    leaves = _chosen(checkpoint.params, globs)
    axes = hub.axes_for(checkpoint.params, layout)
    rows = []
    for index, (name, leaf) in enumerate(leaves.items()):
        report("measuring", index, len(leaves))
        array = leaf.weight if isinstance(leaf, Deformed) else leaf
        found, note = _spectrum(name, leaf, axes, jax.random.fold_in(key, index))
        gap = max((a / b for a, b in itertools.pairwise(found or []) if b > 0), default=None)
        deformed = (
            {"side": leaf.side, **checkpoint.details.get(name, {})} if isinstance(leaf, Deformed) else None
        )
        rows.append(
            {
                "name": name,
                "shape": list(np.shape(array)),
                "dtype": str(getattr(array, "dtype", type(array).__name__)),
                "deformed": deformed,
                "singular_values": found,
                "gap": gap,
                "note": note,
            }
        )
    return rows


def _chosen(params: PyTree, globs: tuple[str, ...]) -> dict[str, Any]:
    leaves = dict(named_leaves(params, is_leaf=is_structured))
    if not globs:
        return leaves
    candidates = [Candidate(name, (), np.dtype(np.float32)) for name in leaves]
    chosen = hub.selector(globs).choose(candidates, jax.random.key(0))
    if not chosen:
        raise SelectionError(
            f"{', '.join(map(repr, globs))} matched nothing; leave --layers out to list all."
        )
    return {c.name: leaves[c.name] for c in chosen}


def _spectrum(
    name: str, leaf: Any, axes: dict[str, KernelAxes], key: jax.Array
) -> tuple[list[float] | None, str]:
    """Return the leading singular values of a kernel, or None and why there are none."""
    array = leaf.weight if isinstance(leaf, Deformed) else leaf
    if np.ndim(array) < 2 or not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
        return None, ""
    if not array.size:
        return None, "empty"
    if not np.isfinite(np.asarray(array, np.float64)).all():
        return None, "holds NaN or Inf"
    try:
        kernel_axes = leaf.axes if isinstance(leaf, Deformed) else axes_of(name, array.shape, axes, False)
    except SpecError:
        return None, "axes unknown"
    matrix = kernel_axes.to_matrix(jax.numpy.asarray(array), "output")
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    k = min(_TOP, *flat.shape[1:])
    values = [np.asarray(top_subspace(one, k, key=key).singular_values, float) for one in flat]
    return sorted(max(values, key=max).tolist(), reverse=True), ""


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    values, deformed = row["singular_values"], row["deformed"]
    return (
        row["name"],
        " x ".join(map(str, row["shape"])) or "scalar",
        row["dtype"],
        ", ".join(f"{key} {value}" for key, value in deformed.items()) if deformed else "",
        row["note"] if values is None else ", ".join(f"{s:.4g}" for s in values),
        "" if row["gap"] is None else f"{row['gap']:.4g}",
    )
