"""Undo a deformed checkpoint: multiply the pairs out, or balance what a gauge deformation set apart.

An attacker's tool: neither needs specdef.json. Inserted pairs are told by the records in the files'
headers; a gauge deformation by nothing, as balancing any two adjacent maps undoes it (THEORY.md 5.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specdef_jax.errors import FileError
from specdef_jax.gauge import balance
from specdef_jax.hub.attention import AttentionPair, find_pairs, pair_at
from specdef_jax.hub.deforming import config_text, fingerprint
from specdef_jax.hub.factors import fuse_stored
from specdef_jax.hub.gauging import matrices_of
from specdef_jax.hub.insertion import CLASS, MODEL_TYPE
from specdef_jax.hub.manifest import MANIFEST, load_manifest
from specdef_jax.hub.record import load_record
from specdef_jax.hub.rewrite import Group, check_output, rewrite
from specdef_jax.hub.safetensors_file import COMP, RECORD
from specdef_jax.hub.shards import CONFIG, Shards, open_shards
from specdef_jax.hub.working import Step, default_workers


@dataclass(frozen=True)
class Fused:
    """What was undone.

    Attributes:
      multiplied: names of tensors whose compensation was multiplied in.
      balanced: names of value projections that were balanced with their output projections.
    """

    multiplied: tuple[str, ...]
    balanced: tuple[str, ...]


def fuse_directory(
    source: Path | str, out: Path | str, *, workers: int | None = None, progress: Step | None = None
) -> Fused:
    """Write a checkpoint that computes the same function and is no sharper than an undeformed one.

    Inserted pairs come back as one tensor in the dtype it had before (that of the pair, if specdef.json is
    missing), with the config of the original. Where there are none, every attention is balanced, which
    gives an equivalent of the original, not the original.

    Args:
      source: a deformed directory.
      out: directory to make.
      workers: tensors at work at a time.
      progress: progress(stage, done, total).

    Raises:
      FileError: the input is damaged, holds nothing to undo, or the output cannot be written.
      StructureError: as pair_at.
    """
    source, out = Path(source), Path(out)
    check_output(source, out)
    shards = open_shards(source)
    records = inserted(shards)
    manifest = load_manifest(source) if MANIFEST in shards.others else None
    pairs: list[AttentionPair] = []
    if records:
        layers = {} if manifest is None else manifest.layers
        dtypes = {n: np.dtype(layer.source_dtype) for n, layer in layers.items()}
        groups = [_multiplied(shards, n, e, dtypes.get(n, shards.info(n).dtype)) for n, e in records.items()]
        text = config_text(shards, stock_config(shards.config)) if manifest is None else manifest.config
    else:
        firsts = find_pairs(shards) if manifest is None else manifest.layers
        pairs = [pair_at(shards, first) for first in firsts]
        groups, text = [_balanced(shards, pair) for pair in pairs], config_text(shards, shards.config)
    if not groups:
        raise FileError(f"{source} has no compensations and no attention to balance: nothing to undo.")
    tell = progress or (lambda stage, done, total: None)
    others = tuple(name for name in shards.others if name != MANIFEST)
    rewrite(
        Shards(shards.path, shards.config, shards.shards, shards.index, shards.index_metadata, others, ()),
        out,
        groups,
        texts={CONFIG: text},
        finish=lambda partial, files: {},
        key=fingerprint(shards, ["fuse"]),
        headers={s.name: {k: v for k, v in s.metadata.items() if k != RECORD} for s in shards.shards},
        dropped=frozenset(name + COMP for name in records),
        workers=workers or default_workers(),
        progress=lambda done, total: tell("writing", done, total),
    )
    return Fused(tuple(records), tuple(pair.first for pair in pairs))


def inserted(shards: Shards) -> dict[str, dict[str, Any]]:
    """Return the records of inserted pairs in the headers of a checkpoint, whose tensors fit them.

    Raises:
      FileError: a record is damaged, or names tensors that are not there or of other shapes.
    """
    found = {}
    for shard in shards.shards:
        if RECORD in shard.metadata:
            found |= load_record(shard.metadata[RECORD], str(shards.path / shard.name))
    for name, entry in found.items():
        check_pair(shards, name, entry)
    return found


def check_pair(shards: Shards, name: str, entry: dict[str, Any]) -> None:
    """Refuse a pair whose tensors are missing or do not fit its record."""
    for part in (name, name + COMP):
        if part not in shards:
            raise FileError(
                f"{shards.path}: the record names '{part}', which is missing; get the file again."
            )
    axes, weight, comp = entry["axes"], shards.info(name), shards.info(name + COMP)
    rank = len(axes.stack + axes.window + axes.inputs + axes.outputs)
    if len(weight.shape) == rank and weight.dtype == comp.dtype:
        d, stack = axes.dim(weight.shape, entry["side"]), tuple(weight.shape[i] for i in axes.stack)
        if comp.shape == (*stack, d, d):
            return
    raise FileError(
        f"{shards.path}: '{name}' {weight.dtype}{weight.shape} and its compensation {comp.dtype}{comp.shape} "
        "do not fit the record; get the checkpoint again."
    )


def stock_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config as it was before a compensation was inserted, going by its names."""
    found = dict(config)
    if str(found.get("model_type", "")).startswith(MODEL_TYPE):
        found["model_type"] = found["model_type"].removeprefix(MODEL_TYPE)
    if str(found.get("_class_name", "")).startswith(CLASS):
        found["_class_name"] = found["_class_name"].removeprefix(CLASS)
    if isinstance(found.get("architectures"), list):
        found["architectures"] = [str(name).removeprefix(CLASS) for name in found["architectures"]]
    return found


def _multiplied(shards: Shards, name: str, entry: dict[str, Any], dtype: np.dtype) -> Group:
    def make() -> dict[str, np.ndarray]:
        weight, comp = shards.read(name), shards.read(name + COMP)
        return {name: fuse_stored(weight, comp, entry["axes"], entry["side"], dtype)}

    return Group({name: (dtype, shards.info(name).shape)}, {}, make)


def _balanced(shards: Shards, pair: AttentionPair) -> Group:
    names = pair.names
    infos = [shards.info(name) for name in names]

    def make() -> dict[str, np.ndarray]:
        with jax.enable_x64(True):
            first, second = (jnp.asarray(x, jnp.float64) for x in matrices_of(shards, pair))
            d = first.shape[1] // pair.groups
            rows = first.reshape(len(first), pair.groups, d).swapaxes(0, 1)
            heads = second.reshape(pair.groups, -1, d, second.shape[1]).swapaxes(1, 2)
            wide = heads.reshape(pair.groups, d, -1)
            X, Y = jax.lax.map(lambda pair: balance(*pair), (rows, wide))
            first = np.asarray(X.swapaxes(0, 1).reshape(first.shape))
            second = np.asarray(Y.reshape(heads.shape).swapaxes(1, 2).reshape(second.shape))
        features = infos[0].shape[1]
        arrays = [first[:features].T, second.T, *first[features:]]
        return {n: a.astype(i.dtype) for n, a, i in zip(names, arrays, infos, strict=True)}

    return Group({n: (i.dtype, i.shape) for n, i in zip(names, infos, strict=True)}, {}, make)
