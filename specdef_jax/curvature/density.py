"""Spectral density of a symmetric operator by stochastic Lanczos quadrature.

A vector drawn from the sphere and m Lanczos steps, fully reorthogonalized, give a quadrature rule with m
nodes for the measure whose mean over the draws is (1 / n) sum_i delta(lambda - lambda_i). The spread over the
draws gives the standard errors. A smooth density is the rule convolved with a Gaussian, on a linear axis or
on a logarithmic one: a deformed network has outliers of size alpha^2 and a tail of size 1 / alpha^2, and both
show only there.

What m steps cannot do is separate eigenvalues close to zero from one another while others are large: pass the
outliers, found by eigsh, as `outliers`, and they are taken out of the draws and counted exactly. Below
eps ||A|| nothing is resolved; that share of the spectrum is reported as `null`.

Source: Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38 (2017) 1075; Ghorbani, Krishnan and Xiao,
ICML 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from specdef_jax.curvature import basis as bs
from specdef_jax.curvature.dense import eigvals
from specdef_jax.curvature.narrow import narrowest_of
from specdef_jax.curvature.operators import Operator, check_choice, flattened, is_spread, random_vector
from specdef_jax.curvature.result import Eigen
from specdef_jax.errors import ProblemError

Axis = Literal["linear", "log"]
NULL = 10.0  # times eps ||A||: what is smaller is rounding


@dataclass(frozen=True)
class Density:
    """A spectral density with standard errors.

    Attributes:
      grid: (points,) eigenvalues ("linear"), or their magnitudes, ascending ("log").
      density: (points,) per unit of eigenvalue; on the log axis (2, points) per decade of magnitude, of the
        positive and of the negative eigenvalues. All of it and `null` sum to one.
      stderr: like density, standard error of the mean over the draws, without the bias of m nodes.
      null: share of the spectrum below the rounding level; only set apart on the log axis.
      null_stderr: its standard error.
      nodes: (probes, m) nodes of the quadrature rules, those of the outliers excepted.
      weights: (probes, m) their weights; of all, with the outliers, the sum is one.
      outliers: (k,) eigenvalues counted exactly, each with weight 1 / size.
      size: number of eigenvalues, n.
      width: standard deviation of the Gaussian: units of the eigenvalue, or decades.
      axis: "linear" or "log".
      matvecs: products spent.
      exact: every eigenvalue was computed, the operator being small: no sampling error.
      narrowest: narrowest float in the product.
    """

    grid: Float[np.ndarray, " points"]
    density: Float[np.ndarray, "*sign points"]
    stderr: Float[np.ndarray, "*sign points"]
    null: float
    null_stderr: float
    nodes: Float[np.ndarray, "probes m"]
    weights: Float[np.ndarray, "probes m"]
    outliers: Float[np.ndarray, " k"]
    size: int
    width: float
    axis: Axis
    matvecs: int
    exact: bool
    narrowest: str

    def share(self, low: float, high: float) -> tuple[float, float]:
        """Return the share of the spectrum in [low, high], and its standard error, unsmoothed."""
        inside = (self.nodes >= low) & (self.nodes <= high)
        extra = np.sum((self.outliers >= low) & (self.outliers <= high)) / self.size
        mean, stderr = _mean(np.sum(self.weights * inside, axis=1), self.exact)
        return float(mean + extra), float(stderr)


def density(
    op: Operator,
    *,
    key: PRNGKeyArray,
    probes: int = 16,
    steps: int = 80,
    axis: Axis = "linear",
    width: float | None = None,
    points: int = 1001,
    outliers: Eigen | None = None,
    batch: int = 1,
) -> Density:
    """Return the spectral density of a symmetric operator.

    Args:
      op: symmetric operator; its data is a jit argument.
      key: seeds the draws.
      probes: number of draws, at least 2.
      steps: Lanczos steps m of each. An operator of no more than `steps` rows is diagonalized instead.
      axis: "linear", or "log" in the magnitude, each sign for itself.
      width: of the Gaussian; default a hundredth of the range, or a tenth of a decade.
      points: of the grid.
      outliers: converged pairs to take out of the draws and count exactly.
      batch: draws worked on at a time; each takes m vectors of memory.

    Raises:
      ProblemError: the operator is not symmetric, an argument has no meaning, the outliers have not
        converged, or the product is not finite.

    Example:
      >>> op = from_matrix(jnp.diag(jnp.linspace(1.0, 2.0, 500)))
      >>> found = density(op, key=jax.random.key(0))
      >>> round(float(np.trapezoid(found.density, found.grid)), 3)
      1.0
    """
    if not op.symmetric:
        raise ProblemError(f"density needs a symmetric operator, this {op.kind} is not.")
    check_choice("axis", axis, ("linear", "log"))
    if probes < 2 or steps < 2 or points < 2 or batch < 1 or (width is not None and not width > 0):
        raise ProblemError("density needs probes, steps and points of at least 2, a batch and a width > 0.")
    if outliers is not None and outliers.code != 0:
        raise ProblemError(f"the outliers are {outliers.status.name}: {outliers.status.advice}")
    narrowest = narrowest_of(op)
    exact = op.size <= steps
    kept = np.zeros(0) if outliers is None or exact else np.asarray(outliers.values)
    if exact:
        nodes = np.asarray(eigvals(op))[None]
        weights, matvecs = np.full(nodes.shape, 1 / op.size), op.size
    else:
        removed = None if outliers is None else outliers.vectors
        nodes, weights = map(
            np.asarray, _rules(op, key, probes, min(steps, op.size - kept.size), batch, removed)
        )
        weights = weights * (1 - kept.size / op.size)
        matvecs = probes * nodes.shape[1]
    if not np.isfinite(nodes).all():
        raise ProblemError(f"the product of this {op.kind} returned NaN or Inf.")
    norm = max(np.abs(nodes).max(), np.abs(kept).max(initial=0))
    floor = NULL * float(jnp.finfo(narrowest).eps) * norm
    every = _with_outliers(nodes, weights, kept, op.size)
    draw = _linear if axis == "linear" else _log
    grid, curves, null, width = draw(*every, width, points, floor)
    value, stderr = _mean(curves, exact)
    null_value, null_stderr = _mean(null, exact)
    return Density(
        grid, value, stderr, float(null_value), float(null_stderr), nodes, weights, kept, op.size, width,
        axis, matvecs, exact, narrowest,
    )  # fmt: skip


def _rules(
    op: Operator, key: PRNGKeyArray, probes: int, steps: int, batch: int, removed: PyTree | None
) -> tuple[Array, Array]:
    if is_spread(op):
        return _quadrature(op, key, removed, probes, steps, batch)
    flat = None
    if removed is not None:
        leaves = [x.reshape(x.shape[0], -1).astype(op.dtype) for x in jax.tree.leaves(removed)]
        flat = jnp.concatenate(leaves, axis=1)
    return _quadrature(flattened(op), key, flat, probes, steps, batch)


@partial(jax.jit, static_argnames=("probes", "steps", "batch"))
def _quadrature(
    op: Operator, key: PRNGKeyArray, removed: PyTree | None, probes: int, steps: int, batch: int
) -> tuple[Float[Array, "p m"], Float[Array, "p m"]]:
    dtype = jnp.promote_types(op.dtype, jnp.float32)
    if removed is not None:
        removed = jax.tree.map(lambda x: x.astype(dtype), removed)

    def project(v: PyTree) -> PyTree:
        if removed is None:
            return v
        every = jnp.ones(jax.tree.leaves(removed)[0].shape[0], bool)
        return bs.orthogonalize(v, removed, every)[0]

    def rule(key: PRNGKeyArray) -> tuple[Array, Array]:
        start, _ = bs.normalize(project(random_vector(op, key, dtype)))
        basis = bs.set_row(bs.zeros(steps + 1, op.template, dtype), 0, start)
        diagonal, off = _tridiagonal(lambda v: project(bs.in_dtype(op.mv, dtype)(v)), basis, steps)
        matrix = jnp.diag(diagonal) + jnp.diag(off[:-1], 1) + jnp.diag(off[:-1], -1)
        values, vectors = jnp.linalg.eigh(matrix)
        return values, vectors[0] ** 2

    return jax.lax.map(rule, jax.random.split(key, probes), batch_size=batch)


def _tridiagonal(
    product: Callable[[PyTree], PyTree], basis: PyTree, steps: int
) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Return the Lanczos coefficients from vector 0 of a basis.

    After an invariant subspace they are zero, and so are the weights.
    """
    dtype = jax.tree.leaves(basis)[0].dtype
    eps = jnp.finfo(dtype).eps

    def step(j: Array, carry: tuple[PyTree, Array, Array, Array]) -> tuple[PyTree, Array, Array, Array]:
        basis, diagonal, off, norm = carry
        image = product(bs.row(basis, j))
        norm = jnp.maximum(norm, bs.normalize(image)[1])
        rest, removed = bs.orthogonalize(image, basis, jnp.arange(steps + 1) <= j)
        following, beta = bs.normalize(rest)
        alive = beta > 10 * eps * norm
        following = jax.tree.map(lambda x: jnp.where(alive, x, 0), following)
        off = off.at[j].set(jnp.where(alive, beta, 0))
        return bs.set_row(basis, j + 1, following), diagonal.at[j].set(removed[j]), off, norm

    zeros = jnp.zeros(steps, dtype)
    _, diagonal, off, _ = jax.lax.fori_loop(0, steps, step, (basis, zeros, zeros, jnp.zeros((), dtype)))
    return diagonal, off


def _with_outliers(
    nodes: np.ndarray, weights: np.ndarray, outliers: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    extra = np.broadcast_to(outliers, (len(nodes), outliers.size))
    return np.concatenate([nodes, extra], 1), np.concatenate([weights, np.full(extra.shape, 1 / size)], 1)


def _mean(samples: np.ndarray, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over the first axis and its standard error."""
    mean = np.asarray(np.mean(samples, axis=0))
    if exact:
        return mean, np.zeros_like(mean)
    return mean, np.asarray(np.std(samples, axis=0, ddof=1) / np.sqrt(len(samples)))


def _gaussians(grid: np.ndarray, at: np.ndarray, weights: np.ndarray, width: float) -> np.ndarray:
    """Return, for each draw, the rule convolved with a Gaussian."""
    curves = np.zeros((len(at), grid.size))
    for i in range(at.shape[1]):  # one node of every draw at a time: small arrays
        away = (grid - at[:, i, None]) / width
        curves += weights[:, i, None] * np.exp(-(away**2) / 2)
    return curves / (width * np.sqrt(2 * np.pi))


def _linear(
    nodes: np.ndarray, weights: np.ndarray, width: float | None, points: int, floor: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    low, high = nodes.min(), nodes.max()
    if width is None:
        width = float(max((high - low) / 100, floor, np.finfo(np.float64).tiny))
    grid = np.linspace(low - 5 * width, high + 5 * width, points)
    return grid, _gaussians(grid, nodes, weights, width), np.zeros(len(nodes)), width


def _log(
    nodes: np.ndarray, weights: np.ndarray, width: float | None, points: int, floor: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    width = 0.1 if width is None else width
    seen = np.abs(nodes) > floor
    magnitude = np.log10(np.where(seen, np.abs(nodes), 1))
    low, high = (magnitude[seen].min(), magnitude[seen].max()) if seen.any() else (-1.0, 1.0)
    decades = np.linspace(low - 5 * width, high + 5 * width, points)
    curves = [
        _gaussians(decades, magnitude, np.where(seen & (np.sign(nodes) == sign), weights, 0), width)
        for sign in (1, -1)
    ]
    null = np.sum(np.where(seen, 0, weights), axis=1)
    return 10**decades, np.stack(curves, axis=1), null, width
