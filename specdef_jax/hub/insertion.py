"""Placement "insert": a compensation beside each deformed tensor, and a config with a name of its own.

A loader that chooses the class by the config (AutoModel) refuses it. One that is told the class loads it
with a warning, ignores the compensations, and computes garbage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from specdef_jax.errors import BudgetError, LeafError
from specdef_jax.hub.factors import build_stored
from specdef_jax.hub.manifest import StoredLayer
from specdef_jax.hub.measuring import is_exact_insert, measure_insert
from specdef_jax.hub.naming import Layout
from specdef_jax.hub.placing import Placed, leading, statuses
from specdef_jax.hub.planning import PlannedTensor, meets, plan_tensor
from specdef_jax.hub.record import entry_of, record_text
from specdef_jax.hub.rewrite import Group
from specdef_jax.hub.safetensors_file import COMP, RECORD
from specdef_jax.hub.shards import Shards
from specdef_jax.hub.tensors import Tensor, kernel_axes
from specdef_jax.hub.working import Step, in_order
from specdef_jax.precision import as_format
from specdef_jax.preservation import LayerPreservation
from specdef_jax.spec import SpecDef

MODEL_TYPE = "specdef-"
CLASS = "SpecDef"
MEASURING = 7  # folded into the key, so that probes are drawn apart from directions


def place(
    shards: Shards,
    tensors: dict[str, Tensor],
    chosen: Sequence[str],
    spec: SpecDef,
    key: PRNGKeyArray,
    *,
    layout: Layout,
    workers: int,
    tell: Step,
) -> Placed:
    """Plan the insertion of compensations for the chosen kernels.

    Raises:
      LeafError: a chosen kernel has a compensation already.
      BudgetError, LeafError, SpecError: as plan_tensor.
    """
    for name in chosen:
        if name + COMP in tensors:
            raise LeafError(
                f"'{name}' has a compensation, '{name + COMP}', already; fuse the checkpoint first."
            )
    axes = kernel_axes(tensors, layout)
    keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(chosen)}
    planned = in_order(
        lambda tensor: plan_tensor(tensor, axes.get(tensor.name), spec, keys[tensor.name]),
        [tensors[name] for name in chosen],
        lambda tensor: tensor.size,
        workers=workers,
        told=lambda done: tell("choosing directions", done, len(chosen)),
    )

    def measure(written: Shards, workers: int, tell: Step) -> dict[str, StoredLayer]:
        found = in_order(
            lambda p: measure_stored(p, written, spec.budget, keys[p.tensor.name]),
            planned,
            lambda p: p.tensor.size,
            workers=workers,
            told=lambda done: tell("measuring", done, len(planned)),
        )
        return {p.tensor.name: layer for p, layer in zip(planned, found, strict=True)}

    return Placed(
        names=tuple(chosen),
        groups=[_group(p) for p in planned],
        config=own_config(shards.config),
        headers=_headers(shards, planned),
        measure=measure,
    )


def own_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the entries by which a config says that its model is not of the stock architecture."""
    found: dict[str, Any] = {}
    if "_class_name" in config:
        found["_class_name"] = f"{CLASS}{config['_class_name']}"
    if isinstance(config.get("architectures"), list):
        found["architectures"] = [f"{CLASS}{name}" for name in config["architectures"]]
    if "model_type" in config or not found:
        found["model_type"] = f"{MODEL_TYPE}{config.get('model_type', 'unknown')}"
    return found


def measure_stored(p: PlannedTensor, written: Shards, budget: float, key: PRNGKeyArray) -> StoredLayer:
    """Measure a pair as it is on disk.

    Raises:
      BudgetError: it is off by more than the budget.
    """
    name, layer = p.tensor.name, p.layer
    plain, weight, comp = p.tensor.read(), written.read(name), written.read(name + COMP)
    measured, exact = measure_pair(name, plain, weight, comp, layer.axes, layer.side, key)
    if not meets(measured, exact, budget):
        raise BudgetError(
            f"'{name}' came out with a relative error of {measured.error:.2g} in {p.dtype}, beyond the "
            f"budget of {budget:g}; ask for a smaller alpha, another basis, or a larger budget."
        )
    k = layer.U.shape[-1]
    return StoredLayer(
        entry=entry_of(layer),
        source_dtype=str(plain.dtype),
        dtype=str(p.dtype),
        sigma_before=leading(plain, layer.axes, k, key, layer.side),
        sigma_after=leading(weight, layer.axes, k, key, layer.side),
        exact=exact,
        measured=measured,
        status=statuses(layer),
    )


def measure_pair(
    name: str,
    plain: np.ndarray,
    weight: np.ndarray,
    comp: np.ndarray,
    axes: Any,
    side: Any,
    key: PRNGKeyArray,
) -> tuple[LayerPreservation, bool]:
    """Return the error of a stored pair in its own dtype, and whether it is the plain kernel to the bit."""
    form = as_format(weight.dtype)
    probes = jax.random.fold_in(key, MEASURING)
    measured = measure_insert(name, plain, weight, comp, axes, side, form, probes)
    return measured, is_exact_insert(plain, weight, comp, axes, side)


def _group(p: PlannedTensor) -> Group:
    name, layer = p.tensor.name, p.layer
    d, stack = layer.U.shape[-2], layer.U.shape[:-2]
    leader = _leader(p.tensor)

    def make() -> dict[str, np.ndarray]:
        with jax.enable_x64(True):
            weight, comp = build_stored(p.tensor.read(), layer, p.dtype)
        return {name: weight, name + COMP: comp}

    after = {name + COMP: leader}
    if p.tensor.parts:
        after = {name: leader, **after}
    stored = {name: (p.dtype, p.tensor.shape), name + COMP: (p.dtype, (*stack, d, d))}
    return Group(stored, after, make)


def _headers(shards: Shards, planned: Sequence[PlannedTensor]) -> dict[str, dict[str, str]]:
    """Return the metadata of each shard that holds a pair, by which the file is readable alone."""
    records: dict[str, dict[str, Any]] = {}
    for p in planned:
        shard = shards.shard_of(_leader(p.tensor)).name
        records.setdefault(shard, {})[p.tensor.name] = entry_of(p.layer)
    metadata = {shard.name: shard.metadata for shard in shards.shards}
    return {shard: metadata[shard] | {RECORD: record_text(entries)} for shard, entries in records.items()}


def _leader(tensor: Tensor) -> str:
    """Return the stored tensor in whose place the pair goes."""
    return tensor.parts[0] if tensor.parts else tensor.name
