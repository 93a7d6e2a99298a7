"""Placement "gauge": value and output projections deformed in place, in a checkpoint that stays stock."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from specdef_jax import select
from specdef_jax.choice import check_dtype
from specdef_jax.errors import BudgetError, SelectionError
from specdef_jax.gauge import GaugePair, deform_pair
from specdef_jax.hub.attention import AttentionPair, find_pairs, pair_at
from specdef_jax.hub.insertion import MEASURING
from specdef_jax.hub.manifest import StoredLayer
from specdef_jax.hub.measuring import is_exact_gauge, measure_gauge
from specdef_jax.hub.placing import Placed, leading, statuses
from specdef_jax.hub.planning import meets
from specdef_jax.hub.rewrite import Group
from specdef_jax.hub.shards import Shards
from specdef_jax.hub.working import Step, in_order
from specdef_jax.parametrization import KernelAxes
from specdef_jax.precision import as_format
from specdef_jax.preservation import LayerPreservation
from specdef_jax.spec import SpecDef


@dataclass(frozen=True)
class _Planned:
    pair: AttentionPair
    status: str


def place(
    shards: Shards,
    selector: select.Selector | None,
    spec: SpecDef,
    choose_key: PRNGKeyArray,
    key: PRNGKeyArray,
    *,
    workers: int,
    tell: Step,
) -> Placed:
    """Plan the deformation of attentions in place.

    Raises:
      SelectionError: no attention with value and output projections, or none selected.
      StructureError, LeafError, BudgetError: as pair_at and deform_pair.
    """
    chosen = _choose(shards, selector, choose_key)
    pairs = [pair_at(shards, first) for first in chosen]
    for pair in pairs:
        for name in pair.names:
            check_dtype(name, shards.info(name).dtype)
    keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(chosen)}
    planned = in_order(
        lambda pair: _plan(shards, pair, spec, keys[pair.first]),
        pairs,
        lambda pair: _entries(shards, pair),
        workers=workers,
        told=lambda done: tell("choosing directions", done, len(pairs)),
    )

    def measure(written: Shards, workers: int, tell: Step) -> dict[str, StoredLayer]:
        found = in_order(
            lambda p: _measured(shards, written, p, spec, keys[p.pair.first]),
            planned,
            lambda p: _entries(shards, p.pair),
            workers=workers,
            told=lambda done: tell("measuring", done, len(planned)),
        )
        return {p.pair.first: layer for p, layer in zip(planned, found, strict=True)}

    groups = [_group(shards, p, spec, keys[p.pair.first]) for p in planned]
    return Placed(tuple(chosen), groups, {}, {}, measure)


def matrices_of(shards: Shards, pair: AttentionPair) -> tuple[np.ndarray, np.ndarray]:
    """Return (in, groups * d), the bias a last row, and (heads * d, out)."""
    return _joined(*_read(shards, pair))


def _read(shards: Shards, pair: AttentionPair) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return both kernels as (in, out), and the bias."""
    bias = None if pair.bias is None else shards.read(pair.bias)
    return shards.read(pair.first).T, shards.read(pair.second).T, bias


def _joined(first: Any, second: Any, bias: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first), np.asarray(second)
    if bias is not None:
        first = np.concatenate([first, np.asarray(bias).astype(first.dtype)[None]])
    return first, second


def measure_pair(
    plain: tuple[np.ndarray, np.ndarray],
    stored: tuple[np.ndarray, np.ndarray],
    pair: AttentionPair,
    key: PRNGKeyArray,
) -> tuple[LayerPreservation, bool]:
    """Return the error of a stored pair in its own dtype, and whether it is the original up to exponents."""
    form = as_format(stored[0].dtype)
    probes = jax.random.fold_in(key, MEASURING)
    measured = measure_gauge(pair.first, plain, stored, pair.groups, form, probes)
    return measured, is_exact_gauge(plain, stored, pair.groups)


def _choose(shards: Shards, selector: select.Selector | None, key: PRNGKeyArray) -> list[str]:
    pairs = find_pairs(shards)
    if not pairs:
        raise SelectionError(
            f"{shards.path} has no attention with separate value and output projections (v_proj and o_proj, "
            "to_v and to_out.0); use placement insert."
        )
    if selector is None:
        return list(pairs)
    names = [name for first, (second, _) in pairs.items() for name in (first, second)]
    candidates = [select.Candidate(n, shards.info(n).shape, np.dtype(np.float32)) for n in names]
    chosen = {candidate.name for candidate in selector.choose(candidates, key)}
    found = [first for first, (second, _) in pairs.items() if first in chosen or second in chosen]
    if not found:
        raise SelectionError(
            f"{selector.description} matched no value or output projection, which is what gauge deforms; "
            f"there are {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}."
        )
    return found


def _plan(shards: Shards, pair: AttentionPair, spec: SpecDef, key: PRNGKeyArray) -> _Planned:
    """Find the directions of each group, and refuse what the dtype cannot carry."""
    tensors = _read(shards, pair)
    made = _deform(*tensors, pair, spec, key)
    plain, stored = _joined(*tensors), _joined(made.first, made.second, made.bias)
    measured, exact = measure_pair(plain, stored, pair, key)
    if not meets(measured, exact, spec.budget):
        raise BudgetError(
            f"'{pair.first}' and '{pair.second}' would be off by {measured.error:.2g} in {plain[0].dtype}, "
            f"beyond the budget of {spec.budget:g}. A stock checkpoint keeps its dtype: use the axis basis "
            "with a power of two, which is exact, a smaller alpha, a larger budget, or placement insert."
        )
    return _Planned(pair, statuses(made.layer))


def _deform(
    first: np.ndarray,
    second: np.ndarray,
    bias: np.ndarray | None,
    pair: AttentionPair,
    spec: SpecDef,
    key: PRNGKeyArray,
) -> GaugePair:
    kernels = jnp.asarray(first), jnp.asarray(second)
    added = None if bias is None else jnp.asarray(bias)
    unlimited = replace(spec, budget=float("inf"))
    return deform_pair(*kernels, unlimited, key=key, bias=added, groups=pair.groups)


def _group(shards: Shards, p: _Planned, spec: SpecDef, key: PRNGKeyArray) -> Group:
    def make() -> dict[str, np.ndarray]:
        with jax.enable_x64(True):
            made = _deform(*_read(shards, p.pair), p.pair, spec, key)
        arrays = [np.asarray(made.first).T, np.asarray(made.second).T]
        if made.bias is not None:
            arrays.append(np.asarray(made.bias))
        return dict(zip(p.pair.names, arrays, strict=True))

    return Group({n: (shards.info(n).dtype, shards.info(n).shape) for n in p.pair.names}, {}, make)


def _measured(shards: Shards, written: Shards, p: _Planned, spec: SpecDef, key: PRNGKeyArray) -> StoredLayer:
    plain, stored = matrices_of(shards, p.pair), matrices_of(written, p.pair)
    measured, exact = measure_pair(plain, stored, p.pair, key)
    before, after = (leading_of_groups(s, p.pair, spec.k, key) for s in (shards, written))
    return StoredLayer(
        entry={
            "second": p.pair.second,
            "bias": p.pair.bias,
            "groups": p.pair.groups,
            "basis": spec.basis,
            "alpha": float(spec.alpha),
            "k": int(spec.k),
        },
        source_dtype=str(plain[0].dtype),
        dtype=str(stored[0].dtype),
        sigma_before=before,
        sigma_after=after,
        exact=exact,
        measured=measured,
        status=p.status,
    )


def leading_of_groups(shards: Shards, pair: AttentionPair, k: int, key: PRNGKeyArray) -> list[float]:
    """Return the k leading singular values of the value projection of the largest group."""
    weight = shards.read(pair.first)
    stacked = weight.reshape(pair.groups, -1, weight.shape[1])
    return leading(stacked, KernelAxes(inputs=(2,), outputs=(1,), stack=(0,)), k, key)


def _entries(shards: Shards, pair: AttentionPair) -> int:
    return sum(int(np.prod(shards.info(n).shape)) for n in (pair.first, pair.second))
