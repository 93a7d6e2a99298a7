"""The matrix inequalities behind statement 2.2, on matrices without a network.

H_1 symmetric, phi^-1 = D = diag(a on F, 1/a on S, 1 on R), H_a = D H_1 D, k = ||K||, K the block of H_1 on F,
c = ||H_1's rows beside F, columns F||, r = ||the block of H_1 beside F||. For a >= 1

    a^2 k <= ||H_a|| <= a^2 ||H_1||,      ||H_a|| <= Lambda(a) <= a^2 k + r + c^2 / k.

Proofs in theory/s2_2_sandwich.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from specdef_jax import bounds
from theory.certificate import Certificate, inequality, refuted, tight
from theory.draws import over_draws
from theory.falsifier import falsify
from theory.hessians import rounding, sigma_1
from theory.instances.matrices import FAMILIES, Family
from theory.sizes import Size

CLAIMS = {
    "lower": "a^2 ||K|| <= ||H_a||",
    "upper": "||H_a|| <= a^2 ||H_1||",
    "Lambda": "||H_a|| <= Lambda(a)",
    "remainder": "||H_a|| <= a^2 ||K|| + r + c^2 / k",
}


def random_blocks(family: str, key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Certify the inequalities on random matrices, a quarter of them without a fast block."""
    sides = over_draws(functools.partial(_draw, FAMILIES[family]), key, size.draws)
    told = f"{family} 6 x 6, two directions each of a, 1/a and 1, a = 1 ... 1e3"
    return [
        inequality(claim, told, 0.0, sides[name], allowance=sides["allowance " + name])
        for name, claim in CLAIMS.items()
    ]


def falsified(key: PRNGKeyArray, size: Size) -> Certificate:
    """Let the falsifier at all four at once."""
    steps = 100 if size is Size.SMALL else 200
    found = falsify(_least_slack, _sample, key, tried=size.draws, climbed=size.starts, steps=steps)
    return inequality(
        "the four inequalities where a falsifier looks", "the smallest slack at the worst point it found",
        0.0, _least_slack(found.point), search=found.search,
    )  # fmt: skip


def tight_blocks() -> list[Certificate]:
    """Certify that Lambda and both terms of the constant are attained, and that one is needed."""
    a, E, pair = 1e4, jnp.array([[1.0], [0.0]]), "a 2 x 2 matrix"
    D = jnp.array([a, 1.0])
    full, coupled, unequal = (
        jnp.array(H) for H in ([[2.0, 1.0], [1.0, 3.0]], [[2.0, 4.0], [4.0, 0.0]], [[1e-9, 0.0], [0.0, 3.0]])
    )
    blocks = [bounds.fast_blocks(H, E) for H in (full, coupled, unequal)]
    small = jnp.array([2.0, 1.0])
    at_two, at_a = (d[:, None] * H * d for d, H in ((small, full), (D, coupled)))
    remainder = sigma_1(at_a) - a**2 * 2
    return [
        tight("||H_a|| = Lambda(a)", f"{pair}, a = 2", sigma_1(at_two),
              bounds.sharpness_upper(2.0, blocks[0]), factor=1 + 1e-12, allowance=rounding(at_two)),
        tight("||H_a|| - a^2 ||K|| -> c^2 / k", f"{pair}, k = 2, c = 4, r = 0, a = 1e4", remainder,
              bounds.sharpness_remainder(blocks[1]), factor=1 + 1e-6, allowance=rounding(at_a)),
        tight("||H_1|| - ||K|| -> r", f"{pair}, k = 1e-9, c = 0, r = 3, a = 1", sigma_1(unequal) - 1e-9,
              bounds.sharpness_remainder(blocks[2]), factor=1 + 1e-8),
        refuted("||H_a|| <= a^2 ||K|| without a remainder is false", f"{pair}, a = 1e4", remainder, 0.0,
                allowance=rounding(at_a)),
    ]  # fmt: skip


def _draw(family: Family, key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 3)
    X = family(keys[0], (6, 6))
    empty = jax.random.bernoulli(keys[1], 0.25) * jnp.zeros((6, 6)).at[:2, :2].set(1.0)
    a = 10 ** jax.random.uniform(keys[2], maxval=3.0)
    return _slacks((X + X.T) / 2 * (1 - empty), a, jnp.array([a, a, 1 / a, 1 / a, 1.0, 1.0]))


def _sample(key: PRNGKeyArray) -> dict[str, Array]:
    H, log_alpha = jax.random.split(key)
    return {"H": jax.random.normal(H, (5, 5)), "log alpha": jax.random.uniform(log_alpha, maxval=3.0)}


def _least_slack(point: dict[str, Array]) -> Array:
    a = jnp.exp(jnp.abs(point["log alpha"]))
    found = _slacks((point["H"] + point["H"].T) / 2, a, jnp.array([a, a, 1 / a, 1.0, 1.0]))
    return jnp.min(jnp.stack([found[name] + found["allowance " + name] for name in CLAIMS]))


def _slacks(H: Array, a: Array, D: Array) -> dict[str, Array]:
    """Return the slack of each inequality and its allowance, relative to a^2 ||H_1||; two fast directions.

    Allowance: D H D rounds each entry twice, eigvalsh and svd are backward stable; so the norm of a block of
    H_1, which appears times a^2, a or 1, is off by at most `rounding` of H_1, and ||H_a|| by that of H_a. In
    the remainder c^2/k has the derivative c^2/k^2 in k, and 2 c/k <= 1 + c^2/k^2 in c. Without a fast block
    the remainder is infinite and claims nothing.
    """
    H_a = D[:, None] * H * D
    norm, sharpness = jnp.max(jnp.abs(jnp.linalg.eigvalsh(jnp.stack([H, H_a]))), axis=1)
    blocks = bounds.fast_blocks(H, jnp.eye(len(H))[:, :2])
    lower, upper = bounds.sandwich_sides(a, blocks.fast, norm)
    constant = jnp.where(blocks.fast > 0, bounds.sharpness_remainder(blocks), jnp.inf)
    slacks = {
        "lower": sharpness - lower,
        "upper": upper - sharpness,
        "Lambda": bounds.sharpness_upper(a, blocks) - sharpness,
        "remainder": jnp.where(blocks.fast > 0, lower + constant - sharpness, 0.0),
    }
    allowance = rounding(H_a) + 3 * jnp.square(a) * rounding(H)
    steep = jnp.where(blocks.fast > 0, jnp.square(blocks.coupling / blocks.fast), 0.0)
    allowances = {f"allowance {name}": allowance for name in CLAIMS}
    allowances["allowance remainder"] = allowance * (1 + steep)
    return {name: value / upper for name, value in (slacks | allowances).items()}
