"""Statement 5.3 [ours; the paper's Theorem 8 claims a linear-size bypass]: The linear-size limit.

STATEMENT. Let layer(h) be ANY implementation of h -> W h with layer(h) = W h for all h (so with the
derivative W), hold everything in it fixed, add B in R^(m x n), 0 at the start: y = layer(h) + B h. Train B
and the rest by a translation-equivariant optimizer: one whose updates do not change when a constant is
added to all parameters that it is shown, gradients and losses being the same. Then for all t

    (W + B_t, rest_t) = (W_t, rest_t),

fine-tuning of the original network, step for step. The attacker adds sum m_i n_i <= |theta| parameters to
what was released. Reading gradients, losses, curvature or parameters as differences from where they started
is equivariant; decay, norms of weights and projections are not. optax and optax.contrib are classified one
by one in theory/instances/optimizer_catalogue.py; DoG is equivariant or not by its initial step, as only
the heuristic one measures the weights.

Variant: S in R^(m x m) after the frozen layer, y = S layer(h), identity at the start: m^2 parameters.
Gradient descent on S is gradient descent on W with the gradient multiplied from the right by W^T W (of the
start), so W_t - W keeps to row(W): another path, and W + D is reached only if the rows of D lie in row(W).

ASSUMPTIONS. layer(h) = W h for all h that occur along the run, and its derivative is W. Equality at the
data, or of values alone (a detached product), is not enough: refused, and refuted.

PROOF. Let f(W, rest) be the loss of the original and F(B, rest) that of the injected network. As y =
layer(h) + B h = (W + B) h for every h, F(B, rest) = f(W + B, rest) identically, so gradients, Hessians and
values of F at (B, rest) are those of f at (W + B, rest). The two runs start at (0, rest_0) and (W, rest_0),
a translation by (W, 0). Suppose that they differ by it up to step t. Then both optimizers have been shown
the same gradients and losses, and parameters that differ by a constant: equal updates, and the runs differ
by it at t + 1. QED. (If layer has another derivative, the gradient of the rest below it is wrong at once.)
Variant: g_S = g_W (W)^T with W that of the start, so S - c g_S gives S W - c g_W W^T W; the row space of
g_W W^T W lies in that of W.

TIGHTNESS. An equality. That the class is right is shown from outside it: every optimizer of the catalogue
that decays or measures weights parts from fine-tuning at once.

SOURCE. Ours. The paper's own construction was not readable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import specdef_jax as sd
from specdef_jax import attacks, trees
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
    under_assumptions,
)
from theory.instances.matrices import orthonormal
from theory.instances.networks import networks
from theory.instances.optimizer_catalogue import EQUIVARIANT, SIGHTED, VARIANTS, Entry, unclassified
from theory.sizes import Size
from theory.trajectories import plain, trajectory

Layer = Callable[[Array], Array]
ALPHA = 48.0
STEPS = 60
ADAM = next(entry for entry in EQUIVARIANT if entry.name == "adam")
CLAIM = "(W + B_t, rest_t) is fine-tuning of the original"
TRIED = {
    Size.SMALL: (6, 3),
    Size.DEFAULT: (len(EQUIVARIANT) - VARIANTS, 6),
    Size.FULL: (len(EQUIVARIANT), len(SIGHTED)),
}


def certify(key: PRNGKeyArray, size: Size) -> Certificates:
    """Certify the limit for every optimizer, for every implementation, and on networks."""
    equivariant, sighted = TRIED[size]
    found: list[Certificate] = _by_optimizer(key, (*EQUIVARIANT[:equivariant], *SIGHTED[:sighted]))
    found += _classified()
    found += _by_implementation(key, size)
    found += _after(key)
    for instance in networks(size, key):
        plan = sd.plan(instance.params, sd.SpecDef(alpha=ALPHA, k=2), where=instance.where, key=key)
        found += on_network(instance.loss, instance.params, plan, *instance.args, name=instance.name)
    return tuple(found)


def on_network(loss: Callable[..., Array], params: PyTree, plan: Plan, *args: Any, name: str) -> Certificates:
    """Certify on anyone's network that sd.attacks.inject is fine-tuning of the original, and its size.

    Args:
      loss: loss(params, *args) on plain parameters.
      params: plain parameters.
      plan: what was deformed.
      *args: data.
      name: of the instance.
    """
    deformed = sd.apply_plan(params, plan)
    attack = attacks.inject(loss, deformed, *args)
    # Bounded steps, and an eps that hides gradients which are rounding alone.
    optimizer = optax.adam(1e-3, eps=1e-3)
    found, _ = trajectory(attack.problem, optimizer, *args, steps=STEPS)
    original, _ = trajectory(plain(loss, params), optimizer, *args, steps=STEPS)
    kernels = dict(trees.named_leaves(params))
    added = sum(kernels[path].size for path in plan)
    held = trees.size((attack.problem.params, attack.problem.loss)) - trees.size(deformed)
    return (
        equality(
            f"adam: {CLAIM}", name, *(_flat(p) - _flat(p)[0] for p in (found, original)), count=STEPS + 1
        ),
        equality("added to what was released: sum m_i n_i", name, held, added, allowance=0.0),
        inequality("sum m_i n_i <= |theta|", name, added, trees.size(params)),
    )


def _flat(path: PyTree) -> Array:
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(path)], axis=1)


def _data(key: PRNGKeyArray) -> tuple[dict[str, Array], Array, Array]:
    """Return {w (5, 3), b (5,)}, inputs and targets of y = sum tanh(w^T tanh(x + b)), not fitted."""
    keys = jax.random.split(key, 4)
    params = {"w": jax.random.normal(keys[0], (5, 3)) / np.sqrt(5), "b": jax.random.normal(keys[1], (5,)) / 2}
    return params, jax.random.normal(keys[2], (12, 5)), jax.random.normal(keys[3], (12,))


def _loss(layer: Layer, params: dict[str, Array], x: Array, y: Array) -> Array:
    """Return the squared loss of the network whose layer is layer(h) + B h, B = params["w"]."""
    h = jnp.tanh(x + params["b"])
    return jnp.mean((jnp.tanh(layer(h) + h @ params["w"]).sum(1) - y) ** 2)


def _path(
    layer: Layer, start: dict[str, Array], entry: Entry, x: Array, y: Array
) -> dict[str, Float[Array, "steps ..."]]:
    """Follow B and the rest."""
    optimizer = entry.make()

    def objective(params: dict[str, Array]) -> Array:
        return _loss(layer, params, x, y)

    def step(carry: tuple, _: None) -> tuple[tuple, PyTree]:
        params, state = carry
        value, gradient = jax.value_and_grad(objective)(params)
        given = {"value": value, "grad": gradient, "value_fn": objective, "obj_fn": objective}
        given = {name: x for name, x in given.items() if name in entry.given}
        update = optax.with_extra_args_support(optimizer).update if given else optimizer.update
        updates, state = update(gradient, state, params, **given)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (start, optimizer.init(start)), None, length=entry.steps)[1]


@partial(jax.jit, static_argnames="entry")
def _three(entry: Entry, factors: tuple[Array, Array], starts: PyTree, x: Array, y: Array) -> PyTree:
    """Follow the original (no factors) and two injected networks; return W + B_t and the rest of each."""

    def run(weight: Array, comp: Array, start: dict[str, Array]) -> dict[str, Array]:
        path = _path(lambda h: (h @ weight) @ comp, start, entry, x, y)
        return {**path, "w": weight @ comp + path["w"]}

    return jax.vmap(run)(*factors, starts)


def _by_optimizer(key: PRNGKeyArray, entries: Iterable[Entry]) -> list[Certificate]:
    """Inject beside the deformed pair and beside a random invertible factorization."""
    params, x, y = _data(key)
    kernel, zero = params["w"], jnp.zeros_like(params["w"])
    weight, comp = _factors(kernel, key)
    R = jax.random.normal(jax.random.fold_in(key, 2), (3, 3))
    factors = jnp.stack([zero, weight, kernel @ R]), jnp.stack([0 * comp, comp, jnp.linalg.inv(R)])
    starts = {"w": jnp.stack([kernel, zero, zero]), "b": jnp.stack([params["b"]] * 3)}
    found = []
    for entry in entries:
        try:
            paths = _three(entry, factors, starts, x, y)
        except AttributeError:  # an older optax does not have it
            continue
        flat = np.concatenate([np.asarray(p).reshape(3, entry.steps, -1) for p in paths.values()], axis=2)
        moved = np.abs(flat[0] - flat[0, 0]).max()
        parted = np.abs(flat[1:] - flat[0]).max(axis=(1, 2)) / moved
        instance = f"pair at a = {ALPHA:g} and random factors, {entry.steps} steps"
        if entry.equivariant:
            found.append(
                equality(
                    f"{entry.name}: {CLAIM}",
                    instance,
                    parted,
                    0.0,
                    allowance=entry.allowance,
                    scale=1.0,
                    note=entry.reason,
                )
            )
        else:
            found.append(
                refuted(
                    f"{entry.name}: {CLAIM} is false",
                    instance,
                    parted.min(),
                    1e-4,
                    word=Word.CHECKED,
                    note=entry.reason,
                )
            )
    return found  # fmt: skip


def _factors(kernel: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
    """Return the deformed pair of a kernel, by hand."""
    U = orthonormal(jax.random.fold_in(key, 1), kernel.shape[1], 1)
    return kernel + (ALPHA - 1) * kernel @ U @ U.T, jnp.eye(len(U)) + (1 / ALPHA - 1) * U @ U.T


def _classified() -> Certificates:
    """Every optimizer that the installed optax offers has its place in the catalogue."""
    claim, instance = "every optimizer of optax and optax.contrib is classified", f"optax {optax.__version__}"

    def evaluate() -> Certificate:
        missing = unclassified()
        require(not missing, f"the catalogue knows this optax (it lacks {', '.join(missing)})")
        return equality(claim, instance, len(missing), 0, allowance=0.0)

    return under_assumptions(claim, instance, evaluate)


def check_layer(layer: Partial, params: dict[str, Array], x: Array, y: Array, name: str) -> Certificates:
    """Certify injection beside an implementation of one layer, h -> h @ params["w"], of the small network.

    Args:
      layer: layer(h) on rows; anything may be inside.
      params: {"w": (5, 3), "b": (5,)}.
      x: inputs, (examples, 5).
      y: targets.
      name: of the implementation.
    """

    def evaluate() -> Certificate:
        h, v = jax.random.normal(jax.random.key(0), (2, 7, 5))
        value, along = jax.jvp(layer, (h,), (v,))
        require(bool(jnp.allclose(value, h @ params["w"], atol=1e-9)), "layer(h) = W h for all h")
        require(bool(jnp.allclose(along, v @ params["w"], atol=1e-9)), "the derivative of the layer is W")
        parted = injected_deviation(layer, params, x, y)
        return equality(f"adam: {CLAIM}", name, parted, 0.0, scale=1.0, allowance=1e-9)

    return under_assumptions(CLAIM, name, evaluate)


def injected_deviation(layer: Partial, params: dict[str, Array], x: Array, y: Array) -> float:
    """Return how far Adam beside this layer leaves fine-tuning, relative to the way that goes."""
    zero = jnp.zeros_like(params["w"])
    original = _with_adam(Partial(_times, zero), params, x, y)
    found = _with_adam(layer, {**params, "w": zero}, x, y)
    found = {**found, "w": found["w"] + params["w"]}
    moved = max(float(jnp.abs(p - p[0]).max()) for p in original.values())
    return max(float(jnp.abs(found[name] - p).max()) for name, p in original.items()) / moved


@jax.jit
def _with_adam(layer: Partial, start: dict[str, Array], x: Array, y: Array) -> dict[str, Array]:
    return _path(layer, start, ADAM, x, y)


def _by_implementation(key: PRNGKeyArray, size: Size) -> list[Certificate]:
    """Inject beside other implementations of the layer: right ones, and two that only look right."""
    params, x, y = _data(key)
    kernel = params["w"]
    weight, comp = _factors(kernel, key)
    U, sigma, Vt = jnp.linalg.svd(kernel, full_matrices=False)
    root = sigma ** (1 / 3)
    right: dict[str, Partial] = {
        "relu(W h) - relu(-W h)": Partial(_rectified, kernel),
        "a chain of three factors": Partial(_chain, U * root, jnp.diag(root), root[:, None] * Vt),
        "the pair, C first read as I + (C - I)": Partial(_split, weight, comp),
    }
    at_data = jnp.tanh(x + params["b"])
    wrong = {
        "the derivative": ("W h with h detached: right values, no derivative", Partial(_detached, kernel)),
        "for all h": ("right value and derivative at the data alone", Partial(_at_data, kernel, at_data)),
    }
    names = list(right)[:1] if size is Size.SMALL else list(right)
    found = [c for name in names for c in check_layer(right[name], params, x, y, name)]
    for which, (name, layer) in wrong.items():
        found.append(
            refuses(
                "a layer that only looks right is refused",
                name,
                check_layer(layer, params, x, y, name),
                which,
            )
        )
        found.append(
            refuted(
                f"adam: {CLAIM} is false",
                name,
                injected_deviation(layer, params, x, y),
                1e-3,
                word=Word.CHECKED,
            )
        )
    return found  # fmt: skip


def _times(kernel: Array, h: Array) -> Array:
    return h @ kernel


def _rectified(kernel: Array, h: Array) -> Array:
    return jax.nn.relu(h @ kernel) - jax.nn.relu(-h @ kernel)


def _chain(first: Array, second: Array, third: Array, h: Array) -> Array:
    return ((h @ first) @ second) @ third


def _split(weight: Array, comp: Array, h: Array) -> Array:
    return h @ weight + (h @ weight) @ (comp - jnp.eye(len(comp)))


def _detached(kernel: Array, h: Array) -> Array:
    return jax.lax.stop_gradient(h @ kernel)


def _at_data(kernel: Array, points: Array, h: Array) -> Array:
    """Return W h plus the squared distance to the nearest of the points."""
    nearest = jnp.min(jnp.sum((h[:, None] - points) ** 2, axis=-1), axis=1)
    return h @ kernel + 5 * nearest[:, None]


def _after(key: PRNGKeyArray) -> list[Certificate]:
    """The variant: S after the frozen layer, identity at the start."""
    params, x, y = _data(key)
    kernel, eye = params["w"], jnp.eye(3)
    gram = kernel @ kernel.T  # the kernel is W^T
    plain_path, predicted, found = _variants(params, eye, gram, x, y)
    moved = jnp.abs(predicted["w"] - kernel).max()
    off = jnp.eye(5) - kernel @ jnp.linalg.pinv(kernel)
    left = jnp.abs(off @ (found["w"] - kernel)).max(), jnp.abs(off @ (plain_path["w"] - kernel)).max()
    name = f"W 3 x 5, SGD, {STEPS} steps"
    return [
        equality("S after the layer: (S_t W, rest_t) is SGD with gradient g W^T W", name,
                 *(jnp.concatenate([p["w"].reshape(STEPS, -1), p["b"]], 1) - ravelled(params) for p in
                   (found, predicted)), count=STEPS),
        equality("S after the layer: W_t - W keeps to row(W)", name, left[0], 0.0, scale=moved),
        refuted("S after the layer is fine-tuning of the original: false", name, left[1], 1e-3 * moved,
                word=Word.CHECKED, note="what fine-tuning moves outside row(W), and S cannot"),
        equality("S has m^2 entries", name, eye.size, 9, allowance=0.0),
    ]  # fmt: skip


def ravelled(params: dict[str, Array]) -> Array:
    """Return {w, b} as one vector."""
    return jnp.concatenate([params["w"].ravel(), params["b"]])


@jax.jit
def _variants(params: dict[str, Array], eye: Array, gram: Array, x: Array, y: Array) -> tuple[PyTree, ...]:
    """Follow SGD on W, SGD on W with its gradient times gram, and SGD on S in W S, 0.1 a step."""
    kernel, nothing = params["w"], Partial(_times, jnp.zeros_like(params["w"]))

    def original(p: dict[str, Array]) -> Array:
        return _loss(nothing, p, x, y)

    def after(p: dict[str, Array]) -> Array:
        return original({**p, "w": kernel @ p["w"]})

    def run(loss: Callable[..., Array], scale: Array, start: dict[str, Array]) -> dict[str, Array]:
        def step(p: dict[str, Array], _: None) -> tuple[PyTree, PyTree]:
            g = jax.grad(loss)(p)
            p = trees.axpy(-0.1, {**g, "w": scale @ g["w"]}, p)
            return p, p

        return jax.lax.scan(step, start, None, length=STEPS)[1]

    found = run(after, eye, {**params, "w": eye})
    paths = run(original, jnp.eye(len(kernel)), params), run(original, gram, params)
    return *paths, {**found, "w": kernel @ found["w"]}
