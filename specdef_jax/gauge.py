"""Gauge placement: deform two linear maps that are adjacent already, and add nothing (THEORY.md 0).

Where a network computes h -> (mix(h K1 + b1)) K2 with nothing but linear maps over other axes between (the
value and output projections of attention), T(a) goes into the first and T(1/a) into the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from specdef_jax.errors import StructureError
from specdef_jax.pair import build_pair
from specdef_jax.parametrization import full_precision_matmul as matmul
from specdef_jax.spec import Layer, SpecDef
from specdef_jax.specdef import plan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GaugePair:
    """Two deformed kernels in the shapes and dtypes of the originals.

    Attributes:
      first: (in, groups * d), the kernel that carries T(a).
      second: (heads * d, out), the kernel that carries T(1/a).
      bias: (groups * d,), the bias of the first map under T(a); None if there is none.
      layer: directions U (groups, d, k), alpha and singular values.
    """

    first: Float[Array, "n gd"]
    second: Float[Array, "hd m"]
    bias: Float[Array, " gd"] | None
    layer: Layer


def deform_pair(
    first: Float[Array, "..."],  # shapes are checked below, by errors that say what to do
    second: Float[Array, "..."],
    spec: SpecDef,
    *,
    key: PRNGKeyArray,
    bias: Float[Array, "..."] | None = None,
    groups: int = 1,
) -> GaugePair:
    """Deform two adjacent kernels so that their composition stays the same.

    Args:
      first: (in, groups * d).
      second: (heads * d, out) with heads a multiple of groups: with grouped queries, head i reads group
        i // (heads / groups).
      spec: how to deform; directions are those of `first`, side is ignored.
      key: for randomized subspaces.
      bias: (groups * d,), of the first map.
      groups: independent blocks of features (key-value heads), each with its own directions.

    Raises:
      StructureError: the shapes do not fit together.
      LeafError, SpecError, BudgetError: as `plan` on the first kernel.

    Example:
      >>> pair = deform_pair(jnp.eye(2), jnp.ones((2, 3)), SpecDef(alpha=4.0), key=jax.random.key(0))
      >>> bool(jnp.allclose(pair.first @ pair.second, jnp.ones((2, 3))))
      True
    """
    d = _check(first, second, bias, groups)
    stacked = jnp.moveaxis(first.reshape(len(first), groups, d), 1, 0)
    layer = plan({"first": stacked}, _output_side(spec), where="first", key=key, stacked=True)["first"]
    with jax.enable_x64(True):
        rows = stacked if bias is None else jnp.concatenate([stacked, bias.reshape(groups, 1, d)], axis=1)
        weight, comp = jax.vmap(build_pair, in_axes=(0, 0, None, None, None))(
            rows, layer.U, layer.alpha, layer.basis, "output"
        )
        blocks = second.reshape(groups, -1, d, second.shape[1]).astype(jnp.float64)
        compensated = matmul(comp[:, None], blocks).reshape(second.shape)
        joined = jnp.moveaxis(weight, 0, 1).reshape(rows.shape[1], groups * d)
        return GaugePair(
            joined[: len(first)].astype(first.dtype),
            compensated.astype(second.dtype),
            None if bias is None else joined[-1].astype(bias.dtype),
            layer,
        )


def _output_side(spec: SpecDef) -> SpecDef:
    return SpecDef(spec.alpha, spec.k, spec.basis, "output", spec.directions, spec.tol, spec.budget)


def _check(first: Array, second: Array, bias: Array | None, groups: int) -> int:
    """Return the features of one group, or say what does not fit."""
    if first.ndim != 2 or second.ndim != 2:
        raise StructureError(
            f"deform_pair takes two matrices, found shapes {first.shape} and {second.shape}."
        )
    features = first.shape[1]
    if groups < 1 or features % groups:
        raise StructureError(f"{features} features cannot be split into {groups} groups; check `groups`.")
    if second.shape[0] % features:
        raise StructureError(
            f"the first kernel gives {features} features, the second reads {second.shape[0]}: must be a "
            "multiple, one block for each head. Are both (in, out)?"
        )
    if bias is not None and bias.shape != (features,):
        raise StructureError(f"the bias has shape {bias.shape}, the first kernel {features} features.")
    return features // groups


def balance(
    first: Float[Array, "n d"], second: Float[Array, "d m"]
) -> tuple[Float[Array, "n d"], Float[Array, "d m"]]:
    """Return two maps of the same composition with equal Gram matrices on the features between them.

    X^T X = Y Y^T, which no gauge deformation has and every one is undone to: among all X Y = first second
    the balanced ones have the smallest ||X||^2 + ||Y||^2, the nuclear norm twice. They are one up to
    orthogonal changes of the features, of which the one nearest to `first` is taken. float64.

    Source: X = Q1 P S^(1/2), Y = S^(1/2) P'^T Q2^T from the decompositions of both maps and of R1 R2^T.
    """
    with jax.enable_x64(True):
        first, second = first.astype(jnp.float64), second.astype(jnp.float64)
        d = first.shape[1]
        Q1, R1 = jnp.linalg.qr(first)
        Q2, R2 = jnp.linalg.qr(second.T)
        P, S, Pt = jnp.linalg.svd(matmul(R1, R2.T), full_matrices=False)
        root = jnp.sqrt(S)
        X = matmul(Q1, P * root)
        Y = matmul(root[:, None] * Pt, Q2.T)
        X, Y = jnp.pad(X, ((0, 0), (0, d - len(S)))), jnp.pad(Y, ((0, d - len(S)), (0, 0)))
        left, _, right = jnp.linalg.svd(matmul(X.T, first))
        turn = matmul(left, right)
        return matmul(X, turn), matmul(turn.T, Y)
