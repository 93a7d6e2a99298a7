"""What a number format does to a deformed layer: derived bounds and the largest usable alpha.

THEORY.md 1.2 to 1.4. A released layer computes two products in a row, h -> fl(h A) -> fl(fl(h A) B),
where (A, B) is (weight, comp) on the output side and (comp, weight) on the input side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specdef_jax.errors import BudgetError, SpecError
from specdef_jax.pair import Basis

Matrix = Array | np.ndarray
_BLOCK = 1 << 23  # entries converted to float64 at a time


@dataclass(frozen=True)
class Format:
    """A number format for storage and products.

    Attributes:
      name: what certificates call it.
      dtype: storage dtype of weights and activations.
      mantissa_bits: explicit bits to which each operand of a product is rounded first, None for all.
    """

    name: str
    dtype: jnp.dtype
    mantissa_bits: int | None = None

    @property
    def accumulator(self) -> jnp.dtype:
        """The dtype sums are kept in: at least float32, which layered asks for."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def unit(self) -> float:
        """The largest relative error of one operand or one stored result."""
        bits = self.mantissa_bits
        return unit_roundoff(self.dtype) if bits is None else 2.0 ** -(bits + 1)

    def product_error(self, n: int) -> float:
        """Return eps with |fl(a^T b) - a^T b| <= eps |a|^T |b| for n terms in any order of summation.

        Each operand is rounded (if the format rounds operands), sums run in the accumulator, and
        the result is rounded to storage; no overflow. Infinite when n u >= 1: no bound exists.
        """
        gamma_n = gamma(n, unit_roundoff(self.accumulator))
        operand = 0.0 if self.mantissa_bits is None else self.unit
        stored = unit_roundoff(self.dtype) if self.accumulator != self.dtype else 0.0
        return (1 + operand) ** 2 * (1 + gamma_n) * (1 + stored) - 1

    def round_operand(self, x: Array) -> Array:
        """Round an operand of a product as the format does, to nearest, ties to even."""
        if self.mantissa_bits is None:
            return x
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=self.mantissa_bits)


FORMATS = {
    name: Format(name, jnp.dtype(dtype), bits)
    for name, dtype, bits in (
        ("float64", jnp.float64, None),
        ("float32", jnp.float32, None),
        ("tf32", jnp.float32, 10),
        ("bfloat16", jnp.bfloat16, None),
        ("float16", jnp.float16, None),
    )
}


def as_format(name: str | Format | jnp.dtype | type) -> Format:
    """Return the Format called `name`, or that of a dtype.

    Raises:
      SpecError: no such format.
    """
    if isinstance(name, Format):
        return name
    key = name if isinstance(name, str) else jnp.dtype(name).name
    if key not in FORMATS:
        raise SpecError(f"number format {key!r} is unknown; use one of {', '.join(FORMATS)}.")
    return FORMATS[key]


def unit_roundoff(dtype: jnp.dtype) -> float:
    """Return u, the largest relative error of rounding to nearest: half the machine epsilon."""
    return float(jnp.finfo(dtype).eps) / 2


def gamma(n: int, u: float) -> float:
    """Return gamma_n = n u / (1 - n u), infinite when n u >= 1 (Higham 2002, section 3.1)."""
    return n * u / (1 - n * u) if n * u < 1 else math.inf


def pair_error_bound(
    h: Float[np.ndarray, "batch n"],
    first: Float[Array | np.ndarray, "n p"],
    second: Float[Array | np.ndarray, "p q"],
    plain: Matrix | tuple[Matrix, ...],
    form: Format,
) -> Float[np.ndarray, "batch q"]:
    """Bound |fl(fl(h A) B) - h W| componentwise, rigorously (THEORY.md 1.2).

    The stored factors are taken as they are: what storage rounding did is the residual |h W - h A B|,
    computed in float64 for these inputs, with its own rounding bound. Inputs are float64, holding values of
    the storage format; the factors may be of any dtype, of which no whole copy in float64 is made.

    Args:
      h: inputs.
      first: A, the factor applied first, as stored.
      second: B, the factor applied second, as stored.
      plain: W, the undeformed matrix (n, q), or the two (n, p), (p, q) whose product it is.
      form: the number format of storage and products.

    It holds for the exact h W, and for h W as NumPy multiplies these arrays in float64.
    """
    n, p = first.shape
    e1, e2 = form.product_error(n), form.product_error(p)
    factors = plain if isinstance(plain, tuple) else (plain,)
    exact, size = h, np.abs(h)
    for factor in factors:
        exact, size = times(exact, size, factor)
    one = np.ones((1, n)), np.ones((1, p))  # for the sums of |A| and |B|
    signed, found = times(h, np.concatenate([np.abs(h), one[0]]), first)
    through, sums = found[:-1], found[-1]
    # First product: flushed values reach the result through B; second: its operands are |h A| and B.
    inner = _flushed(form, np.abs(h), sums, n)
    signed, found = times(signed, np.concatenate([through, inner, one[1]]), second)
    magnitude, flushed, sums = found[: len(h)], found[len(h) : -1], found[-1]
    wide = unit_roundoff(jnp.dtype(jnp.float64))
    rounding = gamma(n + p, wide) * magnitude + gamma(n + p * (len(factors) - 1), wide) * size
    storage = np.abs(exact - signed) + rounding
    underflow = (1 + e2) * flushed + _flushed(form, (1 + e1) * through + inner, sums, p)
    # The bound itself is evaluated in float64: its relative error is far below this factor.
    return (((1 + e1) * (1 + e2) - 1) * magnitude + storage + underflow) * (1 + 1e-10)


def times(
    x: Float[np.ndarray, "a n"], y: Float[np.ndarray, "b n"], matrix: Float[Array | np.ndarray, "n p"]
) -> tuple[Float[np.ndarray, "a p"], Float[np.ndarray, "b p"]]:
    """Return (x M, y |M|) in float64, converting M once and a few columns at a time."""
    matrix = np.asarray(matrix)
    columns = max(1, _BLOCK // max(len(matrix), 1))
    signed, absolute = np.empty((len(x), matrix.shape[1])), np.empty((len(y), matrix.shape[1]))
    for start in range(0, matrix.shape[1], columns):
        part = np.s_[:, start : start + columns]
        block = matrix[part].astype(np.float64)
        signed[part] = x @ block
        absolute[part] = y @ np.abs(block, out=block)
    return signed, absolute


def in_rows(*matrices: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the same few rows of each array in float64."""
    step = max(1, _BLOCK // max(math.prod(matrices[0].shape[1:]), 1))
    for start in range(0, len(matrices[0]), step):
        yield tuple(x[start : start + step].astype(np.float64) for x in matrices)


def frobenius(matrix: np.ndarray) -> float:
    """Return the Frobenius norm in float64, a few rows at a time."""
    return math.sqrt(sum(np.vdot(x, x) for (x,) in in_rows(matrix)))


def _flushed(
    form: Format, left: Float[np.ndarray, "batch n"], sums: Float[np.ndarray, " p"], terms: int
) -> Float[np.ndarray, "batch p"]:
    """Bound what flushing subnormal numbers to zero costs a product of factors of these magnitudes.

    At most one smallest normal per stored result, per multiplication and addition of the accumulator,
    and per operand, times what it is multiplied with: `sums` are the column sums of the right factor's
    magnitudes, `terms` the number of its rows.
    """
    stored, summed = (float(jnp.finfo(dtype).tiny) for dtype in (form.dtype, form.accumulator))
    return stored + summed * (2 * terms + left.sum(axis=1, keepdims=True) + sums)


def rule_of_thumb(unit: float, growth: float) -> float:
    """Return u ||Wt||_F / ||W||_F, the relative error to expect for isotropic inputs.

    ||Wt||_F^2 = ||S||^2 + (a^2 - 1) ||S_k||^2, so for large alpha this is the rule a u ||S_k|| / ||S||
    of THEORY.md 1.2, where a constant of 1 to 6 was seen in front.
    """
    return unit * growth


def norm_growth(alpha: float, energy: float) -> float:
    """Return ||Wt||_F / ||W||_F for a share energy = ||S_k||_F / ||S||_F of the Frobenius norm."""
    return math.sqrt(1 + (alpha**2 - 1) * energy**2)


def alpha_max(
    dtype: str | Format | jnp.dtype | type,
    basis: Basis = "symmetric",
    budget: float = 0.1,
    *,
    energy: float = 1.0,
    largest: float = 1.0,
    features: int = 1,
) -> float:
    """Return the largest alpha for a dtype, a basis and a relative error budget (THEORY.md 1.4).

    In the symmetric basis rounding errors of the deformed directions leak into the others and grow
    with alpha. In the rotated and axis bases each coordinate carries its own relative error, so only
    the range of the exponent limits alpha: no entry of the deformed weight can overflow up to it (rotated
    factors lose entries below alpha times the smallest normal number).

    Args:
      dtype: storage dtype or format.
      basis: which basis.
      budget: largest relative error for isotropic inputs, by the rule of thumb.
      energy: ||S_k||_F / ||S||_F of the layer, 1 at worst.
      largest: largest |entry| of the undeformed weight.
      features: m, of the deformed side; directions that mix features can gather sqrt(m) entries in one.

    Raises:
      SpecError: no such format or basis.
    """
    if basis not in get_args(Basis):
        raise SpecError(f"basis {basis!r} is unknown; use one of {', '.join(get_args(Basis))}.")
    form = as_format(dtype)
    info = jnp.finfo(form.dtype)
    room = float(info.max) / max(largest, float(info.tiny))
    root = math.sqrt(features)
    room = {"axis": room, "rotated": room / root, "symmetric": 1 + 2 * (room - 1) / (1 + root)}[basis]
    in_range = min(room, 1 / float(info.tiny))
    if basis != "symmetric" or energy == 0 or math.isinf(budget):
        return in_range
    if budget < form.unit:
        return 1.0
    return min(in_range, math.sqrt(((budget / form.unit) ** 2 - 1) / energy**2 + 1))


def check_budget(
    path: str,
    dtype: jnp.dtype,
    basis: Basis,
    alpha: float,
    budget: float,
    *,
    energy: float,
    largest: float,
    features: int = 1,
) -> None:
    """Raise BudgetError when alpha is beyond what the storage dtype can carry."""
    # Below 1 the roles are swapped: comp grows, and what it amplifies is rounding, which has no direction.
    factor, energy = (alpha, energy) if alpha >= 1 else (1 / alpha, 1.0)
    limit = alpha_max(dtype, basis, budget, energy=energy, largest=largest, features=features)
    if factor <= limit:
        return
    beyond = f"'{path}': alpha = {alpha:g} in {dtype} with basis '{basis}' is beyond alpha_max = {limit:.3g}"
    if factor > alpha_max(dtype, basis, math.inf, largest=largest, features=features):
        raise BudgetError(
            f"{beyond}: a factor would leave the range of {dtype}. Use a wider dtype or a smaller alpha."
        )
    expected = rule_of_thumb(unit_roundoff(dtype), norm_growth(factor, energy))
    raise BudgetError(
        f"{beyond} (expected relative error {expected:.2g}, budget {budget:g}). Use a wider dtype, the "
        "axis or rotated basis, a smaller alpha, or a larger SpecDef(budget=...)."
    )
