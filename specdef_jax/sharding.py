"""Where arrays lie: reading a sharding, and asking for it again inside a compiled program.

Under automatic axes a new array gets its sharding by a constraint, under explicit axes, where shardings are
part of the type, by resharding.
"""

from __future__ import annotations

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


def sharding_of(leaf: object) -> NamedSharding | None:
    """Return the sharding of an array or shape struct over several devices; None for one, or if unknown.

    Inside jit only explicit axes are known.
    """
    if isinstance(leaf, Tracer):
        sharding = jax.typeof(leaf).sharding
        known = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
        return sharding if known and len(sharding.mesh.shape) else None
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and sharding.num_devices > 1 else None


def leading(sharding: NamedSharding | None) -> NamedSharding | None:
    """Return the sharding of an array with one more axis in front, which is not split."""
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def placed(x: Array, sharding: NamedSharding | None) -> Array:
    """Return x with this sharding, inside jit or out; as it is for None."""
    if sharding is None:
        return x
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(x, sharding)
    if isinstance(x, Tracer):
        return jax.lax.with_sharding_constraint(x, sharding)
    return jax.device_put(x, sharding)
