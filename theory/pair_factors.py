"""Factors R between the two halves of a deformed pair: what they change and what not (statement 0, iii)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import trees
from specdef_jax.parametrization import Deformed, Side, is_structured, problem
from specdef_jax.spec import Plan
from specdef_jax.words import Word
from theory.certificate import Certificate, equality, refuted
from theory.hessians import curvature_of, eigenvalues, sigma_1
from theory.instances.matrices import orthonormal
from theory.instances.networks import Instance
from theory.trajectories import trajectory

ALPHA = 7.0  # no power of two: everything rounds
STEPS = 30
TOLD_APART = 1e-6  # relative; far above what rounding leaves of an equality


def apart(claim: str, instance: str, gap: Any, note: str = "") -> Certificate:
    """Refute an equality by a gap far above rounding, which is estimated."""
    return refuted(claim, instance, gap, 0.0, allowance=TOLD_APART, word=Word.CHECKED, note=note)


def factors(instance: Instance, side: Side, key: PRNGKeyArray) -> list[Certificate]:
    """Insert R between the factors of a deformed layer, and compare spectra and paths."""
    plan = sd.plan(instance.params, sd.SpecDef(alpha=ALPHA, k=2, side=side), where=instance.where, key=key)
    rotated = Plan({path: replace(layer, basis="rotated") for path, layer in plan.items()})
    deformed = sd.apply_plan(instance.params, plan)
    d = plan[instance.where].U.shape[-2]
    skewed = jnp.eye(d).at[0, 1].set(1.0)  # determinant 1, so no scale gives it away
    compare = _comparison(instance, deformed)
    orthogonal = compare(_with_factor(deformed, instance.where, orthonormal(key, d, d)))
    turned = compare(sd.apply_plan(instance.params, rotated))
    sheared = compare(_with_factor(deformed, instance.where, skewed))
    name = f"{instance.name}, {side} side"
    return [
        equality("orthogonal R keeps the Hessian spectrum", name, orthogonal.spectrum, 0.0, scale=1.0),
        equality("orthogonal R keeps the path of gradient descent", name, orthogonal.sgd, 0.0, scale=1.0),
        equality("symmetric and rotated share the spectrum", name, turned.spectrum, 0.0, scale=1.0),
        equality(
            "symmetric and rotated share the path of gradient descent", name, turned.sgd, 0.0, scale=1.0
        ),
        apart("symmetric and rotated share the path of Adam", name, turned.adam),
        apart("a shear R keeps the spectrum", name, sheared.spectrum),
        apart("a shear R keeps the path of gradient descent", name, sheared.sgd),
    ]


class Gaps(NamedTuple):
    """How far another pair is from the first: Hessian spectrum, and paths of two optimizers, relative."""

    spectrum: float
    sgd: float
    adam: float


def _comparison(instance: Instance, deformed: PyTree) -> Callable[[PyTree], Gaps]:
    """Return a function that measures how far another pair is from this one."""
    hessian = curvature_of(instance.loss, deformed, *instance.args).hessian
    norm = sigma_1(hessian)
    optimizers = optax.sgd(float(1 / norm)), optax.adam(0.01)

    def paths(tree: PyTree) -> list[np.ndarray]:
        task = problem(instance.loss, tree, *instance.args)
        runs = (trajectory(task, o, *instance.args, steps=STEPS)[0] for o in optimizers)
        return [np.concatenate([np.ravel(x) for x in jax.tree.leaves(run)]) for run in runs]

    mine = paths(deformed)

    def compare(other: PyTree) -> Gaps:
        theirs = curvature_of(instance.loss, other, *instance.args).hessian
        spectrum = float(jnp.max(jnp.abs(eigenvalues(theirs) - eigenvalues(hessian))) / norm)
        gaps = [float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(mine, paths(other), strict=True)]
        return Gaps(spectrum, *gaps)

    return compare


def _with_factor(tree: PyTree, path: str, R: Float[Array, "d d"]) -> PyTree:
    """Return the tree with the factors A, B of a leaf, kernel = A B, replaced by A R^T and R^-T B."""

    def visit(name: str, leaf: Any) -> Any:
        if name != path:
            return leaf
        matrix, right = leaf.axes.to_matrix(leaf.weight, leaf.side), leaf.comp
        right = right if leaf.side == "output" else right.T
        right = jnp.linalg.solve(R.T, right)
        weight = leaf.axes.from_matrix(matrix @ R.T, leaf.weight.shape, leaf.side)
        return Deformed(weight, right if leaf.side == "output" else right.T, leaf.side, leaf.axes)

    return trees.map_named(visit, tree, is_leaf=is_structured)


def swap() -> list[Certificate]:
    """For L = (c w - t)^2 / 2 the factor R = c/w, not orthogonal, changes nothing."""
    pair, other = jnp.array([2.0, 0.5]), jnp.array([0.5, 2.0])
    spectra = [eigenvalues(curvature_of(_scalar, p).hessian) for p in (pair, other)]
    gradients = [curvature_of(_scalar, p).gradient for p in (pair, other)]
    steps = [jnp.prod(p - 0.1 * g) for p, g in zip((pair, other), gradients, strict=True)]
    name = "L = (c w - 3)^2 / 2 at c = 2, w = 1/2, R = 4: the two numbers change places"
    return [
        equality("a factor R that is not orthogonal may keep spectrum and path", name,
                 jnp.append(spectra[0], steps[0])[None], jnp.append(spectra[1], steps[1])[None]),
    ]  # fmt: skip


def _scalar(pair: Float[Array, " 2"]) -> Float[Array, ""]:
    return (pair[0] * pair[1] - 3.0) ** 2 / 2
