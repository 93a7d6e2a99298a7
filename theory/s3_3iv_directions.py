"""Statement 3.3iv [ours]: Directions: the floor L*_U and what U^T W h tells about the residual.

STATEMENT. Let x = W h be the outputs of the deformed layer on the attacker's samples, z = U^T x, l_i(y) the
loss of sample i as a function of the layer's output, g_i its gradient at y = x_i, E the mean over samples.
The floor is L*_U = inf_B E l(x + B z). Define the linear information of z about the residual,
    I_U = tr(E[g z^T] E[z z^T]^+ E[z g^T]),
the energy of g explained linearly by z. It depends on span(U) alone, and
    (a) l_i rho-smooth (Hessian <= rho I everywhere)  =>  L*_U <= L_0 - I_U / (2 rho);
    (b) l_i beta-strongly convex                      =>  L*_U >= L_0 - I_U / (2 beta);
    (c) l_i(y) = beta |y - t_i|^2 / 2                 =>  equality;
    (d) l_i convex                                    =>  (L*_U = L_0  iff  I_U = 0);
    (e) over all U of k directions, I_U is least, and for (c) the floor highest, for the generalized
        eigenvectors of the k smallest eigenvalues of (N, M), N = E[x g^T] E[g x^T], M = E[x x^T] > 0; the
        least I_U is the sum of those eigenvalues. It is 0 for k <= m - rank E[g x^T]; with softmax outputs
        as the layer's own, 1^T g = 0, so some direction always has floor = start.
    (f) A defender who does not know g: if g = A^T (x - E x) with random A, E[A A^T] = tau I, then E_A I_U =
        tau tr(E[z z^T]^-1 U^T Cov(x)^2 U), so the pencil is (Cov(x)^2, M): directions of little variance, or
        nearly constant ones. sd.resistant_directions solves both pencils; directions="resistant" in sd.plan.
For a tail that is not convex (a) stays true and (d) is FALSE: I_U = 0 makes B = 0 a critical point only.

GIVEN SHARPNESS. s = a^2 ||K_U|| with ||K_U|| <= rho ||E[z z^T]||, so alpha >= sqrt(s / (rho ||E[z z^T]||)):
what is uninformative because it is small needs a large alpha. Directions are therefore taken among those
of enough energy, E[z^2] >= energy lambda_max(M).

ASSUMPTIONS. The layer is applied once per sample (else y_i collects several z, with the same B); E[z z^T]
need not be invertible.

PROOF. F(B) = E l(x + B z). (a) l(x + B z) <= l(x) + g^T B z + rho |B z|^2 / 2; take means: F(B) <= L_0 +
<E[g z^T], B> + rho tr(B E[zz^T] B^T) / 2, minimised at B = -E[g z^T] E[zz^T]^+ / rho (the range of
E[z g^T] lies in that of E[zz^T]) with value L_0 - I_U / (2 rho). (b) is the same with >= and beta, for
every B. (c) is both. (d) F is convex in B, so B = 0 is a global minimum iff grad F(0) = E[g z^T] = 0 iff
I_U = 0. (e) With z = U^T x, I_U = tr((U^T M U)^-1 U^T N U); substitute V = M^(1/2) U (U^T M U)^(-1/2),
orthonormal: tr(V^T M^(-1/2) N M^(-1/2) V), and Ky Fan's minimum principle. rank N = rank E[g x^T] <= m - 1
if 1^T g = 0. Invariance: U -> U R cancels. (f) E[g z^T] = A^T Cov(x) U, and E_A tr(A^T Q A) =
tr(Q E[A A^T]) = tau tr(Q) with Q = Cov U E[zz^T]^-1 U^T Cov. Without convexity: l(y) = ((y - x)^2 - 1)^2
has gradient 0 at y = x, so I_U = 0, and y = 2 x reaches 0 from 1. QED.

TIGHTNESS. (a), (b) are equalities for squared loss; (e) is attained by its eigenvectors.

SOURCE. Ours. What it means on trained networks is measured in benchmarks/directions.py.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, PRNGKeyArray

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.errors import SpecError
from theory.assumptions import require
from theory.certificate import (
    AssumptionViolated,
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
from theory.instances.matrices import orthonormal
from theory.instances.networks import Instance, linear_tail_instance, mlp_instance, shared_instance
from theory.sizes import Size

SAMPLES, FEATURES = 12, 4


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify (a) to (f) on networks and random data, and that no direction beats (e)."""
    squared = linear_tail_instance(key)
    return (
        *(c for d in ("top", "bottom", "random", "resistant") for c in _squared(squared, d, key)),
        *_cross_entropy(linear_tail_instance(key, "cross-entropy"), key),
        *_extremal(key, size),
        *_agnostic(key, size),
        _not_convex(),
        *_outside(mlp_instance(key), key),
    )


def _squared(instance: Instance, directions: str, key: PRNGKeyArray) -> Certificates:
    """(c): the floor, by L-BFGS, against the formula."""
    claim, name = "L*_U = L_0 - I_U / 2", f"{instance.name}, {instance.where}, {directions}"

    def evaluate() -> Certificate:
        require(instance.where == instance.network.kernels[-1], "the map behind the layer is linear")
        require(instance.positions == 1, "the layer is applied once per sample")
        x, g, start = _residuals(instance)
        plan = _plan(instance, directions, key)
        floor = bounds.fast_subspace_loss(
            instance.loss, instance.params, plan, *instance.args, steps=2000, tol=1e-12
        )
        information = bounds.linear_information(x @ plan[instance.where].U, g)
        lower, upper = bounds.floor_interval(start, information, smoothness=1.0, convexity=1.0)
        return equality(
            claim, name, [floor, floor], [lower, upper], allowance=1e-9, count=1,
            note=f"L_0 = {start:.4f}, floor {float(floor):.4f}",
        )  # fmt: skip

    return under_assumptions(claim, name, evaluate)


def _cross_entropy(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """(a) and (d) for softmax cross-entropy: smooth with 1/2, convex, not strongly so."""
    x, g, start = _residuals(instance)
    name = f"{instance.name}, linear tail"
    blind = jnp.linalg.svd(g.T @ x)[2][-1:].T  # E[g x^T] u = 0: 1^T g = 0 leaves at least one
    floor_of = functools.partial(_floor_along, instance, key)
    top = _plan(instance, "top", key)[instance.where].U
    information = bounds.linear_information(x @ top, g)
    _, upper = bounds.floor_interval(start, information, smoothness=0.5)
    nothing, anything = (bounds.floor_interval(start, i, smoothness=0.5)[0] for i in (0.0, information))
    return [
        inequality("L*_U <= L_0 - I_U / (2 rho)", f"{name}, top", floor_of(top), upper, allowance=1e-9,
                   word=sd.Word.CHECKED, note=f"L_0 = {start:.4f}, I_U = {float(information):.4f}"),
        equality("I_U = 0 gives floor = start", f"{name}, u with E[g z] = 0", floor_of(blind), start,
                 allowance=1e-9, note=f"I_U = {float(bounds.linear_information(x @ blind, g)):.1e}"),
        refuted("I_U > 0 with floor = start is false", f"{name}, top", start, floor_of(top), allowance=1e-6,
                word=sd.Word.CHECKED),
        equality("without strong convexity the lower bound is the start for I_U = 0, else -inf", name,
                 [float(nothing), float(jnp.isneginf(anything))], [start, 1.0], count=2),
    ]  # fmt: skip


def _extremal(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(e): random directions never carry less, the generalized eigenvectors carry exactly that."""
    sides = over_draws(_least_and_random, key, size.draws)
    x, g = _data(key)
    n = len(x)
    N, M = np.asarray(x.T @ g @ g.T @ x) / n**2, np.asarray(x.T @ x) / n
    values = scipy.linalg.eigh(N, M, eigvals_only=True)
    U = sd.resistant_directions(x, 2, residuals=g, energy=1e-12)
    found = falsify(
        _information_slack, functools.partial(_sample_point, FEATURES), key, tried=size.draws,
        climbed=size.starts, steps=100,
    )  # fmt: skip
    return [
        inequality("I_U >= the sum of the k smallest eigenvalues", "Gaussian data, k = 2 of 4, random U",
                   sides["least"], sides["random"], allowance=1e-11 * sides["energy"], scale=sides["energy"],
                   word=sd.Word.CHECKED, search=found.search),
        equality("the sum of the k smallest eigenvalues of (N, M)", "Gaussian data, k = 2, against SciPy",
                 bounds.least_information(x, g, 2), values[:2].sum(), scale=values[-1]),
        tight("resistant_directions attains it", "Gaussian data, k = 2", bounds.least_information(x, g, 2),
              bounds.linear_information(x @ U, g), factor=1 + 1e-9, allowance=1e-12 * values[-1],
              word=sd.Word.CHECKED),
        inequality("a direction of rank-deficient E[g x^T] carries nothing", "g of rank 2, 4 features, k = 2",
                   bounds.least_information(x, _rank_two(g), 2), 0.0, allowance=1e-12 * values[-1],
                   word=sd.Word.CHECKED),
    ]  # fmt: skip


def _rank_two(g: Array) -> Array:
    """Return residuals of rank two with the size of g."""
    U, s, Vt = jnp.linalg.svd(g, full_matrices=False)
    return (U[:, :2] * s[:2]) @ Vt[:2]


def _least_and_random(key: PRNGKeyArray) -> dict[str, Array]:
    data_key, u_key, family_key = jax.random.split(key, 3)
    x, g = _data(data_key)
    # Half of the draws have features that fall by three decades: M is ill-conditioned.
    graded = jnp.where(jax.random.bernoulli(family_key), jnp.logspace(0, -3, FEATURES), 1.0)
    U = orthonormal(u_key, FEATURES, 2)
    return {
        "least": bounds.least_information(x * graded, g, 2),
        "random": bounds.linear_information(x * graded @ U, g),
        "energy": jnp.mean(jnp.sum(g**2, axis=1)),
    }


def _data(key: PRNGKeyArray) -> tuple[Array, Array]:
    """Activations with a mean, and correlated residuals."""
    x_key, g_key, mix_key = jax.random.split(key, 3)
    x = jax.random.normal(x_key, (SAMPLES, FEATURES)) + 1.0
    g = x @ jax.random.normal(mix_key, (FEATURES, 3)) + jax.random.normal(g_key, (SAMPLES, 3))
    return x, g


def _sample_point(features: int, key: PRNGKeyArray) -> dict[str, Array]:
    x, g = _data(key)
    return {"x": x, "g": g, "U": jax.random.normal(jax.random.fold_in(key, 1), (features, 2))}


def _information_slack(point: dict[str, Array]) -> Array:
    least = bounds.least_information(point["x"], point["g"], 2)
    found = bounds.linear_information(point["x"] @ point["U"], point["g"])
    energy = jnp.mean(jnp.sum(point["g"] ** 2, axis=1))
    return (found - least) / energy + 1e-11


def _agnostic(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """(f): the mean over random linear tasks, by its closed form and by sampling."""
    x, _ = _data(key)
    centred = x - x.mean(0)
    cov, M = centred.T @ centred / len(x), x.T @ x / len(x)
    U = orthonormal(key, FEATURES, 2)

    def information(task_key: PRNGKeyArray) -> Array:
        return bounds.linear_information(x @ U, centred @ jax.random.normal(task_key, (FEATURES, 3)))

    sampled = over_draws(information, key, size.draws)
    predicted = 3 * jnp.trace(jnp.linalg.solve(U.T @ M @ U, U.T @ cov @ cov @ U))
    error = float(sampled.std() / np.sqrt(sampled.size))
    resistant = sd.resistant_directions(x, 1, energy=1e-12)[:, 0]
    values = scipy.linalg.eigh(np.asarray(cov @ cov), np.asarray(M), eigvals_only=True)
    ratio = (resistant @ cov @ cov @ resistant) / (resistant @ M @ resistant)
    return [
        equality("E_A I_U = tau tr(E[zz^T]^-1 U^T Cov^2 U)", f"{sampled.size:,} random tasks, tau = 3",
                 sampled.mean(), predicted, allowance=5 * error / float(predicted), count=sampled.size,
                 word=sd.Word.ESTIMATED, note="allowance: five standard errors"),
        equality("resistant_directions alone solves (Cov^2, M)", "against SciPy", ratio, values[0],
                 scale=values[-1]),
    ]  # fmt: skip


def _not_convex() -> Certificate:
    """Without convexity zero information does not keep the floor up."""
    x = jnp.array([1.0, -1.0])  # two samples of one feature

    def loss_of_one(y: Array, x: Array) -> Array:
        return ((y - x) ** 2 - 1) ** 2

    def loss(b: float) -> Array:
        return jnp.mean(loss_of_one(x + b * x, x))

    g = jax.vmap(jax.grad(loss_of_one))(x, x)
    return refuted(
        "I_U = 0 gives floor = start, without convexity, is false", "l(y) = ((y - x)^2 - 1)^2, x = +-1",
        loss(0.0), loss(1.0),
        note=f"I_U = {float(bounds.linear_information(x[:, None], g[:, None])):g}; B = 0 is a maximum",
    )  # fmt: skip


def _outside(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """A tail that is not linear, a shared layer, and constant activations without a second direction."""
    shared = replace(shared_instance(key, "squared"), where="layer_2/w")
    x = jnp.outer(jnp.ones(6), jnp.arange(1.0, 4.0))

    def two_directions() -> Certificates:
        try:
            return (seen("two directions", "constant", float(sd.resistant_directions(x, 2).size), False),)
        except SpecError as error:
            raise AssumptionViolated(str(error)) from error

    claim = "outside its assumptions the statement is refused"
    constant = under_assumptions("resistant directions", "constant", two_directions)
    return [
        refuses(
            claim, "a tanh behind the layer", _squared(instance, "top", key), "behind the layer is linear"
        ),
        refuses(claim, "a layer shared by tokens", _squared(shared, "top", key), "once per sample"),
        refuses("two directions of constant activations are refused", "k = 2", constant, "activation energy"),
    ]


def _residuals(instance: Instance) -> tuple[Array, Array, float]:
    """Return the last layer's outputs before the bias, the gradients of the samples' losses, and L_0."""
    acts = sd.activations(instance.network.apply, instance.params, instance.args[0], where=instance.where)
    x, y = acts[instance.where], instance.args[1]
    bias = instance.params[instance.where.split("/")[0]]["b"]

    def one(out: Array, label: Array) -> Array:
        logits = out + bias
        if "squared" in instance.name:
            return 0.5 * jnp.sum((logits - jax.nn.one_hot(label, len(bias))) ** 2)
        return jax.nn.logsumexp(logits) - logits[label]

    g = jax.vmap(jax.grad(one))(x, y)
    return x, g, float(jnp.mean(jax.vmap(one)(x, y)))


def _plan(instance: Instance, directions: Any, key: PRNGKeyArray) -> sd.Plan:
    spec = sd.SpecDef(alpha=1.0, k=1, side="output", directions=directions)
    acts = None
    if isinstance(directions, str) and directions == "resistant":
        acts = sd.activations(instance.network.apply, instance.params, instance.args[0], where=instance.where)
    return sd.plan(instance.params, spec, where=instance.where, key=key, activations=acts)


def _floor_along(instance: Instance, key: PRNGKeyArray, U: Array) -> Array:
    plan = _plan(instance, U, key)
    return bounds.fast_subspace_loss(
        instance.loss, instance.params, plan, *instance.args, steps=2000, tol=1e-12
    )
