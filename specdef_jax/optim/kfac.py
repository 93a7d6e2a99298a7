"""K-FAC for dense layers: the Fisher matrix of each kernel as a Kronecker product of two small ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Float, Int, PyTree

from specdef_jax import trees
from specdef_jax.errors import ProblemError, SpecError
from specdef_jax.optim.arguments import check_positive, like, need_params, needed
from specdef_jax.optim.dense_layers import DenseLayer, dense_layers
from specdef_jax.parametrization import full_precision_matmul
from specdef_jax.select import matches

Factors = tuple[Float[Array, "inputs inputs"], Float[Array, "outputs outputs"]]


class KfacState(NamedTuple):
    """State of kfac.

    Attributes:
      steps: steps taken.
      factors: kernel -> running averages along its first and its second axis, before bias correction.
      gradients: gradients of the loss that the last step took beside the one it was given.
    """

    steps: Int[Array, ""]
    factors: dict[str, tuple[Float[Array, "n n"], Float[Array, "m m"]]]
    gradients: Int[Array, ""]


def kfac(
    step_size: float | Array = 0.1,
    *,
    damping: float | Array = 1e-3,
    decay: float = 0.95,
    kl_clip: float | None = None,
    batch: int | None = None,
    plain: Sequence[str] = (),
    widest: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Return -step_size (A + pi sqrt(damping))^-1 g (G + sqrt(damping) / pi)^-1 for each dense kernel.

    Needs value_fn and params; from them alone it takes the activations h and the gradients after each layer
    (dense_layers.py), by one more gradient of the loss. A = E[h h^T]; G = E[g g^T] with g of the one loss of
    an example, at its own label: this is the EMPIRICAL Fisher matrix, which is not the Fisher matrix and
    vanishes where every example is fitted. Exact factors can be handed to update as factors={kernel: (A, G)},
    of any of the kernels, by names joined by "/", A of what is summed and G of what comes out. With positions
    (batch, positions, n), or several uses of one kernel, A is a mean and G a sum over them ("expand").

    A bias that is added to a layer's output is a block of its own with the same G: (G + damping)^-1 g. All
    else (convolutions, look-ups, norms, stacks of layers) takes plain gradient steps. The two factors of a
    Deformed leaf are two dense layers. Undamped, with invertible factors, the step is equivariant and a
    deformation undone; damped it is not (THEORY.md 4.4).

    Args:
      step_size: eta, of everything.
      damping: lambda of Tikhonov's lambda I, split between the two factors; 0 only where both are invertible.
      decay: of the running averages of A and G, in [0, 1).
      kl_clip: largest eta^2 <g, step> of a step, which is shortened to it; None shortens none.
      batch: examples that the loss averages over; None takes the leading axis of the layers' outputs.
      plain: globs of kernels to leave to plain gradient steps.
      widest: a leaf with a longer axis is left to them too.

    Raises:
      SpecError: damping is negative, decay not in [0, 1), kl_clip, batch or widest not positive.
      ProblemError: (in update) value_fn or params are missing, the loss has no dense kernel, or one that
        cannot be followed, or factors do not fit.
      LayeredUnsupported: (in update) a Deformed leaf is used in a way that has no layered form.

    Source: Martens and Grosse, ICML 2015, pi from section 6.3 of the full version; "expand" from Eschenhagen,
    Immer, Turner, Schneider and Hennig, NeurIPS 2023; clipping from Ba, Grosse and Martens, ICLR 2017.
    """
    if isinstance(damping, int | float) and not damping >= 0:
        raise SpecError(f"damping = {damping}: give zero or a positive number.")
    if not 0 <= decay < 1:
        raise SpecError(f"decay = {decay}: give a number from 0 on, below 1.")
    check_positive(
        kl_clip=1 if kl_clip is None else kl_clip, batch=1 if batch is None else batch, widest=widest
    )

    def kernels(params: PyTree) -> dict[str, int]:
        return {
            name: i
            for i, (name, leaf) in enumerate(trees.named_leaves(params))
            if leaf.ndim == 2
            and max(leaf.shape) <= widest
            and jnp.issubdtype(leaf.dtype, jnp.floating)
            and not any(matches(glob, name) for glob in plain)
        }

    def init(params: PyTree) -> KfacState:
        leaves = jax.tree.leaves(params)
        factors = {name: _nothing(leaves[i]) for name, i in kernels(params).items()}
        return KfacState(jnp.array(0), factors, jnp.array(0))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, KfacState]:
        (value_fn,) = needed(extra, "kfac", "value_fn")
        params = need_params(params, "kfac")
        numbers = kernels(params)
        layers = dense_layers(value_fn, params, list(numbers.values()), batch, "kfac")
        found = {name: layers[i] for name, i in numbers.items() if i in layers}
        supplied = extra.get("factors") or {}
        _check_supplied(supplied, found)
        count = state.steps + 1
        averages, gradients = dict(state.factors), jax.tree.leaves(updates)
        steps = list(gradients)
        for name, layer in found.items():
            pair = supplied.get(name) or _factors(layer)
            fresh = pair if layer.axis == 0 else pair[::-1]
            averages[name] = tuple(
                decay * old + (1 - decay) * jnp.asarray(new, old.dtype)
                for old, new in zip(averages[name], fresh, strict=True)
            )
            rows, columns = (average / (1 - decay**count) for average in averages[name])
            i = numbers[name]
            steps[i] = _both_solved(rows, columns, gradients[i], damping)
            if layer.bias is not None:
                outputs = columns if layer.axis == 0 else rows
                steps[layer.bias] = _solve(outputs, damping, gradients[layer.bias])
        step = like(updates, jax.tree.unflatten(jax.tree.structure(updates), steps))
        length = -jnp.asarray(step_size)
        if kl_clip is not None:
            square = length**2 * trees.inner(updates, step)
            length = length * jnp.sqrt(jnp.minimum(1, kl_clip / jnp.where(square > 0, square, kl_clip)))
        return like(updates, trees.scale(length, step)), KfacState(count, averages, jnp.array(1))

    return optax.GradientTransformationExtraArgs(init, update)


def _nothing(kernel: Array) -> tuple[Array, Array]:
    n, m = kernel.shape
    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    return jnp.zeros((n, n), dtype), jnp.zeros((m, m), dtype)


def _factors(layer: DenseLayer) -> Factors:
    """Return (A, G), of a loss that is a mean over the batch."""
    h, g = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (layer.h, layer.g))
    return full_precision_matmul(h.T, h) / len(h), full_precision_matmul(g.T, g) * layer.batch


def _both_solved(rows: Array, columns: Array, gradient: Array, damping: float | Array) -> Array:
    """Return (rows + pi sqrt(damping))^-1 gradient (columns + sqrt(damping) / pi)^-1."""
    row_mean, column_mean = (jnp.trace(f) / len(f) for f in (rows, columns))
    defined = (row_mean > 0) & (column_mean > 0)
    pi = jnp.sqrt(jnp.where(defined, row_mean, 1) / jnp.where(defined, column_mean, 1))
    root = jnp.sqrt(jnp.asarray(damping, rows.dtype))
    half = _solve(rows, pi * root, gradient)
    return _solve(columns, root / pi, half.T).T


def _solve(factor: Array, shift: float | Array, right: Array) -> Array:
    shifted = factor + shift * jnp.eye(len(factor), dtype=factor.dtype)
    return cho_solve(cho_factor(shifted), right.astype(factor.dtype))


def _check_supplied(supplied: Mapping[str, tuple[Any, Any]], found: Mapping[str, DenseLayer]) -> None:
    for name, (a, g) in supplied.items():
        if name not in found:
            raise ProblemError(
                f"kfac: factors are given for '{name}'; the dense kernels are {', '.join(found)}."
            )
        n, m = found[name].h.shape[1], found[name].g.shape[1]
        if (jnp.shape(a), jnp.shape(g)) != ((n, n), (m, m)):
            raise ProblemError(
                f"kfac: the factors of '{name}' have shapes {jnp.shape(a)} and {jnp.shape(g)}; its inputs "
                f"ask for ({n}, {n}), its outputs for ({m}, {m})."
            )
