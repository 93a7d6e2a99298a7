"""SpecDef: deform the spectrum of linear maps without changing the function (THEORY.md 0).

`plan` looks at the weights and decides the subspaces (iterative, on the host); `apply_plan` is a
pure function of parameters and plan, so it runs under jit, vmap over alpha and any sharding;
`deform` is both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from specdef_jax import select, subspace, trees
from specdef_jax.errors import LeafError, SelectionError, SpecError, StructureError
from specdef_jax.layout import AxesLike, axes_of
from specdef_jax.pair import Basis, build_pair
from specdef_jax.parametrization import Deformed, KernelAxes, Side, is_structured
from specdef_jax.precision import FORMATS, check_budget

Directions = Literal["top", "bottom", "random"] | Array | np.ndarray


@dataclass(frozen=True, eq=False)
class SpecDef:
    """How to deform one linear map.

    Attributes:
      alpha: factor on the chosen singular directions, > 0; powers of two are exact in the axis basis.
      k: number of directions, 1 <= k <= min(m, n).
      basis: "symmetric" T(a) as in the paper, "rotated" (diagonal after an orthogonal change of
        basis), or "axis" (directions among the columns of the identity).
      side: which side the compensation stands on; "auto" takes the side with fewer features.
      directions: "top" or "bottom" singular directions, "random", or an array (features, k).
      tol: residual asked of the subspace; missing it is a status, not an error.
      budget: largest relative error of the layer in its storage dtype that is accepted
        (THEORY.md 1.2 rule of thumb); math.inf accepts any.

    Raises:
      SpecError: a field has no meaning.
    """

    alpha: float = 2.0**13
    k: int = 1
    basis: Basis = "symmetric"
    side: Literal["auto", "output", "input"] = "auto"
    directions: Directions = "top"
    tol: float = 1e-2
    budget: float = 0.1

    def __post_init__(self) -> None:
        _positive("alpha", self.alpha)
        _positive("tol", self.tol)
        if not isinstance(self.budget, Real) or not self.budget > 0:
            raise SpecError(f"budget = {self.budget}: must be positive (math.inf accepts any error).")
        if isinstance(self.k, bool) or not isinstance(self.k, int | np.integer) or self.k < 1:
            raise SpecError(f"k = {self.k!r}: the number of directions must be an integer >= 1.")
        _one_of("basis", self.basis, get_args(Basis))
        _one_of("side", self.side, ("auto", "output", "input"))
        if isinstance(self.directions, str):
            _one_of("directions", self.directions, ("top", "bottom", "random"))
        elif not isinstance(self.directions, jax.Array | np.ndarray):
            raise SpecError(
                f"directions has type {type(self.directions).__name__}: "
                "give 'top', 'bottom', 'random' or an array (features, k)."
            )
        elif self.basis == "axis":
            raise SpecError("basis 'axis' chooses columns of the identity; it takes no directions array.")

    @classmethod
    def paper(cls) -> SpecDef:
        """Return the setting reported for the paper: alpha 1e4, k 25, top singular directions."""
        return cls(alpha=1e4, k=25)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    """The decision for one kernel; arrays are data, the rest static.

    Attributes:
      U: orthonormal directions (*stack, d, k), d the features of `side`.
      alpha: the factor, a scalar.
      singular_values: ||W restricted to each direction|| (*stack, k), before deformation.
      residual: relative residual of the subspace (*stack), see specdef_jax.subspace.
      status: specdef_jax.subspace.Status (*stack).
      side, basis, axes: static.
    """

    U: Float[Array, "*stack d k"]
    alpha: Float[Array, ""]
    singular_values: Float[Array, "*stack k"]
    residual: Float[Array, "*stack"]
    status: Int[Array, "*stack"]
    side: Side = field(metadata={"static": True})
    basis: Basis = field(metadata={"static": True})
    axes: KernelAxes = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Path -> Layer for every kernel to deform: a pytree."""

    layers: dict[str, Layer]

    def __getitem__(self, path: str) -> Layer:
        """Return the layer planned at a path."""
        return self.layers[path]

    def __iter__(self) -> Iterator[str]:
        """Iterate over paths."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of planned layers."""
        return len(self.layers)

    def items(self) -> Iterator[tuple[str, Layer]]:
        """Iterate over (path, layer)."""
        return iter(self.layers.items())

    def with_alpha(self, alpha: float | Float[Array, ""]) -> Plan:
        """Return the same plan at another alpha (a traced scalar under vmap is fine), any budget accepted.

        Raises:
          SpecError: alpha is known, and not positive and finite.
        """
        if not isinstance(alpha, Tracer):
            _positive("alpha", float(alpha))
        return Plan(
            {
                path: replace(layer, alpha=jnp.asarray(alpha, layer.alpha.dtype))
                for path, layer in self.items()
            }
        )


def plan(
    params: PyTree,
    spec: SpecDef,
    *,
    where: select.Selector | str | Sequence[str] | None = None,
    key: PRNGKeyArray,
    axes: AxesLike | Mapping[str, AxesLike] | None = None,
    stacked: bool = False,
) -> Plan:
    """Choose the layers and their directions.

    Args:
      params: tree of arrays (raw dict, Linen params, NNX state, ...).
      spec: how to deform.
      where: selector, glob or globs; None selects every matrix that is not an embedding.
      key: for randomized subspaces and selectors.
      axes: (input axes, output axes) of the selected kernels, or a mapping from glob to that; axes
        not named are stacked layers. Needed for DenseGeneral kernels.
      stacked: the first axis of each selected kernel runs over layers (nn.scan).

    Returns:
      A Plan: path -> Layer.

    Raises:
      SelectionError: nothing selected, or only leaves that are no matrices.
      LeafError: a selected leaf cannot be deformed (dtype, rank, values, already deformed).
      SpecError: k or directions do not fit a selected kernel.
      BudgetError: alpha costs more than spec.budget in the leaf's dtype, or overflows it.
    """
    select_key, subspace_key = jax.random.split(key)
    selector = select.as_selector(where)
    leaves = dict(trees.named_leaves(params, is_leaf=is_structured))
    chosen = _chosen(leaves, selector, select_key)
    layers = {}
    for index, name in enumerate(chosen):
        kernel = leaves[name]
        kernel_axes = axes_of(name, kernel.shape, axes, stacked)
        leaf_key = jax.random.fold_in(subspace_key, index)
        layers[name] = _plan_leaf(name, kernel, kernel_axes, spec, leaf_key)
    return Plan(layers)


def apply_plan(params: PyTree, plan: Plan) -> PyTree:
    """Replace every planned kernel by its Deformed pair.

    Pure: works under jit, vmap (for instance over plan.with_alpha) and any sharding, which the
    weights keep (under the caller's jit, its out_shardings decide). The pair is built in float64 and
    rounded once to the kernel's dtype.

    Raises:
      StructureError: the plan names a leaf that `params` does not have, or with other features.
      LeafError: a planned leaf is deformed already, or of a dtype that cannot be deformed.
    """
    missing = set(plan.layers)

    def visit(name: str, leaf: Any) -> Any:
        if name not in plan.layers:
            return leaf
        missing.discard(name)
        if is_structured(leaf):
            raise LeafError(f"'{name}' is deformed already; merge it first (sd.merge).")
        return _deform_leaf(name, leaf, plan[name])

    deformed = trees.map_named(visit, params, is_leaf=is_structured)
    if missing:
        raise StructureError(
            f"the plan names {sorted(missing)}, which the parameters lack; plan on the same tree."
        )
    return deformed


def deform(
    params: PyTree,
    spec: SpecDef,
    *,
    where: select.Selector | str | Sequence[str] | None = None,
    key: PRNGKeyArray,
    axes: AxesLike | Mapping[str, AxesLike] | None = None,
    stacked: bool = False,
) -> PyTree:
    """Plan and apply: return the deformed tree, which computes the same function.

    Arguments and errors are those of `plan`.

    Example:
      >>> params = {"w": jnp.eye(3)}
      >>> deformed = deform(params, SpecDef(alpha=4.0), where="w", key=jax.random.key(0))
    """
    return apply_plan(params, plan(params, spec, where=where, key=key, axes=axes, stacked=stacked))


def _chosen(leaves: dict[str, Any], selector: select.Selector, key: PRNGKeyArray) -> list[str]:
    """Resolve the selector to names of matrices; say why when there is none."""
    candidates = [_candidate(name, leaf) for name, leaf in leaves.items()]
    chosen = selector.choose(candidates, key)
    if not chosen:
        names = ", ".join(repr(c.name) for c in candidates if c.is_matrix) or "none"
        raise SelectionError(f"{selector.description} matched nothing. Matrices in this tree: {names}.")
    for candidate in chosen:
        if is_structured(leaves[candidate.name]):
            raise LeafError(f"'{candidate.name}' is deformed already; merge it first (sd.merge).")
        if len(candidate.shape) >= 2:
            _check_dtype(candidate.name, candidate.dtype)
    matrices = [c.name for c in chosen if c.is_matrix]
    if not matrices:
        refused = ", ".join(f"'{c.name}' {c.shape}" for c in chosen[:5])
        raise SelectionError(
            f"{selector.description} matched only leaves that are no kernels (vectors, embeddings): "
            f"{refused}. Select a leaf of rank two or more that multiplies its input."
        )
    return matrices


def _check_dtype(name: str, dtype: Any) -> None:
    if str(dtype) not in FORMATS:
        raise LeafError(
            f"'{name}' has dtype {dtype}: integer, quantized and complex tensors cannot be deformed; "
            "dequantize it to float16, bfloat16, float32 or float64 first."
        )


def _candidate(name: str, leaf: Any) -> select.Candidate:
    array = leaf.weight if isinstance(leaf, Deformed) else leaf
    dtype = array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype
    return select.Candidate(name, tuple(np.shape(array)), dtype)


def _plan_leaf(name: str, kernel: Any, axes: KernelAxes, spec: SpecDef, key: PRNGKeyArray) -> Layer:
    shape = tuple(kernel.shape)
    if not math.prod(shape):
        raise LeafError(f"'{name}' has shape {shape}, which holds no entries; select another leaf.")
    sides: tuple[Side, Side] = ("output", "input")
    side = min(sides, key=lambda s: axes.dim(shape, s)) if spec.side == "auto" else spec.side
    with jax.enable_x64(True):  # so that a float64 leaf stays float64
        matrix, norms, largest = _look(jnp.asarray(kernel), axes, side)
    rest, d = matrix.shape[-2:]
    if spec.k > min(rest, d):
        raise SpecError(
            f"'{name}': k = {spec.k} exceeds min(m, n) = {min(rest, d)} of its shape {shape}; "
            "choose a smaller k."
        )
    if not math.isfinite(float(largest)):
        raise LeafError(f"'{name}' holds NaN or Inf; repair the checkpoint before deforming it.")
    found = _subspace(name, matrix, spec, key)
    share = np.linalg.norm(np.asarray(found.singular_values, float), axis=-1) / np.maximum(
        np.asarray(norms), np.finfo(float).tiny
    )
    check_budget(
        name,
        matrix.dtype,
        spec.basis,
        spec.alpha,
        spec.budget,
        energy=min(float(np.max(share)), 1.0),
        largest=float(largest),
    )
    return Layer(
        U=found.U,
        alpha=jnp.asarray(spec.alpha, jnp.result_type(float)),
        singular_values=found.singular_values,
        residual=found.residual,
        status=found.status,
        side=side,
        basis=spec.basis,
        axes=axes,
    )


def _subspace(name: str, matrix: Array, spec: SpecDef, key: PRNGKeyArray) -> subspace.Subspace:
    """Find the directions of one matrix, or of each matrix of a stack."""
    stack = matrix.shape[:-2]
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    keys = jax.random.split(key, len(flat))
    given = None
    if not isinstance(spec.directions, str):
        expected, shape = (matrix.shape[-1], spec.k), spec.directions.shape
        if shape not in (expected, (*stack, *expected)):
            raise SpecError(
                f"'{name}': directions have shape {shape}, give an array (features, k) = {expected}"
                + (f", or {(*stack, *expected)} for one per layer." if stack else ".")
            )
        given = jnp.broadcast_to(spec.directions, (*stack, *expected)).reshape(-1, *expected)
    found = []
    for i, (one, one_key) in enumerate(zip(flat, keys, strict=True)):
        found.append(_directions(one, spec, None if given is None else given[i], one_key))
    return jax.tree.map(lambda *parts: jnp.stack(parts).reshape(*stack, *parts[0].shape), *found)


def _directions(matrix: Array, spec: SpecDef, given: Array | None, key: PRNGKeyArray) -> subspace.Subspace:
    if given is not None:
        return subspace.given_subspace(matrix, given)
    if spec.basis == "axis":
        if spec.directions == "random":
            chosen = jax.random.choice(key, matrix.shape[-1], (spec.k,), replace=False)
            return subspace.given_subspace(matrix, jnp.eye(matrix.shape[-1], dtype=matrix.dtype)[:, chosen])
        return subspace.axis_subspace(matrix, spec.k, bottom=spec.directions == "bottom")
    if spec.directions == "random":
        return subspace.random_subspace(matrix, spec.k, key=key)
    find = subspace.top_subspace if spec.directions == "top" else subspace.bottom_subspace
    return find(matrix, spec.k, tol=spec.tol, key=key)


@functools.partial(jax.jit, static_argnames=("axes", "side"))
def _look(kernel: Array, axes: KernelAxes, side: Side) -> tuple[Array, Array, Array]:
    """Return the kernel as a matrix, its Frobenius norm(s), and its largest magnitude (NaN if any is)."""
    matrix = axes.to_matrix(kernel, side)
    norms = jnp.sqrt(jnp.sum(jnp.square(matrix.astype(jnp.float64)), axis=(-2, -1)))
    return matrix, norms, jnp.max(jnp.abs(matrix))


def _deform_leaf(name: str, kernel: Array, layer: Layer) -> Deformed:
    """Check that a kernel is the one planned for, and replace it by its pair."""
    axes, side = layer.axes, layer.side
    shape = tuple(np.shape(kernel))
    _check_dtype(name, kernel.dtype)
    d, stack = layer.U.shape[-2], layer.U.shape[:-2]
    if len(shape) != len(axes.stack + axes.window + axes.inputs + axes.outputs) or (
        axes.dim(shape, side) != d or tuple(shape[i] for i in axes.stack) != stack
    ):
        raise StructureError(
            f"'{name}' has shape {shape}, but was planned with {d} features on the {side} side and "
            f"stack {stack}; plan on the same tree."
        )
    with jax.enable_x64(True):
        weight, comp = _pair_of(jnp.asarray(kernel), layer)
        concrete = isinstance(kernel, jax.Array) and not isinstance(weight, Tracer)
        if concrete and not weight.sharding.is_equivalent_to(kernel.sharding, kernel.ndim):
            # XLA may have gathered what a rotation mixes; the pair is stored as the kernel was.
            weight = jax.device_put(weight, kernel.sharding)
    return Deformed(weight, comp, side, axes)


@jax.jit
def _pair_of(kernel: Array, layer: Layer) -> tuple[Array, Array]:
    """Build the pair in float64 and round it once to the kernel's dtype."""
    axes, side = layer.axes, layer.side

    def turn(matrix: Array) -> Array:  # (rest, d) <-> the orientation of the side
        return matrix if side == "output" else jnp.swapaxes(matrix, -1, -2)

    matrix = turn(axes.to_matrix(kernel, side))
    weight, comp = build_pair(matrix, layer.U, layer.alpha, layer.basis, side)
    weight = axes.from_matrix(turn(weight), kernel.shape, side)
    return weight.astype(kernel.dtype), comp.astype(kernel.dtype)


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SpecError(f"{name} = {value!r}: must be a number.")
    if not math.isfinite(value) or value <= 0:
        raise SpecError(f"{name} = {value}: must be positive and finite.")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(f"{name} = {value!r}: must be one of {', '.join(map(repr, allowed))}.")
