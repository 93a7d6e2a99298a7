"""Random layers at alpha = 2^p beside the same layers at alpha = 1, to the bit (statement 1.3)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from specdef_jax.pair import Basis, build_pair
from specdef_jax.parametrization import Deformed, Side
from specdef_jax.precision import Format, as_format
from theory.certificate import Certificate, inequality, refuted
from theory.draws import over_draws
from theory.instances.matrices import orthonormal
from theory.released_layer import AXES, released
from theory.sizes import Size

ROWS, FEATURES, K = 5, 4, 2
LARGEST = {"float64": 60, "float32": 30, "bfloat16": 30, "float16": 12}  # exponents p
CLAIM = "the same bits at a = 2^p"


def none(claim: str, where: str, differ: Bool[np.ndarray, " instances"], note: str = "") -> Certificate:
    """Certify that no layer differs."""
    return inequality(claim, f"{where}: layers that differ", differ.astype(float), 0.0, note=note)


def some(claim: str, where: str, differ: Any) -> Certificate:
    """Refute that no layer differs."""
    return refuted(claim, f"{where}: layers that differ", np.asarray(differ, float), 0.0)


def layers(basis: Basis, key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Random layers on both sides, exponents up to the largest; what is out of range is told apart."""
    sides = [
        over_draws(functools.partial(_draw, basis, side), key, size.draws) for side in ("output", "input")
    ]
    found: list[Certificate] = []
    for name, largest in LARGEST.items():
        drawn = [np.concatenate(parts) for parts in zip(*(side[name] for side in sides), strict=True)]
        differ, within = drawn
        where = f"{name}, {basis}, both sides, p up to {largest}"
        note = f"{within.mean():.1%} of {within.size} layers are within the range"
        reference = "undeformed layer and an identity" if basis == "axis" else "same layer at a = 1"
        found.append(none(f"{CLAIM} as the {reference}", where, differ[within], note))
        if name == "float16":
            found.append(some(f"{CLAIM} out of range", where, differ[~within]))
    return found


def _draw(basis: Basis, side: Side, key: PRNGKeyArray) -> dict[str, tuple[Array, Array]]:
    """Return, per format, whether the outputs differ and whether all was in range."""
    kernel, inputs, U, p_key = _inputs(basis, side, key)
    found = {}
    for name, largest in LARGEST.items():
        form = as_format(name)
        W, h = kernel.astype(form.dtype), inputs.astype(form.dtype)
        alpha = jnp.ldexp(1.0, jax.random.randint(p_key, (), 1, largest + 1))  # exp2 would round
        # Both alphas at once: compilation is most of the time.
        pairs = jax.vmap(lambda a, W=W: _pair(W, U, a, basis, side))(jnp.stack([jnp.ones(()), alpha]))
        outputs = jax.vmap(lambda pair, h=h, form=form: released(form)({"w": pair}, h))(pairs)
        differ = jnp.any(outputs[1] != outputs[0])
        if basis == "axis":  # at alpha = 1 nothing may have happened to W, and its comp is an identity
            differ |= jnp.any(pairs.weight[0] != W) | jnp.any(pairs.comp[0] != jnp.eye(pairs.comp.shape[-1]))
        within = jnp.all(jax.vmap(lambda pair, h=h, form=form: _within(pair, h, form))(pairs))
        found[name] = differ, within & _same_zeros(pairs)
    return found


def _inputs(basis: Basis, side: Side, key: PRNGKeyArray) -> tuple[Array, Array, Array, PRNGKeyArray]:
    kernel_key, u_key, p_key, h_key, axis_key = jax.random.split(key, 5)
    kernel, inputs = jax.random.normal(kernel_key, (ROWS, FEATURES)), jax.random.normal(h_key, (3, ROWS))
    d = FEATURES if side == "output" else ROWS
    axes = jax.random.permutation(axis_key, jnp.eye(d), axis=1)[:, :K]
    return kernel, inputs, axes if basis == "axis" else orthonormal(u_key, d, K), p_key


def _pair(W: Array, U: Array, alpha: Array, basis: Basis, side: Side) -> Deformed:
    weight, comp = build_pair(W.astype(jnp.float64), U, alpha, basis, side)
    return Deformed(weight.astype(W.dtype), comp.astype(W.dtype), side, AXES)


def _differ(form: Format, h: Array, leaf: Any, reference: Any) -> Bool[Array, ""]:
    network = released(form)
    return jnp.any(network({"w": leaf}, h) != network({"w": reference}, h))


def other_pairs(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Refute the identity for 3 2^p, and for the symmetric basis at 2^p."""
    sides = over_draws(_other_draw, key, size.draws // 10)
    where = "float32, output side, p up to 12"
    return [some(f"{CLAIM} {told}", where, differ) for told, differ in sides.items()]


def _other_draw(key: PRNGKeyArray) -> dict[str, Array]:
    form = as_format("float32")
    kernel, h, U, p_key = _inputs("rotated", "output", key)
    axes = _inputs("axis", "output", key)[2]
    W, h = kernel.astype(form.dtype), h.astype(form.dtype)
    alpha = jnp.ldexp(1.0, jax.random.randint(p_key, (), 1, 13))

    def pair(U: Array, a: Array, basis: Basis) -> Deformed:
        return _pair(W, U, a, basis, "output")

    return {
        "for 3 2^p too, axis": _differ(form, h, pair(axes, 3 * alpha, "axis"), W),
        "for 3 2^p too, rotated": _differ(form, h, pair(U, 3 * alpha, "rotated"), pair(U, alpha, "rotated")),
        "in the symmetric basis": _differ(form, h, pair(U, alpha, "symmetric"), W),
    }


def _within(pair: Deformed, h: Float[Array, "batch n"], form: Format) -> Bool[Array, ""]:
    """Tell whether factors, products, partial sums and results are all zero or normal.

    If every product of a sum is at least tiny/eps of the accumulator, each partial sum is a multiple of tiny,
    so zero or normal. Results are looked at before they are stored, where they may become zero. The smallest
    normal number counts as out of range: a factor may have been rounded up to it.
    """
    inner = jnp.finfo(form.accumulator)
    good = jnp.asarray(True)
    for factor in _factors(pair):
        products = jnp.abs(h.astype(jnp.float64))[:, :, None] * jnp.abs(factor.astype(jnp.float64))
        good &= jnp.all((products == 0) | (products >= float(inner.tiny / inner.eps)))
        good &= jnp.all(products.sum(1) < float(inner.max) / 2)
        sums = jnp.matmul(h, factor, preferred_element_type=form.accumulator)
        good &= _normal(factor, form) & _normal(sums, form)
        h = sums.astype(form.dtype)
    return good


def _factors(pair: Deformed) -> tuple[Array, Array]:
    return (pair.weight, pair.comp) if pair.side == "output" else (pair.comp, pair.weight)


def _normal(x: Array, form: Format) -> Bool[Array, ""]:
    info, size = jnp.finfo(form.dtype), jnp.abs(x.astype(jnp.float64))
    return jnp.all((size == 0) | ((size > float(info.tiny)) & (size <= float(info.max))))


def _same_zeros(pairs: Deformed) -> Bool[Array, ""]:
    """Tell whether no entry of a factor has become zero; both alphas lead."""
    return jnp.all(jnp.stack([jnp.all((x[0] == 0) == (x[1] == 0)) for x in (pairs.weight, pairs.comp)]))
