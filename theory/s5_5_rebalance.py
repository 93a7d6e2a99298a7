"""Statement 5.5 [standard, ours]: Balanced factors forget the deformation, but train along another path.

STATEMENT. Let W = C Wt in R^(m x n), C m x d, Wt d x n, be read off two adjacent linear maps, whichever of
them was deformed, and W = P S Q^T its singular value decomposition, s = ||W||, r = rank W <= d. Factors are
BALANCED if C^T C = Wt Wt^T.

(i) [standard] 2 ||W||_* <= ||C||_F^2 + ||Wt||_F^2 and 2 s <= ||C||^2 + ||Wt||^2 for all factors; equality
in the first holds just for balanced ones, and these are C' = P S^(1/2) R, Wt' = R^T S^(1/2) Q^T with R in
R^(r x d), R R^T = I. So they are those of W, not of (C, Wt): neither a nor U is left in them. R changes
neither the spectrum of the Hessian nor the path of gradient descent and momentum.

(ii) [ours] Let H, G be the Hessian of the network and dL/dW. For any factors, with the rest of the network,
    sigma_1(H_factors) <= max(1, ||C||^2 + ||Wt||^2) sigma_1(H) + ||G||,
for balanced ones max(1, 2 s) sigma_1(H) + ||G||, the least reach ||C||^2 + ||Wt||^2 of all factors; with
the step of the two factors divided by max(1, 2 s), sigma_1(H) + ||G|| / max(1, 2 s). Against the undeformed
network with the identity inserted, H_1, and nu = max(1, (s + sqrt(1 + s^2)) / 2),
    sigma_1(H_balanced) <= nu sigma_1(H_1) + (1 + nu) ||G||.
Nothing here depends on a, while the deformed network has sigma_1 >= a^2 ||K_U|| (2.2). Rebalanced can still
be sharper than undeformed: by nu, attained.

(iii) [ours; standard for gradient flow] What is not recovered is the path. One step c of gradient descent
is
    W+ = W - c ((W W^T)^(1/2) G + G (W^T W)^(1/2)) + c^2 G W^T G,      rest+ = rest - c g,
not W - c G: singular directions u_i v_j^T move at s_i + s_j, not at all (to first order) where both vanish,
and the rank of W_t stays at most d. Training does not balance: one step on any factors changes D = C^T C -
Wt Wt^T by
    D+ - D = c^2 (Wt G^T G Wt^T - C^T G G^T C)
exactly, so gradient flow conserves D, and with it the mark of the deformation.

(iv) [ours] LoRA on the composite, y = layer(h) + sc B A h, layer frozen, layer(h) = W h for all h, is LoRA
on the original, step for step, for EVERY optimizer, those that read weights, or decay them, included,
provided that the start of (A, B), and sc, do not read the factors. LoRA on Wt alone with C frozen: SGD is
SGD of LoRA on the original with the step on B multiplied by T(a^-2) from the left. LoRA on C and Wt
separately is another method, whose sharpness at the start grows as a^2.

ASSUMPTIONS. alpha >= 1; nothing nonlinear between the factors; L twice differentiable at the point.

PROOF. (i) ||C||_F^2 + ||Wt||_F^2 >= 2 ||C||_F ||Wt||_F >= 2 ||C Wt||_*, as ||C Wt||_* = max <Z, C Wt> over
||Z|| <= 1, and <C^T Z, Wt^T> is at most ||C||_F ||Wt||_F; likewise ||C||^2 + ||Wt||^2 >= 2 ||C|| ||Wt|| >=
2 s. In the case of equality t -> ||C e^(tX)||_F^2 + ||e^(-tX) Wt||_F^2 is least at t = 0 for every
symmetric X; its derivative 2 tr X (C^T C - Wt Wt^T) vanishes: balanced. If balanced, (Wt^T Wt)^2 = Wt^T C^T
C Wt = W^T W, so Wt^T Wt = Q S Q^T, and Wt = R^T S^(1/2) Q^T with R = S^(-1/2) Q^T Wt^T, R R^T = I. Likewise
C = P S^(1/2) R', and C Wt = W gives R' R^T = I: rows of length 1 with scalar product 1 agree, R' = R. Both
squares are then tr S: equality. If R and R~ are two of them, one orthogonal Z of R^d has R~ = R Z, and (C,
Wt) -> (C Z, Z^T Wt) is an orthogonal map under which L is invariant: it carries Hessian, gradients and
every method that commutes with it.

(ii) J: (dC, dWt, drest) -> (dC Wt + C dWt, drest) has J J^T = (C C^T (x) I + I (x) Wt^T Wt) + I, so ||J||^2
= max(1, ||C||^2 + ||Wt||^2). The Hessian is J^T H J + B, B the form 2 <G, dC dWt>, at most 2 ||G|| ||dC||_F
||dWt||_F <= ||G||. With D = diag(max(1, 2 s)^(-1/2) on the factors, 1), ||J D|| <= 1 and D B D is scaled by
D^2. For (I, W), J_1 is onto, so J = J_1 N with N = J_1^+ J, J^T H J = N^T (H_1 - B_1) N, and ||N||^2 is the
norm of (J_1 J_1^T)^(-1/2) J J^T (J_1 J_1^T)^(-1/2), that is max(1, max_ij (s_i + s_j) / (1 + s_j^2)) for
balanced ones (j runs over singular values of W and 0; both products are diagonal in u_i v_j^T). (s + t) /
(1 + t^2) is largest at t = sqrt(1 + s^2) - s, with value (s + sqrt(1 + s^2)) / 2. Hence sigma_1 <= nu
(sigma_1(H_1) + ||G||) + ||G||. QED.

(iii) (C - c G Wt^T)(Wt - c C^T G) = W - c (C C^T G + G Wt^T Wt) + c^2 G (C Wt)^T G, and C C^T = P S P^T =
(W W^T)^(1/2), Wt^T Wt = (W^T W)^(1/2). (C - c G Wt^T)^T (C - c G Wt^T) and (Wt - c C^T G)(Wt - c C^T G)^T
have the same linear term -c (C^T G Wt^T + Wt G^T C); subtract. QED.

(iv) F(A, B, rest) = L(W + sc B A, rest), the same function of the same variables for both networks, with
the same start: any method that reads nothing else makes the same steps. On Wt: F = L(W + sc C B A, rest);
with B' = C B a step on B, -c sc C^T G A^T, moves B' by -c sc C C^T G A^T = T(a^-2) times that of the
original, and the gradient in A, sc (C B)^T G, is the same. On C: the start B = 0 has, in B, the form sc^2
D^2 L[dB A Wt], and A Wt = A W + (a - 1) (A U) U^T W grows as a. QED.

TIGHTNESS. (i) balanced factors. (ii) ||C||^2 + ||Wt||^2 by C = c, Wt = w, L = h W^2 / 2 + g W; nu by W =
diag(s, sqrt(1 + s^2) - s) and L quadratic in its entry (1, 2) alone. (iii), (iv) are equalities.

SOURCE. (i) Srebro, Rennie, Jaakkola, Maximum-Margin Matrix Factorization, 2004. (iii) of gradient flow:
Arora, Cohen, Hazan, On the Optimization of Deep Networks, 2018; Du, Hu, Lee, 2018. The rest is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import attacks, bounds, trees
from specdef_jax.attacks.adjacent import AdjacentPair, factors_of
from specdef_jax.attacks.rebalance import balanced
from specdef_jax.gauge import balance
from specdef_jax.parametrization import Deformed, Problem, is_structured, problem
from specdef_jax.spec import Plan
from specdef_jax.words import Word
from theory import adapters
from theory.assumptions import require, require_congruence
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
from theory.falsifier import falsify
from theory.fits import exponent
from theory.forms import OTHER, USUAL, alternating, planned
from theory.hessians import Curvature, curvature_of, eigenvalues, rounding, sigma_1
from theory.instances.adjacent import grouped_attention, perceptron
from theory.instances.matrices import Triple, triples
from theory.instances.networks import Instance, mlp_instance, networks
from theory.sizes import Size
from theory.trajectories import trajectory

ALPHA = 48.0
STEPS = 40
CLAIM = "rebalanced, the network does not depend on alpha"
UPPER = "sigma_1(H_factors) <= (|C|^2 + |Wt|^2) sigma_1(H) + |G|"
LORA = "LoRA on the composite is LoRA on the original"
METHODS: dict[str, optax.GradientTransformation] = {
    "SGD": optax.sgd(0.1),
    "momentum": optax.sgd(0.03, momentum=0.9),
    "Adam": optax.adam(0.02),
    "AdamW, decay": optax.adamw(0.02, weight_decay=0.1),
    "LAMB": optax.lamb(0.02),
}


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify rebalancing on networks and on attention, its inequalities on matrices, and adapters."""
    found: list[Certificate] = []
    for number, instance in enumerate(networks(size, key, hard="cnn")):
        for form in alternating(size, first=number == 0):
            plan, name = planned(instance, ALPHA, form, key)
            found += on_network(instance.loss, instance.params, plan, *instance.args, name=name, key=key)
    found += on_attention(key)
    found += _matrices(key, size)
    found += _attained()
    for number, instance in enumerate(networks(size, key) if size is Size.FULL else [mlp_instance(key)]):
        plan, name = planned(instance, ALPHA, OTHER if number else USUAL, key)
        # An eps that hides gradients which are rounding alone, as those of a transformer's key biases.
        methods = METHODS if number == 0 else {"Adam": optax.adam(1e-3, eps=1e-3)}
        found += adapted(
            instance.loss, instance.params, plan, *instance.args, name=name, key=key, methods=methods
        )
    found += [*_separately(mlp_instance(key), key), *_outside(mlp_instance(key), key)]
    return tuple(found)


def on_network(
    loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any, name: str, key: PRNGKeyArray
) -> Certificates:
    """Certify (i) to (iii) on anyone's network, small enough for a dense Hessian.

    Args:
      loss: loss(params, *args) on plain parameters.
      params: plain parameters.
      plan: what is deformed; kernels without a stack axis, alphas at least 1.
      *args: data.
      name: of the instance.
      key: for the test of what stands between the factors.
    """

    def evaluate() -> list[Certificate]:
        _, inserted = require_congruence(loss, params, plan, *args, key=key)
        deformed = sd.apply_plan(params, plan)
        task = attacks.rebalance(loss, deformed, *args).problem
        other = problem(loss, balanced(inserted), *args)
        before, sharp, first, found, same = (
            curvature_of(loss, tree, *args)
            for tree in (params, deformed, inserted, task.params, other.params)
        )
        top, norm, s = sigma_1(found.hessian), *_norms(params, plan, before)
        nu = np.maximum(1.0, (s + np.sqrt(1 + s**2)) / 2)
        allowance = rounding(found.hessian) + rounding(first.hessian) + rounding(before.hessian)
        shrunk = _shrunk(task.params, 2 * s)
        scaled = sigma_1(found.hessian * jnp.outer(shrunk, shrunk))
        values = eigenvalues(found.hessian)
        return [
            *_factors(task.params, params, plan, name),
            equality(f"{CLAIM}: its Hessian spectrum", name, eigenvalues(same.hessian), values,
                     scale=top, count=len(values)),
            inequality("sigma_1(H_balanced) <= max(1, 2 s) sigma_1(H) + |G|", name, top,
                       bounds.factored_sharpness_upper(2 * s, sigma_1(before.hessian), norm),
                       allowance=allowance, word=Word.CHECKED),
            inequality("step divided by max(1, 2 s): sigma_1 <= sigma_1(H) + |G| / max(1, 2 s)", name, scaled,
                       sigma_1(before.hessian) + norm / max(1.0, 2 * s), allowance=allowance,
                       word=Word.CHECKED),
            inequality("sigma_1(H_balanced) <= nu sigma_1(H_1) + (1 + nu) |G|", name, top,
                       nu * sigma_1(first.hessian) + (1 + nu) * norm, allowance=allowance,
                       word=Word.CHECKED),
            refuted("rebalanced, the network is as sharp as deformed is false", name, sigma_1(sharp.hessian),
                    10 * top, word=Word.CHECKED, note="ten times"),
            *_paths(loss, params, plan, task, other, before, args, 0.1 / float(top), name),
        ]  # fmt: skip

    return under_assumptions(CLAIM, name, evaluate)


def _factors(balanced: PyTree, params: PyTree, plan: Plan, name: str) -> list[Certificate]:
    """The factors in the tree: their product, their Gram matrices, their size."""
    found, kernels = [], dict(trees.named_leaves(params))
    for path, leaf in trees.named_leaves(balanced, is_leaf=is_structured):
        if path not in plan.layers:
            continue
        X, Y = (x[0] for x in factors_of(leaf))
        size = 2 * bounds.nuclear_norm(X @ Y)
        found += [
            equality(f"C' Wt' = W, {path}", name, leaf.materialize()[None], kernels[path][None]),
            equality(f"C'^T C' = Wt' Wt'^T, {path}", name, (X.T @ X)[None], (Y @ Y.T)[None]),
            equality(f"|C'|_F^2 + |Wt'|_F^2 = 2 |W|_*, {path}", name, jnp.sum(X**2) + jnp.sum(Y**2), size),
        ]
    return found


def _norms(params: PyTree, plan: Plan, before: Curvature) -> tuple[float, float]:
    """Return the largest spectral norms of dL/dW and of W among the planned kernels."""
    gradient = ravel_pytree(params)[1](before.gradient)
    both = dict(trees.named_leaves(gradient)), dict(trees.named_leaves(params))
    norms = [
        max(float(np.linalg.norm(np.asarray(_matrix(named[path], plan, path)), 2)) for path in plan)
        for named in both
    ]
    return norms[0], norms[1]


def _matrix(kernel: Array, plan: Plan, path: str) -> Array:
    return plan[path].axes.to_sided(kernel, plan[path].side)


def _shrunk(tree: PyTree, reach: float) -> Array:
    """Return max(1, reach)^(-1/2) on the entries of factors and 1 elsewhere, in the order of ravel_pytree."""

    def visit(leaf: Any) -> Any:
        factor = max(1.0, reach) ** -0.5 if isinstance(leaf, Deformed) else 1.0
        return jax.tree.map(lambda x: jnp.full(x.shape, factor), leaf)

    return ravel_pytree(jax.tree.map(visit, tree, is_leaf=is_structured))[0]


def _paths(
    loss: Callable[..., Array], params: PyTree, plan: Plan, task: Problem, other: Problem, before: Curvature,
    args: tuple[Any, ...], step_size: float, name: str,
) -> list[Certificate]:  # fmt: skip
    """One step by its formula; the path of SGD from two alphas; the path of the original, which it is not."""
    optimizer = optax.sgd(step_size)
    path, same, original = (
        trajectory(t, optimizer, *args, steps=STEPS)[0] for t in (task, other, problem(loss, params, *args))
    )
    gradient = ravel_pytree(params)[1](before.gradient)

    def step(leaf_path: str, leaf: Array) -> Array:
        g = dict(trees.named_leaves(gradient))[leaf_path]
        if leaf_path not in plan.layers:
            return -step_size * g
        W, G = (np.asarray(_matrix(x, plan, leaf_path)) for x in (leaf, g))
        left, values, right = np.linalg.svd(W, full_matrices=False)
        moved = (left * values) @ left.T @ G + G @ (right.T * values) @ right
        moved = jnp.asarray(-step_size * moved + step_size**2 * G @ W.T @ G)
        return plan[leaf_path].axes.from_sided(moved, leaf.shape, plan[leaf_path].side)

    predicted = _flat(jax.tree.map(lambda x: x[None], trees.map_named(step, params)))
    path, same, original = (_flat(p) - _flat(p)[0] for p in (path, same, original))
    parted = jnp.abs(path - original).max() / jnp.abs(original).max()
    return [
        equality("one step: -c ((W W^T)^(1/2) G + G (W^T W)^(1/2)) + c^2 G W^T G", name, path[1:2],
                 predicted),
        equality(f"{CLAIM}: {STEPS} steps of SGD", name, path, same, count=STEPS + 1),
        refuted("the path is that of the original: false", name, parted, 1e-2, word=Word.CHECKED),
    ]  # fmt: skip


def _flat(path: PyTree) -> Array:
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(path)], axis=1)


def on_attention(key: PRNGKeyArray) -> list[Certificate]:
    """The gauge: value and output projections, deformed group by group and not, end in the same network."""
    net = grouped_attention(key)
    first, second = net.params["first"], net.params["second"]
    made = sd.deform_pair(
        first["w"], second["w"], sd.SpecDef(alpha=ALPHA), key=key, bias=first["b"], groups=net.groups
    )
    deformed = {
        **net.params, "first": {"w": made.first, "b": made.bias}, "second": {**second, "w": made.second}
    }  # fmt: skip
    pair = AdjacentPair("first/w", "second/w", "first/b", net.groups)
    loss = partial(_bounded, net.apply)
    attack = attacks.rebalance(loss, deformed, net.x, pairs=[pair])
    tasks = attack.problem, problem(loss, balanced(net.params, [pair]), net.x)
    optimizer = optax.sgd(0.1, momentum=0.9)
    losses = [trajectory(task, optimizer, net.x, steps=STEPS)[1] for task in tasks]
    other = trajectory(problem(loss, deformed, net.x), optimizer, net.x, steps=STEPS)[1]
    name = f"{net.name}, gauge"
    return [
        equality(f"{CLAIM}: the losses of {STEPS} steps of momentum", name, *losses, count=STEPS + 1),
        refuted("deformed, the losses are the same: false", name, jnp.abs(other - losses[0]).max(),
                1e-2 * jnp.abs(losses[0]).max(), word=Word.CHECKED),
        equality("added parameters and FLOPs of a step", name,
                 [attack.bill.added_parameters, attack.bill.added_flops], 0.0, scale=1.0, allowance=0.0),
    ]  # fmt: skip


def _bounded(apply: Callable[..., Array], params: PyTree, x: Array) -> Array:
    return jnp.mean(jnp.sin(3 * apply(params, x)))


def _quadratics(draws: tuple[Callable[..., Triple], ...], key: PRNGKeyArray) -> dict[str, Array]:
    """Return _quadratic of each family, leading axis over families: one program for all."""
    keys = jax.random.split(key, len(draws))
    factors = [draw(k, 2, 2, 3, 1)[:2] for draw, k in zip(draws, keys, strict=True)]
    C, Wt = (jnp.stack(x) for x in zip(*factors, strict=True))
    return jax.vmap(_quadratic)(C, Wt, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, 1))


def _quadratic(C: Array, Wt: Array, key: PRNGKeyArray) -> dict[str, Array]:
    """Both sides for L(W) = <G, W - W0> + (W - W0)^T H (W - W0) / 2 at W0 = C Wt, C 2 x 2, Wt 2 x 3."""
    keys = jax.random.split(key, 4)
    # A scale of the order of 1, to compare with the inserted identity; s is a ninth to nine, mostly.
    scales = 3 ** jax.random.normal(keys[0], (2,))
    C, Wt = (scale * x / jnp.linalg.norm(x) for scale, x in zip(scales, (C, Wt), strict=True))
    H, G = jax.random.normal(keys[2], (6, 6)), jax.random.normal(keys[3], (2, 3))
    H, W = (H + H.T) / 2, C @ Wt
    balanced = balance(C, Wt)
    s = jnp.linalg.norm(W, 2)
    reach = jnp.linalg.norm(C, 2) ** 2 + jnp.linalg.norm(Wt, 2) ** 2
    factors = [(C, Wt), balanced, (jnp.eye(2), W), balanced, (jnp.eye(2), W)]
    first, second = (jnp.stack(x) for x in zip(*factors, strict=True))
    slopes = jnp.stack([G, G, G, 0 * G, 0 * G])
    every = jax.vmap(_factored, in_axes=(0, 0, None, 0))(first, second, H, slopes)
    tops = jnp.max(jnp.abs(jnp.linalg.eigvalsh(every)), axis=-1)
    names = ("any", "balanced", "inserted", "still", "still inserted")
    top, norm, c = sigma_1(H), jnp.linalg.norm(G, 2), jnp.exp(jax.random.normal(keys[1]))
    nu = jnp.maximum(1.0, (s + jnp.sqrt(1 + s**2)) / 2)
    after = C - c * G @ Wt.T, Wt - c * C.T @ G
    return {
        **dict(zip(names, tops, strict=True)),
        "nu": nu,
        "still upper": nu * tops[4],
        "upper": reach * top + norm,
        "balanced upper": 2 * s * top + norm,
        "norm": norm,
        "frobenius": jnp.sum(C**2) + jnp.sum(Wt**2),
        "balanced frobenius": jnp.sum(balanced[0] ** 2) + jnp.sum(balanced[1] ** 2),
        "nuclear": bounds.nuclear_norm(W),
        "reach": reach,
        "s": s,
        "gram": balanced[0].T @ balanced[0] - balanced[1] @ balanced[1].T,
        "product": balanced[0] @ balanced[1] - W,
        "moved": _imbalance(*after) - _imbalance(C, Wt),
        "predicted": c**2 * (Wt @ G.T @ G @ Wt.T - C.T @ G @ G.T @ C),
        "size": jnp.sum(after[0] ** 2) + jnp.sum(after[1] ** 2) + jnp.sum(C**2) + jnp.sum(Wt**2),
    }


def _factored(C: Array, Wt: Array, H: Array, G: Array) -> Array:
    """Return J^T H J + B in (C, Wt), both by rows; on networks automatic differentiation tells the same."""
    m, n, d = len(C), Wt.shape[1], len(Wt)
    J = jnp.concatenate([jnp.kron(jnp.eye(m), Wt.T), jnp.kron(C, jnp.eye(n))], axis=1)
    B = jnp.einsum("ij,kl->iklj", G, jnp.eye(d)).reshape(m * d, d * n)  # of <G, dC dWt>
    zero = jnp.zeros((m * d, m * d)), jnp.zeros((d * n, d * n))
    return J.T @ H @ J + jnp.block([[zero[0], B], [B.T, zero[1]]])


def _imbalance(C: Array, Wt: Array) -> Array:
    return C.T @ C - Wt @ Wt.T


def _matrices(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """The inequalities of (i) and (ii), and the identities, on random factors; a falsifier looks."""
    found = []
    search = falsify(_slack, _sample, key, tried=size.draws, climbed=size.starts // 2, steps=60).search
    drawn = over_draws(partial(_quadratics, tuple(triples(size).values())), key, size.draws)
    for number, family in enumerate(triples(size)):
        sides = {side: values[:, number] for side, values in drawn.items()}
        name = f"{family} factors, 2 x 2 and 2 x 3"
        eps = np.finfo(float).eps
        # Products and decompositions of small matrices, and Hessians of ten variables.
        small, large = 64 * eps * sides["frobenius"], 512 * eps * sides["upper"]
        hard = 512 * eps * (sides["balanced upper"] + sides["nu"] * (sides["inserted"] + sides["norm"]))
        found += [
            inequality("2 |W|_* <= |C|_F^2 + |Wt|_F^2", name, 2 * sides["nuclear"], sides["frobenius"],
                       allowance=small, scale=sides["frobenius"]),
            inequality("2 |W| <= |C|^2 + |Wt|^2", name, 2 * sides["s"], sides["reach"], allowance=small,
                       scale=sides["reach"]),
            equality("balanced: C'^T C' = Wt' Wt'^T", name, sides["gram"], 0.0, scale=sides["s"]),
            equality("balanced: C' Wt' = W", name, sides["product"], 0.0, scale=sides["s"]),
            equality("balanced: |C'|_F^2 + |Wt'|_F^2 = 2 |W|_*", name, sides["balanced frobenius"],
                     2 * sides["nuclear"]),
            inequality(UPPER, name, sides["any"], sides["upper"], allowance=large, scale=sides["upper"],
                       search=search if number == 0 else None),
            inequality("sigma_1(H_balanced) <= 2 s sigma_1(H) + |G|", name, sides["balanced"],
                       sides["balanced upper"], allowance=hard, scale=sides["balanced upper"]),
            inequality("sigma_1(H_balanced) <= nu sigma_1(H_1) + (1 + nu) |G|", name, sides["balanced"],
                       sides["nu"] * sides["inserted"] + (1 + sides["nu"]) * sides["norm"], allowance=hard,
                       scale=sides["balanced upper"]),
            inequality("G = 0: sigma_1(H_balanced) <= nu sigma_1(H_1)", name, sides["still"],
                       sides["still upper"], allowance=hard, scale=sides["balanced upper"],
                       note=f"at best {np.max(sides['still'] / sides['still upper']):.3f} of it"),
            equality("D+ - D = c^2 (Wt G^T G Wt^T - C^T G G^T C)", name, sides["moved"], sides["predicted"],
                     scale=sides["size"]),
        ]  # fmt: skip
    return found


def _slack(point: dict[str, Array]) -> Array:
    """Return the slack of the upper side in (ii), rounding added, for 2 x 2 factors."""
    H = (point["H"] + point["H"].T) / 2
    C, Wt, G = point["C"], point["Wt"], point["G"]
    reach = jnp.linalg.norm(C, 2) ** 2 + jnp.linalg.norm(Wt, 2) ** 2
    upper = reach * sigma_1(H) + jnp.linalg.norm(G, 2)
    hessian = _factored(C, Wt, H, G)
    return (upper - sigma_1(hessian) + rounding(hessian)) / upper + 64 * jnp.finfo(upper.dtype).eps


def _sample(key: PRNGKeyArray) -> dict[str, Array]:
    keys = jax.random.split(key, 4)
    shapes = {"C": (2, 2), "Wt": (2, 2), "H": (4, 4), "G": (2, 2)}
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def _attained() -> list[Certificate]:
    """Where the inequalities are equalities: by hand, away from rounding."""
    one = jnp.ones((1, 1))
    c, w, h, g = 2.0, 3.0, 5.0, 7.0
    scalar = sigma_1(_factored(jnp.sqrt(c * w) * one, jnp.sqrt(c * w) * one, h * one, g * one))
    s = 2.0
    t = (1 + s**2) ** 0.5 - s
    corner = jnp.diag(jnp.array([0.0, 1.0, 0.0, 0.0]))  # the entry (1, 2) of a 2 x 2 matrix, by rows
    W, nothing = jnp.diag(jnp.array([s, t])), jnp.zeros((2, 2))
    root = jnp.sqrt(W)
    balanced, inserted = _factored(root, root, corner, nothing), _factored(jnp.eye(2), W, corner, nothing)
    factors = jnp.diag(jnp.array([2.0, 1.0])), jnp.diag(jnp.array([2.0, 1.0]))
    return [
        tight("2 |W|_* <= |C|_F^2 + |Wt|_F^2", "C = Wt = diag(2, 1)",
              2 * bounds.nuclear_norm(factors[0] @ factors[1]), sum(jnp.sum(x**2) for x in factors),
              factor=1 + 1e-12, allowance=1e-13),
        tight("sigma_1(H_balanced) <= 2 s sigma_1(H) + |G|", "C = Wt = sqrt 6, L = 5 W^2 / 2 + 7 W", scalar,
              2 * c * w * h + g, factor=1 + 1e-12, allowance=1e-12),
        tight("G = 0: sigma_1(H_balanced) <= nu sigma_1(H_1)", "W = diag(2, sqrt 5 - 2), L in W_12 alone",
              sigma_1(balanced), (s + (1 + s**2) ** 0.5) / 2 * sigma_1(inserted), factor=1 + 1e-12,
              allowance=1e-12),
    ]  # fmt: skip


def adapted(
    loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any, name: str, key: PRNGKeyArray,
    methods: dict[str, optax.GradientTransformation] = METHODS,
) -> Certificates:  # fmt: skip
    """Certify (iv) on anyone's network: an adapter beside the composite, and one on Wt alone.

    Args:
      loss: loss(params, *args) on plain parameters.
      params: plain parameters.
      plan: one deformed kernel.
      *args: data.
      name: of the instance.
      key: of the adapter.
      methods: optimizers, whether or not they read weights.
    """
    ((where, _),) = plan.items()
    deformed = sd.apply_plan(params, plan)
    layer = _leaf(deformed, where)
    original = adapters.undeformed(deformed, where, dict(trees.named_leaves(params))[where])
    start = adapters.drawn(key, *adapters.shape_of(layer))
    pair = [adapters.on_composite(loss, tree, where, start) for tree in (deformed, original)]
    found = []
    for method, optimizer in methods.items():
        paths = [_flat(trajectory(task, optimizer, *args, steps=STEPS)[0]) for task in pair]
        found.append(
            equality(f"{method}: {LORA}", name, *(p - p[0] for p in paths), count=STEPS + 1, allowance=1e-9)
        )
    alone = adapters.on_factors(loss, deformed, where, {"weight": start})
    right = adapters.right_of(layer)
    slowed = optax.chain(optax.stateless(partial(_on_up, right.T @ right)), optax.sgd(0.1))
    paths = [
        _flat(trajectory(task, optimizer, *args, steps=STEPS)[0])
        for task, optimizer in ((alone, optax.sgd(0.1)), (pair[1], slowed))
    ]
    found.append(equality("LoRA on Wt alone: SGD is SGD of LoRA on the original, T(a^-2) on B", name,
                          *(p - p[0] for p in paths), count=STEPS + 1, allowance=1e-9))  # fmt: skip
    return tuple(found)


def _leaf(tree: PyTree, where: str) -> Deformed:
    return dict(trees.named_leaves(tree, is_leaf=is_structured))[where]


def _on_up(matrix: Array, gradient: PyTree, _: PyTree) -> PyTree:
    inner = gradient["adapters"]["composite"]
    return {**gradient, "adapters": {"composite": {**inner, "up": inner["up"] @ matrix}}}


def _separately(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """LoRA on both factors, and LoRA that starts from the factors: neither is LoRA on the original."""
    plan, name = planned(instance, ALPHA, USUAL, key)
    where, optimizer = instance.where, optax.adam(0.01)  # of bounded steps, however sharp
    deformed = sd.apply_plan(instance.params, plan)
    layer = _leaf(deformed, where)
    kernel = dict(trees.named_leaves(instance.params))[where]
    original = adapters.undeformed(deformed, where, kernel)
    rows, d = adapters.shape_of(layer)
    both = {"weight": adapters.drawn(key, rows, d), "right": adapters.drawn(key, d, d)}

    def path(task: Problem) -> Array:
        flat = _flat(trajectory(task, optimizer, *instance.args, steps=STEPS)[0])
        return flat - flat[0]

    def sharpness(alpha: float) -> float:
        tree = sd.apply_plan(instance.params, plan.with_alpha(alpha))
        task = adapters.on_factors(instance.loss, tree, where, both)
        return float(sigma_1(curvature_of(task.loss, task.params, *instance.args).hessian))

    reference = path(adapters.on_composite(instance.loss, original, where, both["weight"]))
    parted = jnp.abs(path(adapters.on_factors(instance.loss, deformed, where, both)) - reference).max()
    starts = [_principal(_leaf(tree, where), d) for tree in (deformed, original)]
    reading = [
        path(adapters.on_composite(instance.loss, tree, where, start))
        for tree, start in zip((deformed, original), starts, strict=True)
    ]
    alphas = 2.0 ** np.arange(10, 25, 2)
    growth = exponent(alphas, [sharpness(alpha) for alpha in alphas])
    return [
        refuted("Adam: LoRA on C and Wt separately is LoRA on the original: false", name,
                parted / jnp.abs(reference).max(), 1e-2, word=Word.CHECKED),
        refuted("Adam: a start that reads Wt gives LoRA on the original: false", name,
                jnp.abs(reading[0] - reading[1]).max() / jnp.abs(reading[1]).max(), 1e-2, word=Word.CHECKED),
        fit("LoRA on C and Wt separately: sharpness at the start grows as a^2", name, growth.slope, 2.0,
            tolerance=0.05, count=len(alphas)),
    ]  # fmt: skip


def _principal(layer: Deformed, d: int) -> adapters.Adapter:
    """Return an adapter that starts at the top singular vectors of the stored weight, times sqrt sigma."""
    left, values, _ = jnp.linalg.svd(layer.axes.to_matrix(layer.weight, layer.side), full_matrices=False)
    chosen = slice(0, adapters.RANK)
    return {"down": left[:, chosen] * jnp.sqrt(values[chosen]), "up": jnp.zeros((adapters.RANK, d))}


def _outside(instance: Instance, key: PRNGKeyArray) -> list[Certificate]:
    """A nonlinear map between two layers, and alpha < 1, are refused."""
    net = perceptron(key, "gelu")
    loss, pair = partial(_bounded, net.apply), AdjacentPair("first/w", "second/w", "first/b")

    def between() -> Certificate:
        try:
            attacks.rebalance(loss, net.params, net.x, pairs=[pair])
        except sd.ProblemError as error:
            require("not adjacent" not in str(error), "nothing nonlinear stands between the factors")
        return equality(CLAIM, net.name, 0.0, 0.0)

    plan, _ = planned(instance, 0.5, USUAL, key)
    below = on_network(instance.loss, instance.params, plan, *instance.args, name="", key=key)
    bent = under_assumptions(CLAIM, net.name, between)
    return [
        refuses("outside its assumptions the statement is refused", net.name, bent, "nothing nonlinear"),
        refuses("outside its assumptions the statement is refused", "alpha = 1/2", below, "alpha >= 1"),
    ]
