"""The dense layers inside a loss: what each kernel multiplies, and the gradient after it.

All that is known of a network is value_fn(params). Its jaxpr is evaluated with the 2-D parameters marked; a
mark follows its array through whatever only rearranges it, and where a dot_general multiplies a marked kernel
with something unmarked, that is a dense layer z = h K: h is written down and a probe of zeros is added to z,
whose gradient is that of the loss with respect to z. Deformed leaves are evaluated as released (layered.py),
so their two factors are two dense layers in sequence, whether the loss merges them or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core import Literal as Constant
from jaxtyping import Array, Float, PyTree

from specdef_jax import trees
from specdef_jax.errors import ProblemError
from specdef_jax.layered import layered
from specdef_jax.layered_views import bind
from specdef_jax.optim.arguments import Value


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
    marked = [
        _Marked(x, kinds[i], i, tuple(range(x.ndim))) if i in kinds else x for i, x in enumerate(leaves)
    ]

    def evaluate(probes: list[Array] | None) -> tuple[Array, _Run]:
        run = _Run(names, batch, optimizer, probes)
        return jnp.asarray(_plain(_evaluate(closed, marked, run)[0])), run

    found: list[_Run] = []
    jax.eval_shape(lambda: found.append(evaluate(None)[1]))
    uses, biases = found[0].uses, found[0].biases
    _check(names, leaves, uses, batch, optimizer)

    def probed(probes: list[Array]) -> tuple[Array, list[Array]]:
        value, run = evaluate(probes)
        return value, run.activations

    gradients, activations = jax.grad(probed, has_aux=True)([jnp.zeros(u.shape, u.dtype) for u in uses])
    layers = {}
    for leaf in dict.fromkeys(use.leaf for use in uses):
        mine = [i for i, use in enumerate(uses) if use.leaf == leaf]
        rows = [_rows(gradients[i], uses[i].feature) for i in mine]
        examples = batch or math.prod(uses[mine[0]].leading[:1])
        h = jnp.concatenate([activations[i] for i in mine])
        added = {biases.get(i) for i in mine}
        readers = {uses[i].leaf for i, bias in biases.items() if bias in added}
        bias = added.pop() if len(added) == len(readers) == 1 else None
        layers[leaf] = DenseLayer(uses[mine[0]].axis, h, jnp.concatenate(rows), examples, bias)
    return layers


def _check(
    names: Sequence[str], leaves: Sequence[Array], uses: Sequence[_Use], batch: int | None, optimizer: str
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


@dataclass(frozen=True)
class _Marked:
    """An array that is a parameter with its axes moved, or the output of a dense layer.

    `index` counts leaves, for an output uses. `axes` says where the axes of the leaf are in `value`, for an
    output where its features are.
    """

    value: Any
    kind: Literal["kernel", "bias", "output"]
    index: int
    axes: tuple[int, ...]


class _Use(NamedTuple):
    leaf: int
    axis: int
    leading: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any
    feature: int


@dataclass
class _Run:
    """What one evaluation met, in its order."""

    names: Sequence[str]
    batch: int | None
    optimizer: str
    probes: Sequence[Array] | None
    uses: list[_Use] = field(default_factory=list)
    activations: list[Array] = field(default_factory=list)
    biases: dict[int, int] = field(default_factory=dict)  # use -> leaf


def _plain(x: Any) -> Any:
    return x.value if isinstance(x, _Marked) else x


def _rows(x: Array, feature: int) -> Array:
    return jnp.moveaxis(x, feature, -1).reshape(-1, x.shape[feature])


def _evaluate(closed: ClosedJaxpr, operands: Sequence[Any], run: _Run) -> list[Any]:
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *operands], strict=True))
    for eqn in jaxpr.eqns:
        inputs = [atom.val if isinstance(atom, Constant) else values[atom] for atom in eqn.invars]
        touched = any(isinstance(x, _Marked) for x in inputs)
        rule = _RULES.get(eqn.primitive.name, _forget) if touched else _bound
        values.update(zip(eqn.outvars, rule(eqn, inputs, run), strict=True))
    return [atom.val if isinstance(atom, Constant) else values[atom] for atom in jaxpr.outvars]


def _bound(eqn: Any, inputs: Sequence[Any], run: _Run) -> list[Any]:
    del run
    return bind(eqn, [_plain(x) for x in inputs])


def _forget(eqn: Any, inputs: Sequence[Any], run: _Run) -> list[Any]:
    """Lose the marks, unless a product with a kernel would be lost with them."""
    name, passed = eqn.primitive.name, inputs
    if name == "scan":  # what it slices is a stack of vectors
        passed = inputs[: eqn.params["num_consts"] + eqn.params["num_carry"]]
    kernels = [x for x in passed if isinstance(x, _Marked) and x.kind == "kernel"]
    if kernels and any(map(_multiplies, _programs(eqn))):
        named = ", ".join(f"'{run.names[x.index]}'" for x in kernels)
        raise ProblemError(
            f"{run.optimizer}: {named} may multiply activations inside {name}, which keeps them to itself. "
            "Write the layer outside of it, or name it in plain= to take plain gradient steps on it."
        )
    return _bound(eqn, inputs, run)


def _programs(eqn: Any) -> Iterator[Jaxpr]:
    for value in eqn.params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, ClosedJaxpr | Jaxpr):
                yield x.jaxpr if isinstance(x, ClosedJaxpr) else x


def _multiplies(jaxpr: Jaxpr) -> bool:
    return any(
        eqn.primitive.name == "dot_general" or any(map(_multiplies, _programs(eqn))) for eqn in jaxpr.eqns
    )


def _dot_general(eqn: Any, inputs: Sequence[Any], run: _Run) -> list[Any]:
    (out,) = _bound(eqn, inputs, run)
    sides = [i for i, x in enumerate(inputs) if isinstance(x, _Marked) and x.kind == "kernel"]
    summed, batched = eqn.params["dimension_numbers"]
    if len(sides) != 1 or batched[0] or len(summed[0]) != 1:
        return [out]
    (side,) = sides
    kernel, x, (along,) = inputs[side], jnp.asarray(_plain(inputs[1 - side])), summed[1 - side]
    leading = (*x.shape[:along], *x.shape[along + 1 :])
    if kernel.value.ndim != 2 or (run.batch and math.prod(leading) % run.batch):
        return [out]
    feature = out.ndim - 1 if side == 1 else 0
    axis = kernel.axes.index(summed[side][0])
    number = len(run.uses)
    run.uses.append(_Use(kernel.index, axis, leading, out.shape, out.dtype, feature))
    run.activations.append(_rows(x, along).astype(out.dtype))
    if run.probes is not None:
        out = out + run.probes[number]
    return [_Marked(out, "output", number, (feature,))]


def _add(eqn: Any, inputs: Sequence[Any], run: _Run) -> list[Any]:
    (out,) = _bound(eqn, inputs, run)
    marks = {x.kind: x for x in inputs if isinstance(x, _Marked)}
    bias, output = marks.get("bias"), marks.get("output")
    if bias is not None and output is not None and bias.axes == output.axes:
        run.biases[output.index] = bias.index
    return [out]


def _follow(axis_after: Callable[[Any, Any, int], int | None]) -> Callable[..., list[Any]]:
    """Return the rule of a primitive that moves axis i of its operand to axis_after(eqn, shape, i)."""

    def rule(eqn: Any, inputs: Sequence[Any], run: _Run) -> list[Any]:
        mark, *others = inputs
        if not isinstance(mark, _Marked) or any(isinstance(x, _Marked) for x in others):
            return _forget(eqn, inputs, run)
        axes = [axis_after(eqn, mark.value.shape, i) for i in mark.axes]
        kept = [i for i in axes if i is not None]
        if len(kept) < len(axes):
            return _forget(eqn, inputs, run)
        return [replace(mark, value=_bound(eqn, inputs, run)[0], axes=tuple(kept))]

    return rule


def _reshaped(eqn: Any, old: tuple[int, ...], i: int) -> int | None:
    """Follow an axis that a reshape leaves alone: all that comes after it, or before it, stays as it is."""
    new = eqn.outvars[0].aval.shape
    from_end = i + len(new) - len(old)
    if eqn.params.get("dimensions") is not None and eqn.primitive.name == "reshape":
        return None
    if from_end >= 0 and old[i:] == new[from_end:]:
        return from_end
    return i if old[: i + 1] == new[: i + 1] else None


def _broadcast(eqn: Any, old: tuple[int, ...], i: int) -> int | None:
    to = eqn.params["broadcast_dimensions"][i]
    return to if eqn.params["shape"][to] == old[i] else None


def _held(program: str) -> Callable[..., list[Any]]:
    """Return the rule of a primitive that only holds another program: it is inlined."""

    def rule(eqn: Any, inputs: Sequence[Any], run: _Run) -> list[Any]:
        jaxpr = eqn.params[program]
        return _evaluate(ClosedJaxpr(jaxpr, ()) if isinstance(jaxpr, Jaxpr) else jaxpr, inputs, run)

    return rule


_SAME = ("convert_element_type", "copy", "name", "sharding_constraint")
_RULES: dict[str, Callable[..., list[Any]]] = {
    **dict.fromkeys(_SAME, _follow(lambda eqn, shape, i: i)),
    "transpose": _follow(lambda eqn, shape, i: eqn.params["permutation"].index(i)),
    "broadcast_in_dim": _follow(_broadcast),
    "reshape": _follow(_reshaped),
    "squeeze": _follow(_reshaped),
    "dot_general": _dot_general,
    "add": _add,
    "jit": _held("jaxpr"),
    "pjit": _held("jaxpr"),
    "closed_call": _held("call_jaxpr"),
    "checkpoint": _held("jaxpr"),
    "remat2": _held("jaxpr"),
}
