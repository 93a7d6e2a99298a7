"""What `specdef deform` and `specdef attack fuse` do with a directory, and `specdef verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import tyro

from specdef_jax import hub
from specdef_jax.cli.console import reporting, show_table
from specdef_jax.preservation import LayerPreservation
from specdef_jax.spec import SpecDef

_Directory = Annotated[Path, tyro.conf.Positional]
_Json = Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff]


def deform_directory(
    source: Path,
    out: Path,
    spec: SpecDef,
    layers: tuple[str, ...],
    *,
    placement: hub.Placement,
    dequantize: str | None,
    layout: hub.Layout,
    seed: int,
) -> int:
    """Deform a directory of safetensors files, show what came of it, and return the exit code."""
    with reporting() as report:
        manifest = hub.deform(
            source,
            out,
            spec,
            layers or None,
            placement=placement,
            dequantize=dequantize,
            layout=layout,
            seed=seed,
            progress=report,
        )
    columns = ("tensor", "dtype", "stored", "sigma_1", "deformed", "directions", *_ERROR)
    rows = [
        (
            name,
            layer.source_dtype,
            layer.dtype,
            f"{layer.sigma_before[0]:.4g}",
            f"{layer.sigma_after[0]:.4g}",
            layer.status.replace("_", " "),
            *_error(layer.measured, layer.exact),
        )
        for name, layer in manifest.layers.items()
    ]
    show_table(f"{len(rows)} deformed ({manifest.placement}), written to {out}", columns, rows)
    return 0


def verify(out: _Directory, /, *, against: Path, as_json: _Json = False) -> int:
    """Check that a directory is a deformation of another and nothing else.

    Every certificate is computed again from the tensors of the two directories: each deformed layer's
    error with its derived bound, every other tensor and file byte by byte, every hash.

    Args:
      out: directory that `specdef deform` wrote.
      against: directory it was made from.
      as_json: print JSON instead of a table.

    Returns:
      The exit code: 1 if anything does not hold.
    """
    with reporting() as report:
        found = hub.verify(out, against, progress=report)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1, allow_nan=False))
        return 0 if found.holds else 1
    rows = [
        (name, layer.dtype, *_error(layer.measured, layer.exact), "holds" if layer.holds else "FAILS")
        for name, layer in found.layers.items()
    ]
    title = f"{len(rows)} deformed ({found.placement}) in {out}"
    show_table(title, ("tensor", "stored", *_ERROR, "verdict"), rows)
    for problem in found.problems:
        print(f"FAILS: {problem}")
    print(
        f"{found.identical} tensors are those of {against}, byte for byte; {found.files} files have the hash "
        f"they were written with; {'everything holds' if found.holds else 'NOT everything holds'}."
    )
    return 0 if found.holds else 1


def fuse_directory(source: Path, out: Path) -> int:
    """Write the fused directory, say what was done, and return the exit code."""
    with reporting() as report:
        found = hub.fuse(source, out, progress=report)
    told = []
    if found.multiplied:
        told.append(f"{len(found.multiplied)} compensations multiplied in")
    if found.balanced:
        told.append(f"{len(found.balanced)} attentions balanced")
    print(f"fuse: {', '.join(told)}, written to {out}")
    return 0


_ERROR = ("error", "bound", "known")


def _error(measured: LayerPreservation, exact: bool) -> tuple[str, ...]:
    word = "bit-identical" if exact else str(measured.word)
    return f"{measured.error:.1e}", f"{measured.bound:.1e}", word
