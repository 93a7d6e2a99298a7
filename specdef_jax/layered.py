"""Evaluate a network as released: each deformed layer as two products, never multiplied out.

The network is traced with plain abstract kernels, so any framework works (Flax Linen, NNX split and
merge, Equinox, plain functions); the jaxpr is then evaluated with `View`s of the two factors where
the kernels were (layered_views.py, layered_rules.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from specdef_jax.jaxprs import scan_operands
from specdef_jax.layered_rules import conv_general_dilated, dot_general
from specdef_jax.layered_views import MERGE, REARRANGE, Tap, View, bind, rearrange, refuse, view_of
from specdef_jax.parametrization import Deformed, is_structured
from specdef_jax.trees import path_name


def layered(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Return `apply` for trees with Deformed leaves, each layer computed as two products (THEORY.md 0).

    On the output side weight comes first and comp after it, the bias after both; on the input side
    comp comes first. Both products ask for full precision, accumulate in float32 or wider and are
    stored in the output dtype of the plain product, which is what THEORY.md 1.2 bounds. A tree
    without structured weights goes to `apply` as it is; structured weights that are not Deformed are
    merged first.

    The network is traced anew at each call, so jit the result: jax.jit(layered(apply)). It may be
    used under jit, grad, vmap, scan and checkpoint, and `apply` may use them.

    Args:
      apply: apply(deformed, x, ...) written for plain arrays. Array leaves of all arguments are
        traced; every other leaf (Python numbers, strings, functions) stays as it is.

    Returns:
      A function of the same arguments, with the outputs of `apply`.

    Raises:
      LayeredUnsupported: (when called) a primitive uses a deformed weight in a way that has no
        layered form, or `apply` returns one.

    Example:
      >>> import jax.numpy as jnp
      >>> from specdef_jax.parametrization import Deformed, KernelAxes
      >>> leaf = Deformed(4 * jnp.eye(2), jnp.eye(2) / 4, "output", KernelAxes((0,), (1,)))
      >>> layered(lambda params, x: x @ params["kernel"])({"kernel": leaf}, jnp.ones(2)).tolist()
      [1.0, 1.0]
    """
    return evaluated(apply, None)


def evaluated(apply: Callable[..., Any], tap: Tap | None) -> Callable[..., Any]:
    """Return layered(apply), with a tap on what every compensation multiplies.

    A tap needs the layers outside of scan, while and cond, whose inner values cannot leave them.
    """

    @functools.wraps(apply)
    def run(*args: Any, **kwargs: Any) -> Any:
        pairs, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_structured)
        leaves = [_operand(path, leaf, tap) for path, leaf in pairs]
        traced = [i for i, leaf in enumerate(leaves) if _is_array(leaf) or isinstance(leaf, View)]
        operands = [leaves[i] for i in traced]
        if not any(isinstance(x, View) for x in operands):
            plain_args, plain_kwargs = treedef.unflatten(leaves)
            return apply(*plain_args, **plain_kwargs)

        outputs: list[Any] = []  # what the trace below found: the output tree with its static leaves

        def plain(*arrays: Any) -> list[Any]:
            filled = list(leaves)
            for i, array in zip(traced, arrays, strict=True):
                filled[i] = array
            plain_args, plain_kwargs = treedef.unflatten(filled)
            out, out_tree = jax.tree.flatten(apply(*plain_args, **plain_kwargs))
            outputs[:] = [[None if _is_array(x) else x for x in out], out_tree]
            return [x for x in out if _is_array(x)]

        # A weight has the shape and dtype of the kernel it stands for, and only those are read here.
        closed = jax.make_jaxpr(plain)(*(x.weight if isinstance(x, View) else x for x in operands))
        values = iter(map(_as_array, _no_views("return", _evaluate(closed, operands))))
        static, out_tree = outputs
        return out_tree.unflatten([next(values) if x is None else x for x in static])

    return run


def _operand(path: tuple[Any, ...], leaf: Any, tap: Tap | None) -> Any:
    if isinstance(leaf, Deformed):
        # The first two keys say which argument; they name the leaf only if it is the whole argument.
        return view_of(leaf, path_name(path[2:]) or path_name(path[1:]), tap)
    return leaf.materialize() if is_structured(leaf) else leaf


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def _as_array(value: Any) -> jax.Array:
    return value if isinstance(value, jax.Array) else jnp.asarray(value)  # a literal of the jaxpr


def _no_views(primitive: str, outputs: Sequence[Any]) -> Sequence[Any]:
    if any(isinstance(x, View) for x in outputs):
        refuse(primitive, outputs, f"It gives back the weight itself. {MERGE}.")
    return outputs


def _evaluate(closed: ClosedJaxpr, operands: Sequence[Any]) -> list[Any]:
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *operands], strict=True))
    for eqn in jaxpr.eqns:
        inputs = [_read(values, atom) for atom in eqn.invars]
        touched = any(isinstance(x, View) for x in inputs)
        rule = _RULES.get(eqn.primitive.name, _unknown) if touched else bind
        values.update(zip(eqn.outvars, rule(eqn, inputs), strict=True))
    return [_read(values, atom) for atom in jaxpr.outvars]


def _read(values: dict[Any, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, Literal) else values[atom]


def _unknown(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    remedy = f"{MERGE}, or let the weight enter products with the activations only."
    refuse(eqn.primitive.name, operands, remedy)


# Primitives that hold other programs


def _jit(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    # Inlined: the caller's jit compiles it, and without one a jit made here would compile at each call.
    constrained = map(_constrain, operands, eqn.params["in_shardings"])
    outputs = _evaluate(eqn.params["jaxpr"], list(constrained))
    return list(map(_constrain, outputs, eqn.params["out_shardings"]))


def _constrain(value: Any, sharding: Any) -> Any:
    if not isinstance(sharding, jax.sharding.Sharding):
        return value
    if isinstance(value, View):
        return replace(value, weight=_constrain(value.weight, sharding))
    return lax.with_sharding_constraint(value, sharding)


def _closed_call(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    return _evaluate(eqn.params["call_jaxpr"], operands)


def _remat(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    params = eqn.params
    body = functools.partial(_evaluate_list, _closed(params["jaxpr"]))
    if _tapped(operands):  # what is tapped must leave the checkpoint, so there is none
        return body(*operands)
    if params["differentiated"] and params["prevent_cse"]:
        # The recomputation of a gradient taken inside: without the barrier XLA would fuse it away.
        operands = lax.optimization_barrier(list(operands))
    return jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])(*operands)


def _evaluate_list(closed: ClosedJaxpr, *operands: Any) -> list[Any]:
    return _evaluate(closed, operands)


def _closed(jaxpr: Jaxpr) -> ClosedJaxpr:
    return ClosedJaxpr(jaxpr, ())


def _cond(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    def branch(closed: ClosedJaxpr) -> Callable[..., Sequence[Any]]:
        return lambda *inputs: _no_views("cond", _evaluate(closed, inputs))

    index, *inputs = operands
    _no_taps("cond", inputs)
    return list(lax.switch(index, [branch(closed) for closed in eqn.params["branches"]], *inputs))


def _while(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    params = eqn.params
    cond_end = params["cond_nconsts"]
    body_end = cond_end + params["body_nconsts"]
    cond_consts, body_consts, carry = operands[:cond_end], operands[cond_end:body_end], operands[body_end:]
    _no_carried("while", carry)
    _no_taps("while", operands)
    return lax.while_loop(
        lambda carry: _evaluate(params["cond_jaxpr"], [*cond_consts, *carry])[0],
        lambda carry: list(_no_views("while", _evaluate(params["body_jaxpr"], [*body_consts, *carry]))),
        list(carry),
    )


def _scan(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    params = eqn.params
    n, carried = scan_operands(params)
    m = n + carried
    consts, carry, xs = operands[:n], operands[n:m], operands[m:]
    _no_carried("scan", carry)
    _no_taps("scan", operands)

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        layer = [_one_layer(x) if isinstance(x, View) else x for x in xs]
        out = list(_no_views("scan", _evaluate(params["jaxpr"], [*consts, *carry, *layer])))
        return out[: m - n], out[m - n :]

    carry, ys = lax.scan(
        body,
        list(carry),
        [_layers_first(x) if isinstance(x, View) else x for x in xs],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _no_carried(primitive: str, carry: Sequence[Any]) -> None:
    if any(isinstance(x, View) for x in carry):
        refuse(primitive, carry, f"The loop carries it. Close over it instead. Or: {MERGE}.")


def _tapped(operands: Sequence[Any]) -> bool:
    return any(isinstance(x, View) and x.tap is not None for x in operands)


def _no_taps(primitive: str, operands: Sequence[Any]) -> None:
    if _tapped(operands):
        remedy = "Activations cannot be taken out of it. Collect them in the network itself."
        refuse(primitive, [x for x in operands if isinstance(x, View) and x.tap is not None], remedy)


def _layers_first(view: View) -> View:
    """Bring the comp of each layer along the axis that a scan slices."""
    if 0 not in view.stack:
        refuse("scan", [view], f"The loop runs over an axis that is not a stack of layers. {MERGE}.")
    axis = view.stack.index(0)
    stack = (0, *(i for i in view.stack if i != 0))
    return replace(view, comp=jnp.moveaxis(view.comp, axis, 0), stack=stack)


def _one_layer(view: View) -> View:
    """Name the axes of a View whose leading axis the scan has taken away."""
    features, stack = tuple(i - 1 for i in view.features), tuple(i - 1 for i in view.stack[1:])
    return replace(view, features=features, stack=stack)


_RULES: dict[str, Callable[[Any, Sequence[Any]], list[Any]]] = {
    **dict.fromkeys(REARRANGE, rearrange),
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _closed_call,
    "checkpoint": _remat,
    "remat2": _remat,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
