"""Derived rounding bounds against exact arithmetic, and the largest alpha against measured errors."""

from __future__ import annotations

import inspect
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax.precision import (
    FORMATS,
    Format,
    alpha_max,
    as_format,
    check_budget,
    gamma,
    norm_growth,
    pair_error_bound,
    rule_of_thumb,
    unit_roundoff,
)
from specdef_jax.preservation import _two_products

NAMES = tuple(FORMATS)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def stored(x, form):
    """Round to the storage format; return float64 values."""
    return np.asarray(jnp.asarray(x).astype(form.dtype), np.float64)


def exact_dot(a, b):
    return sum((Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)), Fraction(0))


def run(h, first, second, form):
    arrays = (jnp.asarray(x, form.dtype) for x in (h, first, second))
    return np.asarray(_two_products(*arrays, form=form), np.float64)


# Units


@pytest.mark.parametrize(
    ("name", "unit"),
    [("float64", -53), ("float32", -24), ("tf32", -11), ("bfloat16", -8), ("float16", -11)],
)
def test_units_are_half_the_spacing_above_one(name, unit):
    form = as_format(name)
    assert form.unit == 2.0**unit
    if form.mantissa_bits is None:
        assert unit_roundoff(form.dtype) == 2.0**unit
        one = jnp.ones((), form.dtype)
        assert one + jnp.asarray(2.0 * 2.0**unit, form.dtype) > one
        assert float((1.0 + jnp.asarray(2.0**unit, form.dtype)).astype(form.dtype)) == 1  # tie to even


def test_gamma_is_the_textbook_one_and_infinite_beyond_its_range():
    u = Fraction(1, 2**24)
    assert gamma(1000, 2.0**-24) == pytest.approx(float(1000 * u / (1 - 1000 * u)), rel=1e-15)
    assert gamma(0, 2.0**-8) == 0
    assert gamma(256, 2.0**-8) == gamma(257, 2.0**-8) == math.inf
    assert as_format("float32").product_error(2**24) == math.inf


def test_formats_by_name_and_by_dtype():
    assert as_format(jnp.bfloat16) is as_format("bfloat16") is FORMATS["bfloat16"]
    assert as_format(FORMATS["tf32"]).mantissa_bits == 10
    assert as_format(np.dtype("float32")).mantissa_bits is None
    for unknown in ("float8", jnp.int32):
        with pytest.raises(sd.SpecError, match="unknown; use one of float64, float32, tf32"):
            as_format(unknown)


# One product


@pytest.mark.parametrize("name", NAMES)
def test_product_error_bounds_every_product_against_exact_arithmetic(name):
    form = as_format(name)
    n = 48
    worst = 0.0
    for seed in range(3):
        a, b = stored(normal(seed, 4, n), form), stored(normal(seed + 9, n, 4), form)
        if seed == 2:  # all of one sign: errors of the sums add up
            a, b = np.abs(a), np.abs(b)
        first = jnp.asarray(a, form.dtype), jnp.asarray(b, form.dtype)
        out = np.asarray(
            jnp.matmul(
                *(form.round_operand(x) for x in first),
                precision="highest",
                preferred_element_type=form.accumulator,
            ).astype(form.dtype),
            np.float64,
        )
        for i, j in np.ndindex(4, 4):
            error = abs(Fraction(float(out[i, j])) - exact_dot(a[i], b[:, j]))
            allowed = Fraction(form.product_error(n)) * exact_dot(np.abs(a[i]), np.abs(b[:, j]))
            assert error <= allowed
            worst = max(worst, float(error / allowed))
    # Not vacuous: rounding operands (tf32) or results (16 bit) comes within a factor of 50; sums of n
    # terms in the accumulator stay further below their worst case.
    assert worst > (0.02 if name in ("tf32", "bfloat16", "float16") else 1e-4)


@pytest.mark.parametrize("name", ["tf32", "bfloat16", "float16"])
def test_product_error_is_attained_by_one_term_within_a_factor_of_two(name):
    form = as_format(name)
    if name == "tf32":  # operands just above a tie, each rounded down by its largest relative error
        a = b = 1 + 2.0**-11 - 2.0**-23
    else:  # a product just above a tie of the storage format
        a, b = 1.0, 1.0 + 2 * form.unit
        a = b
    out = float(
        form.round_operand(jnp.asarray(a, form.dtype)) * form.round_operand(jnp.asarray(b, form.dtype))
    )
    error = abs(Fraction(out) - Fraction(a) * Fraction(b)) / (Fraction(a) * Fraction(b))
    assert error <= form.product_error(1)
    if name == "tf32":
        assert error > Fraction(form.product_error(1)) / 2


def test_tf32_rounds_operands_to_ten_bits_to_nearest_even():
    form = as_format("tf32")
    step = 2.0**-10
    x = jnp.asarray([1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, 1 + 0.49 * step, -3.0], jnp.float32)
    np.testing.assert_array_equal(form.round_operand(x), [1, 1 + 2 * step, 1 + step, 1, -3])
    assert as_format("float32").round_operand(x) is x


# The pair


def pair(form, alpha, seed=0, n=24, m=16, side="output", basis="symmetric"):
    W = stored(normal(seed, n, m), form)
    spec = sd.SpecDef(alpha=alpha, k=2, side=side, basis=basis, budget=math.inf)
    leaf = sd.deform({"w": jnp.asarray(W, form.dtype)}, spec, key=jax.random.key(seed))["w"]
    weight, comp = np.asarray(leaf.weight, np.float64), np.asarray(leaf.comp, np.float64)
    return (W, weight, comp) if side == "output" else (W, comp, weight)


@pytest.mark.parametrize("alpha", [1.0, 256.0])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("name", NAMES)
def test_the_bound_of_a_pair_is_never_broken_and_not_vacuous(name, side, alpha):
    form = as_format(name)
    W, first, second = pair(form, alpha, side=side)
    # Random inputs, the input that the stored factors treat worst, unit vectors, tiny and large ones.
    residual = np.linalg.svd(W - first @ second)[0][:, 0]
    bottom = np.linalg.svd(W)[0][:, 15]
    h = np.concatenate(
        [normal(1, 16, 24), residual[None], bottom[None], np.eye(24), np.sign(normal(2, 8, 24))]
    )
    h = np.concatenate([h, 2.0**-10 * h, 8 * h])
    h = stored(h, form)
    error = np.abs(run(h, first, second, form) - h @ W)
    bound = pair_error_bound(h, first, second, W, form)
    assert (error <= bound).all()
    if name != "float64" or alpha > 1:  # float64 at alpha = 1 is the reference, computed the same way
        assert (error / bound).max() > (0.02 if form.dtype.itemsize < 4 or alpha > 1 else 0.005)


def test_the_bound_covers_numbers_that_are_flushed_to_zero():
    form = as_format("float32")
    first, second = np.full((64, 4), 1e-20), np.eye(4) * 1e10
    h = np.full((1, 64), 9e-19)
    plain = stored(first, form) @ second
    first, h = stored(first, form), stored(h, form)
    bound = pair_error_bound(h, first, second, plain, form)
    assert (bound >= np.abs(h @ plain)).all()  # all of the result may be lost
    error = np.abs(run(h, first, second, form) - h @ plain)
    assert (error <= bound).all()


def test_the_bound_sees_a_pair_that_is_not_the_kernel():
    form = as_format("float32")
    W, first, second = pair(form, 64.0)
    h = stored(normal(3, 8, 24), form)
    other = pair_error_bound(h, first, second, 1.01 * W, form)
    assert (other > 0.009 * np.abs(h @ W)).all()
    assert (other > 10 * pair_error_bound(h, first, second, W, form)).any()


# The largest alpha


def measured(name, alpha, basis="symmetric", seed=0, n=64):
    form = as_format(name)
    W, first, second = pair(form, alpha, seed, n, n, basis=basis)
    h = stored(normal(seed + 1, 64, n), form)
    exact = h @ W
    return np.linalg.norm(run(h, first, second, form) - exact) / np.linalg.norm(exact)


def test_norm_growth_is_the_growth_of_the_frobenius_norm():
    form = as_format("float64")
    W, weight, _ = pair(form, 100.0)
    s = np.linalg.svd(W, compute_uv=False)
    energy = np.linalg.norm(s[:2]) / np.linalg.norm(s)
    assert norm_growth(100.0, energy) == pytest.approx(np.linalg.norm(weight) / np.linalg.norm(W), rel=1e-12)
    assert norm_growth(1.0, energy) == 1
    assert rule_of_thumb(2.0**-24, 8.0) == 2.0**-21


@pytest.mark.parametrize("budget", [1e-3, 1e-2])
def test_the_error_at_alpha_max_is_the_budget_within_a_factor_of_six(budget):
    for seed in range(2):
        s = np.linalg.svd(stored(normal(seed, 64, 64), as_format("float32")), compute_uv=False)
        alpha = alpha_max("float32", "symmetric", budget, energy=np.linalg.norm(s[:2]) / np.linalg.norm(s))
        assert budget / 6 < measured("float32", alpha, seed=seed) < 6 * budget
        assert measured("float32", alpha / 100, seed=seed) < budget / 10


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_errors_grow_with_alpha_in_the_symmetric_basis_alone(name):
    for basis in ("rotated", "axis"):
        small, large = measured(name, 2.0, basis), measured(name, 2.0**20, basis)
        assert large < 2 * small + 1e-30
    assert measured(name, 2.0**6) > 10 * measured(name, 2.0)


def test_alpha_max_is_monotone_and_differs_between_its_options():
    budgets = [alpha_max("float32", "symmetric", b) for b in (1e-6, 1e-4, 1e-2, 1.0)]
    assert budgets == sorted(set(budgets))
    by_format = [alpha_max(name) for name in ("bfloat16", "tf32", "float32", "float64")]
    assert by_format == sorted(set(by_format))
    energies = [alpha_max("float32", energy=e) for e in (1.0, 0.5, 0.1, 0.0)]
    assert energies == sorted(set(energies))
    assert alpha_max("float16", "axis", largest=8.0) < alpha_max("float16", "axis", largest=0.1) <= 2.0**14
    assert alpha_max("float32", "symmetric", 2.0**-30) == 1
    assert alpha_max("float32", "rotated") == alpha_max("float32", "symmetric", math.inf) > 1e30
    # The rule itself: u sqrt(1 + (a^2 - 1) e^2) = budget
    a = alpha_max("float32", "symmetric", 1e-3, energy=0.3)
    assert 2.0**-24 * norm_growth(a, 0.3) == pytest.approx(1e-3, rel=1e-12)


def test_alpha_below_one_swaps_the_factors_so_direction_does_not_matter():
    # comp then grows, and what it amplifies is the rounding of the weight.
    form = as_format("float32")
    W = stored(normal(5, 64, 64), form)
    spec = sd.SpecDef(alpha=1e-6, k=2, directions="bottom", side="output", budget=math.inf)
    leaf = sd.deform({"w": jnp.asarray(W, jnp.float32)}, spec, key=jax.random.key(0))["w"]
    h = stored(normal(6, 64, 64), form)
    exact = h @ W
    out = run(h, np.asarray(leaf.weight), np.asarray(leaf.comp), form)
    assert np.linalg.norm(out - exact) / np.linalg.norm(exact) > 1e-3
    with pytest.raises(sd.BudgetError, match="alpha = 1e-06"):
        check_budget("w", jnp.dtype(jnp.float32), "symmetric", 1e-6, 1e-3, energy=1e-4, largest=1.0)
    check_budget("w", jnp.dtype(jnp.float32), "symmetric", 1e6, 1e-3, energy=1e-4, largest=1.0)


@pytest.mark.parametrize("basis", ["symmetric", "rotated", "axis"])
def test_no_weight_overflows_below_alpha_max(basis):
    # Ones and a constant direction gather sqrt(64) entries in one: the limit must know.
    kernel = jnp.ones((64, 64), jnp.float16)
    U = "top" if basis == "axis" else jnp.full((64, 1), 0.125)
    limit = alpha_max("float16", basis, math.inf, features=64)
    assert limit <= alpha_max("float16", basis, math.inf)

    def spec(alpha):
        return sd.SpecDef(alpha=alpha, basis=basis, side="output", directions=U, budget=math.inf)

    pair = sd.deform({"w": kernel}, spec(0.99 * limit), key=jax.random.key(0))["w"]
    assert jnp.isfinite(pair.weight).all()
    with pytest.raises(sd.BudgetError, match="would leave the range of float16"):
        sd.deform({"w": kernel}, spec(1.01 * limit), key=jax.random.key(0))


def test_an_unknown_basis_is_refused():
    with pytest.raises(sd.SpecError, match="'diagonal' is unknown; use one of symmetric, rotated, axis"):
        inspect.unwrap(alpha_max)("float32", "diagonal")


def test_a_format_may_be_made_by_the_user():
    form = Format("bf16 operands", jnp.dtype(jnp.float32), mantissa_bits=7)
    assert form.unit == 2.0**-8
    assert form.product_error(4) > as_format("tf32").product_error(4)
