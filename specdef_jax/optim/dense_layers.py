"""The dense layers inside a loss: what each kernel multiplies, and the gradient after it.

All that is known of a network is value_fn(params). Its jaxpr is evaluated with the kernels marked (marks.py);
where one is multiplied with activations, z = h K, h is written down and a probe of zeros is added to z, whose
gradient is that of the loss with respect to z. Deformed leaves are evaluated as released (layered.py),
so their two factors are two dense layers in sequence, whether the loss merges them or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from specdef_jax import trees
from specdef_jax.errors import ProblemError
from specdef_jax.layered import layered
from specdef_jax.optim.arguments import Value
from specdef_jax.optim.marks import Marked, Run, Use, evaluate, plain, rows


class DenseLayer(NamedTuple):
    """One kernel and what the loss did with it.

    Attributes:
      axis: of the kernel that is summed with the activations, 0 for h @ K and 1 for K @ h.
      h: activations, one row for each example and position, of all places where the kernel is used.
      g: gradients of the loss with respect to the outputs, in the same rows.
      batch: examples that the loss averages over.
      bias: number of the leaf that is added to every output of this kernel and of no other, or None.
    """

    axis: int
    h: Float[Array, "rows inputs"]
    g: Float[Array, "rows outputs"]
    batch: int
    bias: int | None


def dense_layers(
    value_fn: Value, params: PyTree, kernels: Sequence[int], batch: int | None, optimizer: str
) -> dict[int, DenseLayer]:
    """Return the dense layers of a loss at the parameters, at the price of one gradient.

    jit and checkpoint are looked into. vmap leaves a product of two batched arrays where it maps over a
    kernel; such a product, convolutions and look-ups are no dense layers.

    Args:
      value_fn: value_fn(params) -> scalar.
      params: tree of arrays.
      kernels: numbers of the leaves that may be kernels, all of them 2-D.
      batch: examples the loss averages over: a product whose number of rows is no multiple of it is no dense
        layer. None takes the leading axis of the outputs, which must be the same in all.
      optimizer: what error messages call the caller.

    Raises:
      ProblemError: there is no dense layer, the leading axes differ, a kernel is multiplied from both sides,
        or inside scan, while, cond or another primitive that keeps its activations.
      LayeredUnsupported: a Deformed leaf is used in a way that has no layered form.
    """
    names = [name for name, _ in trees.named_leaves(params)]
    leaves, treedef = jax.tree.flatten(params)
    closed = jax.make_jaxpr(lambda *x: layered(value_fn)(treedef.unflatten(x)))(*leaves)
    kinds: dict[int, Literal["kernel", "bias"]] = {i: "bias" for i, x in enumerate(leaves) if x.ndim == 1}
    kinds |= dict.fromkeys(kernels, "kernel")
    marked = [Marked(x, kinds[i], i, tuple(range(x.ndim))) if i in kinds else x for i, x in enumerate(leaves)]

    first = Run(names, batch, optimizer, None)
    jax.eval_shape(lambda: list(map(plain, evaluate(closed, marked, first))))
    uses, biases = first.uses, first.biases
    _check(names, leaves, uses, batch, optimizer)

    def probed(probes: list[Array]) -> tuple[Array, list[Array]]:
        run = Run(names, batch, optimizer, probes)
        (value,) = evaluate(closed, marked, run)
        return jnp.asarray(plain(value)), run.activations

    gradients, activations = jax.grad(probed, has_aux=True)([jnp.zeros(u.shape, u.dtype) for u in uses])
    layers = {}
    for leaf in dict.fromkeys(use.leaf for use in uses):
        mine = [i for i, use in enumerate(uses) if use.leaf == leaf]
        h = jnp.concatenate([activations[i] for i in mine])
        g = jnp.concatenate([rows(gradients[i], uses[i].feature) for i in mine])
        examples = batch or math.prod(uses[mine[0]].leading[:1])
        added = {biases.get(i) for i in mine}
        readers = {uses[i].leaf for i, bias in biases.items() if bias in added}
        bias = added.pop() if len(added) == len(readers) == 1 else None
        layers[leaf] = DenseLayer(uses[mine[0]].axis, h, g, examples, bias)
    return layers


def _check(
    names: Sequence[str], leaves: Sequence[Array], uses: Sequence[Use], batch: int | None, optimizer: str
) -> None:
    if not uses:
        have = ", ".join(f"'{n}' {x.shape}" for n, x in zip(names, leaves, strict=True))
        raise ProblemError(
            f"{optimizer} found no dense kernel. It looked for a 2-D floating leaf that a dot_general "
            "multiplies with activations, over one of its axes and without a batch axis. The leaves are "
            f"{have}. Leave none of the kernels out, or use another optimizer."
        )
    sides: dict[int, int] = {}
    for use in uses:
        if sides.setdefault(use.leaf, use.axis) != use.axis:
            raise ProblemError(
                f"{optimizer}: '{names[use.leaf]}' multiplies activations from both sides, so that its two "
                "factors have no one meaning. Name it in plain=."
            )
    sizes = sorted({(names[use.leaf], math.prod(use.leading[:1])) for use in uses})
    if batch is None and len({size for _, size in sizes}) > 1:
        raise ProblemError(
            f"{optimizer} takes the leading axis of a layer's output as the batch, but these differ: "
            f"{sizes}. Say how many examples the loss averages over by batch=. A kernel multiplied by "
            "a frozen matrix looks like this too: name it in plain=."
        )
