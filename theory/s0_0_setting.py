"""Statement 0 [paper, ours]: The deformed pair is exact for any orthonormal directions.

STATEMENT. y = W h with W in R^(m x n); U in R^(m x k) with U^T U = I, 1 <= k <= m; a > 0 (a >= 1 by
convention: a < 1 swaps the roles of the factors);

    T(a) = I + (a - 1) U U^T,     Wt = T(a) W,     C = T(1/a).

(i) T(a) T(1/a) = I, so C Wt = W for every W and every such U: no singular vector is needed, U may be random,
    columns of the identity, or orthogonal to the range of W. C costs m^2 numbers. On the input side
    W = Wt C with Wt = W T'(a), C = T'(1/a), U in R^(n x k), and n^2. Stored as (U, a), C costs k m + 1.
(ii) The paper's C = U S S~^-1 U^T, from the thin W = U S V^T with S~ = S but its first k <= rank W values
    times a, is T(1/a) only where W has full row rank (U square, S invertible). With the pseudoinverse it is
    T(1/a) P, P the projector onto the range of W: C Wt = W still, but ||C - T(1/a)|| = 1 and C has rank
    rank W; with S singular S~^-1 does not exist. Hence C is DEFINED as T(1/a).
(iii) For an orthogonal R the pair (C R^T, R Wt) has the same product, the same Hessian spectrum, and
    gradient descent takes the same path of C Wt (and of all other parameters). For any other invertible R, in
    (C R^-1, R Wt), there are networks where the spectrum changes, and where the path does. Not on every
    network: for L = (c w - t)^2 / 2 the factor R = c/w swaps the two numbers, which changes neither. The
    rotated basis (C Q, Q^T Wt), Q = [U, U_perp], is the case R = Q^T. Adam and other coordinatewise methods
    tell symmetric from rotated.
(iv) Gauge placement: two linear maps V, O with y = sum_i O_i sum_s A_i V h_s + (A_i acting on positions only)
    take T V (and T b for a bias b of V) and O_i T^-1: the same function for all parameters, with several
    query heads i per key-value head, sinks, windows and biases. Not with a norm or a quantization between.
(v) With T diagonal and positive also across positively homogeneous activations (ReLU, leaky ReLU), between
    the up and down maps of a gated unit without clamp, and between a norm's gain (and bias) and its readers.
    For a T that is not diagonal this is false, and so it is for GELU, tanh and a clamped gate.

ASSUMPTIONS. U^T U = I (how a defect is amplified: statement 1.1), a > 0. (iv), (v): what stands between the
two maps is as described.

PROOF. (i) With P_U = U U^T, P_U^2 = P_U: T(a) T(1/a) = I + [(a - 1) + (1/a - 1) + (a - 1)(1/a - 1)] P_U, and
the bracket is a/a - 1 = 0. Transpose for the input side.
(ii) S S~^+ is diagonal with 1/a (k times), 1 (rank W - k times) and zeros, so C = U_r U_r^T +
(1/a - 1) U_k U_k^T with U_r the left singular vectors of nonzero singular values. As U_k U_k^T P = U_k U_k^T,
this is T(1/a) P. P W = W and P T(a) W = T(a) W (P commutes with U_k U_k^T), so C Wt = T(1/a) T(a) W = W.
T(1/a) - C = T(1/a)(I - P) = I - P, of norm 1 unless P = I, which is full row rank.
(iii) rho: (C, Wt, rest) -> (C R^T, R Wt, rest) is linear and L(rho theta) = L(theta) for all theta, as
(C R^T)(R Wt) = C Wt. For orthogonal R it preserves Frobenius norms, so rho^-1 = rho^T. Differentiating
twice, H(rho theta) = rho H(theta) rho^T: similar. Once, g(rho theta) = rho g(theta): a gradient step
commutes with rho, and by induction the paths correspond. If R is invertible and not orthogonal, neither is
R^-1, so some C has ||C R^-1||_F != ||C||_F. Take L = |C Wt h - t|^2 / 2, |h| = 1, at Wt h = 0: the trace of
the Hessian is m |Wt h|^2 + ||C||_F^2 = ||C||_F^2, so the spectrum changes. There a gradient step of size eta
changes C Wt h by eta C C^T t, for the pair with R by eta C (R^T R)^-1 C^T t; at C = I they differ for some t,
as R^T R != I. The exception: L reads c w only, and the scalar R = c/w maps (c, w) to (c / R, R w) = (w, c), a
permutation.
Q is orthogonal, and (C Q, Q^T Wt) has the form (C R^T, R Wt).
(iv) A_i mixes positions and T features: T commutes with A_i, and O_i T^-1 sum A_i T (V h + b) =
O_i sum A_i (V h + b). (v) s(D z) = D s(z) for D positive and diagonal and s positively homogeneous
coordinatewise; act(g) * (D u) = D (act(g) * u); n * (D g) + D b = D (n * g + b). QED.

TIGHTNESS. Equalities; the allowances of (i) are derived in _allowances.

SOURCE. arXiv 2602.18868 as reported (pair, alpha 1e4, k 25); (i) for any U, (iii) and (iv) are ours; (v) is
folklore. Low-rank storage (U, a) is another parametrization when U is trained; its curvature grows as a^2.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.pair import build_pair
from specdef_jax.precision import gamma
from specdef_jax.spec import Plan
from theory.certificate import Certificate, Certificates, equality, fit, inequality
from theory.draws import over_draws
from theory.fits import exponent
from theory.hessians import sigma_1
from theory.instances.matrices import FAMILIES, orthonormal
from theory.instances.networks import networks
from theory.pair_factors import ALPHA, apart, factors, swap
from theory.placements import placements
from theory.sizes import Size

DIMS = (3, 4)  # rest, features: k runs to 4
UNIT = 2.0**-53


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify the pair on random matrices, its orthogonal freedom on networks, and the placements."""
    found = [*_exact(key, size), *_paper(key, size)]
    for instance in networks(size, key):
        # Compilation is most of the time: both sides of the transformer in full only.
        both = size is Size.FULL or (size is Size.DEFAULT and instance.positions == 1)
        for side in ("output", "input") if both else ("output",):
            found += factors(instance, side, key)
    found += [*swap(), *placements(key, size), *_cost(key)]
    return tuple(found)


# (i) the pair


def _exact(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """C Wt = W for every basis, side and k, on random and structured W and U, alpha up to 1e6."""
    ks = {Size.SMALL: (2,), Size.DEFAULT: (1, 2, 4), Size.FULL: (1, 2, 3, 4)}[size]
    draws = [over_draws(functools.partial(_draw, k), jax.random.fold_in(key, k), size.draws) for k in ks]
    sides = jax.tree.map(lambda *xs: np.concatenate(xs), *draws)
    told = f"k = {', '.join(map(str, ks))} of 4; random, singular, null-space, axis and nearly-axis U"
    claim, note = "||C Wt - W||_F = 0", "allowance derived, see _allowances"
    return [
        inequality(
            claim, f"{basis}, {side} side; {told}", error, 0.0, allowance=allowance, scale=norm, note=note
        )
        for (basis, side), (error, allowance, norm) in sides.items()
    ]


def _draw(k: int, key: PRNGKeyArray) -> dict[tuple[str, str], tuple[Array, Array, Array]]:
    """Return, per basis and side, error of the product, its allowance, and the norm of the matrix."""
    matrix_key, family_key, u_key, kind_key, alpha_key, axis_key = jax.random.split(key, 6)
    drawn = jnp.stack([family(matrix_key, DIMS) for family in FAMILIES.values()])
    matrix = drawn[jax.random.randint(family_key, (), 0, len(drawn))]
    d = DIMS[1]
    V = jnp.linalg.svd(matrix)[2].T
    near = jnp.eye(d, k) + 1e-8 * jax.random.normal(u_key, (d, k))
    given = jnp.stack([orthonormal(u_key, d, k), V[:, :k], V[:, d - k :], jnp.eye(d)[:, d - k :], near])
    U = jnp.linalg.qr(given[jax.random.randint(kind_key, (), 0, len(given))])[0]
    axes = jax.random.permutation(axis_key, jnp.eye(d), axis=1)[:, :k]
    alpha = 10 ** jax.random.uniform(alpha_key, maxval=6.0)
    found = {}
    for basis in ("symmetric", "rotated", "axis"):
        directions = axes if basis == "axis" else U
        allowance = _allowances(matrix, U, alpha)[basis]
        for side, W in (("output", matrix), ("input", matrix.T)):
            weight, comp = build_pair(W, directions, alpha, basis, side)
            product = weight @ comp if side == "output" else comp @ weight
            found[basis, side] = jnp.linalg.norm(product - W), allowance, jnp.linalg.norm(matrix)
    return found


def _allowances(matrix: Float[Array, "rest d"], U: Float[Array, "d k"], alpha: Array) -> dict[str, Array]:
    """Return by how much rounding may move the product of a pair, in the Frobenius norm.

    gamma_n = n u / (1 - n u) bounds n roundings in a row (Higham 2002, 3.1 and 3.5), sums in any order.
    Symmetric: A = |W| (I + (a - 1)|U||U|^T) >= |Wt|, B = I + |U||U|^T >= |C|. Computed, |dWt| <=
    gamma_{d+k+3} A (a sum of d, the factor a - 1, a sum of k, an addition) and |dC| <= gamma_{k+3} B (1/a - 1
    in two roundings, of absolute size u; a factor, a sum of k, an addition); the product adds gamma_d:
    gamma_{2d+2k+6} A B in all. The pair polishes U by one Cholesky step, G = U^T U = L L^T, U <- U L^-T: its
    Gram matrix is I within e = (gamma_d + gamma_{k+1} + 4 gamma_k) k, from the product, the factorization,
    and twice the inverse and the product with it, norms being 1; by statement 1.1 that moves the product by
    (a - 1)^2/a ||W U|| e.
    Rotated: gamma_{2d+2} |W||Q||Q^T| as the scales cancel, and ||Q Q^T - I|| <= 4 sqrt(d) gamma_{dk} for
    Householder's Q (Higham 2002, (19.13), whose small constant is taken as 2 and validated in the tests).
    Axis: three roundings of each entry. The factor 1.01 covers second orders and this evaluation.
    """
    d, k = U.shape
    polished = (gamma(d, UNIT) + gamma(k + 1, UNIT) + 4 * gamma(k, UNIT)) * k
    absolute, norm = jnp.abs(U) @ jnp.abs(U).T, jnp.linalg.norm(matrix)
    A, B = jnp.abs(matrix) @ (jnp.eye(d) + (alpha - 1) * absolute), jnp.eye(d) + absolute
    symmetric = gamma(2 * d + 2 * k + 6, UNIT) * jnp.linalg.norm(A @ B)
    symmetric += jnp.square(alpha - 1) / alpha * jnp.linalg.norm(matrix @ U) * polished
    rotated = gamma(2 * d + 2, UNIT) * norm * d + 4 * d**0.5 * gamma(d * k, UNIT) * norm
    return {"symmetric": 1.01 * symmetric, "rotated": 1.01 * rotated, "axis": 1.01 * gamma(3, UNIT) * norm}


# (ii) the paper's compensation

SHAPES = {"full row rank": (3, 5, 3), "rectangular U": (5, 3, 3), "singular S": (4, 5, 2)}


def _paper(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """U S S~^+ U^T against T(1/a) and T(1/a) P, from the singular vectors that W was made of."""
    found: list[Certificate] = []
    for name, (m, n, rank) in SHAPES.items():
        draw = functools.partial(_paper_draw, m, n, rank)
        sides = over_draws(draw, jax.random.fold_in(key, m), max(size.draws // 10, 100))
        zero = np.zeros(len(sides["T"]))
        where = f"{name}: W {m} x {n} of rank {rank}"
        found += [
            equality("U S S~^+ U^T = T(1/a) P", where, sides["TP"], zero, scale=1.0),
            equality("U S S~^+ U^T Wt = W", where, sides["W"], zero, scale=1.0),
        ]
        if rank == m:
            found.append(equality("U S S~^-1 U^T = T(1/a)", where, sides["T"], zero, scale=1.0))
        else:
            note = "C has rank rank W, so it is not in the orbit of the inserted identity"
            found += [
                apart("U S S~^+ U^T = T(1/a)", where, sides["T"], note),
                equality("||U S S~^+ U^T - T(1/a)|| = 1", where, sides["T"], zero + 1),
            ]
    return found


def _paper_draw(m: int, n: int, rank: int, key: PRNGKeyArray) -> dict[str, Array]:
    left_key, right_key, alpha_key = jax.random.split(key, 3)
    U, V = orthonormal(left_key, m, rank), orthonormal(right_key, n, rank)
    alpha = 10 ** jax.random.uniform(alpha_key, maxval=3.0)
    values = 2.0 ** -jnp.arange(rank)  # well apart: singular vectors are determined to some 10 u
    W, k = (U * values) @ V.T, 2
    T = jnp.eye(m) + (1 / alpha - 1) * U[:, :k] @ U[:, :k].T
    C = bounds.paper_compensation(W, k, alpha)
    Wt = (U * values * jnp.where(jnp.arange(rank) < k, alpha, 1.0)) @ V.T
    gaps = {"T": C - T, "TP": C - T @ U @ U.T, "W": C @ Wt - W}
    return {name: jnp.linalg.norm(gap, 2) for name, gap in gaps.items()}


# What it costs


def _cost(key: PRNGKeyArray) -> list[Certificate]:
    """Count what C stores, dense and low-rank; follow the curvature of low-rank storage in alpha."""
    n, m, k = 7, 4, 2
    kernel = {"w": jax.random.normal(key, (n, m))}
    sizes = []
    for tree in (kernel, {"w": kernel["w"].T}):
        for side in ("output", "input", "auto"):
            pair = sd.deform(tree, sd.SpecDef(alpha=ALPHA, k=k, side=side), key=key)["w"]
            sizes.append(pair.comp.size)
    expected = [m**2, n**2, min(m, n) ** 2, n**2, m**2, min(m, n) ** 2]
    layer = sd.plan(kernel, sd.SpecDef(alpha=ALPHA, k=k, side="output"), key=key)["w"]
    h = jax.random.normal(key, (5, n))
    deformed = sd.apply_plan(kernel, Plan({"w": layer}))["w"]
    stored = layer.U, layer.alpha
    alphas = 2.0 ** np.arange(6, 14, 2)
    sharpness = [float(_low_rank_sharpness(layer.U, a, kernel["w"], h)) for a in alphas]
    found = exponent(alphas, sharpness)
    return [
        equality("C costs m^2 on the output side, n^2 on the input side, auto takes the smaller",
                 f"kernels {n} x {m} and {m} x {n}", sizes, expected, allowance=0.0),
        equality("low-rank storage (U, a) costs k m + 1", f"m = {m}, k = {k}",
                 sum(x.size for x in stored), k * m + 1, allowance=0.0),
        equality("low-rank storage computes the same layer", f"m = {m}, n = {n}, k = {k}",
                 _low_rank(layer.U, layer.alpha, deformed.weight, h)[None], (h @ kernel["w"])[None]),
        fit("the curvature in a trained U grows as a^2", "squared loss, alpha 2^6 to 2^12", found.slope, 2.0,
            tolerance=0.1, count=len(alphas)),
    ]  # fmt: skip


def _low_rank(U: Float[Array, "m k"], alpha: Array, weight: Float[Array, "n m"], h: Array) -> Array:
    """Return C Wt h with C = I + (1/a - 1) U U^T never formed."""
    z = h @ weight
    return z + (1 / alpha - 1) * (z @ U) @ U.T


@jax.jit
def _low_rank_sharpness(U: Array, alpha: Array, kernel: Array, h: Array) -> Array:
    """Return sigma_1 of the Hessian in U alone, of a squared loss with unit targets."""
    weight = kernel + (alpha - 1) * kernel @ U @ U.T

    def loss(flat: Array) -> Array:
        return 0.5 * jnp.mean(jnp.square(_low_rank(flat.reshape(U.shape), alpha, weight, h) - 1.0))

    return sigma_1(jax.hessian(loss)(U.ravel()))
