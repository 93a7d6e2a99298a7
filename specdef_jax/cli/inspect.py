"""`specdef inspect`: what a checkpoint holds, the top of each matrix's spectrum, and what looks deformed."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from specdef_jax import hub
from specdef_jax.cli.block_curvature import COLUMNS, cells, draw, measure, of_entry
from specdef_jax.cli.console import Report, reporting, show_table
from specdef_jax.errors import ProblemError, SelectionError, SpecError, StructureError
from specdef_jax.hub.safetensors_file import COMP
from specdef_jax.layout import axes_of
from specdef_jax.parametrization import Deformed, KernelAxes, is_structured
from specdef_jax.select import Candidate
from specdef_jax.trees import named_leaves

_COLUMNS = ("tensor", "shape", "dtype", "deformed", "top singular values", "gap", "suspected")


@dataclass(frozen=True)
class _Entry:
    """A tensor of any kind of checkpoint, read when it is its turn."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    axes: Callable[[], KernelAxes]
    deformed: dict[str, Any] | None
    read: Callable[[], np.ndarray]


def inspect(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    /,
    *,
    layers: tuple[str, ...] = (),
    layout: Literal["auto", "hf", "jax"] = "auto",
    loss: str | None = None,
    data: str | None = None,
    plot: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
    seed: int = 0,
) -> int:
    """List the tensors of a checkpoint, which are deformed, and their leading singular values.

    A deformed kernel is listed with the values of its stored weight, compensation left out. The gap is
    the largest ratio of neighbouring values among the first 33. Of stacked matrices the one with the
    largest first value is listed. What is suspected is no proof: layers trained on correlated features
    show gaps too.

    With --loss the Hessian block of each tensor is measured too, in float64: its largest eigenvalue by
    magnitude, with the true residual. It is a lower bound on the sharpness of the whole network.

    Args:
      source: directory of safetensors files, .safetensors file, or directory of an Orbax checkpoint.
      layers: globs on tensor names; list only these.
      layout: as in `specdef deform`.
      loss: module:function of your own, loss(params, *data) -> scalar, on the tree that sd.hub.read_tree
        gives.
      data: module:name of a tuple of arrays, or of a function that returns one.
      plot: file to draw the curvature into, .svg, .png or .pdf.
      as_json: print JSON instead of a table.
      seed: of the randomized subspace iteration.

    Returns:
      The exit code.
    """
    if loss is None and (data is not None or plot is not None):
        raise ProblemError("--data and --plot say nothing without --loss.")
    curves: dict[str, dict[str, Any]] = {}
    with reporting() as report:
        report("reading", 0, 0)
        if hub.is_shards(source):
            shards = hub.open_shards(source)
            entries, gauge = _of_shards(shards, layout), _gauge(shards)
        else:
            entries, gauge = _of_tree(hub.read_tree(source), layout), {}
        chosen = _chosen(entries, layers)
        rows = _rows(chosen, gauge, jax.random.key(seed), report)
        if loss is not None:
            params = hub.read_tree(source).params
            names = [entry.name for entry in chosen if jnp.issubdtype(entry.dtype, jnp.floating)]
            curves, spectrum = measure(params, loss, data, names, jax.random.key(seed), report)
            for row in rows:
                row["curvature"] = of_entry(curves, row["name"])
            if plot is not None:
                draw(curves, spectrum, plot)
    if as_json:
        print(json.dumps({"path": str(source), "tensors": rows}, indent=1, allow_nan=False))
    else:
        columns = _COLUMNS if loss is None else (*_COLUMNS, *COLUMNS)
        show_table(f"{len(rows)} tensors in {source}", columns, map(_cells, rows))
    return 0


def _of_tree(checkpoint: hub.Checkpoint, layout: hub.Layout) -> list[_Entry]:
    given = hub.axes_for(checkpoint.params, layout)
    found = []
    for name, leaf in named_leaves(checkpoint.params, is_leaf=is_structured):
        array, deformed, axes = leaf, None, lambda n=name, x=leaf: axes_of(n, np.shape(x), given, False)
        if isinstance(leaf, Deformed):
            array, axes = leaf.weight, lambda x=leaf: x.axes
            deformed = {"side": leaf.side, **checkpoint.details.get(name, {})}
        dtype = getattr(array, "dtype", type(array).__name__)
        found.append(_Entry(name, np.shape(array), dtype, axes, deformed, lambda x=array: np.asarray(x)))
    return found


def _of_shards(shards: hub.Shards, layout: hub.Layout) -> list[_Entry]:
    tensors, records = hub.tensors_of(shards), hub.inserted(shards)
    given = hub.kernel_axes(tensors, layout)
    found = []
    for name, tensor in tensors.items():
        record, axes = records.get(name), lambda n=name, t=tensor: axes_of(n, t.shape, given, False)
        if record is not None:
            axes = lambda r=record: r["axes"]  # noqa: E731
        deformed = None if record is None else {k: v for k, v in record.items() if k != "axes"}
        found.append(_Entry(name, tensor.shape, tensor.dtype, axes, deformed, tensor.read))
    return found


def _gauge(shards: hub.Shards) -> dict[str, Callable[[], str]]:
    """Return, for each value projection whose heads are known, a look at its balance."""

    def look(pair: hub.AttentionPair) -> str:
        first, second = hub.matrices_of(shards, pair)
        return hub.suspect_gauge(first, second, pair.groups)

    found = {}
    for name in hub.find_pairs(shards):
        with contextlib.suppress(StructureError):
            found[name] = functools.partial(look, hub.pair_at(shards, name))
    return found


def _rows(
    entries: list[_Entry], gauge: dict[str, Callable[[], str]], key: jax.Array, report: Report
) -> list[dict[str, Any]]:
    rows = []
    for index, entry in enumerate(entries):
        report("measuring", index, len(entries))
        found = _spectrum(entry, jax.random.fold_in(key, index))
        suspected = [found.suspected, gauge[entry.name]() if entry.name in gauge and found.values else ""]
        rows.append(
            {
                "name": entry.name,
                "shape": list(entry.shape),
                "dtype": str(entry.dtype),
                "deformed": entry.deformed,
                "singular_values": found.values,
                "gap": found.gap,
                "suspected": "; ".join(filter(None, suspected)),
                "note": found.note,
            }
        )
    return rows


def _chosen(entries: list[_Entry], globs: tuple[str, ...]) -> list[_Entry]:
    if not globs:
        return entries
    candidates = [Candidate(entry.name, (), np.dtype(np.float32)) for entry in entries]
    chosen = {c.name for c in hub.selector(globs).choose(candidates, jax.random.key(0))}
    if not chosen:
        raise SelectionError(
            f"{', '.join(map(repr, globs))} matched nothing; leave --layers out to list all."
        )
    return [entry for entry in entries if entry.name in chosen]


def _spectrum(entry: _Entry, key: jax.Array) -> hub.Spectrum:
    """Return the spectrum of a kernel, none for what is not one."""
    compensation = entry.name.endswith(COMP)
    if len(entry.shape) < 2 or compensation or not jnp.issubdtype(entry.dtype, jnp.floating):
        return hub.Spectrum()
    try:
        axes = entry.axes()
    except SpecError:
        return hub.Spectrum(note="axes unknown")
    return hub.spectrum_of(entry.read(), axes, key)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    values, deformed = row["singular_values"], row["deformed"]
    return (
        row["name"],
        " x ".join(map(str, row["shape"])) or "scalar",
        row["dtype"],
        ", ".join(f"{key} {value}" for key, value in deformed.items()) if deformed else "",
        row["note"] if values is None else ", ".join(f"{s:.4g}" for s in values),
        "" if row["gap"] is None else f"{row['gap']:.4g}",
        row["suspected"],
        *(cells(row["curvature"]) if "curvature" in row else ()),
    )
