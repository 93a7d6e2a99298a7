"""Marks on the parameters of a program, which follow their arrays until a dense layer is met.

A jaxpr is evaluated with some parameters marked; a mark stays on through whatever only rearranges an array.
Where a dot_general multiplies a marked kernel with something unmarked, what it multiplies is written down
(`Run`) and the product is marked as an output, to which a marked bias may then be added. All other
primitives are computed as they stand and lose the marks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core import Literal as Constant
from jaxtyping import Array

from specdef_jax.errors import ProblemError
from specdef_jax.jaxprs import scan_operands
from specdef_jax.layered_views import bind


@dataclass(frozen=True)
class Marked:
    """An array that is a parameter with its axes moved, or the output of a dense layer.

    `index` counts leaves, for an output uses. `axes` says where the axes of the leaf are in `value`, for an
    output where its features are.
    """

    value: Any
    kind: Literal["kernel", "bias", "output"]
    index: int
    axes: tuple[int, ...]


class Use(NamedTuple):
    """One product of activations with a kernel.

    Attributes:
      leaf: number of the kernel.
      axis: of the kernel, the one summed.
      leading: axes of the activations without the one summed.
      shape: of the product.
      dtype: of the product.
      feature: axis of the product along which the outputs of the layer are.
    """

    leaf: int
    axis: int
    leading: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any
    feature: int


@dataclass
class Run:
    """What one evaluation met, in its order.

    Attributes:
      names: of the leaves, for errors.
      batch: a product whose number of rows is no multiple of it is no dense layer; None takes all.
      optimizer: what errors call the caller.
      probes: added to the products, one for each; None adds none.
      uses: the products.
      activations: what each kernel was multiplied with, (rows, inputs).
      biases: number of a product -> the leaf added to it.
    """

    names: Sequence[str]
    batch: int | None
    optimizer: str
    probes: Sequence[Array] | None
    uses: list[Use] = field(default_factory=list)
    activations: list[Array] = field(default_factory=list)
    biases: dict[int, int] = field(default_factory=dict)


def plain(x: Any) -> Any:
    """Return a value without its mark."""
    return x.value if isinstance(x, Marked) else x


def rows(x: Array, feature: int) -> Array:
    """Return an array as (rows, features)."""
    return jnp.moveaxis(x, feature, -1).reshape(-1, x.shape[feature])


def evaluate(closed: ClosedJaxpr, operands: Sequence[Any], run: Run) -> list[Any]:
    """Return the outputs of a program, some of its operands Marked, and write down in `run` what it met.

    Raises:
      ProblemError: a kernel may be multiplied inside a primitive that keeps what happens in it.
    """
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *operands], strict=True))
    for eqn in jaxpr.eqns:
        inputs = [atom.val if isinstance(atom, Constant) else values[atom] for atom in eqn.invars]
        touched = any(isinstance(x, Marked) for x in inputs)
        rule = _RULES.get(eqn.primitive.name, _forget) if touched else _bound
        values.update(zip(eqn.outvars, rule(eqn, inputs, run), strict=True))
    return [atom.val if isinstance(atom, Constant) else values[atom] for atom in jaxpr.outvars]


def _bound(eqn: Any, inputs: Sequence[Any], run: Run) -> list[Any]:
    del run
    return bind(eqn, [plain(x) for x in inputs])


def _forget(eqn: Any, inputs: Sequence[Any], run: Run) -> list[Any]:
    """Lose the marks, unless a product with a kernel would be lost with them."""
    name, passed = eqn.primitive.name, inputs
    if name == "scan":  # what it slices is a stack of vectors
        passed = inputs[: sum(scan_operands(eqn.params))]
    kernels = [x for x in passed if isinstance(x, Marked) and x.kind == "kernel"]
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


def _dot_general(eqn: Any, inputs: Sequence[Any], run: Run) -> list[Any]:
    (out,) = _bound(eqn, inputs, run)
    sides = [i for i, x in enumerate(inputs) if isinstance(x, Marked) and x.kind == "kernel"]
    summed, batched = eqn.params["dimension_numbers"]
    if len(sides) != 1 or batched[0] or len(summed[0]) != 1:
        return [out]
    (side,) = sides
    kernel, x, (along,) = inputs[side], jnp.asarray(plain(inputs[1 - side])), summed[1 - side]
    leading = (*x.shape[:along], *x.shape[along + 1 :])
    if kernel.value.ndim != 2 or (run.batch and math.prod(leading) % run.batch):
        return [out]
    feature = out.ndim - 1 if side == 1 else 0
    axis = kernel.axes.index(summed[side][0])
    number = len(run.uses)
    run.uses.append(Use(kernel.index, axis, leading, out.shape, out.dtype, feature))
    run.activations.append(rows(x, along).astype(out.dtype))
    if run.probes is not None:
        out = out + run.probes[number]
    return [Marked(out, "output", number, (feature,))]


def _add(eqn: Any, inputs: Sequence[Any], run: Run) -> list[Any]:
    (out,) = _bound(eqn, inputs, run)
    marks = {x.kind: x for x in inputs if isinstance(x, Marked)}
    bias, output = marks.get("bias"), marks.get("output")
    if bias is not None and output is not None and bias.axes == output.axes:
        run.biases[output.index] = bias.index
    return [out]


def _follow(axis_after: Callable[[Any, Any, int], int | None]) -> Callable[..., list[Any]]:
    """Return the rule of a primitive that moves axis i of its operand to axis_after(eqn, shape, i)."""

    def rule(eqn: Any, inputs: Sequence[Any], run: Run) -> list[Any]:
        mark, *others = inputs
        if not isinstance(mark, Marked) or any(isinstance(x, Marked) for x in others):
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

    def rule(eqn: Any, inputs: Sequence[Any], run: Run) -> list[Any]:
        jaxpr = eqn.params[program]
        return evaluate(ClosedJaxpr(jaxpr, ()) if isinstance(jaxpr, Jaxpr) else jaxpr, inputs, run)

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
