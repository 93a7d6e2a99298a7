"""Statement 5.4 [ours, on a third party's reading of the paper's Theorem 8]: The SVD chain sharpens.

STATEMENT. Hold C = T(1/a) fixed, U spanned by k left singular vectors of W, and train Wt = U_W S V^T (S the
singular values a sigma_i on U, sigma_i elsewhere) as a product F_1 ... F_p, F_1 = U_W S^(1/p), F_j =
S^(1/p), F_p = S^(1/p) V^T (p = 1: F_1 = Wt), with the rest. Let s be the largest entry of S, v its right
singular vector, and

    K = max |D^2 L(W)[u v^T, u v^T]| over unit u orthogonal to U,  l_1 = ||C||,  l_j = max c_i S_i^((j-1)/p),

c_i = 1/a on U and 1 elsewhere, g = dL/dW, n_ij = l_i s^((j-i-1)/p) s^((p-j)/p) for i < j, symmetric. Then

    s^(2(p-1)/p) K <= sigma_1(H_chain) <= max(1, sum_j l_j^2 s^(2(p-j)/p)) sigma_1(H) + ||g|| ||n||.

For k < m both sides grow as a^(2(p-1)/p) (below if K != 0): a chain of p >= 2 factors is sharper than the
undeformed network, without limit in a, and so than freezing C (5.2), which is p = 1. A negative result:
splitting the spectrum evenly does not share out its condition, as the compensation stands outside the
chain. For k = m the exponent is another one, -2/p: l_j = a^-1 s^((j-1)/p) makes every product a^(-1/p), and
the layer's own block falls as a^(-2/p), more slowly than the a^-2 of 5.2.

ASSUMPTIONS. alpha >= 1; U spanned by left singular vectors of W, so that the factors are diagonal in the
same basis; L twice differentiable at the point.

PROOF. W = C F_1 ... F_p is linear in each factor. Below: move F_1 alone by dF_1 = u e^T, e the coordinate
of s. Then dW = C u e^T S^((p-1)/p) V^T = s^((p-1)/p) u v^T, as C u = u, and there is no second-order term:
the Rayleigh quotient of H_chain is s^(2(p-1)/p) D^2 L[u v^T, u v^T]. Above: dW = sum_j (C F_1 .. F_(j-1))
dF_j (F_(j+1) .. F_p). The first bracket is C for j = 1 and U_W diag(c_i S_i^((j-1)/p)) else, of norm l_j;
the second S^((p-j)/p) V^T, of norm s^((p-j)/p). So J: (dF, drest) -> (dW, drest) has ||J||^2 <= max(1,
sum_j l_j^2 s^(2(p-j)/p)). The Hessian is J^T H J plus the form <g, d^2 W>, whose block (i, j), i < j, is
<g, (..) dF_i F_(i+1) .. F_(j-1) dF_j (..)>, at most ||g|| n_ij |dF_i| |dF_j| by |tr(A X M Y)| <= ||A|| |X|
||M|| |Y|; a symmetric matrix of blocks has at most the norm of the matrix of their norms. Growth, k < m:
l_1 = 1 and l_j <= max(a^-1 s^((j-1)/p), sigma^((j-1)/p)) is bounded, so the sum is s^(2(p-1)/p) (1 +
O(s^(-2/p))) and n = O(s^((p-2)/p)). QED.

TIGHTNESS. k = 1: the quotient of sharpness and lower side tends to 1 as a grows. The upper side is attained
by the five diagonal instances below, each of its terms by one of them.

SOURCE. The construction is a third party's reading of the paper's Theorem 8; bounds and exponents are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import bounds, trees
from specdef_jax.spec import Layer, Plan
from specdef_jax.words import Word
from theory.assumptions import require, require_alpha, require_smooth
from theory.certificate import (
    Certificate,
    Certificates,
    equality,
    fit,
    inequality,
    refuses,
    refuted,
    tight,
    under_assumptions,
)
from theory.draws import over_draws
from theory.fits import exponent
from theory.hessians import Curvature, curvature_of, rounding, sigma_1
from theory.instances.networks import Instance, mlp_instance, networks
from theory.sizes import Size

ALPHAS = 2.0 ** np.arange(10, 25, 2)
FACTORS = {Size.SMALL: (1, 2), Size.DEFAULT: (1, 2, 3, 5), Size.FULL: (1, 2, 3, 4, 5, 8)}
CLAIM = "s^(2(p-1)/p) K <= sigma_1(H_chain) <= its upper side"


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify both sides and the exponents on networks, and both sides on random quadratics."""
    found: list[Certificate] = []
    first = mlp_instance(key)
    for p in FACTORS[size]:
        found += _on_instance(first, key, p)
    for instance in networks(size, key)[1:]:
        found += _on_instance(instance, key, 2)
    found += _whole(first, key, 2)
    for p in (2,) if size is Size.SMALL else (2, 3):
        found += _quadratics(key, size, p)
    found += [*_attained(), *_outside(first, key)]
    return tuple(found)


def _on_instance(instance: Instance, key: PRNGKeyArray, p: int) -> Certificates:
    spec = sd.SpecDef(alpha=1.0, k=1, side="output")
    plan = sd.plan(instance.params, spec, where=instance.where, key=key)
    return on_network(instance.loss, instance.params, plan, *instance.args, factors=p, name=instance.name)


def on_network(
    loss: Callable[..., Array],
    params: PyTree,
    plan: Plan,
    *args: Any,
    factors: int,
    name: str,
    alphas: np.ndarray = ALPHAS,
) -> Certificates:
    """Certify the statement on anyone's network, small enough for a dense Hessian.

    Args:
      loss: loss(params, *args) on plain parameters.
      params: plain parameters.
      plan: one layer, directions among the singular ones, fewer than all; its alpha is not read.
      *args: data.
      factors: p.
      name: of the instance.
      alphas: where the sharpness is measured; at least six, large, for the exponent.
    """
    name = f"{name}, p = {factors}, {len(alphas)} alphas to {max(alphas):.0f}"

    def evaluate() -> list[Certificate]:
        require_alpha(*alphas)
        require_smooth(loss, params, *args)
        ((path, layer),) = plan.items()
        split = _spectrum(dict(trees.named_leaves(params))[path], layer)
        overlap = jnp.sum((split.left.T @ layer.U) ** 2, axis=1)
        aligned = bool(jnp.all(jnp.minimum(overlap, jnp.abs(1 - overlap)) < 1e-6))
        require(aligned, "U is spanned by left singular vectors of W")
        before = curvature_of(loss, params, *args)
        measured = _sharpness(loss, params, plan, args, jnp.asarray(alphas), factors)
        outside, norm = _outside_curvature(params, plan, before)
        lower, upper = jax.vmap(
            lambda alpha: bounds.chain_sides(
                split.values, split.deformed, alpha, factors, len(layer.U), outside=outside,
                sigma_1=sigma_1(before.hessian), gradient_norm=norm,
            )
        )(jnp.asarray(alphas))  # fmt: skip
        allowance = measured["rounding"] + rounding(before.hessian) * upper / sigma_1(before.hessian)
        top, slope = np.asarray(measured["top"]), exponent(alphas, measured["top"]).slope
        found = [
            equality("C F_1 ... F_p = W", name, measured["error"], 0.0, scale=1.0, allowance=1e-7),
            inequality("s^(2(p-1)/p) K <= sigma_1(H_chain)", name, lower, top, allowance=allowance,
                       word=Word.CHECKED),
            inequality("sigma_1(H_chain) <= its upper side", name, top, upper, allowance=allowance,
                       word=Word.CHECKED),
            fit(f"sharpness grows as a^{bounds.chain_exponent(factors):.3g}", name, slope,
                bounds.chain_exponent(factors), tolerance=0.05, count=len(alphas)),
        ]  # fmt: skip
        if factors > 1:
            found += [
                tight("s^(2(p-1)/p) K <= sigma_1(H_chain), largest alpha", name, lower[-1], top[-1],
                      factor=1.1, allowance=allowance[-1], word=Word.CHECKED),
                # Sharper than the undeformed network, and so by 5.2 than with C frozen.
                refuted("a chain is no sharper than the undeformed network is false", name, top[-1],
                        10 * sigma_1(before.hessian), word=Word.CHECKED, note="ten times, largest alpha"),
            ]  # fmt: skip
        return found

    return under_assumptions(CLAIM, name, evaluate)


class Spectrum(NamedTuple):
    """Singular value decomposition of W, and which values belong to U."""

    left: Array
    values: Array
    right: Array
    deformed: Array


def _spectrum(kernel: Array, layer: Layer) -> Spectrum:
    W = layer.axes.to_matrix(kernel, layer.side).T
    left, values, right = jnp.linalg.svd(W, full_matrices=False)
    return Spectrum(left, values, right, jnp.sum((left.T @ layer.U) ** 2, axis=1) > 0.5)


def _factors(kernel: Array, layer: Layer, alpha: Array, p: int) -> list[Array]:
    """Return F_1, ..., F_p."""
    left, values, right, deformed = _spectrum(kernel, layer)
    stretched = jnp.where(deformed, alpha * values, values)
    if p == 1:
        return [(left * stretched) @ right]
    root = stretched ** (1 / p)
    return [left * root, *[jnp.diag(root)] * (p - 2), root[:, None] * right]


def _assembled(factors: list[Array], layer: Layer, alpha: Array, shape: tuple[int, ...]) -> Array:
    """Return the kernel of C F_1 ... F_p."""
    U, W = layer.U, factors[0]
    for factor in factors[1:]:
        W = W @ factor
    W = W + (1 / alpha - 1) * U @ (U.T @ W)
    return layer.axes.from_matrix(W.T, shape, layer.side)


@partial(jax.jit, static_argnames=("loss", "p", "own"))
def _sharpness(
    loss: Callable[..., Array],
    params: PyTree,
    plan: Plan,
    args: tuple[Any, ...],
    alphas: Array,
    p: int,
    own: bool = False,
) -> dict[str, Array]:
    """Return sigma_1 of the network with the chain (its own block alone, if so asked) for every alpha."""
    ((path, layer),) = plan.items()
    kernel = dict(trees.named_leaves(params))[path]

    def at(alpha: Array) -> dict[str, Array]:
        def on_vector(v: Array) -> Array:
            factors, rest = unravel(v)
            W = _assembled(factors, layer, alpha, kernel.shape)
            others = params if own else rest
            return loss(trees.map_named(lambda name, x: W if name == path else x, others), *args)

        # The kernel itself is no parameter of the chain: an empty array in its place.
        rest = trees.map_named(lambda name, x: x[:0] if name == path else x, params)
        start = (_factors(kernel, layer, alpha, p), {} if own else rest)
        flat, unravel = ravel_pytree(start)
        H = jax.hessian(on_vector)(flat)
        error = jnp.max(jnp.abs(_assembled(start[0], layer, alpha, kernel.shape) - kernel))
        return {"top": sigma_1(H), "rounding": rounding(H), "error": error}

    return jax.lax.map(at, alphas)


@jax.jit
def _outside_curvature(params: PyTree, plan: Plan, before: Curvature) -> tuple[Array, Array]:
    """Return K, and the spectral norm of dL/dW."""
    ((path, layer),) = plan.items()
    kernel = dict(trees.named_leaves(params))[path]
    *_, right, deformed = split = _spectrum(kernel, layer)
    v = right[jnp.argmax(jnp.where(deformed, jnp.inf, split.values))]  # the largest deformed one comes first
    complement = jnp.linalg.svd(layer.U)[0][:, layer.U.shape[1] :]

    def embedded(u: Array) -> Array:
        move = layer.axes.from_matrix(jnp.outer(v, u), kernel.shape, layer.side)
        zeros = trees.map_named(lambda name, x: move if name == path else jnp.zeros_like(x), params)
        return ravel_pytree(zeros)[0]

    basis = jax.vmap(embedded, in_axes=1, out_axes=1)(complement)
    gradient = dict(trees.named_leaves(ravel_pytree(params)[1](before.gradient)))[path]
    norm = jnp.linalg.norm(layer.axes.to_matrix(gradient, layer.side), 2)
    return sigma_1(basis.T @ before.hessian @ basis), norm


def _whole(instance: Instance, key: PRNGKeyArray, p: int) -> list[Certificate]:
    """At k = m another exponent, on the layer's own block."""
    m = instance.params["layer_1"]["w"].shape[1]
    spec = sd.SpecDef(alpha=1.0, k=m, side="output")
    plan = sd.plan(instance.params, spec, where=instance.where, key=key)
    alphas = jnp.asarray(ALPHAS)
    measured = _sharpness(instance.loss, instance.params, plan, instance.args, alphas, p, own=True)
    predicted = bounds.chain_exponent(p, whole=True)
    return [
        fit(f"k = m: the layer's own curvature goes as a^{predicted:.3g}", f"{instance.name}, p = {p}",
            exponent(ALPHAS, measured["top"]).slope, predicted, tolerance=0.05, count=len(ALPHAS)),
    ]  # fmt: skip


def _quadratics(key: PRNGKeyArray, size: Size, p: int) -> list[Certificate]:
    """Both sides for L(W) = <g, W - W_0> + (W - W_0)^T H (W - W_0) / 2, W 3 x 2, k = 1, exact derivatives."""
    sides = over_draws(_DRAWS[p], key, size.draws)
    name = f"random quadratics, W 3 x 2, p = {p}, alpha 1 to 1000"
    allowance, scale = sides["allowance"], sides["upper"]
    best = float((sides["top"] / scale).max())
    return [
        inequality("s^(2(p-1)/p) K <= sigma_1(H_chain)", name, sides["lower"], sides["top"],
                   allowance=allowance, scale=scale),
        inequality("sigma_1(H_chain) <= its upper side", name, sides["top"], sides["upper"],
                   allowance=allowance, scale=scale, note=f"at best {best:.3f} of it"),
    ]  # fmt: skip


def _quadratic(p: int, key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 4)
    W0, H, g = (jax.random.normal(k, s) for k, s in zip(keys, ((3, 2), (6, 6), (3, 2)), strict=False))
    H, alpha = (H + H.T) / 2, 10 ** jax.random.uniform(keys[3], (), maxval=3)
    left, values, right = jnp.linalg.svd(W0, full_matrices=False)
    U, deformed = left[:, :1], jnp.array([True, False])
    C = jnp.eye(3) + (1 / alpha - 1) * U @ U.T
    root = jnp.where(deformed, alpha * values, values) ** (1 / p)
    start = [left * root, *[jnp.diag(root)] * (p - 2), root[:, None] * right]
    flat, unravel = ravel_pytree(start)

    def loss(v: Array) -> Array:
        W = C
        for factor in unravel(v):
            W = W @ factor
        moved = (W - W0).ravel()
        return g.ravel() @ moved + moved @ H @ moved / 2

    chain = jax.hessian(loss)(flat)
    basis = jnp.kron(jnp.linalg.svd(U)[0][:, 1:], right[0][:, None])  # u v^T by rows
    lower, upper = bounds.chain_sides(
        values, deformed, alpha, p, 3, outside=sigma_1(basis.T @ H @ basis), sigma_1=sigma_1(H),
        gradient_norm=jnp.linalg.norm(g, 2),
    )  # fmt: skip
    # Automatic differentiation of a product of p factors loses p roundings of what the upper side bounds.
    allowance = rounding(chain) + 64 * p * jnp.finfo(flat.dtype).eps * upper
    return {"lower": lower, "top": sigma_1(chain), "upper": upper, "allowance": allowance}


_DRAWS = {p: partial(_quadratic, p) for p in (2, 3)}


def _attained() -> list[Certificate]:
    """Diagonal W, W = C F_1 ... F_p written out, where the upper side is the sharpness itself."""
    found = []
    for name, values, mask, alpha, p, rows, loss, sigma, norm in (
        ("m = 1, W linear", [8.0], [True], 2.0, 3, 1, lambda W, r: W[0, 0], 0.0, 1.0),
        ("m = 1, W squared", [8.0], [True], 2.0, 3, 1, lambda W, r: (W[0, 0] - 8) ** 2 / 2, 1.0, 0.0),
        ("m = 2, W orthogonal to U", [3.0], [True], 2.0, 2, 2, lambda W, r: W[1, 0], 0.0, 1.0),
        ("m = 2, not deformed is larger", [4.0, 1.0], [False, True], 2.0, 2, 2,
         lambda W, r: (W[0, 0] - 4) ** 2 / 2, 1.0, 0.0),
        ("the rest alone", [1.0], [True], 4.0, 1, 1, lambda W, r: r**2 / 2, 1.0, 0.0),
    ):  # fmt: skip
        top = _diagonal_sharpness(jnp.array(values), jnp.array(mask), alpha, p, rows, loss)
        sides = bounds.chain_sides(
            jnp.array(values), jnp.array(mask), alpha, p, rows, outside=0.0, sigma_1=sigma, gradient_norm=norm
        )
        name = f"{name}, p = {p}, a = {alpha:g}"
        found.append(tight("sigma_1(H_chain) <= its upper side", name, top, sides[1], factor=1 + 1e-12,
                           allowance=1e-12 * sides[1], word=Word.CHECKED))  # fmt: skip
    return found


def _diagonal_sharpness(
    values: Array, deformed: Array, alpha: float, p: int, rows: int, loss: Callable[..., Array]
) -> Array:
    """Return sigma_1 of loss(C F_1 ... F_p, r), W = diag(values) with `rows` rows, at r = 0."""
    root = jnp.where(deformed, alpha * values, values) ** (1 / p)
    C = jnp.eye(rows).at[: len(values), : len(values)].set(jnp.diag(jnp.where(deformed, 1 / alpha, 1.0)))
    left = jnp.eye(rows)[:, : len(values)]
    flat, unravel = ravel_pytree(([left * root, *[jnp.diag(root)] * (p - 1)], jnp.zeros(())))

    def on_vector(v: Array) -> Array:
        factors, r = unravel(v)
        W = C
        for factor in factors:
            W = W @ factor
        return loss(W, r)

    return sigma_1(jax.hessian(on_vector)(flat))


def _outside(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """Directions that are no singular ones, and alpha < 1."""
    spec = sd.SpecDef(alpha=1.0, k=1, side="output", directions="random")
    plan = sd.plan(instance.params, spec, where=instance.where, key=key)
    top = sd.plan(instance.params, sd.SpecDef(alpha=1.0, side="output"), where=instance.where, key=key)
    tried = {
        "random directions": (plan, ALPHAS, "left singular vectors"),
        "alpha = 1/2": (top, [0.5], "alpha >= 1"),
    }
    found = []
    for name, (plan, alphas, which) in tried.items():
        certificates = on_network(
            instance.loss,
            instance.params,
            plan,
            *instance.args,
            factors=2,
            name=name,
            alphas=np.asarray(alphas),
        )
        found.append(refuses("outside its assumptions the statement is refused", name, certificates, which))
    return found
