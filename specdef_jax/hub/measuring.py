"""What storing a deformed tensor costs: its error, measured and derived, from arrays as they are on disk."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from specdef_jax.parametrization import KernelAxes, Side
from specdef_jax.precision import Format, frobenius, in_rows
from specdef_jax.preservation import LayerPreservation, certify_matrix, certify_stack
from specdef_jax.words import Word

PROBES = 16


def measure_insert(
    name: str,
    plain: np.ndarray,
    weight: np.ndarray,
    comp: np.ndarray,
    axes: KernelAxes,
    side: Side,
    form: Format,
    key: PRNGKeyArray,
) -> LayerPreservation:
    """Push isotropic inputs through the two stored factors of each matrix of a stack; return the worst.

    Args:
      name: what to call it.
      plain: the undeformed kernel.
      weight: the deformed one.
      comp: (*stack, d, d).
      axes: of both kernels.
      side: of the compensation.
      form: number format of storage and products.
      key: for the inputs.
    """
    return _worst(certify_stack(name, plain, weight, comp, axes, side, form, PROBES, key))


def measure_gauge(
    name: str,
    plain: tuple[np.ndarray, np.ndarray],
    stored: tuple[np.ndarray, np.ndarray],
    groups: int,
    form: Format,
    key: PRNGKeyArray,
) -> LayerPreservation:
    """Push isotropic inputs through the two maps of each group of heads; return the worst.

    Args:
      name: what to call it.
      plain: value projection (in, groups * d), its bias a last row, and output projection (heads * d, out).
      stored: the same, deformed.
      groups: number of key-value heads.
      form: number format of storage and products.
      key: for the inputs.
    """
    results = []
    for i in range(groups):
        (V, W), (first, second) = (group_of(*pair, i, groups) for pair in (plain, stored))
        growth = frobenius(first) / (frobenius(V) or 1.0)
        results.append(certify_matrix(name, _probes(key, i, len(V)), first, second, (V, W), growth, form))
    return _worst(results)


def is_exact_insert(
    plain: np.ndarray, weight: np.ndarray, comp: np.ndarray, axes: KernelAxes, side: Side
) -> bool:
    """Tell whether the stored pair is the plain kernel to the last bit, as a diagonal compensation can be."""
    diagonal = np.diagonal(comp, axis1=-2, axis2=-1)
    if np.count_nonzero(comp) != np.count_nonzero(diagonal):
        return False
    scales = diagonal.reshape(-1, diagonal.shape[-1]).astype(np.float64)
    pairs = zip(*(axes.to_stack(x, side) for x in (plain, weight)), scales, strict=True)
    return all(np.array_equal(a, b * s) for w, deformed, s in pairs for a, b in in_rows(w, deformed))


def is_exact_gauge(
    plain: tuple[np.ndarray, np.ndarray], stored: tuple[np.ndarray, np.ndarray], groups: int
) -> bool:
    """Tell whether the stored maps are the plain ones with features scaled by powers of two, to the bit."""
    for i in range(groups):
        (V, W), (first, second) = (group_of(*pair, i, groups) for pair in (plain, stored))
        V, W, first, second = (x.astype(np.float64) for x in (V, W, first, second))
        scales = np.where(np.any(V != 0, axis=0), _ratio(first, V), _ratio(W.T, second.T))
        if not (np.frexp(scales)[0] == 0.5).all():  # positive powers of two, and nothing else
            return False
        if not np.array_equal(V * scales, first) or not np.array_equal(W / scales[:, None], second):
            return False
    return True


def group_of(V: np.ndarray, W: np.ndarray, i: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what group i of heads computes: (in, d), and (d, r * out) for the r heads that read it."""
    d = V.shape[1] // groups
    heads = W.reshape(groups, -1, d, W.shape[1])[i]
    return V[:, i * d : (i + 1) * d], np.moveaxis(heads, 0, 1).reshape(d, -1)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return, for each column, a / b where |b| is largest; 1 for a column of zeros."""
    rows, columns = np.argmax(np.abs(b), axis=0), np.arange(b.shape[1])
    found = b[rows, columns]
    return np.where(found != 0, a[rows, columns] / np.where(found != 0, found, 1), 1.0)


def _probes(key: PRNGKeyArray, i: int, n: int) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, i), (PROBES, n), jnp.float32)


def _worst(results: Iterable[LayerPreservation]) -> LayerPreservation:
    """Return the result that asks most for attention: a broken bound, an overflow, the largest error."""
    return max(results, key=lambda r: (r.bound_ratio > 1, r.word is Word.ESTIMATED, r.error))
