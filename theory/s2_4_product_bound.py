"""Statement 2.4 [paper, as reported; corrected ours]: Product bound on an off-diagonal block.

STATEMENT. Let A (p x m), B (m x n), C (n x q) be real. For 1 <= r1 <= min(p, m), 1 <= r2 <= min(n, q) let
P hold the top r1 right singular vectors of A and Q the top r2 left singular vectors of C. Write
B = U S V^T, sigma_{k+1}(B) = 0 for k = min(m, n). Then sigma_1(ABC) is at least each of

    V1   sigma_r1(A) sigma_1(B) sigma_r2(C) smin(P^T U_B) smin(V_B^T Q)                    r1, r2 >= rank B,
    V2   sigma_r1(A) sigma_r2(C) [sigma_1(B) c1 c2 - sigma_2(B) s1 s2]_+ ,
    V2k  sigma_r1(A) sigma_r2(C) [sigma_1(B) smin(P^T U_k) smin(V_k^T Q) - sigma_{k+1}(B)]_+ ,   k <= r1, r2,

where U_B, V_B belong to the nonzero singular values, U_k, V_k to the first k, smin(X) is the k-th singular
value of X with k columns, c1 = |P^T u_1|, c2 = |Q^T v_1|, s^2 = 1 - c^2. The reading reported for the paper,

    R    sigma_1(H) >= sup sigma_r1(A) sigma_1(B) sigma_r2(C) c1 c2,

with the angles taken between B's TOP singular vectors and the two subspaces, is FALSE:
A = (cos .7, sin .7), B = diag(1.01, 1), C = (-sin .7, cos .7)^T give sigma_1(ABC) = .0049 and R = .498.

ASSUMPTIONS. None beyond the indices; r1, r2 >= rank B for V1, without which V1 is false.

PROOF. Restricting A to its top r1 singular directions, A = sum_i sigma_i a_i p_i^T, gives for every x
|A x| >= sigma_r1(A) |P^T x|, and likewise |y^T C| >= sigma_r2(C) |y^T Q|. So
sigma_1(ABC) >= sup_{|w| = 1} |A B Q' w|-type quotients; explicitly, choose the unit z with C z = sigma Q w,
|C z| >= sigma_r2 for w a unit vector of R^r2 (z lies in the span of the top r2 right singular vectors of C,
C z = Q D z' with D >= sigma_r2, so every Q w is C z with |z| <= 1/sigma_r2). Then
|A B C z| >= sigma_r1(A) |P^T B Q w|, and the supremum over w is

    (*)   sigma_1(ABC) >= sigma_r1(A) ||P^T B Q|| sigma_r2(C).

V1: P^T B Q = (P^T U_B) S_B (V_B^T Q). A matrix X with full column rank has |X y| >= smin(X) |y|, so
||P^T B Q|| >= smin(P^T U_B) ||S_B V_B^T Q|| = smin(P^T U_B) ||Q^T V_B S_B|| >= smin(P^T U_B)
smin(Q^T V_B) sigma_1(B), the last because |Q^T V_B S_B e_1| >= smin sigma_1. Full column rank needs
r1, r2 >= rank B. If r1 < rank B, the factor called smin would be the smallest singular value of a wide
matrix, and the first inequality fails: that variant is refuted below.
V2k: split B = U_k S_k V_k^T + B', ||B'|| = sigma_{k+1}(B). By the triangle inequality ||P^T B Q|| >=
||P^T U_k S_k V_k^T Q|| - sigma_{k+1}(B), and the first term is bounded as in V1.
V2: let x = P P^T u_1 / c1 and y = Q Q^T v_1 / c2, unit vectors of the two subspaces (if c1 c2 = 0 the bound
is 0 and there is nothing to prove). Write x = c1 u_1 + s1 u', y = c2 v_1 + s2 v' with unit u' orthogonal
to u_1 and v' to v_1. Then ||P^T B Q|| >= x^T B y = sigma_1 c1 c2 + s1 s2 u'^T B v' >= sigma_1 c1 c2 -
sigma_2 s1 s2, as u_1^T B v' = u'^T B v_1 = 0. QED.

TIGHTNESS. With A = I, C = I all three equal sigma_1(B). V2 is attained for rank one A and C by
construction of x and y when u', v' are the second singular vectors with opposite signs. V1 is vacuous when
A or C has fewer singular values than B has rank, V2 and V2k once the angles are so wide that the bracket is
negative: the certificates say how often.

CONSEQUENCE. In alpha: V2k grows linearly only in blocks that have C as a row and no compensation inside A
or C; the quadratic growth of 2.2 sits in the compensation's own block, which no product bound sees.

SOURCE. Theorem 3 of arXiv 2602.18868 in the reading of third parties; Horn and Johnson, Topics in Matrix
Analysis (1991), theorem 3.3.14, is the case of cosines 1; the corrected forms are ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from specdef_jax.bounds import product
from theory.assumptions import require
from theory.certificate import (
    Certificate,
    Certificates,
    inequality,
    refuses,
    refuted,
    seen,
    tight,
    under_assumptions,
)
from theory.draws import over_draws
from theory.falsifier import Found, falsify
from theory.instances.matrices import triples
from theory.sizes import Size

Bound = Callable[[Array, Array, Array], Array]
Shape = tuple[int, int, int, int]
VALID: dict[str, Bound] = {"V1": product.product_v1, "V2": product.product_v2, "V2k": product.product_v2k}
SHAPES: tuple[Shape, ...] = ((1, 2, 2, 1), (3, 3, 3, 3), (2, 4, 3, 5))
MORE_SHAPES: tuple[Shape, ...] = (*SHAPES, (2, 2, 2, 2), (5, 5, 5, 5), (8, 8, 8, 8), (8, 3, 6, 2))


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify the valid bounds, refute the reported reading, and say how tight each is."""
    shapes = {Size.SMALL: SHAPES[:2], Size.DEFAULT: SHAPES, Size.FULL: MORE_SHAPES}[size]
    found: list[Certificate] = [_counterexample()]
    for i, (name, sample) in enumerate(triples(size).items()):
        for j, shape in enumerate(shapes):
            k = jax.random.fold_in(jax.random.fold_in(key, i), j)
            found += _on_family(f"{name} {shape}", functools.partial(_sample, sample, shape), k, size)
    found += [_survival(name, shapes[-1], key, size) for name in VALID]
    found.append(_falsified(shapes[0], key, size))
    found += _tight(size)
    found.append(_needs_rank(key, size))
    return tuple(found)


def check_v1(A: Array, B: Array, C: Array, r1: int, r2: int) -> Certificates:
    """Certify V1 at given indices; they must be at least the rank of B."""

    def evaluate() -> Certificate:
        rank = int(np.linalg.matrix_rank(np.asarray(B)))
        require(min(r1, r2) >= rank, f"r1, r2 >= rank B (r1 = {r1}, r2 = {r2}, rank B = {rank})")
        bound = _v1_at(A, B, C, r1, r2)
        return inequality(
            "V1 <= sigma_1(ABC)",
            f"r1 = {r1}, r2 = {r2}",
            bound,
            _sigma_1(A, B, C),
            allowance=product.product_allowance(A, B, C),
        )

    return under_assumptions("V1 <= sigma_1(ABC)", f"r1 = {r1}, r2 = {r2}", evaluate)


def _counterexample() -> Certificate:
    """Print the counterexample to the reported reading."""
    s, c = np.sin(0.7), np.cos(0.7)
    A, B, C = jnp.array([[c, s]]), jnp.diag(jnp.array([1.01, 1.0])), jnp.array([[-s], [c]])
    return refuted(
        "R: sup sigma_r1(A) sigma_1(B) sigma_r2(C) cos cos <= sigma_1(ABC) is false",
        "A = (cos .7, sin .7), B = diag(1.01, 1), C = (-sin .7, cos .7)^T",
        product.product_reported(A, B, C),
        _sigma_1(A, B, C),
        allowance=product.product_allowance(A, B, C),
        note="counterexample: R and sigma_1(ABC) are the two sides",
    )


def _on_family(
    instance: str, sample: Callable[[PRNGKeyArray], tuple[Array, Array, Array]], key: PRNGKeyArray, size: Size
) -> list[Certificate]:
    sides = over_draws(functools.partial(_sides, sample), key, size.draws)
    sigma, allowance = sides["sigma_1"], sides["allowance"]
    certificates = [
        inequality(
            f"{name} <= sigma_1(ABC)",
            instance,
            sides[name],
            sigma,
            allowance=allowance,
            scale=sides["norms"],
            note=_how_tight(sides[name], sigma, allowance),
        )
        for name in VALID
    ]
    violated = float(np.mean(sides["R"] > sigma + allowance))
    certificates.append(
        seen(
            "share of instances that violate R",
            instance,
            violated,
            True,
            note=_how_tight(sides["R"], sigma, allowance),
        )
    )
    return certificates


def _how_tight(bound: np.ndarray, sigma: np.ndarray, allowance: np.ndarray) -> str:
    """Tell the ratio to the truth, and how often the bound says nothing."""
    told = bound > allowance
    ratio = bound[told] / sigma[told]
    vacuous = f"vacuous on {1 - told.mean():.1%}"
    if not ratio.size:
        return vacuous
    return f"median {np.median(ratio):.3f}, best {ratio.max():.4f} of sigma_1(ABC), {vacuous}"


def _survival(name: str, shape: Shape, key: PRNGKeyArray, size: Size) -> Certificate:
    """Let the falsifier at a valid bound."""
    found = _search(VALID[name], shape, key, size)
    bound, sigma = VALID[name](*found.point), _sigma_1(*found.point)
    return inequality(
        f"{name} <= sigma_1(ABC) where a falsifier looks",
        f"the worst point it found, {shape}",
        bound,
        sigma,
        allowance=product.product_allowance(*found.point),
        scale=_norms(*found.point),
        search=found.search,
    )


def _falsified(shape: Shape, key: PRNGKeyArray, size: Size) -> Certificate:
    """The same falsifier refutes the reported reading."""
    found = _search(product.product_reported, shape, key, size)
    A, B, C = (np.round(np.asarray(X), 3).tolist() for X in found.point)
    return refuted(
        "R is false, as the falsifier finds by itself",
        f"the worst point it found, {shape}",
        product.product_reported(*found.point),
        _sigma_1(*found.point),
        allowance=product.product_allowance(*found.point),
        search=found.search,
        note=f"A = {A}, B = {B}, C = {C}",
    )


def _tight(size: Size) -> list[Certificate]:
    """Instances on which the two sides meet."""
    B = jnp.diag(jnp.array([3.0, 1.0, 0.5]))
    eye = jnp.eye(3)
    sides = [
        tight(
            f"{name} = sigma_1(ABC)",
            "A = C = I",
            bound(eye, B, eye),
            _sigma_1(eye, B, eye),
            factor=1 + 1e-12,
            allowance=product.product_allowance(eye, B, eye),
        )
        for name, bound in VALID.items()
    ]
    t = 0.4
    A, C = jnp.array([[np.cos(t), np.sin(t)]]), jnp.array([[np.cos(t)], [-np.sin(t)]])
    B = jnp.diag(jnp.array([2.0, 1.0]))
    sides.append(
        tight(
            "V2 = sigma_1(ABC)", "rank one A and C with destructive interference, angle .4",
            product.product_v2(A, B, C), _sigma_1(A, B, C), factor=1 + 1e-12,
            allowance=product.product_allowance(A, B, C),
        )
    )  # fmt: skip
    return sides


def _needs_rank(key: PRNGKeyArray, size: Size) -> Certificate:
    """V1 with r1 < rank B is refused."""
    A, B, C = _sample(triples(size)["gaussian"], (3, 3, 3, 3), key)
    return refuses(
        "V1 outside r1, r2 >= rank B is refused", "r1 = 1, rank B = 3", check_v1(A, B, C, 1, 3), "rank B"
    )


def _sample(family: Callable[..., tuple], shape: Shape, key: PRNGKeyArray) -> tuple[Array, Array, Array]:
    return family(key, *shape)


def _search(bound: Bound, shape: Shape, key: PRNGKeyArray, size: Size) -> Found:
    return falsify(
        _slack(bound), _gaussian_triple(shape), key, tried=size.draws, climbed=size.starts,
        steps=100 if size is Size.SMALL else 200,
    )  # fmt: skip


@functools.cache
def _slack(bound: Bound) -> Callable[[tuple[Array, Array, Array]], Array]:
    """Return the slack of a bound, normalised by ||A|| ||B|| ||C||, its rounding allowance added."""

    def slack(point: tuple[Array, Array, Array]) -> Array:
        gap = _sigma_1(*point) - bound(*point) + product.product_allowance(*point)
        return gap / _norms(*point)

    return slack


@functools.cache
def _gaussian_triple(shape: Shape) -> Callable[[PRNGKeyArray], tuple[Array, Array, Array]]:
    return functools.partial(_sample, triples(Size.DEFAULT)["gaussian"], shape)


def _sides(sample: Callable, key: PRNGKeyArray) -> dict[str, Array]:
    A, B, C = sample(key)
    sides = {name: bound(A, B, C) for name, bound in VALID.items()}
    sides |= {"R": product.product_reported(A, B, C), "sigma_1": _sigma_1(A, B, C)}
    return sides | {"allowance": product.product_allowance(A, B, C), "norms": _norms(A, B, C)}


def _sigma_1(A: Array, B: Array, C: Array) -> Float[Array, ""]:
    return jnp.linalg.norm(A @ B @ C, 2)


def _norms(A: Array, B: Array, C: Array) -> Float[Array, ""]:
    return jnp.linalg.norm(A, 2) * jnp.linalg.norm(B, 2) * jnp.linalg.norm(C, 2)


def _v1_at(A: Array, B: Array, C: Array, r1: int, r2: int) -> Float[Array, ""]:
    """Return V1 at given indices, from full decompositions."""
    _, a, Vt = jnp.linalg.svd(A)
    U, b, Wt = jnp.linalg.svd(B)
    Q, c, _ = jnp.linalg.svd(C)
    rank = int(jnp.sum(b > 1e-12 * b[0]))
    low_1 = jnp.linalg.svd(Vt[:r1] @ U[:, :rank], compute_uv=False)[rank - 1]
    low_2 = jnp.linalg.svd(Q[:, :r2].T @ Wt[:rank].T, compute_uv=False)[rank - 1]
    return a[r1 - 1] * b[0] * c[r2 - 1] * low_1 * low_2
