"""Statement 2.3 [standard]: Separation and interlacing of the eigenvalues of blocks.

STATEMENT. H symmetric n x n, Q (n x p) and P (n x q) with orthonormal columns, eigenvalues ascending.

    (i)   lambda_i(H) <= lambda_i(Q^T H Q) <= lambda_{i+n-p}(H),   i = 1 ... p           (Poincare);
    (ii)  conversely lambda_{j-n+p}(Q^T H Q) <= lambda_j(H) <= lambda_j(Q^T H Q), where the index exists;
    (iii) sigma_1(Q^T H P) <= sigma_1(H), and <= (lambda_n(H) - lambda_1(H)) / 2 if Q^T P = 0.

With columns of the identity: principal blocks (Cauchy) and off-diagonal blocks, for instance the Hessian in
one layer's parameters, or between two layers. With (i) of 2.2: the deformed network has at least as many
eigenvalues above a^2 t > 0 as K_U has above t, lambda_{n-p+i}(H_a) >= a^2 lambda_i(K_U).

ASSUMPTIONS. H = H^T; Q^T Q = I, P^T P = I; for the second half of (iii) Q^T P = 0. On a network the loss is
twice differentiable at the point, else there is no symmetric Hessian.

PROOF. Courant-Fischer: lambda_i(A) = min over subspaces S of dimension i of max_{x in S, |x| = 1} x^T A x.
For y in R^p, |Q y| = |y| and y^T (Q^T H Q) y = (Q y)^T H (Q y), and Q maps the subspaces of R^p of dimension
i to some of those of R^n: the minimum for Q^T H Q runs over fewer, so it is at least lambda_i(H). Apply this
to -H, lambda_i(-A) = -lambda_{d+1-i}(A) for a d x d matrix: -lambda_{p+1-i}(Q^T H Q) >= -lambda_{n+1-i}(H);
with p + 1 - i for i this is lambda_i(Q^T H Q) <= lambda_{n-p+i}(H). (ii) is (i) with j = i and j = i + n - p.
(iii) |x^T Q^T H P y| <= |H| |x| |y|. If Q^T P = 0 then Q^T (H - s I) P = Q^T H P for every s; s the midpoint
of the spectrum makes sigma_1(H - s I) half its length. In the consequence lambda_{n-p+i}(H_a) >=
lambda_i(F^T H_a F) = a^2 lambda_i(K_U). QED.

TIGHTNESS. (i) is attained on both sides by Q made of eigenvectors of the p smallest, or largest, values.
(iii) by [[0, 1], [1, 0]] shifted by any multiple of I. That the index n - p cannot be lowered, that sharing
one column breaks the second bound of (iii), and that Q must be orthonormal is shown by counterexamples.

SOURCE. Horn and Johnson, Matrix Analysis (2nd ed. 2013), 4.3.28 (Cauchy), 4.3.37 (Poincare).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.parametrization import loss_on
from specdef_jax.words import Word
from theory.assumptions import require, require_smooth
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
from theory.falsifier import falsify
from theory.hessians import curvature_of, eigenvalues, rounding
from theory.instances.matrices import FAMILIES, Family, families, orthonormal
from theory.instances.networks import Instance, mlp_instance, networks
from theory.sizes import Size

SEPARATION = "lambda_i(H) <= lambda_i(Q^T H Q) <= lambda_{i+n-p}(H)"
BACKWARDS = "lambda_{j-n+p}(Q^T H Q) <= lambda_j(H) <= lambda_j(Q^T H Q)"
OFF_DIAGONAL = "sigma_1(Q^T H P) <= (lambda_n - lambda_1) / 2"


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify the three inequalities on random matrices and on the layers of networks."""
    found: list[Certificate] = []
    for i, name in enumerate(families(size)):
        for p in (2,) if size is Size.SMALL else (2, 5):  # p = n - 1 is the case of strict alternation
            found += _random(name, 6, p, jax.random.fold_in(key, i), size)
    found.append(_falsified(key, size))
    found += _tight(key)
    found += _negative(key)
    for instance in networks(size, key):
        found += on_network(instance.loss, instance.params, *instance.args, name=instance.name)
    found += _consequence(mlp_instance(key), key)
    return (*found, *_outside(key))


def check(H: Any, Q: Any, P: Any, name: str) -> Certificates:
    """Certify the statement for one matrix and two sets of columns.

    Args:
      H: (n, n).
      Q: (n, p).
      P: (n, q), orthogonal to Q.
      name: of the instance.
    """
    H, Q, P = (np.asarray(x, float) for x in (H, Q, P))

    def evaluate() -> Certificates:
        require(np.allclose(H, H.T, rtol=0, atol=1e-12 * np.abs(H).max()), "H = H^T")
        for X in (Q, P):
            require(np.allclose(X.T @ X, np.eye(X.shape[1]), rtol=0, atol=1e-12), "Q^T Q = I, P^T P = I")
        require(np.allclose(Q.T @ P, 0, rtol=0, atol=1e-12), "Q^T P = 0")
        return _certified(name, [_blocks(H, Q, P)], 2 * float(rounding(H)), np.linalg.norm(H, 2), Word.PROVED)

    return under_assumptions(SEPARATION, name, evaluate)


def on_network(loss: Callable[..., Array], params: PyTree, *args: Any, name: str) -> Certificates:
    """Certify the statement on anyone's network: the block of each leaf, and between it and the next.

    Args:
      loss: loss(params, *args).
      params: plain or deformed parameters, few enough for a dense Hessian.
      *args: data.
      name: of the instance.
    """

    def evaluate() -> Certificates:
        as_partial = loss_on(loss, params, *args)
        require_smooth(as_partial, params, *args)
        H = np.asarray(curvature_of(as_partial, params, *args).hessian)
        H, columns = (H + H.T) / 2, _columns_of_leaves(params)
        blocks = [_blocks(H, Q, P) for Q, P in zip(columns, [*columns[1:], columns[0]], strict=True)]
        told = f"{name}, the blocks of its {len(blocks)} leaves"
        return _certified(told, blocks, 2 * float(rounding(H)), np.linalg.norm(H, 2), Word.CHECKED)

    return under_assumptions(SEPARATION, name, evaluate)


def _columns_of_leaves(params: PyTree) -> list[np.ndarray]:
    """Return, for every leaf, the columns of the identity that belong to its entries in ravel_pytree."""
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    return np.split(np.eye(sum(sizes)), np.cumsum(sizes)[:-1], axis=1)


def _blocks(H: np.ndarray, Q: np.ndarray, P: np.ndarray) -> tuple[Array, ...]:
    """Return by how much each claim of the statement is exceeded."""
    whole, block = jnp.linalg.eigvalsh(H), jnp.linalg.eigvalsh(Q.T @ H @ Q)
    return _excess(whole, block, np.linalg.norm(Q.T @ H @ P, 2))


def _excess(whole: Any, block: Any, sigma: Any) -> tuple[Array, Array, Array]:
    """Return how far the block's eigenvalues, the matrix's, and sigma_1(Q^T H P) leave their intervals."""
    low, high = bounds.compression_intervals(whole, len(block))
    below, above = bounds.matrix_intervals(block, len(whole))
    return (
        jnp.max(jnp.maximum(low - block, block - high)),
        jnp.max(jnp.maximum(below - whole, whole - above)),
        sigma - bounds.off_diagonal_bound(whole),
    )


def _certified(name: str, excess: Any, allowance: Any, scale: Any, word: Word) -> Certificates:
    """Return one certificate for each claim from its excess on every instance.

    Allowance: eigvalsh and svd are backward stable, so every eigenvalue and singular value of H or of a
    block is off by at most `rounding` of H; that Q is orthonormal to n eps, and the rounding of Q^T H Q, add
    less than as much again.
    """
    claims = (f"{SEPARATION}: excess", f"{BACKWARDS}: excess", f"{OFF_DIAGONAL}: excess")
    return tuple(
        inequality(claim, name, found, 0.0, allowance=allowance, scale=scale, word=word)
        for claim, found in zip(claims, np.transpose(excess), strict=True)
    )


def _random(family: str, n: int, p: int, key: PRNGKeyArray, size: Size) -> Certificates:
    sides = over_draws(functools.partial(_draw, FAMILIES[family], n, p), key, size.draws)
    excess = np.stack(sides["excess"], axis=-1)
    return _certified(f"{family} {n} x {n}, p = {p}", excess, sides["allowance"], sides["norm"], Word.PROVED)


def _draw(family: Family, n: int, p: int, key: PRNGKeyArray) -> dict[str, Any]:
    """Draw H, and Q and P as the columns of one orthogonal matrix."""
    keys = jax.random.split(key)
    X = family(keys[0], (n, n))
    point = {"H": X, "columns": jax.random.normal(keys[1], (n, n))}
    return _at(p, point)


def _at(p: int, point: dict[str, Array]) -> dict[str, Any]:
    H, Q = (point["H"] + point["H"].T) / 2, jnp.linalg.qr(point["columns"])[0]
    turned = Q.T @ H @ Q
    whole, block = eigenvalues(H), eigenvalues(turned[:p, :p])
    return {
        "excess": _excess(whole, block, jnp.linalg.norm(turned[:p, p:], 2)),
        "allowance": 2 * rounding(H),
        "norm": jnp.max(jnp.abs(whole)),
        "shifted": block[0] - whole[-p - 1],
    }


def _falsified(key: PRNGKeyArray, size: Size) -> Certificate:
    """Let the falsifier at all three claims at once, over H and the columns."""
    steps = 100 if size is Size.SMALL else 200
    found = falsify(_slack, _sample, key, tried=size.draws, climbed=size.starts, steps=steps)
    return inequality(
        "the three claims where a falsifier looks",
        "the smallest slack at the worst point it found, 5 x 5, p = 3",
        0.0,
        _slack(found.point),
        search=found.search,
    )


def _sample(key: PRNGKeyArray) -> dict[str, Array]:
    H, columns = jax.random.normal(key, (2, 5, 5))
    return {"H": H, "columns": columns}


def _slack(point: dict[str, Array]) -> Array:
    at = _at(3, point)
    return (at["allowance"] - jnp.max(jnp.stack(at["excess"]))) / at["norm"]


def _tight(key: PRNGKeyArray) -> list[Certificate]:
    """Both sides attained by eigenvectors, and by two coupled coordinates."""
    values, Q = jnp.arange(1.0, 7.0), orthonormal(key, 6, 6)
    H = np.asarray((Q * values) @ Q.T)
    whole = jnp.linalg.eigvalsh(H)
    bottom, top = (jnp.linalg.eigvalsh(X.T @ H @ X) for X in (np.asarray(Q[:, :2]), np.asarray(Q[:, -2:])))
    low, high = bounds.compression_intervals(whole, 2)
    below, over = bounds.matrix_intervals(top, 6)[0], bounds.matrix_intervals(bottom, 6)[1]
    least, largest = (f"Q of the eigenvectors of the two {which}" for which in ("smallest", "largest"))
    pair = jnp.array([[4.0, 1.0], [1.0, 4.0]])
    told = {"factor": 1 + 1e-12, "allowance": 2 * float(rounding(H))}
    return [
        tight("lambda_i(H) = lambda_i(Q^T H Q)", least, low, bottom, **told),
        tight("lambda_i(Q^T H Q) = lambda_{i+n-p}(H)", largest, top, high, **told),
        tight("lambda_{j-n+p}(Q^T H Q) = lambda_j(H)", largest, below[4:], whole[4:], **told),
        tight("lambda_j(H) = lambda_j(Q^T H Q)", least, whole[:2], over[:2], **told),
        tight(OFF_DIAGONAL, "[[4, 1], [1, 4]]", pair[0, 1], bounds.off_diagonal_bound(eigenvalues(pair)),
              factor=1 + 1e-12),
        equality("where the compression says nothing, the interval is infinite", "p = 2, n = 6",
                 np.sign([below[:4], over[2:]]) * np.isinf([below[:4], over[2:]]), [[-1] * 4, [1] * 4],
                 allowance=0.0),
    ]  # fmt: skip


def _negative(key: PRNGKeyArray) -> list[Certificate]:
    """Claims a little stronger are false."""
    sides = over_draws(functools.partial(_draw, FAMILIES["gaussian"], 6, 2), key, 1_000)
    H, Q = np.diag([1.0, 2.0, 3.0]), np.eye(3)[:, :2]
    pair = np.array([[4.0, 1.0], [1.0, 4.0]])
    doubled = _excess(jnp.linalg.eigvalsh(H), jnp.linalg.eigvalsh(4 * Q.T @ H @ Q), 0.0)
    return [
        refuted("lambda_i(Q^T H Q) <= lambda_{i+n-p-1}(H) is false", "Gaussian 6 x 6, p = 2",
                sides["shifted"], 0.0, allowance=sides["allowance"]),
        refuted(f"{SEPARATION} is false if Q is not orthonormal", "diag(1, 2, 3), Q twice two columns of I",
                doubled[0], 0.0, word=Word.CHECKED),
        refuted(f"{OFF_DIAGONAL} is false if Q and P share a column", "[[4, 1], [1, 4]], Q = P = I",
                np.linalg.norm(pair, 2), bounds.off_diagonal_bound(jnp.linalg.eigvalsh(pair))),
    ]  # fmt: skip


def _consequence(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """The deformed network has as many large eigenvalues as K_U."""
    alpha = 7.0
    plan = sd.plan(
        instance.params, sd.SpecDef(alpha=alpha, k=2, side="output"), where=instance.where, key=key
    )
    deformed = sd.apply_plan(instance.params, plan)
    H_a = np.asarray(curvature_of(instance.loss, deformed, *instance.args).hessian)
    task = bounds.fast_subspace(instance.loss, instance.params, plan.with_alpha(1.0), *instance.args)
    K = np.asarray(curvature_of(task.loss, task.params, *instance.args).hessian)
    low, _ = bounds.matrix_intervals(alpha**2 * jnp.linalg.eigvalsh(K), len(H_a))
    whole = jnp.linalg.eigvalsh((H_a + H_a.T) / 2)
    return [
        inequality("lambda_{n-p+i}(H_a) >= a^2 lambda_i(K_U)", f"{instance.name}, a = {alpha:g}, k = 2",
                   low[-len(K):], whole[-len(K):], allowance=2 * float(rounding(H_a)),
                   scale=np.abs(whole).max(), word=Word.CHECKED),
    ]  # fmt: skip


def _outside(key: PRNGKeyArray) -> list[Certificate]:
    """Matrices and points outside the assumptions are refused by name."""
    H, eye = np.diag([1.0, 2.0, 3.0]), np.eye(3)
    kinked = mlp_instance(key, "relu")
    x, y = kinked.args
    flat = jax.tree.map(lambda b: jnp.zeros_like(b) if b.ndim == 1 else b, kinked.params)
    claim = "outside its assumptions the statement is refused"
    return [
        refuses(claim, "a matrix that is not symmetric",
                check(H + np.eye(3, k=1), eye[:, :1], eye[:, 1:], ""), "H = H^T"),
        refuses(claim, "Q twice orthonormal", check(H, 2 * eye[:, :1], eye[:, 1:], ""), "Q^T Q = I"),
        refuses(claim, "Q and P share a column", check(H, eye[:, :2], eye[:, 1:], ""), "Q^T P = 0"),
        refuses(claim, "a ReLU network with a preactivation of exactly 0",
                on_network(kinked.loss, flat, x.at[0].set(0.0), y, name=""), "twice differentiable"),
    ]  # fmt: skip
