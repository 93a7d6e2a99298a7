"""Optimizers in another metric: a diagonal of coordinates, or K-FAC's, around any optax factory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from specdef_jax.attacks.bill import Factory
from specdef_jax.optim import kfac
from specdef_jax.parametrization import Deformed, is_structured


@dataclass(frozen=True)
class KFac:
    """K-FAC's preconditioner, then an optimizer; needs value_fn, as races hand it over.

    Attributes:
      damping: of K-FAC.
      factory: step_size -> optax transformation.
    """

    damping: float
    factory: Factory

    def __call__(self, step_size: Array | float) -> optax.GradientTransformation:
        """Return the transformation at a step size."""
        return optax.chain(kfac(1.0, damping=self.damping), optax.scale(-1.0), self.factory(step_size))


def diagonal(params: PyTree) -> PyTree:
    """Return D: s_i on row i of what multiplies the weight from the right, 1 / s_i on its column i of M.

    s_i is the norm of that row, its singular value once its rows are orthogonal. 1 for other leaves.
    """

    def visit(leaf: Any) -> Any:
        if not isinstance(leaf, Deformed):
            return jax.tree.map(lambda x: jnp.ones((), x.dtype), leaf)
        s = jnp.linalg.norm(right_of(leaf), axis=-1)[..., None]
        ones = jnp.ones_like(leaf.axes.to_matrix(leaf.weight, leaf.side))
        return placed(leaf, ones / jnp.swapaxes(s, -1, -2), jnp.broadcast_to(s, leaf.comp.shape))

    return jax.tree.map(visit, params, is_leaf=is_structured)


@dataclass(frozen=True)
class Rescaled:
    """An optimizer in the coordinates theta / D, D a diagonal read off the parameters that it is started on.

    Attributes:
      factory: step_size -> optax transformation.
      read: params -> D, a function of its own, so that equal ones compile once.
    """

    factory: Factory
    read: Callable[[PyTree], PyTree] = diagonal

    def __call__(self, step_size: Array | float) -> optax.GradientTransformation:
        """Return the transformation at a step size."""
        inner = optax.with_extra_args_support(self.factory(step_size))

        def init(params: PyTree) -> RescaledState:
            D = self.read(params)
            return RescaledState(inner.init(_divide(params, D)), D)

        def update(
            updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
        ) -> tuple[PyTree, RescaledState]:
            D = state.D
            here = None if params is None else _divide(params, D)
            given = {name: _CONVERTED.get(name, _unchanged)(value, D) for name, value in extra.items()}
            steps, after = inner.update(_multiply(updates, D), state.inner, here, **given)
            return _multiply(steps, D), RescaledState(after, D)

        return optax.GradientTransformationExtraArgs(init, update)


class RescaledState(NamedTuple):
    """State of the optimizer inside, and the diagonal D of theta = D theta_1."""

    inner: PyTree
    D: PyTree


def right_of(pair: Deformed) -> Float[Array, "*stack d d"]:
    """Return what multiplies M (rest, d) of KernelAxes.to_matrix from the right."""
    return pair.comp if pair.side == "output" else jnp.swapaxes(pair.comp, -1, -2)


def placed(pair: Deformed, matrix: Array, right: Array) -> Deformed:
    """Return the pair with other factors M and right_of."""
    weight = pair.axes.from_matrix(matrix, pair.weight.shape, pair.side)
    return replace(pair, weight=weight, comp=right if pair.side == "output" else jnp.swapaxes(right, -1, -2))


def _multiply(tree: PyTree, D: PyTree) -> PyTree:
    return jax.tree.map(jnp.multiply, tree, D)


def _divide(tree: PyTree, D: PyTree) -> PyTree:
    return jax.tree.map(jnp.divide, tree, D)


def _unchanged(value: Any, D: PyTree) -> Any:
    del D
    return value


def _product(hvp: Callable[[PyTree], PyTree], D: PyTree) -> Callable[[PyTree], PyTree]:
    return lambda tangent: _multiply(hvp(_multiply(tangent, D)), D)


def _value(value_fn: Callable[[PyTree], Array], D: PyTree) -> Callable[[PyTree], Array]:
    return lambda params: value_fn(_multiply(params, D))


_CONVERTED: dict[str, Callable[[Any, PyTree], Any]] = {
    "grad": _multiply,
    "hvp": _product,
    "gnvp": _product,
    "value_fn": _value,
    "obj_fn": _value,
}
