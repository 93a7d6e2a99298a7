"""What a file must say about its deformed weights beside their arrays, as strict JSON.

{"format": 1, "tensors": {NAME: {"side": "output", "axes": {"inputs": [1], "outputs": [0],
"window": [], "stack": []}, "basis": "symmetric", "alpha": 8192.0, "k": 1}}}

NAME is the deformed weight, in the layout of the original, and NAME + ".comp" (Orbax: NAME/weight
and NAME/comp) the compensation, always in the layout of JAX: with `axes` bringing the weight to
(inputs, outputs), the plain kernel is weight @ comp on the output side, comp @ weight on the input
side (THEORY.md 0). `basis`, `alpha` and `k` are for the reader; nothing is computed from them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from specdef_jax.errors import FileError, SpecError
from specdef_jax.parametrization import Deformed, KernelAxes, Side, is_structured
from specdef_jax.spec import Layer, Plan
from specdef_jax.trees import named_leaves

log = logging.getLogger(__name__)

FORMAT = 1
_DETAILS = ("basis", "alpha", "k")


@dataclass(frozen=True)
class Checkpoint:
    """What a file or directory holds.

    Attributes:
      params: the tree, deformed kernels as Deformed leaves.
      metadata: what its author wrote beside the tensors, without the record of this package.
      details: per deformed kernel, what is recorded about it: "basis", "alpha", "k" where known.
    """

    params: PyTree
    metadata: dict[str, Any] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)


def details_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return what a Plan knows about each kernel and a file should record."""
    return {name: _details(layer) for name, layer in plan.items()}


def entry_of(layer: Layer) -> dict[str, Any]:
    """Return the record of one kernel, as load_entry gives it."""
    return {"side": layer.side, "axes": layer.axes, **_details(layer)}


def _details(layer: Layer) -> dict[str, Any]:
    return {"basis": layer.basis, "alpha": float(layer.alpha), "k": int(layer.U.shape[-1])}


def dump_record(params: PyTree, details: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the record of a tree, or None if nothing in it is deformed.

    Raises:
      FileError: the tree holds a structured weight that is no Deformed, which no file can say.
    """
    tensors = {}
    for name, leaf in named_leaves(params, is_leaf=is_structured):
        if isinstance(leaf, Deformed):
            tensors[name] = {"side": leaf.side, "axes": leaf.axes, **details.get(name, {})}
        elif is_structured(leaf):
            raise FileError(f"'{name}' is a {type(leaf).__name__}, which no file can hold; merge it first.")
    return record_text(tensors) if tensors else None


def record_text(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the record of some kernels."""
    tensors = {name: {**entry, "axes": asdict(entry["axes"])} for name, entry in entries.items()}
    return json.dumps({"format": FORMAT, "tensors": tensors}, allow_nan=False)


def load_record(text: str, source: str) -> dict[str, dict[str, Any]]:
    """Read and check a record: per kernel its "side", "axes" (KernelAxes) and details.

    Raises:
      FileError: the record is no JSON, of another format, or makes no sense; the message names
        `source`.
    """
    try:
        record = json.loads(text)
        version = record["format"]
        if version != FORMAT:
            raise FileError(
                f"{source}: the specdef record has format {version!r}, this version reads {FORMAT}; "
                "use the version of specdef_jax that wrote it."
            )
        return {name: load_entry(entry) for name, entry in record["tensors"].items()}
    except FileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SpecError) as error:
        raise FileError(
            f"{source}: the specdef record is damaged ({type(error).__name__}: {error}); "
            "get the file again, or deform the original again."
        ) from error


def to_deformed(name: str, weight: Any, comp: Any, entry: Mapping[str, Any], source: str) -> Deformed:
    """Pair two stored arrays by the record's entry for them.

    Raises:
      FileError: their shapes or dtypes do not fit the entry; the message names `source`.
    """
    axes, side = entry["axes"], entry["side"]
    fits = all(
        isinstance(array, np.ndarray) and jnp.issubdtype(array.dtype, jnp.floating)
        for array in (weight, comp)
    )
    rank = len(axes.stack + axes.window + axes.inputs + axes.outputs)
    if fits and weight.ndim == rank:
        d, stack = axes.dim(weight.shape, side), tuple(weight.shape[i] for i in axes.stack)
        if comp.shape == (*stack, d, d):
            with jax.enable_x64(True):  # so that a float64 leaf stays float64
                return Deformed(jnp.asarray(weight), jnp.asarray(comp), side, axes)
    raise FileError(
        f"{source}: '{name}' {_describe(weight)} and its compensation {_describe(comp)} do not fit the "
        f"record (side {side!r}, {axes}); get the file again, or deform the original again."
    )


def warn_unrecorded(names: list[str], source: str) -> None:
    """Say that compensations were found of which no record tells how they apply."""
    if names:
        log.warning(
            "%s: %s look like compensations of deformed weights, but there is no record of them "
            "(was the metadata stripped?); they are read as plain tensors.",
            source,
            ", ".join(names[:3]) + (", ..." if len(names) > 3 else ""),
        )


def load_entry(entry: Any) -> dict[str, Any]:
    """Read and check the record of one kernel; what is wrong is a ValueError, TypeError or the like."""
    if entry["side"] not in get_args(Side):
        raise ValueError(f"side {entry['side']!r}")
    axes = {name: tuple(entry["axes"][name]) for name in ("inputs", "outputs", "window", "stack")}
    if not all(type(i) is int for part in axes.values() for i in part):
        raise TypeError(f"axes {entry['axes']!r}")
    details = {name: entry[name] for name in _DETAILS if name in entry}
    return {"side": entry["side"], "axes": KernelAxes(**axes), **details}


def details_in(record: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the details of a record, as Checkpoint holds them."""
    return {name: {key: entry[key] for key in _DETAILS if key in entry} for name, entry in record.items()}


def _describe(array: Any) -> str:
    return f"{getattr(array, 'dtype', type(array).__name__)}{tuple(np.shape(array))}"
