"""Statement 5.6 [ours]: The pair gives a deformation away; the deformed weight alone does not.

STATEMENT. U in R^(m x k) orthonormal, C = T(1/a), Wt = T(a) W, stored as (C R^T, R Wt), R orthogonal, a >
1.

(i) The singular values of C R^T are 1/a (k times) and 1 (m - k times), for every U and R: a and k are read
off C. Rounding C entry by entry with unit roundoff u moves each by at most u ||C||_F. A shear R hides them.

(ii) Gap. For every orthonormal U,
    sigma_k(Wt) >= a sigma_k(U^T W),      sigma_(k+1)(Wt) <= ||(I - U U^T) W||,
so the gap at k is at least the quotient; for U spanned by the top k left singular vectors and k < rank W it
is a sigma_k(W) / sigma_(k+1)(W) >= a. For other U it may be less than a.

(iii) Axis. The rows in U get a times their norm: with the k largest rows, k < m, the sorted norms jump by a
||row k|| / ||row k+1|| >= a.

(iv) Gauge. X -> X T(a), Y -> T(1/a) Y (X maps first; for the value projection X = V^T, Y = O^T). Axis: ||X
column|| / ||Y row|| is multiplied by a^2 on the k features of U and by 1 on the others. Any U, X and Y of
rank d: the square roots of the eigenvalues of the pencil (X^T X, Y Y^T) have a gap at k of at least a^2 q /
p - 1, with A = X^T X, B = (Y Y^T)^-1, q = sigma_k(B^(1/2) U U^T A^(1/2)) and p = ||B^(1/2) (I - U U^T)
A^(1/2)||. An orthogonal change of the features in between does not change the pencil.

(v) Imbalance e = ||C||_F ||Wt||_F / ||C Wt||_* of any factors is at least 1, and 1 just where C^T C is a
multiple of Wt Wt^T. If C or Wt is a multiple of an orthogonal matrix, as an inserted identity is, e <=
sqrt(m), with equality at rank 1. Of a deformed pair e^2 = (m - k + k / a^2) (||W||_F^2 + (a^2 - 1) ||U^T
W||_F^2) / ||W||_*^2, which exceeds m for large a if k < m and U^T W != 0. A pair without imbalance, C^T C =
Wt Wt^T, holds nothing of a (5.5): who hides the imbalance completely has undone the deformation.

(vi) No score of Wt alone is certain. Each matrix Wt is the deformed weight of W = T(1/a) Wt, and the
undeformed one of another network. Natural layers, correlated or of low rank, have gaps of 100 and more:
false positives are counted.

ASSUMPTIONS. Released as deformed: not trained since, C stored once.

PROOF. (i) T(1/a) has eigenvalues 1/a (k) and 1; multiplication by R^T leaves singular values alone. Weyl's
perturbation bound, |E| <= u |C| entrywise, so ||E|| <= u ||C||_F. (ii) Wt^T Wt = a^2 W^T U U^T W + W^T (I -
U U^T) W >= a^2 (U^T W)^T (U^T W), which gives the first. Wt = (I - U U^T) W + a U U^T W is (I - U U^T) W
plus a matrix of rank k, and sigma_(k+1)(M + N) <= sigma_1(M) + sigma_(k+1)(N) (Weyl). For U of singular
vectors both are equalities. (iii) T(a) is diagonal. (iv) Axis: T(a) multiplies a column of X, T(1/a)
divides a row of Y. In general the square roots of the eigenvalues are the singular values of X T(a) times
an inverse square root of T(1/a) Y Y^T T(1/a), i. e. of M = B^(1/2) T(a^2) A^(1/2) (with A^(1/2), B^(1/2)
any matrices having these Gram matrices), = B^(1/2) (I - U U^T) A^(1/2) + a^2 B^(1/2) U U^T A^(1/2):
sigma_k(M) >= a^2 q - p, sigma_(k+1)(M) <= p by Weyl, as above. (v) ||C Wt||_* <= ||C||_F ||Wt||_F, with
equality as in 5.5 (i) after scaling. If C = c Q, ||C||_F = c sqrt(m) and ||C Wt||_* = c ||Wt||_* >= c
||Wt||_F, with equality at rank 1; likewise Wt. The formula: ||T(1/a)||_F^2 = m - k + k / a^2, ||T(a)
W||_F^2 = ||(I - U U^T) W||_F^2 + a^2 ||U^T W||_F^2. (vi) T(a) T(1/a) = I. QED.

TIGHTNESS. (ii) top singular vectors; (iv) X = Y = I up to the 1; (v) balanced factors below, rank 1 above.

SOURCE. Ours; Weyl's inequalities: Horn and Johnson, Topics in Matrix Analysis, 3.3.16.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import attacks, bounds, trees
from specdef_jax.attacks.adjacent import AdjacentPair
from specdef_jax.spec import Plan
from theory.assumptions import require_alpha
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
from theory.falsifier import falsify
from theory.forms import EVERY, planned
from theory.instances.adjacent import grouped_attention
from theory.instances.matrices import Family, families, gaussian, orthonormal
from theory.instances.networks import mlp_instance, networks
from theory.sizes import Size

ALPHA = 48.0
EPS = float(np.finfo(np.float64).eps)
UNIT = float(np.finfo(np.float32).eps) / 2
CLAIM = "a and k are read off the released pair"
M, N, K = 5, 4, 2


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify what the pair gives away on networks and matrices; count what undeformed layers give."""
    found: list[Certificate] = []
    for instance in networks(size, key):
        for form in EVERY:
            plan, name = planned(instance, ALPHA, form, key)
            found += on_network(instance.params, plan, name=name)
    found += _compensations(key, size)
    for number, (family, draw) in enumerate(families(size).items()):
        found += _weights(jax.random.fold_in(key, number), size, family, draw)
    found += _gauge(key, size)
    found += _attained()
    found += _natural(key, size)
    plan, _ = planned(mlp_instance(key), 0.5, EVERY[0], key)
    below = on_network(mlp_instance(key).params, plan, name="")
    found.append(
        refuses("outside its assumptions the statement is refused", "alpha = 1/2", below, "alpha >= 1")
    )
    return tuple(found)


def on_network(params: PyTree, plan: Plan, *, name: str) -> Certificates:
    """Certify on anyone's network, in float64, that attacks.detect reads a and k off what is released.

    Args:
      params: plain parameters.
      plan: what is deformed, fewer directions than features.
      name: of the instance.
    """

    def evaluate() -> list[Certificate]:
        require_alpha(*(float(layer.alpha) for _, layer in plan.items()))
        released = attacks.detect(sd.apply_plan(params, plan))
        inserted = attacks.detect(_inserted(params, plan))
        read = [released[path].compensation for path in plan]
        told = [[c.alpha, c.k] if c else [np.nan, np.nan] for c in read]
        wanted = [[float(layer.alpha), layer.U.shape[-1]] for _, layer in plan.items()]
        plain = [score for scores in (attacks.detect(params), inserted) for score in scores.values()]
        return [
            equality(CLAIM, name, told, wanted),
            equality("undeformed matrices and inserted identities taken for a compensation", name,
                     sum(score.certain for score in plain), 0, allowance=0.0),
            inequality("with the identity inserted the imbalance is at most sqrt(d)", name,
                       [inserted[path].imbalance for path in plan],
                       [inserted[path].imbalance_limit for path in plan], allowance=1e-12),
        ]  # fmt: skip

    return under_assumptions(CLAIM, name, evaluate)


def _inserted(params: PyTree, plan: Plan) -> PyTree:
    return sd.apply_plan(params, plan.with_alpha(1.0))


def _compensation(key: PRNGKeyArray) -> dict[str, Array]:
    """Return C R^T with random U, R and a, its rounding to float32, and a shear of it."""
    keys = jax.random.split(key, 3)
    alpha = 10 ** jax.random.uniform(keys[0], (), maxval=6)
    U, R = orthonormal(keys[1], M, K), orthonormal(keys[2], M, M)
    C = (jnp.eye(M) + (1 / alpha - 1) * U @ U.T) @ R.T
    stored = C.astype(jnp.float32).astype(C.dtype)
    shear = jnp.eye(M).at[0, 1].set(1.0)
    values = jnp.stack([jnp.linalg.svd(x, compute_uv=False) for x in (C, stored, C @ shear)])
    expected = jnp.where(jnp.arange(M) < M - K, 1.0, 1 / alpha)
    return {"values": values, "expected": expected, "norm": jnp.linalg.norm(C)}


def _compensations(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Singular values of C R^T, exactly and rounded."""
    s = over_draws(_compensation, key, size.draws)
    exact, stored, sheared = (np.abs(s["values"][:, i] - s["expected"]).max(axis=1) for i in range(3))
    name = f"random U, R, {M} x {M}, k = {K}, alpha 1 to 1e6"
    return [
        equality("the singular values of C R^T are {1/a x k, 1}", name, exact, 0.0, scale=1.0),
        inequality("stored in float32 they move by at most u |C|_F", name, stored, UNIT * s["norm"],
                   allowance=32 * EPS),
        refuted("behind a shear they are the same: false", name, sheared, 0.1),
    ]  # fmt: skip


def _weight(draw: Family, key: PRNGKeyArray) -> dict[str, Array]:
    """Everything about one deformed weight: top, random and axis directions."""
    keys = jax.random.split(key, 3)
    W = draw(keys[0], (M, N))
    alpha = 10 ** jax.random.uniform(keys[1], (), maxval=3)
    left, values, _ = jnp.linalg.svd(W, full_matrices=False)
    U = orthonormal(keys[2], M, K)
    deformed = jnp.stack([W + (alpha - 1) * V @ (V.T @ W) for V in (left[:, :1], U)])
    found = jnp.linalg.svd(deformed, compute_uv=False)
    low, high = bounds.gap_sides(W, U, alpha)
    norms = jnp.sort(jnp.linalg.norm(W, axis=1), descending=True)
    rows = jnp.sort(jnp.linalg.norm(W, axis=1) * jnp.where(jnp.argsort(jnp.argsort(
        -jnp.linalg.norm(W, axis=1))) < K, alpha, 1.0), descending=True)  # fmt: skip
    C, C_one = jnp.eye(M) + (1 / alpha - 1) * U @ U.T, orthonormal(keys[2], M, M)
    return {
        "alpha": alpha,
        "top": found[0, :2],
        "top expected": jnp.stack([alpha * values[0], values[1]]),
        "sigma_k": found[1, K - 1],
        "sigma_k+1": found[1, K],
        "low": low,
        "high": high,
        "rows": rows[K - 1] / rows[K],
        "rows expected": alpha * norms[K - 1] / norms[K],
        "imbalance": bounds.imbalance(C, deformed[1]),
        "formula": bounds.inserted_imbalance(W, U, alpha),
        "orthogonal": bounds.imbalance(C_one, W),
        "size": found[1, 0],
    }


def _weights(key: PRNGKeyArray, size: Size, family: str, draw: Family) -> list[Certificate]:
    """(ii), (iii) and (v) on random weights."""
    s = over_draws(partial(_weight, draw), key, size.draws)
    name = f"{family} W, {M} x {N}, alpha 1 to 1000"
    rounded = 64 * EPS * s["size"]
    gap, least = s["sigma_k"] / s["sigma_k+1"], s["alpha"]
    search = None
    if family == "gaussian":
        search = falsify(_slack, _sample, key, tried=size.draws, climbed=size.starts, steps=60).search
    found = [
        equality("top direction: sigma_1(Wt) = a sigma_1(W), sigma_2(Wt) = sigma_2(W)", name, s["top"],
                 s["top expected"]),
        inequality("any U: a sigma_k(U^T W) <= sigma_k(Wt)", name, s["low"], s["sigma_k"], allowance=rounded,
                   scale=s["size"], search=search),
        inequality("any U: sigma_(k+1)(Wt) <= |(I - U U^T) W|", name, s["sigma_k+1"], s["high"],
                   allowance=rounded, scale=s["size"]),
        equality("axis, largest rows: the norms jump by a |row k| / |row k+1|", name, s["rows"],
                 s["rows expected"]),
        equality("imbalance of the deformed pair, by its formula", name, s["imbalance"], s["formula"]),
        inequality("1 <= imbalance", name, 1.0, s["imbalance"], allowance=1e-12),
        inequality("C orthogonal: imbalance <= sqrt(m)", name, s["orthogonal"], M**0.5, allowance=1e-12),
    ]  # fmt: skip
    if family == "gaussian":
        found.append(refuted("for random U the gap at k is at least a: false", name, least, gap))
    return found


def _slack(point: dict[str, Array]) -> Array:
    """Return the slack of the lower side of the gap, rounding added."""
    U, _ = jnp.linalg.qr(point["U"])
    W, alpha = point["W"], jnp.exp(jnp.abs(point["log_alpha"]))
    low, _ = bounds.gap_sides(W, U, alpha)
    values = jnp.linalg.svd(W + (alpha - 1) * U @ (U.T @ W), compute_uv=False)
    return (values[K - 1] - low) / values[0] + 64 * EPS


def _sample(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 3)
    return {
        "W": jax.random.normal(keys[0], (M, N)),
        "U": jax.random.normal(keys[1], (M, K)),
        "log_alpha": 3 * jax.random.normal(keys[2], ()),
    }


def _pencil(key: PRNGKeyArray) -> dict[str, Array]:
    """The pencil of a random gauge pair, deformed, turned, and its lower bound."""
    keys = jax.random.split(key, 5)
    X, Y = jax.random.normal(keys[0], (6, 4)), jax.random.normal(keys[1], (4, 5))
    alpha, U = 10 ** jax.random.uniform(keys[2], (), maxval=3), orthonormal(keys[3], 4, K)
    T, back = (jnp.eye(4) + (a - 1) * U @ U.T for a in (alpha, 1 / alpha))
    R = orthonormal(keys[4], 4, 4)
    values = bounds.pencil_values(X @ T, back @ Y)
    least = bounds.pencil_gap(X, Y, U, alpha)
    # Rounding of a solve with T(1/a) Y, relative to the largest value.
    blur = 64 * EPS * alpha**2 * jnp.linalg.cond(Y) * jnp.linalg.cond(X)
    return {
        "gap": values[K - 1] / values[K],
        "least": least,
        "values": values / values[0],
        "turned": bounds.pencil_values(X @ T @ R.T, R @ back @ Y) / values[0],
        "allowance": blur * jnp.maximum(1.0, jnp.abs(least)),
    }


def _gauge(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(iv): the ratio of norms on grouped attention, the pencil on random pairs."""
    net = grouped_attention(key)
    first, second = net.params["first"], net.params["second"]
    spec = sd.SpecDef(alpha=ALPHA, k=1, basis="axis")
    made = sd.deform_pair(first["w"], second["w"], spec, key=key, bias=first["b"], groups=net.groups)
    released = {
        **net.params, "first": {"w": made.first, "b": made.bias}, "second": {**second, "w": made.second}
    }  # fmt: skip
    pair = AdjacentPair("first/w", "second/w", "first/b", net.groups)
    before, after = (_ratios(tree, pair) for tree in (net.params, released))
    chosen = np.asarray(jnp.abs(made.layer.U).sum(-1) > 0.5)
    score = attacks.detect(released, [pair])[pair.name]
    spread = max(float(b.max() / b.min()) for b in before)
    s = over_draws(_pencil, key, size.draws)
    name, drawn = f"{net.name}, axis", f"random X 6 x 4, Y 4 x 5, k = {K}, alpha 1 to 1000"
    return [
        equality("|X column| / |Y row| is multiplied by a^2 on U and 1 elsewhere", name, after / before,
                 np.where(chosen, ALPHA**2, 1.0)),
        inequality("a^2 / (its largest quotient before) <= the jump found", name, ALPHA**2 / spread,
                   score.ratio_jump, allowance=1e-9),
        inequality("a^2 q / p - 1 <= the gap of the pencil at k", drawn, s["least"], s["gap"],
                   allowance=s["allowance"], scale=np.maximum(1.0, np.abs(s["least"]))),
        equality("an orthogonal change in between keeps the pencil", drawn, s["turned"], s["values"],
                 allowance=1e-8),
    ]  # fmt: skip


def _ratios(tree: PyTree, pair: AdjacentPair) -> np.ndarray:
    """Return ||X column|| / ||Y row|| of every feature, (groups, d)."""
    X, Y = attacks.adjacent.kernels_of(dict(trees.named_leaves(tree)), pair)
    return np.linalg.norm(np.asarray(X), axis=1) / np.linalg.norm(np.asarray(Y), axis=2)


def _attained() -> list[Certificate]:
    """Where the inequalities are met, and that a weight alone proves nothing."""
    rank_1 = jnp.outer(jnp.arange(1.0, 4.0), jnp.arange(1.0, 3.0))
    balanced = jnp.diag(jnp.array([2.0, 1.0]))
    eye, U = jnp.eye(2), jnp.eye(2)[:, :1]
    T, back = (eye + (a - 1) * U @ U.T for a in (1e3, 1e-3))
    values = bounds.pencil_values(T, back)
    W = jnp.array([[3.0, 1.0], [1.0, 2.0]])
    spec = sd.SpecDef(alpha=4.0, basis="axis", side="output")
    plan = sd.plan({"w": W}, spec, where="w", key=jax.random.key(0))
    released = sd.apply_plan({"w": W}, plan)["w"]
    alone = attacks.detect({"w": released.weight})["w"]
    plain = attacks.detect({"w": replace(released, comp=jnp.eye(2))})["w"]
    whole = sd.apply_plan({"w": W}, Plan({"w": replace(plan["w"], U=jnp.eye(2))}))
    return [
        tight("C orthogonal: imbalance <= sqrt(m)", "rank 1, m = 3", bounds.imbalance(jnp.eye(3), rank_1),
              3**0.5, factor=1 + 1e-12, allowance=1e-12),
        tight("1 <= imbalance", "C = Wt = diag(2, 1)", 1.0, bounds.imbalance(balanced, balanced),
              factor=1 + 1e-12, allowance=1e-12),
        tight("a^2 q / p - 1 <= the gap of the pencil", "X = Y = I, a = 1000",
              bounds.pencil_gap(eye, eye, U, 1e3), values[0] / values[1], factor=1 + 1e-5),
        equality("Wt alone: the scores are those of an undeformed Wt", "a 2 x 2 matrix",
                 [alone.gap, alone.norm_jump], [plain.gap, plain.norm_jump], allowance=0.0),
        equality("k = d: C = I / a is not recognised", "a 2 x 2 matrix",
                 float(attacks.detect(whole)["w"].certain), 0.0, scale=1.0, allowance=0.0),
    ]  # fmt: skip


def _correlated(key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
    """A weight that answers to one strong feature: rank one plus noise of a hundredth."""
    keys = jax.random.split(key, 3)
    u, v = (jax.random.normal(k, (n,)) for k, n in zip(keys, shape, strict=False))
    return jnp.outer(u, v) + 0.01 * jax.random.normal(keys[2], shape)


def _positive(key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
    """Nonnegative entries, as of embeddings of counts: one direction, the mean, stands out."""
    return jax.random.uniform(key, shape)


def _low_rank(key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
    """Rank two plus 1e-3, as of a compressed layer."""
    keys = jax.random.split(key, 3)
    left, right = jax.random.normal(keys[0], (shape[0], 2)), jax.random.normal(keys[1], (2, shape[1]))
    return left @ right + 1e-3 * jax.random.normal(keys[2], shape)


# With the shares of false positives to expect at alpha 10 and 100. A signal of size t in 16 x 12 entries has
# singular values of some sqrt(192) t, noise of size t one of some (sqrt(16) + sqrt(12)) t at most.
NATURAL: dict[str, tuple[Family, tuple[str, str]]] = {
    "independent normals": (gaussian, ("few", "few")),
    "positive entries": (_positive, ("few", "few")),  # 1/2 above sqrt(1/12): a gap of 3
    "rank one plus 1%": (_correlated, ("nearly all", "nearly all")),  # a gap of 190
    "rank two plus 0.1%": (_low_rank, ("nearly all", "nearly all")),  # 1900
}
SHARES = {"few": (0.0, 0.1), "nearly all": (0.9, 1.0)}


def _natural(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """False positives: undeformed 16 x 12 matrices whose gap reaches what alpha = 10 or 100 leaves."""
    found = []
    for name, (draw, expected) in NATURAL.items():
        gaps = over_draws(partial(_largest_gap, draw), key, size.draws)
        told = f"{name}, 16 x 12, undeformed"
        for alpha, word in zip((10, 100), expected, strict=True):
            share, (low, high) = float(np.mean(gaps >= alpha)), SHARES[word]
            note = f"{round(share * gaps.size)} of {gaps.size}, expected {word}; largest gap {gaps.max():.3g}"
            found.append(
                seen(f"false positives: share with a gap of {alpha}", told, share, low <= share <= high,
                     note=note)
            )  # fmt: skip
        if name == "rank two plus 0.1%":
            found.append(refuted("an undeformed layer has no gap of 100: false", told, gaps, 100.0))
    return found


def _largest_gap(draw: Family, key: PRNGKeyArray) -> Array:
    values = jnp.linalg.svd(draw(key, (16, 12)), compute_uv=False)
    return jnp.max(values[:-1] / values[1:])
