"""Statement 1.1 [standard, ours]: A deformed network computes the same function.

STATEMENT. In real arithmetic C Wt = W for the pair of statement 0, in each basis, on either side, for every
a > 0. So a network that reads a layer only through the product C Wt h computes the same outputs for all
inputs and all values of the other parameters, whatever number of layers is deformed. And for ANY U in
R^(m x k), not orthonormal, with E = U^T U - I,

    T(1/a) T(a) W - W = -((a - 1)^2 / a) U E U^T W,                                                     (*)

hence ||C Wt - W|| <= ((a - 1)^2 / a) ||U|| ||E|| ||U^T W||: a defect of U is amplified by about a.

ASSUMPTIONS. a > 0; the layer's weight enters the network only as a factor of activations.

PROOF. With P = U U^T, P^2 = U (I + E) U^T = P + U E U^T. Then T(1/a) T(a) = I + [(a - 1) + (1/a - 1)] P +
(a - 1)(1/a - 1) P^2, where (a - 1)(1/a - 1) = -(a - 1)^2 / a = -[(a - 1) + (1/a - 1)]. The coefficient of P
cancels and (*) remains; E = 0 gives C Wt = W. The rotated pair is (C Q, Q^T Wt) with Q Q^T = I, axis is
symmetric with columns of the identity, the input side is the transpose. A network that reads C Wt reads W,
one layer after the other. The bound is submultiplicativity. QED.

TIGHTNESS. For k = 1 and W of one column the bound is attained: U E U^T W is then a product of matrices of
rank one, whose norms multiply.

CONSEQUENCE. U orthonormal to single precision does not make a pair that is exact to single precision: at
a = 1e4 it is wrong by about 1e4 times that. The library polishes U in float64 before it builds a pair.

SOURCE. Standard; (*) and the consequence are ours. The first part is checked without any rounding, in
rational arithmetic with rational orthogonal matrices (products of Householder reflections).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.errors import LayeredUnsupported
from specdef_jax.pair import build_pair
from specdef_jax.precision import gamma
from specdef_jax.spec import Plan
from specdef_jax.words import Word
from theory.assumptions import require
from theory.certificate import (
    Certificate,
    Certificates,
    equality,
    inequality,
    refuses,
    refuted,
    tight,
    under_assumptions,
)
from theory.draws import over_draws
from theory.forms import forms
from theory.instances.matrices import orthonormal
from theory.instances.networks import mlp_instance, networks
from theory.sizes import Size

ALPHA = 1000.0  # no power of two
UNIT = 2.0**-53
CLAIM = "the deformed network computes the same outputs"


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify C Wt = W over the rationals, (*) on random directions, and networks as released."""
    found = [*_rational(key, size), *_defect(key, size), _single_precision(key)]
    for instance in networks(size, key):
        for side, basis in forms(size):
            spec = sd.SpecDef(alpha=ALPHA, k=2, side=side, basis=basis)
            where = instance.network.kernels[1:3] if side == "output" else instance.where
            plan = sd.plan(instance.params, spec, where=where, key=key)
            name = f"{instance.name}, {len(plan)} layers, {side} side, {basis}"
            found += on_network(instance.network.apply, instance.params, plan, instance.args[0], name=name)
    return (*found, *_outside(key))


def on_network(
    apply: Callable[..., Array], params: PyTree, plan: Plan, *inputs: Any, name: str
) -> Certificates:
    """Certify preservation on anyone's network, as released and merged, in float64.

    Args:
      apply: apply(params, *inputs) -> outputs, on plain parameters.
      params: plain parameters.
      plan: what to deform.
      *inputs: example inputs.
      name: of the instance.
    """

    def evaluate() -> list[Certificate]:
        deformed = sd.apply_plan(params, plan)
        try:
            found = sd.preservation(apply, params, deformed, *inputs, dtypes=["float64"])["float64"]
        except LayeredUnsupported as error:
            require(False, f"the weight enters as the factor of activations only ({error})")
        merged, plain = jax.jit(apply)(sd.merge(deformed), *inputs), jax.jit(apply)(params, *inputs)
        worst = max(found.layers, key=lambda layer: layer.bound_ratio)
        return [
            equality(CLAIM, f"{name}, as released", found.max_error, 0.0, scale=1.0),
            equality(CLAIM, f"{name}, merged", merged[None], plain[None]),
            inequality("|C (Wt h) - W h| <= its rounding bound (statement 1.2)", f"{name}, {worst.path}",
                       worst.bound_ratio, 1.0, word=worst.word, note="in units of the bound"),
        ]  # fmt: skip

    return under_assumptions(CLAIM, name, evaluate)


# Exact arithmetic


def _rational(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """C Wt = W and (*) with rational numbers: what differs from zero differs."""
    count = {Size.SMALL: 20, Size.DEFAULT: 100, Size.FULL: 1000}[size]
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    wrong = dict.fromkeys(("symmetric", "rotated", "axis", "defect"), 0)
    for _ in range(count):
        m, n = (int(x) for x in rng.integers(2, 5, 2))
        k = int(rng.integers(1, m + 1))
        alpha = Fraction(int(rng.integers(1, 2000)), int(rng.integers(1, 50)))
        W, Q = _integers(rng, m, n), _orthogonal(rng, m)
        P = _identity(m)[:, rng.permutation(m)]
        D, inverse = _scales(m, k, alpha), _scales(m, k, 1 / alpha)
        wrong["symmetric"] += _differ(_T(1 / alpha, Q[:, :k]) @ (_T(alpha, Q[:, :k]) @ W), W)
        wrong["axis"] += _differ(_T(1 / alpha, P[:, :k]) @ (_T(alpha, P[:, :k]) @ W), W)
        wrong["rotated"] += _differ((Q @ inverse) @ (D @ (Q.T @ W)), W)
        U = _integers(rng, m, k) * Fraction(1, 3)
        E = U.T @ U - _identity(k)
        defect = -((alpha - 1) ** 2 / alpha) * (U @ E @ U.T @ W)
        wrong["defect"] += _differ(_T(1 / alpha, U) @ (_T(alpha, U) @ W) - W, defect)
    claims = {basis: f"C Wt = W exactly, {basis}" for basis in ("symmetric", "rotated", "axis")}
    claims["defect"] = "(*) exactly, for a rational U that is not orthonormal"
    name = "rational matrices up to 4 x 4, no rounding: entries that differ"
    return [
        inequality(claim, f"{name} in {count} instances", wrong[basis], 0.0)
        for basis, claim in claims.items()
    ]


def _integers(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    drawn = rng.integers(-9, 10, (m, n))
    return np.array([[Fraction(int(x)) for x in row] for row in drawn], object)


def _identity(m: int) -> np.ndarray:
    return np.array([[Fraction(int(i == j)) for j in range(m)] for i in range(m)], object)


def _orthogonal(rng: np.random.Generator, m: int) -> np.ndarray:
    """Return a rational orthogonal matrix: two Householder reflections."""
    Q = _identity(m)
    for _ in range(2):
        v = _integers(rng, m, 1)
        v[0, 0] = v[0, 0] or Fraction(1)  # not the zero vector
        Q = Q @ (_identity(m) - 2 * (v @ v.T) / (v.T @ v)[0, 0])
    return Q


def _T(alpha: Fraction, U: np.ndarray) -> np.ndarray:
    return _identity(len(U)) + (alpha - 1) * (U @ U.T)


def _scales(m: int, k: int, alpha: Fraction) -> np.ndarray:
    scaled = _identity(m)
    scaled[range(k), range(k)] = alpha
    return scaled


def _differ(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.sum(a != b))


# Directions that are not orthonormal


def _defect(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(*) in float64, and its bound, attained for one direction and one row."""
    sides = over_draws(functools.partial(_defect_draw, 5, 4, 2), key, size.draws)
    one = over_draws(functools.partial(_defect_draw, 5, 1, 1), key, 100)
    name = "Gaussian U 5 x 2, alpha up to 1e4"
    return [
        inequality("T(1/a) T(a) W - W = -((a - 1)^2 / a) U E U^T W", name, sides["error"], 0.0,
                   allowance=sides["allowance"], scale=sides["defect"]),
        inequality("||C Wt - W|| <= ((a - 1)^2 / a) ||U|| ||E|| ||U^T W||", name, sides["defect"],
                   sides["bound"], allowance=sides["allowance"], scale=sides["bound"]),
        tight("||C Wt - W|| <= ((a - 1)^2 / a) ||U|| ||E|| ||U^T W||", "one direction, W of one column",
              one["defect"], one["bound"], factor=1 + 1e-10, allowance=one["allowance"]),
    ]  # fmt: skip


def _defect_draw(m: int, n: int, k: int, key: PRNGKeyArray) -> dict[str, Array]:
    """Return the two sides of (*), spectral norms.

    The allowance: T(1/a), T(a) and their product with W are sums of at most m terms in factors of absolute
    values B = I + |U||U|^T and A = I + (a - 1)|U||U|^T, some 2m + 2k + 8 roundings in a row; the right hand
    side has factors |U|, |U^T U| + I, |U^T W|, as many; gamma_{4m+4k+16} times the sum of both covers it.
    """
    u_key, w_key, alpha_key = jax.random.split(key, 3)
    U, W = jax.random.normal(u_key, (m, k)) / m**0.5, jax.random.normal(w_key, (m, n))
    alpha = 10 ** jax.random.uniform(alpha_key, maxval=4.0)
    T, inverse = (jnp.eye(m) + (a - 1) * U @ U.T for a in (alpha, 1 / alpha))
    actual = inverse @ (T @ W) - W
    E = U.T @ U - jnp.eye(k)
    norms = [jnp.linalg.norm(x, 2) for x in (U, E, U.T @ W)]
    absolute, factor = jnp.abs(U) @ jnp.abs(U).T, jnp.square(alpha - 1) / alpha
    left = (jnp.eye(m) + absolute) @ (jnp.eye(m) + (alpha - 1) * absolute) @ jnp.abs(W)
    right = factor * jnp.abs(U) @ (jnp.abs(U).T @ jnp.abs(U) + jnp.eye(k)) @ jnp.abs(U).T @ jnp.abs(W)
    allowance = gamma(4 * m + 4 * k + 16, UNIT) * jnp.linalg.norm(left + right)
    return {
        "error": jnp.linalg.norm(bounds.pair_defect(W, U, alpha) - actual, 2),
        "defect": jnp.linalg.norm(actual, 2),
        "bound": factor * norms[0] * norms[1] * norms[2],
        "allowance": allowance,
    }


def _single_precision(key: PRNGKeyArray) -> Certificate:
    """A pair built from U in float32, as it stands, misses what the same U polished reaches."""
    W = jax.random.normal(key, (6, 8))
    U = orthonormal(key, 8, 2).astype(jnp.float32).astype(jnp.float64)
    alpha = 1e4
    T, inverse = (jnp.eye(8) + (a - 1) * U @ U.T for a in (alpha, 1 / alpha))
    weight, comp = build_pair(W, U, jnp.asarray(alpha), "symmetric", "output")
    polished = float(jnp.linalg.norm(weight @ comp - W) / jnp.linalg.norm(W))
    naive = float(jnp.linalg.norm((W @ T) @ inverse - W) / jnp.linalg.norm(W))
    claim, told = "U orthonormal to single precision makes a pair as exact", f"8 features, a = {alpha:g}"
    note = f"relative error {naive:.1e}; with U polished first {polished:.1e}"
    return refuted(claim, told, naive, 1e5 * polished, word=Word.CHECKED, note=note)


def _outside(key: PRNGKeyArray) -> list[Certificate]:
    """A network that also reads the norm of its weight is refused."""
    instance = mlp_instance(key)
    plan = sd.plan(instance.params, sd.SpecDef(alpha=ALPHA), where=instance.where, key=key)
    refused = on_network(_weight_normalized, instance.params, plan, instance.args[0], name="")
    return [refuses(CLAIM, "a network with weight normalization", refused, "factor of activations only")]


def _weight_normalized(params: PyTree, x: Float[Array, "batch n"]) -> Float[Array, "batch m"]:
    h = jnp.tanh(x @ params["layer_0"]["w"])
    kernel = params["layer_1"]["w"]
    return h @ (kernel / jnp.linalg.norm(kernel, axis=0))
