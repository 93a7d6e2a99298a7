"""What the layers of any network put out on a batch, without touching the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from specdef_jax import select, trees
from specdef_jax.choice import choose_kernels
from specdef_jax.errors import SelectionError
from specdef_jax.layered import evaluated
from specdef_jax.layout import AxesLike, axes_of
from specdef_jax.parametrization import Deformed, is_structured


def activations(
    apply: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    where: select.Selector | str | Sequence[str] | None = None,
    key: PRNGKeyArray | None = None,
    axes: AxesLike | Mapping[str, AxesLike] | None = None,
    stacked: bool = False,
) -> dict[str, Float[Array, "*stack samples features"]]:
    """Return the outputs of chosen kernels, before their biases, on a batch of inputs.

    Works for whatever sd.layered works for; a kernel applied at several positions, or several times, gives
    one row each.

    Args:
      apply: apply(params, *inputs) of the plain network.
      params: plain parameters.
      inputs: a batch.
      where: as in sd.plan.
      key: for random selectors; fixed by default.
      axes: as in sd.plan.
      stacked: as in sd.plan.

    Returns:
      path -> (*stack, samples, features), features those of the kernel's output axes.

    Raises:
      SelectionError: nothing is chosen, or a chosen kernel is never applied.
      LayeredUnsupported: a kernel is applied inside a loop, or in a way that has no layered form.

    Example:
      >>> params = {"w": jnp.ones((2, 3))}
      >>> activations(lambda p, x: jnp.tanh(x @ p["w"]), params, jnp.ones((5, 2)), where="w")["w"].shape
      (5, 3)
    """
    key = jax.random.key(0) if key is None else key
    leaves = dict(trees.named_leaves(params, is_leaf=is_structured))
    chosen = choose_kernels(leaves, select.as_selector(where), key)

    def lift(name: str, leaf: Any) -> Any:
        if name not in chosen:
            return leaf
        kernel_axes = axes_of(name, leaf.shape, axes, stacked)
        stack = tuple(leaf.shape[i] for i in kernel_axes.stack)
        d = kernel_axes.dim(leaf.shape, "output")
        identity = jnp.broadcast_to(jnp.eye(d, dtype=leaf.dtype), (*stack, d, d))
        return Deformed(leaf, identity, "output", kernel_axes)

    lifted = trees.map_named(lift, params, is_leaf=is_structured)

    @jax.jit
    def run(lifted: PyTree, inputs: tuple[Any, ...]) -> dict[str, Array]:
        found: dict[str, list[Array]] = {}
        tapped = evaluated(apply, lambda path, rows: found.setdefault(path, []).append(rows))
        tapped(lifted, *inputs)
        return {path: jnp.concatenate(parts, axis=-2) for path, parts in found.items()}

    found = run(lifted, inputs)
    if missing := [name for name in chosen if name not in found]:
        raise SelectionError(f"{missing} are never multiplied with activations; choose other kernels.")
    return {name: found[name] for name in chosen}
