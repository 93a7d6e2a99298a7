"""Families of random matrices, from harmless to adversarial, to be drawn under vmap."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from theory.sizes import Size

Family = Callable[[PRNGKeyArray, tuple[int, int]], Array]
Triple = tuple[Array, Array, Array]


def gaussian(key: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "m n"]:
    """Independent standard normals."""
    return jax.random.normal(key, shape)


def rank_deficient(key: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "m n"]:
    """Half the full rank, rounded up, so one at least is missing when min(m, n) > 1."""
    left, right = jax.random.split(key)
    rank = max(1, min(shape) // 2)
    return gaussian(left, (shape[0], rank)) @ gaussian(right, (rank, shape[1])) / rank


def clustered(key: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "m n"]:
    """Singular values that agree to three digits: singular vectors are ill-determined."""
    values_key, vectors_key = jax.random.split(key)
    values = 1 + 1e-3 * jax.random.uniform(values_key, (min(shape),))
    return with_spectrum(vectors_key, shape, values)


def graded(key: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "m n"]:
    """Singular values that fall by six decades."""
    return with_spectrum(key, shape, jnp.logspace(0, -6, min(shape)))


def with_spectrum(
    key: PRNGKeyArray, shape: tuple[int, int], values: Float[Array, " r"]
) -> Float[Array, "m n"]:
    """Random singular vectors, prescribed singular values."""
    left, right = jax.random.split(key)
    r = len(values)
    return (orthonormal(left, shape[0], r) * values) @ orthonormal(right, shape[1], r).T


def orthonormal(key: PRNGKeyArray, d: int, k: int) -> Float[Array, "d k"]:
    """Orthonormal columns, uniformly distributed."""
    Q, R = jnp.linalg.qr(jax.random.normal(key, (d, k)))
    return Q * jnp.sign(jnp.diagonal(R))


FAMILIES: dict[str, Family] = {
    "gaussian": gaussian,
    "graded": graded,
    "rank deficient": rank_deficient,
    "clustered": clustered,
}


def families(size: Size) -> dict[str, Family]:
    """One harmless and one hard family by default, all of them in full."""
    return FAMILIES if size is Size.FULL else {name: FAMILIES[name] for name in ("gaussian", "graded")}


def aligned_triple(key: PRNGKeyArray, p: int, m: int, n: int, q: int) -> Triple:
    """A (p, m), B (m, n), C (n, q) that meet B's top singular vectors at adversarial angles.

    B has two close singular values, A sees its left and C its right top vector under random angles with
    random signs, so that the contributions of the two values interfere destructively.
    """
    keys = jax.random.split(key, 5)
    U, V = orthonormal(keys[0], m, m), orthonormal(keys[1], n, n)
    r = min(m, n)
    values = jnp.sort(1 + 0.2 * jax.random.uniform(keys[2], (r,)), descending=True)
    B = (U[:, :r] * values) @ V[:, :r].T
    angles = jax.random.uniform(keys[3], (2,), minval=-jnp.pi / 2, maxval=jnp.pi / 2)
    along = (
        jnp.cos(angles[0]) * U[:, 0] + jnp.sin(angles[0]) * U[:, min(1, m - 1)],
        jnp.cos(angles[1]) * V[:, 0] + jnp.sin(angles[1]) * V[:, min(1, n - 1)],
    )
    noise = jax.random.split(keys[4])
    A = 1e-3 * gaussian(noise[0], (p, m)).at[0].add(1e3 * along[0])
    C = 1e-3 * gaussian(noise[1], (n, q)).at[:, 0].add(1e3 * along[1])
    return A, B, C


def triples(size: Size) -> dict[str, Callable[..., Triple]]:
    """Families of (A, B, C), each a function of (key, p, m, n, q)."""
    drawn = {name: functools.partial(_independent, family) for name, family in families(size).items()}
    return {**drawn, "adversarially aligned": aligned_triple}


def _independent(family: Family, key: PRNGKeyArray, p: int, m: int, n: int, q: int) -> Triple:
    """A and C from the family, B too."""
    a, b, c = jax.random.split(key, 3)
    return family(a, (p, m)), family(b, (m, n)), family(c, (n, q))
