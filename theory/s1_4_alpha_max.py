"""Statement 1.4 [ours, seen]: The largest usable alpha of a format, a basis and a budget.

STATEMENT. Let e = ||U^T W||_F / ||W||_F.
(i) ||T(a) W||_F = ||W||_F sqrt(1 + (a^2 - 1) e^2), so the largest a for which the rule of thumb of statement
    1.2, with c = 1, stays within a relative budget b >= u is

        alpha_max = sqrt(((b / u)^2 - 1) / e^2 + 1).

(ii) [seen] The error measured there is c b, with the c of statement 1.2: about .6 in formats that round
    operands or results; in float32 it grows with the width (1.7 at 32, 3.7 at 128), so wide float32 layers
    exceed the budget by that factor.
(iii) Range. With G the entries that a multiplies and S those that it divides, as stored at a = 1 (axis: the k
    deformed features of W, and ones; rotated: those of Q^T W, and the first k columns of Q), a = 2^p takes
    all of them to normal numbers of the format if and only if

        a <= min(largest number / max |G|, min nonzero |S| / smallest normal number).

    Up to half of it the factors that the library stores are these numbers. (At the limit itself an entry of
    float64 just below the smallest normal number may be flushed before it is rounded up: seen for bfloat16.)
(iv) Over all W in R^(m x n) and all U, max |Wt| / max |W| is at most 1 + (a - 1)(1 + sqrt(m)) / 2
    (symmetric), a sqrt(m) (rotated), a (axis), and these are attained.
(v) specdef_jax.alpha_max is at most largest number / max |W| (axis) and what (iv) makes of it in the other
    bases, so no weight overflows up to it, and it is at most (iii) in the axis basis. Without the factor of
    (iv) that is false: W = ones (64 x 64) in float16, U constant, rotated, a = 2^13 overflows.

ASSUMPTIONS. a >= 1; stored entries normal, or zero, at a = 1.

PROOF. (i) W = U U^T W + (I - U U^T) W are orthogonal parts, T(a) multiplies the first by a: ||T(a) W||^2 =
a^2 e^2 ||W||^2 + (1 - e^2) ||W||^2. Solve u sqrt(1 + (a^2 - 1) e^2) = b. (iii) a x for a normal x is a normal
number of the format if and only if |a x| is at most the largest and at least the smallest (or x = 0); growing
entries can only violate the first, shrinking ones the second. The library rounds a x' with x' the entry in
float64: half a range away from the edge that commutes with scaling (statement 1.3). (iv) With |w_j| <= 1 the
largest (T(a) w)_i is the sum of |T_ij| over j: 1 + (a - 1) [P_ii + sum_{j != i} |P_ij|] with P = U U^T. As
P^2 = P, the P_ij with j != i have squares of sum p - p^2, p = P_ii, so by Cauchy-Schwarz the bracket is at
most p + sqrt((m - 1) p (1 - p)), whose maximum over p is (1 + sqrt(m)) / 2. Equality: one direction with
u_i^2 = p = (1 + 1/sqrt(m)) / 2, its other entries equal, and w = 1. Rotated: |q^T w| <= |q| |w| <=
sqrt(m) max |w|, equality for q and w constant. (v) G is a part of W and S = 1 in the axis basis: the minimum
over less is larger. QED.

TIGHTNESS. (iii) is an equivalence, (iv) attained; (v) when the largest entry stands in a deformed feature.

SOURCE. Ours. The functions are specdef_jax.alpha_max, bounds.exact_alpha_range and bounds.entry_growth.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.errors import BudgetError
from specdef_jax.pair import Basis, build_pair
from specdef_jax.precision import Format, alpha_max, as_format, norm_growth
from specdef_jax.words import Word
from theory.assumptions import require
from theory.certificate import (
    Certificate,
    Certificates,
    equality,
    inequality,
    refuses,
    refuted,
    seen,
    tight,
    under_assumptions,
)
from theory.draws import over_draws
from theory.instances.matrices import FAMILIES, orthonormal
from theory.released_layer import errors, ratio, stored
from theory.sizes import Size

ROWS, FEATURES, K = 5, 4, 2
NARROW = ("float32", "bfloat16", "float16")
SHARP = {"symmetric": "[1 + (a - 1)(1 + sqrt(m)) / 2]", "rotated": "a sqrt(m)", "axis": "a"}
BUDGETS = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 0.1, "float16": 1e-2}


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify the rule's inverse and the range, measure at alpha_max, find what is wrongly accepted."""
    found = [*_rule(key, size), *_measured(key, size)]
    for basis in ("axis", "rotated"):
        found += _range(basis, key, size)
    return (*found, *_growth(key, size), *_library(), *_outside(key))


def on_layer(kernel: Float[Array, "n m"], spec: sd.SpecDef, *, key: PRNGKeyArray, name: str) -> Certificates:
    """Certify that the library accepts alpha on anyone's kernel, and stores finite factors.

    Args:
      kernel: (in, out), in its storage dtype.
      spec: how to deform it.
      key: for randomized subspaces.
      name: of the instance.
    """
    claim = "an accepted alpha stores finite factors"

    def evaluate() -> Certificate:
        try:
            pair = sd.deform({"w": kernel}, spec, key=key)["w"]
        except BudgetError as error:
            require(False, f"alpha <= alpha_max ({error})")
        entries = np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in (pair.weight, pair.comp)])
        return inequality(claim, f"{name}: entries that are not finite", np.sum(~np.isfinite(entries)), 0.0)

    return under_assumptions(claim, name, evaluate)


# (i), (ii) the budget


def _rule(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """||T(a) W|| in closed form, and alpha_max as its inverse, from matrices that are formed."""
    drawn = over_draws(_growth_draw, key, size.draws)
    closed = [norm_growth(float(a), float(e)) for a, e in zip(drawn["alpha"], drawn["energy"], strict=True)]
    W = np.asarray(FAMILIES["gaussian"](key, (6, 5)))
    left, values, _ = np.linalg.svd(W)
    U, energy = left[:, :2], np.linalg.norm(values[:2]) / np.linalg.norm(values)
    told, expected = [], []
    for name, budget in BUDGETS.items():
        alpha = alpha_max(name, "symmetric", budget, energy=energy)
        grown = W + (alpha - 1) * U @ (U.T @ W)
        told.append(as_format(name).unit * np.linalg.norm(grown) / np.linalg.norm(W))
        expected.append(budget)
    return [
        equality("||T(a) W|| = ||W|| sqrt(1 + (a^2 - 1) e^2)", "structured W 5 x 4, alpha up to 1e4",
                 drawn["growth"], closed),
        equality("u ||T(alpha_max) W|| / ||W|| = b", ", ".join(BUDGETS), told, expected),
    ]  # fmt: skip


def _growth_draw(key: PRNGKeyArray) -> dict[str, Array]:
    family_key, matrix_key, u_key, alpha_key = jax.random.split(key, 4)
    drawn = jnp.stack([family(matrix_key, (ROWS, FEATURES)) for family in FAMILIES.values()])
    W = drawn[jax.random.randint(family_key, (), 0, len(drawn))]
    U = orthonormal(u_key, ROWS, K)
    alpha = 10 ** jax.random.uniform(alpha_key, maxval=4.0)
    grown = (jnp.eye(ROWS) + (alpha - 1) * U @ U.T) @ W
    norm = jnp.linalg.norm(W)
    return {
        "alpha": alpha,
        "energy": jnp.linalg.norm(U.T @ W) / norm,
        "growth": jnp.linalg.norm(grown) / norm,
    }


def _measured(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Deform at alpha_max and measure the error, isotropic inputs, in units of the budget."""
    widths = (32, 64) if size is Size.SMALL else (32, 128)
    found: list[Certificate] = []
    for name, budget in BUDGETS.items():
        form = as_format(name)
        told = []
        for d in widths:
            W = stored(jax.random.normal(jax.random.fold_in(key, d), (d, d)) / d**0.5, form)
            values = np.linalg.svd(np.asarray(W), compute_uv=False)
            alpha = alpha_max(
                name, "symmetric", budget, energy=np.linalg.norm(values[:2]) / np.linalg.norm(values)
            )
            h = jax.random.normal(key, (64, d))
            told.append(ratio(*errors(form, W, h, alpha, 2)) / budget)
        low, high = (1.0, 6.0) if name == "float32" else (0.4, 1.3)
        where = f"{name}, budget {budget:g}, Gaussian W of widths {widths[0]} and {widths[1]}, k = 2"
        note = f"error / budget = {', '.join(f'{c:.2f}' for c in told)}"
        kept = low <= min(told) and max(told) <= high
        found.append(
            seen(
                "the error at alpha_max is the budget times c",
                where,
                max(told),
                kept,
                against=high,
                note=note,
            )
        )
    return found


# (iii), (iv) the range


def _range(basis: Basis, key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """The largest power of two within the range stores exact normal factors, the next one does not."""
    drawn = over_draws(functools.partial(_range_draw, basis), key, size.draws)
    found: list[Certificate] = []
    for name, (normal, *sides) in drawn.items():
        inside, beyond, stored_so, library, limit = (side[normal] for side in sides)
        where = f"{name}, {basis}, entries from .1 to 1000: layers"
        found += [
            inequality("2^p up to the range keeps factors normal", f"{where} that are not", ~inside, 0.0),
            inequality("2^p beyond the range does not", f"{where} that are", beyond, 0.0),
            inequality("the library stores them, up to half", f"{where} that differ", ~stored_so, 0.0),
        ]
        if basis == "axis":
            claim = "specdef_jax.alpha_max <= the range"
            found.append(inequality(claim, f"{name}, axis", library, limit, scale=limit))
    return found


def _range_draw(basis: Basis, key: PRNGKeyArray) -> dict[str, tuple[Array, ...]]:
    """Return, per format: normal at 1, at the limit, beyond it; stored so; the library's limit, the limit."""
    kernel_key, scale_key, u_key, axis_key = jax.random.split(key, 4)
    kernel = jax.random.normal(kernel_key, (ROWS, FEATURES)) * 10 ** jax.random.uniform(
        scale_key, (), float, -1, 3
    )
    axes = jax.random.permutation(axis_key, jnp.eye(FEATURES), axis=1)[:, :K]
    U = axes if basis == "axis" else orthonormal(u_key, FEATURES, K)
    chosen = jnp.sum(jnp.abs(U), 1) > 0.5 if basis == "axis" else jnp.arange(FEATURES) < K
    found = {}
    for name in NARROW:
        form = as_format(name)
        W = stored(kernel, form)
        pair = functools.partial(_stored_pair, W, U, basis, form)
        weight, comp = pair(jnp.ones(()))
        grown, shrunk = weight * chosen, comp * chosen[:, None]
        limit = bounds.exact_alpha_range(grown, shrunk, form.dtype)
        exponent = jnp.frexp(limit)[1] - 1
        scaled = [
            (
                jnp.where(chosen, jnp.ldexp(weight, p), weight),
                jnp.where(chosen[:, None], jnp.ldexp(comp, -p), comp),
            )
            for p in (exponent, exponent + 1, exponent - 1)
        ]
        inside, beyond = (_normal(factors, form) for factors in scaled[:2])
        stored_so = _same(pair(jnp.ldexp(1.0, exponent - 1)), scaled[2])
        info = jnp.finfo(form.dtype)
        library = jnp.minimum(float(info.max) / jnp.max(jnp.abs(W)), 1 / float(info.tiny))
        found[name] = _normal((weight, comp), form), inside, beyond, stored_so, library, limit
    return found


def _stored_pair(W: Array, U: Array, basis: Basis, form: Format, alpha: Array) -> tuple[Array, ...]:
    return tuple(stored(x, form) for x in build_pair(W, U, alpha, basis, "output"))


def _normal(factors: tuple[Array, ...], form: Format) -> Bool[Array, ""]:
    info = jnp.finfo(form.dtype)
    sizes = jnp.concatenate([jnp.abs(x).ravel() for x in factors])
    return jnp.all((sizes == 0) | ((sizes >= float(info.tiny)) & (sizes <= float(info.max))))


def _same(factors: tuple[Array, ...], expected: tuple[Array, ...]) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.all(a == b) for a, b in zip(factors, expected, strict=True)]))


def _growth(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """The largest entry of Wt in each basis, on random signs and where the bound is attained."""
    drawn = over_draws(_largest_draw, key, size.draws)
    m, alpha = 64, 16.0
    p = (1 + m**-0.5) / 2
    peaked = jnp.full((m, 1), ((1 - p) / (m - 1)) ** 0.5).at[0, 0].set(p**0.5)
    attained = {"symmetric": peaked, "rotated": jnp.full((m, 1), m**-0.5), "axis": jnp.eye(m)[:, :1]}
    found: list[Certificate] = []
    for basis, U in attained.items():
        claim = f"max |Wt| <= {SHARP[basis]} max |W|, {basis}"
        largest, bound = drawn[basis]
        weight, _ = build_pair(jnp.ones((1, m)), U, jnp.asarray(alpha), basis, "output")
        sharp = bounds.entry_growth(alpha, m, basis)
        where = f"W = 1, m = {m}, the direction of the proof"
        rounding = {"allowance": 1e-12 * bound, "scale": bound, "word": Word.CHECKED}
        found += [
            inequality(claim, "signs and Gaussian entries, m = 4", largest, bound, **rounding),
            tight(claim, where, jnp.max(jnp.abs(weight)), sharp, factor=1 + 1e-12, allowance=1e-12 * sharp,
                  word=Word.CHECKED),
        ]  # fmt: skip
    return found


def _largest_draw(key: PRNGKeyArray) -> dict[str, tuple[Array, Array]]:
    """Return, per basis, the largest entry of Wt and its bound; half of the matrices are signs."""
    w_key, sign_key, u_key, alpha_key = jax.random.split(key, 4)
    W = jax.random.normal(w_key, (ROWS, FEATURES))
    W = jnp.where(jax.random.bernoulli(sign_key), jnp.sign(W), W)
    alpha = 10 ** jax.random.uniform(alpha_key, maxval=3.0)
    found = {}
    for basis in SHARP:
        U = jnp.eye(FEATURES)[:, :1] if basis == "axis" else orthonormal(u_key, FEATURES, 1)
        weight, _ = build_pair(W, U, alpha, basis, "output")
        bound = bounds.entry_growth(alpha, FEATURES, basis) * jnp.max(jnp.abs(W))
        found[basis] = jnp.max(jnp.abs(weight)), bound
    return found


def _library() -> list[Certificate]:
    """Nothing overflows just below alpha_max where (iv) is attained; max |W| alone would allow more."""
    m = 64
    kernel, U = jnp.ones((m, m), jnp.float16), jnp.full((m, 1), m**-0.5)
    found: list[Certificate] = []
    for basis in SHARP:
        alpha = 0.99 * alpha_max("float16", basis, np.inf, features=m)
        directions = "top" if basis == "axis" else U
        spec = sd.SpecDef(alpha, basis=basis, side="output", directions=directions, budget=np.inf)
        pair = sd.deform({"w": kernel}, spec, key=jax.random.key(0))["w"]
        where = f"W = ones ({m} x {m}), {basis}, a = {alpha:.4g}: entries that overflow"
        lost = jnp.sum(~jnp.isfinite(pair.weight))
        found.append(inequality("no weight overflows 1% below alpha_max, float16", where, lost, 0.0))
    weight, _ = build_pair(kernel.astype(jnp.float64), U, jnp.asarray(2.0**13), "rotated", "output")
    lost = jnp.sum(~jnp.isfinite(weight.astype(jnp.float16)))
    where = f"W = ones ({m} x {m}), U constant, rotated, a = 2^13: entries that overflow"
    return [*found, refuted("none below largest number / max |W|, float16", where, lost, 0.0)]


def _outside(key: PRNGKeyArray) -> list[Certificate]:
    """Beyond the budget or the range the library refuses; just below it does not."""
    kernel = jax.random.normal(key, (16, 12)).astype(jnp.bfloat16)
    values = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False)
    limit = alpha_max("bfloat16", "symmetric", 0.1, energy=values[0] / np.linalg.norm(values))
    spec = functools.partial(sd.SpecDef, k=1, side="output")
    name = "bfloat16 16 x 12, budget .1"
    refused = on_layer(kernel, spec(alpha=1.05 * limit), key=key, name=name)
    axis = on_layer(kernel.astype(jnp.float16), spec(alpha=2.0**17, basis="axis"), key=key, name=name)
    return [
        *on_layer(kernel, spec(alpha=0.95 * limit), key=key, name=f"{name}, 5% below alpha_max"),
        refuses("alpha beyond the budget", f"{name}, 5% above alpha_max", refused, "alpha <= alpha_max"),
        refuses("alpha beyond the range", "float16, axis, 2^17", axis, "alpha <= alpha_max"),
    ]
