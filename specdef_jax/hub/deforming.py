"""Deform a checkpoint directory: plan every tensor, write the output, measure what was written."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specdef_jax import environment, select
from specdef_jax.choice import choose_kernels
from specdef_jax.errors import FileError, SpecError
from specdef_jax.hub import gauging, insertion
from specdef_jax.hub.manifest import MANIFEST, Manifest, Placement
from specdef_jax.hub.naming import Layout, selector
from specdef_jax.hub.rewrite import Group, Written, check_output, rewrite
from specdef_jax.hub.safetensors_file import RECORD
from specdef_jax.hub.shards import CONFIG, Shards, open_shards
from specdef_jax.hub.tensors import Tensor, tensors_of
from specdef_jax.hub.working import Step, default_workers
from specdef_jax.precision import as_format
from specdef_jax.spec import SpecDef

log = logging.getLogger(__name__)

BUDGET = 1e-3  # what a stored layer may be off by unless asked otherwise
VERSION = 1  # of the procedure: a run by another one is not resumed


def deform_directory(
    source: Path | str,
    out: Path | str,
    spec: SpecDef,
    where: select.Selector | str | Sequence[str] | None = None,
    *,
    placement: Placement = "insert",
    dequantize: str | None = None,
    layout: Layout = "auto",
    seed: int = 0,
    workers: int | None = None,
    progress: Step | None = None,
) -> Manifest:
    """Deform kernels of a checkpoint directory without changing the function it computes.

    placement "insert" adds NAME.comp beside each deformed NAME and gives the config a model_type of its
    own, as a loader that does not know of compensations would compute garbage; factors are stored in the
    narrowest dtype that keeps each layer's error within spec.budget. "gauge" deforms the value and output
    projections of attention in place: a checkpoint of the same architecture, names and dtypes.

    The output appears when it is whole and measured; a killed run is resumed by the same call.

    Args:
      source: directory with config.json and safetensors files.
      out: directory to make.
      spec: how to deform; gauge does not look at its side.
      where: selector or globs on names, in which "." and "/" both part components; None takes every matrix
        that is not an embedding (gauge: every attention, named by either projection).
      placement: see above.
      dequantize: dtype to which MXFP4 tensors are expanded; None leaves them as they are, out of reach.
      layout: as in naming.axes_for.
      seed: of every random choice.
      workers: tensors at work at a time; by default one per core, four at most.
      progress: progress(stage, done, total).

    Returns:
      What was written to specdef.json.

    Raises:
      FileError: the input is damaged or deformed already, or the output cannot be written.
      SelectionError, LeafError, SpecError, StructureError: something selected cannot be deformed.
      BudgetError: a layer would be off by more than the budget.
    """
    source, out = Path(source), Path(out)
    check_output(source, out)
    shards = open_shards(source)
    if MANIFEST in shards.others or any(RECORD in shard.metadata for shard in shards.shards):
        raise FileError(f"{source} is deformed already; fuse it first.")
    if shards.left_out:
        log.warning(
            "%s: %s belong to no index or may hold a pickle, and are not copied.",
            source,
            ", ".join(shards.left_out[:5]) + (", ..." if len(shards.left_out) > 5 else ""),
        )
    tensors = tensors_of(shards, None if dequantize is None else np.dtype(as_format(dequantize).dtype))
    tell = progress or (lambda stage, done, total: None)
    count = workers or default_workers()
    choose_key, key = jax.random.split(jax.random.key(seed))
    chosen_by = where if isinstance(where, select.Selector) or where is None else selector(_globs(where))
    if placement == "insert":
        structs = {name: tensor.struct for name, tensor in tensors.items()}
        chosen = choose_kernels(structs, chosen_by or selector(), choose_key)
        placed = insertion.place(shards, tensors, chosen, spec, key, layout=layout, workers=count, tell=tell)
    elif placement == "gauge":
        placed = gauging.place(shards, chosen_by, spec, choose_key, key, workers=count, tell=tell)
    else:
        raise SpecError(f"placement {placement!r} is unknown; use insert or gauge.")
    expanded = {name: tensor for name, tensor in tensors.items() if tensor.parts}
    config = {k: v for k, v in shards.config.items() if not (expanded and k == "quantization_config")}
    before = config_text(shards, config)
    asked = _asked(spec, seed)
    made: list[Manifest] = []

    def finish(partial: Path, files: dict[str, Written]) -> dict[str, str]:
        layers = placed.measure(open_shards(partial), count, tell)
        dtypes = {name: str(tensor.dtype) for name, tensor in expanded.items()}
        made.append(Manifest(placement, asked, before, layers, dtypes, files, environment.describe()))
        return {MANIFEST: made[-1].to_json()}

    options = [asked, placement, dequantize, list(placed.names), _digest(spec.directions)]
    rewrite(
        shards,
        out,
        [*placed.groups, *_dequantized(expanded, set(placed.names))],
        texts={CONFIG: config_text(shards, config | placed.config)},
        finish=finish,
        key=fingerprint(shards, options),
        headers=placed.headers,
        dropped=frozenset(part for tensor in expanded.values() for part in tensor.parts),
        workers=count,
        progress=lambda done, total: tell("writing", done, total),
    )
    return made[-1]


def config_text(shards: Shards, config: dict[str, Any]) -> str:
    """Return the text of a config: that of the source, to the byte, where nothing changed."""
    if config == shards.config:
        return (shards.path / CONFIG).read_bytes().decode()
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _globs(where: str | Sequence[str]) -> Sequence[str]:
    return [where] if isinstance(where, str) else where


def _dequantized(expanded: dict[str, Tensor], deformed: set[str]) -> Iterator[Group]:
    """Yield the groups of the expanded tensors that are not deformed."""
    for name, tensor in expanded.items():
        if name not in deformed:
            yield Group(
                {name: (tensor.dtype, tensor.shape)},
                {name: tensor.parts[0]},
                lambda n=name, t=tensor: {n: t.read()},
            )


def _asked(spec: SpecDef, seed: int) -> dict[str, Any]:
    directions = spec.directions if isinstance(spec.directions, str) else "given"
    return {
        "alpha": float(spec.alpha),
        "k": int(spec.k),
        "basis": spec.basis,
        "side": spec.side,
        "directions": directions,
        "tol": float(spec.tol),
        "budget": float(spec.budget),
        "seed": seed,
    }


def _digest(directions: Any) -> str:
    if isinstance(directions, str):
        return directions
    return hashlib.sha256(np.ascontiguousarray(directions).tobytes()).hexdigest()


def fingerprint(shards: Shards, options: list[Any]) -> str:
    """Return what two runs share that write the same output from the same files."""
    files = []
    for name in (CONFIG, *(shard.name for shard in shards.shards), *shards.others):
        found = (shards.path / name).stat()
        files.append([name, found.st_size, found.st_mtime_ns])
    text = json.dumps([VERSION, str(shards.path.resolve()), files, options])
    return hashlib.sha256(text.encode()).hexdigest()
