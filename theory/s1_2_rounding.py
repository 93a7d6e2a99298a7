"""Statement 1.2 [standard, seen]: What rounding costs a deformed layer.

STATEMENT. A layer as released computes two products in a row, h -> fl(h A) -> fl(fl(h A) B), with A (n x p)
and B (p x q) the two stored factors. Let the format round operands with relative error at most u_o (0 if it
does not), sum in an accumulator of unit roundoff u_a, and round results to storage with u_s (0 if the
accumulator is the storage format); gamma_n = n u_a / (1 - n u_a), and

    e_n = (1 + u_o)^2 (1 + gamma_n) (1 + u_s) - 1.

With any order of summation, without overflow, and where nothing underflows, componentwise

    |fl(fl(h A) B) - h W| <= [(1 + e_n)(1 + e_p) - 1] |h| |A| |B| + |h (W - A B)|.                         (*)

In one format throughout the bracket is at most gamma_{n+p}, one unit less than THEORY's gamma_{m+n+1} (output
side: p = m). The second term is what storage rounding of A and B did, taken a posteriori. Numbers flushed to
zero add at most one smallest normal number per stored result, operand, product and sum, carried on by |B|.
[seen] For isotropic h the relative error of a symmetric pair is c a u ||S_k||_F / ||S||_F. In formats that
round operands or results (bfloat16, float16, tf32) c is .5 to 1.2, whatever the width; where the accumulator
is the only error (float32, float64) c grows as the square root of the width: 1.5 at 32, 4 at 128, 8 at 512
here. So "c is 1 to 6" holds up to a width of about 256. For the bottom singular vector as input the error is
c a u sigma_1 / sigma_min with c from .03 to 2, and 2.7 at width 1024.

ASSUMPTIONS. Round to nearest, no overflow; n u_a < 1 and p u_a < 1.

PROOF. One product a^T b of n terms: operands a_i (1 + d), b_i (1 + d'), |d|, |d'| <= u_o; their products and
sums in any order carry factors within 1 + gamma_n (Higham 2002, lemma 3.1 and section 3.1); the result one
factor 1 + u_s. So |fl(a^T b) - a^T b| <= e_n |a|^T |b|. Hence fl(h A) = h A + r, |r| <= e_n |h||A|, and
fl(fl(h A) B) - h A B = r B + r', |r'| <= e_p |fl(h A)| |B| <= e_p (1 + e_n) |h||A||B| and
|r B| <= e_n |h||A||B|. The sum is [e_n + e_p (1 + e_n)] |h||A||B|, which is the bracket. Add |h (A B - W)|.
In one format (1 + gamma_n)(1 + gamma_p) <= 1 + gamma_{n+p} (Higham 2002, lemma 3.3). QED.

TIGHTNESS. Attained to a few percent: by one product of each format with both results (and operands) just past
a tie; in n by 1 + u + ... + u summed from the left, where every u is lost; in the storage term by factors
that do not multiply to W.

SOURCE. N. Higham, Accuracy and Stability of Numerical Algorithms (2002), sections 3.1 and 3.5. c is measured.
The bound is specdef_jax.precision.pair_error_bound. The reference h W is evaluated in extended precision
where the machine has it.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from specdef_jax.pair import build_pair
from specdef_jax.parametrization import Deformed, Side
from specdef_jax.precision import FORMATS, Format, as_format, pair_error_bound, rule_of_thumb
from theory.assumptions import require
from theory.certificate import (
    Certificate,
    Certificates,
    fit,
    inequality,
    refuses,
    seen,
    tight,
    under_assumptions,
)
from theory.draws import over_draws
from theory.fits import exponent
from theory.instances.matrices import FAMILIES, orthonormal
from theory.released_layer import AXES, errors, exact, ratio, released, run, stored
from theory.sizes import Size

ROWS, FEATURES, K, INPUTS = 6, 4, 2, 4
CLAIM = "|fl(fl(h A) B) - h W| <= [(1 + e_n)(1 + e_p) - 1] |h||A||B| + |h||W - A B|"


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify the bound in every format, on random and hostile inputs; measure the rule of thumb."""
    found = _bounded(key, size)
    found += [_one_product(name) for name in FORMATS]
    found += [_left_to_right(), *_storage_and_flushing(), *_outside()]
    return (*found, *_rule(key, size), *_said(key))


# The bound


def _bounded(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Evaluate (*) on pairs of structured matrices on both sides, with inputs that try to break it."""
    ratios: dict[str, list[np.ndarray]] = {name: [] for name in FORMATS}
    for side in ("output", "input"):
        draw = functools.partial(_draw, side)
        for name, drawn in over_draws(draw, jax.random.fold_in(key, len(side)), size.draws // INPUTS).items():
            for h, first, second, plain, out in zip(*drawn, strict=True):
                error = np.abs(exact(out) - exact(h) @ exact(plain))
                bound = pair_error_bound(h, first, second, plain, as_format(name))
                ratios[name].append(np.max(np.where(error > 0, error / bound, 0), axis=1).astype(float))
    told = "both sides, graded to clustered W, alpha up to 300; random, worst, signed, unit h"
    found: list[Certificate] = []
    for name, parts in ratios.items():
        shares = np.concatenate(parts)
        note = f"in units of the bound; median {np.median(shares):.2g}"
        found.append(inequality(CLAIM, f"{name}: {told}", shares, 1.0, note=note))
    return found


def _draw(side: Side, key: PRNGKeyArray) -> dict[str, tuple[Array, ...]]:
    """Return, per format, h, A, B, W and the layer's output; all are numbers of the format, in float64."""
    matrix_key, family_key, u_key, alpha_key, h_key = jax.random.split(key, 5)
    shape = (ROWS, FEATURES)
    drawn = jnp.stack([family(matrix_key, shape) for family in FAMILIES.values()])
    kernel = drawn[jax.random.randint(family_key, (), 0, len(drawn))]
    left, _, right = jnp.linalg.svd(kernel, full_matrices=False)
    directions = right.T if side == "output" else left
    some = orthonormal(u_key, len(directions), K)
    U = jnp.where(jax.random.bernoulli(u_key), directions[:, :K], some)
    alpha = 10 ** jax.random.uniform(alpha_key, maxval=2.5)
    hostile = jnp.stack([left[:, -1], jnp.sign(kernel[:, 0]), 8 * jnp.eye(ROWS)[0]])
    inputs = jnp.concatenate([jax.random.normal(h_key, (1, ROWS)), hostile])
    found = {}
    for name, form in FORMATS.items():
        W, h = stored(kernel, form), inputs.astype(form.dtype)
        weight, comp = (x.astype(form.dtype) for x in build_pair(W, U, alpha, "symmetric", side))
        out = released(form)({"w": Deformed(weight, comp, side, AXES)}, h)
        first, second = (weight, comp) if side == "output" else (comp, weight)
        found[name] = tuple(x.astype(jnp.float64) for x in (h, first, second, W, out))
    return found


def on_layer(
    h: Float[np.ndarray, "batch n"],
    first: Float[np.ndarray, "n p"],
    second: Float[np.ndarray, "p q"],
    plain: Float[np.ndarray, "n q"],
    out: Float[np.ndarray, "batch q"],
    form: Format,
    *,
    name: str,
) -> Certificates:
    """Certify (*) on anyone's layer: what it computed, against its stored factors and the undeformed matrix.

    Args:
      h: inputs, float64 values of numbers of the format, as all arrays.
      first: A, the stored factor that comes first.
      second: B.
      plain: W.
      out: what the layer computed in the format.
      form: number format of storage and products.
      name: of the instance.
    """

    def evaluate() -> Certificate:
        finite = all(np.isfinite(x).all() for x in (h, first, second, out))
        require(finite, "no overflow (a factor or a result is not finite)")
        bound = pair_error_bound(h, first, second, plain, form)
        require(bool(np.isfinite(bound).all()), "n u < 1 for both products")
        error = np.abs(exact(out) - exact(h) @ exact(plain)).astype(float)
        worst = np.unravel_index(np.argmax(error - bound), error.shape)
        return inequality(CLAIM, name, error.ravel(), bound.ravel(), scale=float(bound[worst]))

    return under_assumptions(CLAIM, name, evaluate)


# Where the two sides meet


def _one_product(name: str) -> Certificate:
    """One number in each place, both results (or three operands and an intermediate) just before a tie.

    h = 1 + 4u, A = B = 1 - u: h A = 1 + 3u - 4u^2 rounds down to 1 + 2u, and (1 + 2u)(1 - u) = 1 + u - 2u^2
    down to 1. In tf32, with u = 2^-11 and s = 2^-23: h = 1 + 45u - s, A = 1 + 47u - s, B = 1 + u - s lose u
    each as operands, and (1 + 44u)(1 + 46u) = 1 + 90u + 2024u^2 loses 2024u^2 = .99u. All times 2^6, far from
    the subnormal numbers of float16.
    """
    form = as_format(name)
    u, s = form.unit, 2.0**-23
    h, A, B = (1 + 4 * u, 1 - u, 1 - u) if name != "tf32" else (1 + 45 * u - s, 1 + 47 * u - s, 1 + u - s)
    h *= 64
    out = run(form, [[h]], [[A]], [[B]])
    error = abs(Fraction(float(out[0, 0])) - Fraction(h) * Fraction(A) * Fraction(B))
    bound = pair_error_bound(*(np.array([[x]]) for x in (h, A, B, A * B)), form)
    factor = 6.1 if name == "float64" else 1.06  # the bound allows for a reference in float64
    where = f"{name}, one number in each place"
    return tight(CLAIM, where, float(error), bound, factor=factor, note="error in rational arithmetic")


def _left_to_right() -> Certificate:
    """Sum 1 + u + ... + u from the left in float32: every u is lost to a tie."""
    n, form = 64, as_format("float32")
    u = form.unit
    h, A = np.full((1, n), u), np.ones((n, 1))
    h[0, 0] = 1.0
    total = functools.reduce(lambda a, b: np.float32(a + b), h[0].astype(np.float32))
    error = abs(float(total) - h.sum())
    bound = pair_error_bound(h, A, np.ones((1, 1)), A, form)
    return tight(CLAIM, "float32, 64 terms summed from left to right", error, bound, factor=1.05)


def _storage_and_flushing() -> list[Certificate]:
    """Factors that do not multiply to W; and a product of which everything is flushed to zero."""
    one, form = np.ones((1, 1)), as_format("bfloat16")
    bound = pair_error_bound(one, one, one, 2 * one, form)
    single = as_format("float32")
    tiny = [
        np.asarray(x, np.float32).astype(float) for x in (np.full((1, 64), 9e-19), np.full((64, 4), 1e-20))
    ]
    B = 1e10 * np.eye(4)
    out = run(single, *tiny, B)
    return [
        tight(
            "the storage term |h| |W - A B|", "bfloat16, A = B = 1, W = 2", abs(1.0 - 2.0), bound, factor=1.02
        ),
        *on_layer(
            *tiny, B, tiny[1] @ B, out, single, name="float32, h A = 6e-37 below the smallest normal number"
        ),
    ]


def _outside() -> list[Certificate]:
    """Overflow is refused by name."""
    form = as_format("float16")
    h, A, B = np.full((1, 2), 100.0), np.full((2, 1), 1000.0), np.full((1, 1), 1e-3)
    refused = on_layer(h, A, B, A @ B, run(form, h, A, B), form, name="")
    return [refuses(CLAIM, "float16, h A = 2e5", refused, "no overflow")]


# The rule of thumb


def _rule(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Measure c: one constant where operands or results are rounded, growing where sums are."""
    widths = (32, 64, 128, 256) if size is Size.FULL else (32, 64, 128)
    rounded = {name: [_measure(name, d, key) for d in widths[:2]] for name in ("tf32", "bfloat16", "float16")}
    summed = {name: [_measure(name, d, key) for d in widths] for name in ("float32", "float64")}
    found: list[Certificate] = []
    for name, rows in (rounded | summed).items():
        ratios, worst = [c for c, _ in rows], [c for _, c in rows]
        told = ", ".join(f"{c:.2f}" for c in ratios)
        low, high = (0.4, 1.3) if name in rounded else (1.0, 10.0)
        name = f"{name}, Gaussian W of widths {', '.join(map(str, widths[: len(rows)]))}, k = 1"
        found += [
            seen("isotropic h: the relative error is c a u ||S_k||/||S||", name, max(ratios),
                 low <= min(ratios) and max(ratios) <= high, against=high, note=f"c = {told}"),
            seen("h = bottom singular vector: relative error below 2 a u sigma_1/sigma_min", name, max(worst),
                 max(worst) <= 2, against=2.0),
        ]  # fmt: skip
    grown = exponent(widths, [c for c, _ in summed["float32"]])
    claim = "c grows as the square root of the width where sums alone round"
    found.append(fit(claim, "float32", grown.slope, 0.5, tolerance=0.25, count=len(widths)))
    return found


def _measure(name: str, d: int, key: PRNGKeyArray) -> tuple[float, float]:
    """Return c for isotropic inputs and for the bottom singular vector, k = 1."""
    form, alpha = as_format(name), 100.0
    W = stored(jax.random.normal(key, (d, d)) / d**0.5, form)
    left, values, _ = np.linalg.svd(np.asarray(W))
    inputs = np.concatenate([jax.random.normal(jax.random.fold_in(key, d), (64, d)), left[:, -1:].T])
    error, expected = errors(form, W, inputs, alpha, 1)
    rule = rule_of_thumb(form.unit, alpha * values[0] / np.linalg.norm(values))
    worst = form.unit * alpha * values[0] / values[-1]
    return ratio(error[:-1], expected[:-1]) / rule, ratio(error[-1], expected[-1]) / worst


def _said(key: PRNGKeyArray) -> list[Certificate]:
    """Measure the numbers that are quoted: where each format ends, on a Gaussian 64 x 64 layer, k = 16."""
    d, k = 64, 16
    W, h = jax.random.normal(key, (d, d)) / d**0.5, jax.random.normal(jax.random.fold_in(key, 1), (64, d))

    def error(name: str, alpha: float) -> float:
        form = as_format(name)
        return ratio(*errors(form, stored(W, form), h, alpha, k))

    rows = [
        ("float32 carries a = 1e4 to a percent", error("float32", 1e4), 0.0, 0.01),
        ("bfloat16 is some 15% wrong at a = 100", error("bfloat16", 100.0), 0.08, 0.3),
        ("float32 does not carry a = 1e6 to a percent", error("float32", 1e6), 0.01, math.inf),
        ("float64 carries a = 1e6 to a millionth", error("float64", 1e6), 0.0, 1e-6),
        ("float16 is all wrong at a = 1e4, before it overflows", error("float16", 1e4), 0.5, 1e3),
        ("float16 overflows by a = 6e4", error("float16", 6e4), 1e300, math.inf),
    ]
    name = f"Gaussian {d} x {d}, k = {k}"
    return [
        seen(claim, name, found, low <= found <= high, against=low if math.isinf(high) else high)
        for claim, found, low, high in rows
    ]
