"""Statement 5.1 [ours]: Fusing multiplies the pair out and leaves nothing of the deformation.

STATEMENT. For every factorization C Wt = W of a linear map (the deformed pair in any basis, (C R^-1, R Wt)
with any invertible R) the fused network, C Wt in the place of the layer, is the undeformed network: same
parameters, same gradients, same Hessian, same trajectory of every optimizer. It costs 2 m^2 n FLOPs for a
layer (2 n^2 m on the input side), once, needs no data, adds no parameter and no FLOP to a training step. In
a storage format of unit roundoff u, with gamma_m = m u / (1 - m u), componentwise

    |fl(C Wt) - C Wt| <= gamma_m |C| |Wt|,         |fl(C Wt) - W| <= (gamma_m + 2 u + u^2) |C| |Wt|,

C, Wt as stored, each rounded once: the first is what fusing loses, the second includes what storing lost
before. In the axis basis with a = 2^p both are 0, to the bit.

ASSUMPTIONS. Nothing nonlinear between the factors; no overflow or underflow.

PROOF. C Wt = W in real arithmetic, and a network is a function of its parameters: equal parameters give
equal derivatives and equal trajectories. For rounding: a product of two m-vectors summed in any order
satisfies |fl(x^T y) - x^T y| <= gamma_m |x|^T |y| (Higham, Accuracy and Stability of Numerical Algorithms,
2002, (3.5)); fused multiply-adds only help. With C* = C + E, |E| <= u |C| (rounding to nearest, relative to
the rounded value) and likewise Wt*, C* Wt* = W gives |C Wt - W| <= (2 u + u^2) |C| |Wt|; add the two. In
the axis basis T(a) is diagonal with powers of two: every entry of C Wt is a sum with one nonzero term, W_ij
a / a, exact. QED.

TIGHTNESS. For m = 1 the error is three roundings of one number and comes near 3 u |W|. |C| |Wt| is of the
order of a |W| in the symmetric basis, so a weight fused from storage has lost about log10 a digits: that is
the price of storing the pair, not of fusing it.

SOURCE. Ours; THEORY.md 1.1, 1.2.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import attacks, trees
from specdef_jax.pair import Basis, build_pair
from specdef_jax.parametrization import Deformed, full_precision_matmul
from specdef_jax.spec import Plan
from specdef_jax.words import Word
from theory.assumptions import require
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
from theory.hessians import curvature_of, sigma_1
from theory.instances.matrices import graded, orthonormal
from theory.instances.networks import mlp_instance, networks
from theory.sizes import Size
from theory.trajectories import plain, trajectory

ALPHA = 48.0
UNIT = float(np.finfo(np.float32).eps) / 2
CLAIM = "the fused network is the undeformed one"


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify fusion on networks and its rounding on random pairs; time one large layer."""
    found: list[Certificate] = []
    for instance in networks(size, key):
        plan = sd.plan(instance.params, sd.SpecDef(alpha=ALPHA, k=2), where=instance.where, key=key)
        found += on_network(instance.loss, instance.params, plan, *instance.args, name=instance.name)
    bases: tuple[Basis, ...] = ("symmetric",) if size is Size.SMALL else ("symmetric", "rotated")
    for basis in bases:
        found += _rounding(key, size, basis)
    found += _exact(key, size)
    found.append(_seconds(key))
    instance = mlp_instance(key)
    plan = sd.plan(instance.params, sd.SpecDef(alpha=ALPHA), where=instance.where, key=key)
    bent = on_network(_tanh_between, instance.params, plan, *instance.args, name="")
    found.append(refuses("a nonlinear map between the factors is refused", "tanh", bent, "nothing nonlinear"))
    return tuple(found)


def on_network(loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any, name: str) -> Certificates:
    """Certify on anyone's network that sd.attacks.fuse gives back the undeformed one.

    Args:
      loss: loss(params, *args) on plain parameters, or one that reads Deformed leaves itself.
      params: plain parameters, small enough for a dense Hessian.
      plan: what was deformed.
      *args: data.
      name: of the instance.
    """

    def evaluate() -> list[Certificate]:
        deformed = sd.apply_plan(params, plan)
        attack = attacks.fuse(loss, deformed, *args)
        fused = attack.problem.params
        there, here = (float(problem_loss(loss, tree, *args)) for tree in (deformed, fused))
        require(
            abs(here - there) <= 1e-9 * (1 + abs(there)), "nothing nonlinear stands between weight and comp"
        )
        before, after = curvature_of(loss, params, *args), curvature_of(loss, fused, *args)
        # Rounding grows by 1 + eta |lambda| a step at most, so by 300 in 60 steps.
        optimizer = optax.sgd(0.1 / float(sigma_1(before.hessian)))
        path, _ = trajectory(plain(loss, fused), optimizer, *args, steps=60)
        original, _ = trajectory(plain(loss, params), optimizer, *args, steps=60)
        sharp = sigma_1(curvature_of(loss, deformed, *args).hessian)
        parts = list(zip(trees.named_leaves(fused), jax.tree.leaves(params), strict=True))
        return [
            *(equality(f"fl(C Wt) = W, {leaf}", name, x[None], w[None])
              for (leaf, x), w in parts if leaf in plan.layers),
            equality(f"{CLAIM}: 60 steps of SGD", name, *(_flat(p) for p in (path, original)), count=61),
            equality(f"{CLAIM}: its Hessian", name, after.hessian[None], before.hessian[None]),
            refuted("the fused network is as sharp as the deformed one is false", name, sharp,
                    2 * sigma_1(after.hessian), word=Word.CHECKED),
            equality("added parameters and FLOPs of a step", name,
                     [attack.bill.added_parameters, attack.bill.added_flops], 0.0, scale=1.0, allowance=0.0),
        ]  # fmt: skip

    return under_assumptions(CLAIM, name, evaluate)


def problem_loss(loss: Callable[..., Array], tree: PyTree, *args: Any) -> Array:
    """Return the loss of a tree, deformed or plain."""
    return jax.jit(sd.parametrization.loss_on(loss, tree, *args))(tree, *args)


def _flat(path: PyTree) -> Array:
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(path)], axis=1)


def _pair(key: PRNGKeyArray, basis: Basis, m: int, n: int) -> tuple[Array, Array, Array]:
    """Return W (n, m) in matrix form and its stored float32 factors, at a random alpha up to 1e4."""
    keys = jax.random.split(key, 3)
    matrix = graded(keys[0], (n, m)).astype(jnp.float32).astype(jnp.float64)
    alpha = 10 ** jax.random.uniform(keys[1], (), maxval=4)
    weight, comp = build_pair(matrix, orthonormal(keys[2], m, max(1, m // 2)), alpha, basis, "output")
    return matrix, weight.astype(jnp.float32), comp.astype(jnp.float32)


def _errors(basis: Basis, m: int, n: int, key: PRNGKeyArray) -> dict[str, Array]:
    matrix, weight, comp = _pair(key, basis, m, n)
    fused = full_precision_matmul(weight, comp).astype(jnp.float64)
    weight, comp = weight.astype(jnp.float64), comp.astype(jnp.float64)
    size = jnp.abs(weight) @ jnp.abs(comp)
    return {"product": jnp.abs(fused - weight @ comp), "total": jnp.abs(fused - matrix), "size": size}


def _rounding(key: PRNGKeyArray, size: Size, basis: Basis) -> list[Certificate]:
    """Compare the rounding of float32 fusion, entry by entry, with its bounds; float64 is the exact side."""
    m, n = 4, 3
    e = over_draws(functools.partial(_errors, basis, m, n), key, size.draws)
    gamma = m * UNIT / (1 - m * UNIT)
    # What float64 itself may be off by, in building the pair and in the products: at most 64 roundings.
    allowance = 64 * np.finfo(np.float64).eps * e["size"]
    name = f"float32, {basis} basis, {m} x {n}, alpha 1 to 1e4"
    found = [
        inequality("|fl(C Wt) - C Wt| <= gamma_m |C| |Wt|", name, e["product"], gamma * e["size"],
                   allowance=allowance, scale=e["size"]),
        inequality("|fl(C Wt) - W| <= (gamma_m + 2u + u^2) |C| |Wt|", name, e["total"],
                   (gamma + 2 * UNIT + UNIT**2) * e["size"], allowance=allowance, scale=e["size"]),
    ]  # fmt: skip
    if basis == "symmetric":
        one = over_draws(functools.partial(_errors, basis, 1, 1), key, size.draws)
        bound = (3 * UNIT) * one["size"]
        worst = np.argmax(one["total"] / bound)
        found.append(tight("|fl(C Wt) - W| <= 3u |C| |Wt| comes near", "m = n = 1, the worst draw",
                           one["total"].ravel()[worst], bound.ravel()[worst], factor=2))  # fmt: skip
    return found


def _exact(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Fuse in the axis basis with powers of two, and after an invertible change of basis."""
    sides = over_draws(_axis, key, size.draws)
    mixed = over_draws(_mixed, key, size.draws)
    return [
        equality("axis, a = 2^p: fl(C Wt) = W to the bit", "float32, 5 x 4, p from 0 to 30", sides["fused"],
                 sides["matrix"], allowance=0.0, word=Word.PROVED),
        equality("(C R^-1)(R Wt) = W for invertible R", "float64, 5 x 4, random R", mixed["fused"],
                 mixed["matrix"], scale=mixed["size"]),
    ]  # fmt: skip


def _axis(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 3)
    matrix = jax.random.normal(keys[0], (5, 4), jnp.float32)
    alpha = 2.0 ** jax.random.randint(keys[1], (), 0, 31)
    U = jnp.eye(4)[:, jax.random.permutation(keys[2], 4)[:2]]
    weight, comp = build_pair(matrix, U, alpha, "axis", "output")
    fused = full_precision_matmul(weight.astype(jnp.float32), comp.astype(jnp.float32))
    return {"fused": fused, "matrix": matrix}


def _mixed(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 3)
    matrix, R = jax.random.normal(keys[0], (5, 4)), jax.random.normal(keys[1], (4, 4))
    weight, comp = build_pair(matrix, orthonormal(keys[2], 4, 2), jnp.asarray(ALPHA), "symmetric", "output")
    first, second = weight @ R, jnp.linalg.solve(R, comp)
    size = jnp.max(jnp.abs(first) @ jnp.abs(second)) * jnp.linalg.cond(R)
    return {"fused": first @ second, "matrix": matrix, "size": size}


def _seconds(key: PRNGKeyArray) -> Certificate:
    """Time the fusion of one layer, compilation left out."""
    weight = jax.random.normal(key, (1024, 1024), jnp.float32)
    pair = sd.deform({"w": weight}, sd.SpecDef(alpha=16.0, basis="axis"), where="w", key=key)["w"]
    fuse = jax.jit(Deformed.materialize).lower(pair).compile()
    begin = time.perf_counter()
    jax.block_until_ready(fuse(pair))
    taken = time.perf_counter() - begin
    return seen("seconds to fuse one layer", "1024 x 1024 float32", taken, taken < 60)


def _tanh_between(params: PyTree, x: Array, y: Array) -> Array:
    """A perceptron that puts a tanh between the factors of its second layer, if it has two."""
    pair = params["layer_1"]["w"]
    h = jnp.tanh(x @ params["layer_0"]["w"])
    h = jnp.tanh(h @ pair.weight) @ pair.comp if isinstance(pair, Deformed) else h @ pair
    logits = h @ params["layer_2"]["w"]
    return jnp.mean((logits - jax.nn.one_hot(y, logits.shape[-1])) ** 2)
