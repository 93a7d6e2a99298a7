"""Which axes of a kernel are inputs, outputs, window or stack."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from specdef_jax import select
from specdef_jax.errors import SpecError
from specdef_jax.parametrization import KernelAxes

AxesLike = KernelAxes | tuple[Sequence[int], Sequence[int]]


def axes_of(
    name: str,
    shape: tuple[int, ...],
    axes: AxesLike | Mapping[str, AxesLike] | None,
    stacked: bool,
) -> KernelAxes:
    """Decide which axes of a kernel are inputs, outputs, window and stack.

    Rank 2 is (in, out) and rank 4 is HWIO; rank 3 is (experts, in, out) under a name that says so. Any other
    rank needs `axes`, or `stacked` for a leading axis over layers.

    Raises:
      SpecError: the shape is ambiguous, or the axes given do not fit it.
    """
    given = _axes_for(name, axes) if isinstance(axes, Mapping) else axes
    rank = len(shape)
    if given is not None:
        found = given if isinstance(given, KernelAxes) else _from_pair(name, given, rank)
        if len(found.stack + found.window + found.inputs + found.outputs) != rank:
            raise SpecError(f"'{name}' has shape {shape}, but axes {found} name another number of axes.")
        return found
    stack = (0,) if stacked or is_experts(name, rank) else ()
    plain = rank - len(stack)
    first = len(stack)
    if plain == 2:
        return KernelAxes((first,), (first + 1,), stack=stack)
    if plain == 4:
        window = (first, first + 1)
        return KernelAxes((first + 2,), (first + 3,), window, stack)
    raise SpecError(
        f"'{name}' has shape {shape}, which is ambiguous: (layers, in, out), (in, heads, dim), ...? "
        "Pass axes=((input axes), (output axes)), or stacked=True for a leading axis over layers."
    )


def is_experts(name: str, rank: int) -> bool:
    """Tell whether a tensor is (experts, in, out), a stack of kernels, as mixtures of experts store them."""
    return rank == 3 and re.search(r"\bexperts\b", name) is not None


def _axes_for(name: str, axes: Mapping[str, AxesLike]) -> AxesLike | None:
    fake = [select.Candidate(name, (1, 1), jnp.dtype(jnp.float32))]
    for glob, value in axes.items():
        if select.match(glob).choose(fake, jax.random.key(0)):
            return value
    return None


def _from_pair(name: str, pair: tuple[Sequence[int], Sequence[int]], rank: int) -> KernelAxes:
    try:
        inputs, outputs = (tuple(range(rank)[i] for i in part) for part in pair)
    except (TypeError, ValueError, IndexError) as error:
        raise SpecError(
            f"axes {pair!r} of '{name}': give a pair (input axes, output axes) of integers from -{rank} "
            f"to {rank - 1}."
        ) from error
    return KernelAxes(inputs, outputs, stack=tuple(i for i in range(rank) if i not in inputs + outputs))
