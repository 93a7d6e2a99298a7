"""Where the parameters of a model lie on a mesh, by the names of its leaves.

RULES says what each axis of a leaf counts; a layout says over which axis of the mesh such an axis is split:

    mesh = jax.make_mesh((2, 4), ("data", "model"))
    params = shard(params, mesh, TENSOR_PARALLEL | FSDP)

TENSOR_PARALLEL splits heads and hidden features: first kernels of a pair by columns, second ones by rows, so
that each device carries whole features between the two (Shoeybi et al. 2019, arXiv 1909.08053). FSDP splits
what is left, the features of the residual stream. EXPERT_PARALLEL gives each device experts of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from specdef_jax.errors import StructureError
from specdef_jax.parametrization import Deformed, is_structured
from specdef_jax.trees import map_named

Rules = Sequence[tuple[str, tuple[str | None, ...]]]
Layout = Mapping[str, str]

RULES: Rules = (
    (r"embed_tokens\.weight", ("vocab", "embed")),
    (r"lm_head\.weight", ("embed", "vocab")),
    (r"self_attn\.[qkv]_proj\.weight", ("embed", "heads")),
    (r"self_attn\.[qkv]_proj\.bias", ("heads",)),
    (r"self_attn\.o_proj\.weight", ("heads", "embed")),
    (r"self_attn\.sinks", ("heads",)),
    (r"mlp\.(gate|up)_proj\.weight", ("embed", "mlp")),
    (r"mlp\.(gate|up)_proj\.bias", ("mlp",)),
    (r"mlp\.down_proj\.weight", ("mlp", "embed")),
    (r"mlp\.router\.weight", ("embed", None)),
    (r"mlp\.experts\.gate_up_proj", ("expert", "embed", "mlp")),
    (r"mlp\.experts\.gate_up_proj_bias", ("expert", "mlp")),
    (r"mlp\.experts\.down_proj", ("expert", "mlp", "embed")),
    (r"mlp\.experts\.down_proj_bias", ("expert", "embed")),
)
TENSOR_PARALLEL = {"heads": "model", "mlp": "model", "vocab": "model"}
FSDP = {"embed": "data"}
EXPERT_PARALLEL = {"expert": "model", "heads": "model", "vocab": "model"}


def placement(
    mesh: Mesh, layout: Layout, rules: Rules = RULES
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Return place(name, shape) -> NamedSharding, which hub.load takes.

    A leaf that no rule names is on every device. An axis of the mesh splits one axis of a leaf, the first
    that asks for it. XLA partitions the network by itself, so every axis of the mesh is taken as automatic,
    also where jax.make_mesh has made it explicit.

    Raises:
      StructureError: (when called) an axis of the mesh does not divide the axis that it should split.
    """
    automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))

    def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(automatic, PartitionSpec(*_splits(name, shape, mesh, layout, rules)))

    return place


def shard(params: Mapping[str, Any], mesh: Mesh, layout: Layout, rules: Rules = RULES) -> Any:
    """Return parameters laid out on a mesh, stacked or not, deformed or not.

    Of a Deformed leaf the weight lies as the kernel would, and the compensation is split by the features it
    gives, as the weight splits them.

    Raises:
      StructureError: as `placement`.
    """
    place = placement(mesh, layout, rules)

    def put(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Deformed):
            return jax.device_put(leaf, place(name, leaf.shape))
        weight = jax.device_put(leaf.weight, place(name, leaf.weight.shape))
        return replace(leaf, weight=weight, comp=jax.device_put(leaf.comp, beside(weight.sharding, leaf)))

    return map_named(put, params, is_leaf=is_structured)


def beside(kernel: NamedSharding, leaf: Deformed) -> NamedSharding:
    """Return where the compensation of a kernel lies, (*stack, d, d), given where the kernel does."""
    spec = [*kernel.spec, *[None] * (leaf.weight.ndim - len(kernel.spec))]
    (feature,) = leaf.axes.features(leaf.side)
    stack = [spec[i] for i in leaf.axes.stack]
    return NamedSharding(kernel.mesh, PartitionSpec(*stack, None, spec[feature]))


def _splits(name: str, shape: tuple[int, ...], mesh: Mesh, layout: Layout, rules: Rules) -> list[str | None]:
    """Return for each axis of a leaf the axis of the mesh that splits it."""
    counts = next((c for pattern, c in rules if re.search(rf"(?:^|\.){pattern}$", name)), None)
    if counts is None:
        return [None] * len(shape)
    if len(shape) not in (len(counts), len(counts) + 1):
        raise StructureError(f"'{name}' has shape {shape}, the rule for it {counts}; give rules that fit.")
    found: list[str | None] = [None] * (len(shape) - len(counts))  # of stacked layers
    for count, size in zip(counts, shape[len(found) :], strict=True):
        axis = None if count is None else layout.get(count)
        axis = None if axis in found else axis
        if axis is not None and size % mesh.shape[axis]:
            raise StructureError(
                f"'{name}' has shape {shape}: its {size} {count} cannot be split over the {mesh.shape[axis]} "
                f"devices of '{axis}'; use another mesh, or a layout without '{count}'."
            )
        found.append(axis)
    return found
