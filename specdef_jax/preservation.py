"""Is the function preserved? Measured errors of the network as released, beside derived bounds.

THEORY.md 1. The network as released applies the two stored factors one after the other (layered);
the reference is the undeformed network in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from specdef_jax import trees
from specdef_jax.errors import StructureError
from specdef_jax.layered import layered
from specdef_jax.parametrization import Deformed, KernelAxes, Side, is_structured, merge
from specdef_jax.precision import (
    Format,
    Matrix,
    as_format,
    frobenius,
    pair_error_bound,
    rule_of_thumb,
    times,
)
from specdef_jax.rounding import round_products
from specdef_jax.words import Word

DTYPES = ("float64", "float32", "tf32", "bfloat16", "float16")


@dataclass(frozen=True)
class LayerPreservation:
    """One deformed layer in one format, on isotropic probe inputs.

    Attributes:
      path: where the layer stands.
      error: root mean square of fl(C(Wt h)) - W h over that of W h.
      expected: the rule of thumb u ||Wt|| / ||W||.
      bound: root mean square of the derived componentwise bound over that of W h.
      bound_ratio: largest error / bound over all components; at most 1 if the bound holds.
      word: PROVED when the bound is finite, else ESTIMATED (overflow, or n u >= 1).
    """

    path: str
    error: float
    expected: float
    bound: float
    bound_ratio: float
    word: Word


@dataclass(frozen=True)
class FormatPreservation:
    """The whole network and its deformed layers in one format.

    Attributes:
      format: name of the number format.
      error: ||layered(deformed) - reference|| / ||reference|| on the inputs given.
      baseline: the same for the undeformed network stored in this format.
      max_error: largest componentwise |layered(deformed) - reference| over the largest |reference|.
      layers: per deformed layer.
      holds: every derived bound that is finite held.
    """

    format: str
    error: float
    baseline: float
    max_error: float
    layers: tuple[LayerPreservation, ...]
    holds: bool


@dataclass(frozen=True)
class PreservationCertificate:
    """Preservation in each number format; `holds` when no derived bound was broken."""

    formats: tuple[FormatPreservation, ...]

    @property
    def holds(self) -> bool:
        """Whether every derived bound held."""
        return all(f.holds for f in self.formats)

    def __getitem__(self, name: str) -> FormatPreservation:
        """Return the result for one format."""
        return next(f for f in self.formats if f.format == name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"holds": self.holds}


def preservation(
    apply: Callable[..., Array],
    params: PyTree,
    deformed: PyTree,
    *inputs: PyTree,
    dtypes: Sequence[str | Format | jnp.dtype | type] = DTYPES,
    probes: int = 64,
    key: PRNGKeyArray | None = None,
) -> PreservationCertificate:
    """Certify, per number format, that a deformed network computes the same function.

    Args:
      apply: apply(params, *inputs) -> outputs of the undeformed network.
      params: the undeformed parameters.
      deformed: the deformed tree; its factors are rounded to each format in turn.
      inputs: example inputs of the network.
      dtypes: formats; "tf32" rounds the operands of every product to 10 bits.
      probes: number of isotropic inputs per deformed layer.
      key: for the probes; by default fixed, so that a certificate can be reproduced.

    Raises:
      StructureError: the two trees differ other than by deformed leaves.
    """
    key = jax.random.key(0) if key is None else key
    plain = dict(trees.named_leaves(params))
    pairs = {
        name: leaf
        for name, leaf in trees.named_leaves(deformed, is_leaf=is_structured)
        if isinstance(leaf, Deformed)
    }
    for name, pair in pairs.items():
        if name not in plain or jnp.shape(plain[name]) != pair.weight.shape:
            raise StructureError(
                f"'{name}' is deformed, but the undeformed parameters have no leaf of its shape there; "
                "pass the parameters that were deformed."
            )
    trees.check_same_structure(params, jax.eval_shape(merge, deformed), "the merged deformed parameters")
    with jax.enable_x64(True):
        reference = _evaluate(apply, params, inputs, as_format("float64"))
        formats = []
        for form in map(as_format, dtypes):
            layers = tuple(
                _certify_layer(name, plain[name], pair, form, probes, jax.random.fold_in(key, i))
                for i, (name, pair) in enumerate(pairs.items())
            )
            output = _evaluate(apply, deformed, inputs, form)
            baseline = _evaluate(apply, params, inputs, form)
            formats.append(
                FormatPreservation(
                    format=form.name,
                    error=_relative(output - reference, reference),
                    baseline=_relative(baseline - reference, reference),
                    max_error=_ratio(np.max(np.abs(output - reference)), np.max(np.abs(reference))),
                    layers=layers,
                    holds=all(not math.isfinite(x.bound) or x.bound_ratio <= 1 for x in layers),
                )
            )
    return PreservationCertificate(tuple(formats))


def bit_identical(
    apply: Callable[..., Array],
    reference: PyTree,
    deformed: PyTree,
    *inputs: PyTree,
    dtype: str | Format | jnp.dtype | type,
) -> bool:
    """Tell whether two trees compute outputs with equal bits in a format (THEORY.md 1.3).

    For the axis basis the reference is the undeformed tree, for the rotated basis the same plan at
    alpha = 1. The identity is a statement about one kernel and one order of summation, so an undeformed
    layer is evaluated by the products of its deformed counterpart, followed by an identity.
    NaN counts as different.
    """
    form = as_format(dtype)
    with jax.enable_x64(True):
        a = _evaluate(apply, _same_products(reference, deformed), inputs, form)
        b = _evaluate(apply, deformed, inputs, form)
    return bool(np.array_equal(a, b))


def _same_products(reference: PyTree, deformed: PyTree) -> PyTree:
    """Put an identity beside each plain leaf that is deformed in the other tree."""
    named = trees.named_leaves(deformed, is_leaf=is_structured)
    pairs = {name: leaf for name, leaf in named if isinstance(leaf, Deformed)}

    def lift(name: str, leaf: Any) -> Any:
        if name not in pairs or is_structured(leaf):
            return leaf
        pair = pairs[name]
        identity = jnp.broadcast_to(jnp.eye(pair.comp.shape[-1], dtype=pair.comp.dtype), pair.comp.shape)
        return Deformed(jnp.asarray(leaf), identity, pair.side, pair.axes)

    return trees.map_named(lift, reference, is_leaf=is_structured)


def _evaluate(
    apply: Callable[..., Array], params: PyTree, inputs: Sequence[PyTree], form: Format
) -> Float[np.ndarray, "..."]:
    """Run the network as released in a format and return its outputs, flattened, in float64."""
    params, inputs = _cast((params, tuple(inputs)), form)
    outputs = _run(params, inputs, apply=apply, form=form)
    return np.concatenate([np.asarray(y, np.float64).ravel() for y in jax.tree.leaves(outputs)])


@functools.partial(jax.jit, static_argnames=("apply", "form"))
def _run(params: PyTree, inputs: PyTree, *, apply: Callable[..., Array], form: Format) -> PyTree:
    def network(params: PyTree, inputs: PyTree) -> PyTree:
        return layered(apply)(params, *inputs)

    run = network if form.mantissa_bits is None else round_products(network, form)
    return run(params, inputs)


def _cast(tree: PyTree, form: Format) -> PyTree:
    def cast(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        return leaf.astype(form.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def _certify_layer(
    path: str, plain: Array, pair: Deformed, form: Format, probes: int, key: PRNGKeyArray
) -> LayerPreservation:
    """Certify each matrix of a layer and return the worst."""
    original, weight, comp = (np.asarray(x) for x in (plain, pair.weight, pair.comp))
    results = certify_stack(path, original, weight, comp, pair.axes, pair.side, form, probes, key)
    # A broken bound must show, whatever the other matrices of the stack do.
    return max(results, key=lambda r: (r.bound_ratio > 1, r.word is Word.ESTIMATED, r.bound_ratio, r.error))


def certify_stack(
    path: str,
    plain: np.ndarray,
    weight: np.ndarray,
    comp: np.ndarray,
    axes: KernelAxes,
    side: Side,
    form: Format,
    probes: int,
    key: PRNGKeyArray,
) -> list[LayerPreservation]:
    """Push isotropic inputs through the two stored factors of each matrix of a stack.

    Args:
      path: where the layer stands.
      plain: the undeformed kernel.
      weight: the deformed one, rounded to the format.
      comp: (*stack, d, d), rounded likewise.
      axes: of both kernels.
      side: of the compensation.
      form: number format of storage and products.
      probes: number of inputs.
      key: for the inputs.
    """
    stacks = (axes.to_stack(x, side) for x in (plain, weight))
    results = []
    for i, (w, deformed, c) in enumerate(zip(*stacks, comp.reshape(-1, *comp.shape[-2:]), strict=True)):
        growth = _ratio(frobenius(deformed), frobenius(w))
        first, second = deformed, c
        if side == "input":
            first, second, w = c, deformed.T, w.T
        h = jax.random.normal(jax.random.fold_in(key, i), (probes, len(w)), jnp.float32)
        results.append(certify_matrix(path, h, first, second, w, growth, form))
    return results


def certify_matrix(
    path: str,
    h: Array,
    first: Matrix,
    second: Matrix,
    plain: Matrix | tuple[Matrix, Matrix],
    growth: float,
    form: Format,
) -> LayerPreservation:
    """Compare h -> fl(fl(h first) second) with h -> h plain.

    Args:
      path: what to call it.
      h: inputs (probes, n).
      first: (n, p).
      second: (p, q).
      plain: (n, q), or two factors of it.
      growth: ||deformed|| / ||plain||, for the rule of thumb.
      form: number format of storage and products.
    """
    h, first, second = (jnp.asarray(x).astype(form.dtype) for x in (h, first, second))
    output = np.asarray(_two_products(h, first, second, form=form), np.float64)
    wide = np.asarray(h, np.float64)
    exact, nothing = wide, np.zeros((0, wide.shape[1]))
    for factor in plain if isinstance(plain, tuple) else (plain,):
        exact, nothing = times(exact, nothing, factor)
    if all(bool(jnp.isfinite(x).all()) for x in (output, first, second)):
        bound = pair_error_bound(wide, first, second, plain, form)
    else:  # overflow
        bound = np.full_like(exact, np.inf)
    error = np.abs(output - exact)
    finite = bool(np.isfinite(bound).all())
    return LayerPreservation(
        path=path,
        error=_relative(error, exact),
        expected=rule_of_thumb(form.unit, growth),
        bound=_relative(bound, exact),
        bound_ratio=float(np.max(error / np.where(bound > 0, bound, 1.0))) if finite else math.nan,
        word=Word.PROVED if finite else Word.ESTIMATED,
    )


@functools.partial(jax.jit, static_argnames="form")
def _two_products(h: Array, first: Array, second: Array, *, form: Format) -> Array:
    for factor in (first, second):
        h = jnp.matmul(
            form.round_operand(h),
            form.round_operand(factor),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=form.accumulator,
        ).astype(form.dtype)
    return h


def _relative(error: np.ndarray, exact: np.ndarray) -> float:
    return _ratio(float(np.linalg.norm(error)), float(np.linalg.norm(exact)))


def _ratio(a: float, b: float) -> float:
    if not math.isfinite(a):
        return math.inf
    return float(a / b) if b > 0 else (0.0 if a == 0 else math.inf)
