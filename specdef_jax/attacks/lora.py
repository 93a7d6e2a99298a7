"""LoRA: freeze the released network and train low-rank adapters beside its matrices (THEORY.md 5.5).

An adapter adds scale / rank * A B to a matrix (rest, out) in the layout of kernels, A (rest, rank) Gaussian
of variance 1 / rest, B (rank, out) zero. Beside the composite of a pair it is LoRA on the original network:
nothing of the factors is read. Beside each factor, as a tool would that takes them for two layers, it is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.attacks.adapters import PLAIN, Place, Read, start
from specdef_jax.attacks.bill import Attack, Knowledge, carry_out
from specdef_jax.attacks.released import through
from specdef_jax.errors import SelectionError, SpecError
from specdef_jax.parametrization import Deformed, Problem, is_structured
from specdef_jax.select import Candidate, matches

_BIASES = ("b", "bias")  # stacked over layers or experts, they have the rank of a matrix


def lora(
    loss: Callable[..., Array],
    deformed: PyTree,
    *args: Any,
    rank: int = 4,
    on: Place = "composite",
    **settings: Any,
) -> Attack:
    """Return the attack that trains adapters alone; params are {target: adapter}.

    Args:
      loss: loss(params, *args) of the plain network.
      deformed: the released tree, deformed or not.
      args: data of one step, for the bill.
      rank: as in `adapted`.
      on: as in `adapted`.
      settings: the other keywords of `adapted`, whose errors are raised.
    """
    convert = functools.partial(adapted, loss, deformed, rank=rank, on=on, **settings)
    rung = Knowledge.WHICH_LAYERS if on == "composite" else Knowledge.WEIGHTS
    return carry_out(f"lora on the {on}, rank {rank}", convert, loss, deformed, *args, knowledge=rung)


def adapted(
    loss: Callable[..., Array],
    deformed: PyTree,
    *,
    rank: int = 4,
    scale: float = 8.0,
    targets: Sequence[str] = (),
    on: Place = "composite",
    key: PRNGKeyArray | None = None,
) -> Problem:
    """Return the problem that `lora` trains, without the bill, for which a step would be compiled.

    Args:
      loss: loss(params, *args) of the plain network.
      deformed: the released tree, deformed or not.
      rank: of each adapter.
      scale: the adapters' product is multiplied by scale / rank.
      targets: globs of the matrices to adapt, in the grammar of sd.select.match; none takes every matrix.
      on: where the adapter of a pair stands: beside the "composite", or one beside each of its "factors".
        Of an undeformed matrix, or of two adjacent ones that were deformed in their places, it is the same.
      key: of the Gaussian factors; fixed by default.

    Raises:
      SelectionError: a glob matches no matrix.
      SpecError: rank < 1, or the scale is not positive.
    """
    if rank < 1 or not scale > 0:
        raise SpecError(f"rank = {rank}, scale = {scale}: both must be positive.")
    read, chosen = Read(scale / rank, on), _chosen(deformed, tuple(targets))
    keys = jax.random.split(jax.random.key(0) if key is None else key, len(chosen))
    adapters = {n: start(leaf, rank, read.on, k) for (n, leaf), k in zip(chosen.items(), keys, strict=True)}
    return through(loss, adapters, Partial(read, deformed))


def _chosen(deformed: PyTree, targets: tuple[str, ...]) -> dict[str, Any]:
    """Return the matrices that the globs match; each glob must match one."""
    matrices = {n: x for n, x in trees.named_leaves(deformed, is_leaf=is_structured) if _is_matrix(n, x)}
    for glob in targets or ("**",):
        if not any(matches(glob, name) for name in matrices):
            raise SelectionError(
                f"target {glob!r} matches no matrix; the matrices are {', '.join(map(repr, matrices))}."
            )
    return {n: x for n, x in matrices.items() if any(matches(glob, n) for glob in targets or ("**",))}


def _is_matrix(name: str, leaf: Any) -> bool:
    if is_structured(leaf):
        return isinstance(leaf, Deformed)
    if jnp.ndim(leaf) not in PLAIN or name.rpartition("/")[2] in _BIASES:
        return False
    return Candidate(name, jnp.shape(leaf), leaf.dtype).is_matrix
