"""Points at which a function has no second derivative, found by evaluating it equation by equation.

A ReLU network has a Hessian almost everywhere; where a preactivation is exactly zero it has none, and
what automatic differentiation returns there belongs to neither side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from specdef_jax.layered_views import bind

_TIES = ("max", "min", "gt", "ge", "lt", "le", "eq", "ne", "clamp")
_ZEROS = ("abs", "sign", "sqrt", "rsqrt", "cbrt")
_EXTREMA = ("reduce_max", "reduce_min")
_INLINED = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")


class Kink(NamedTuple):
    """A primitive that is not smooth at its operands, and how many of its entries stand on the edge."""

    primitive: str
    entries: int


def kinks(fn: Callable[..., Any], *args: Any) -> list[Kink]:
    """Return where fn is not smooth at these very arguments; an empty list for a smooth point.

    Looked at: ties of max, min and comparisons of floats, zeros of abs, sign and roots, ties of a maximum
    over entries. What stop_gradient cuts off does not count (the shift inside a softmax). Functions inside
    scan, while and cond are not looked into. Concrete arguments only; not under jit.

    Example:
      >>> kinks(lambda x: jax.nn.relu(x).sum(), jnp.array([1.0, 0.0]))
      [Kink(primitive='max', entries=1)]
    """
    closed = jax.make_jaxpr(fn)(*args)
    found: list[Kink] = []
    _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), {True}, found)
    return found


def _evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], live_out: set[Any], found: list[Kink]
) -> list[Any]:
    """Evaluate a program, noting the kinks of the equations that the result differentiably depends on."""
    live = _live(jaxpr) if live_out else set()
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        matters = any(v in live for v in eqn.outvars)
        name = eqn.primitive.name
        if name in _INLINED:
            inner = _program(eqn.params)
            out = _evaluate(inner.jaxpr, inner.consts, values, {True} if matters else set(), found)
        else:
            out = bind(eqn, values)
            if matters and (entries := _on_the_edge(name, values, out)):
                found.append(Kink(name, entries))
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _live(jaxpr: Jaxpr) -> set[Any]:
    """Return the variables that reach an output other than through stop_gradient."""
    live = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.primitive.name != "stop_gradient" and any(v in live for v in eqn.outvars):
            live |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return live


def _program(params: dict[str, Any]) -> ClosedJaxpr:
    inner = next(params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in params)
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())


def _on_the_edge(name: str, values: Sequence[Any], out: Sequence[Any]) -> int:
    if not values or not jnp.issubdtype(jnp.result_type(values[0]), jnp.floating):
        return 0
    if name in _TIES:
        first, *others = values
        return sum(int(np.sum(np.asarray(first) == np.asarray(other))) for other in others)
    if name in _ZEROS:
        return int(np.sum(np.asarray(values[0]) == 0))
    if name in _EXTREMA:
        # An entry that equals the extremum without being it: count ties by what each reduction kept.
        operand, kept = np.asarray(values[0]), np.asarray(out[0])
        return max(0, int(np.sum(np.isin(operand, kept))) - kept.size)
    return 0
