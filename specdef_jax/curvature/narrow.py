"""Floats narrower than asked inside a computation.

A float64 context does not make a float64 computation: a Flax module with dtype=float32 stays float32
inside it. The jaxpr tells, so a certificate need not trust the dtype of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.typing import DTypeLike
from jaxtyping import PyTree

from specdef_jax.curvature.operators import Operator


class NarrowFloat(NamedTuple):
    """A primitive whose result is a narrow float, by name of primitive and dtype."""

    primitive: str
    dtype: str


def narrow_floats(fn: Callable[..., Any], *args: Any, asked: DTypeLike = jnp.float64) -> list[NarrowFloat]:
    """Return the distinct (primitive, dtype) in fn(*args) whose float results carry fewer bits than `asked`.

    Nothing is computed: the arguments may be shape structs. Only results count, so exact float32 data that
    is promoted before use is not reported. Everything the result may depend on is reported, a float32
    one-hot included; an empty list therefore means that no rounding is coarser than `asked`.

    Example:
      >>> narrow_floats(lambda x: jnp.sin(x.astype(jnp.bfloat16)), jnp.ones(3), asked=jnp.float32)
      [NarrowFloat(primitive='convert_element_type', dtype='bfloat16'),
       NarrowFloat(primitive='sin', dtype='bfloat16')]
    """
    bits = jnp.finfo(asked).nmant
    found = (f for f in _float_results(fn, *args) if jnp.finfo(f.dtype).nmant < bits)
    return list(dict.fromkeys(found))


def narrowest_float(fn: Callable[..., Any], *args: Any) -> str:
    """Return the name of the float dtype with the fewest mantissa bits among the results in fn(*args).

    The floats of the returned tree count too. "float64" where there is no float at all.
    """
    outputs = jax.tree.leaves(jax.eval_shape(fn, *args))
    names = {x.dtype.name for x in outputs if jnp.issubdtype(x.dtype, jnp.floating)}
    names |= {found.dtype for found in _float_results(fn, *args)}
    return min(sorted(names), key=lambda name: jnp.finfo(name).nmant, default="float64")


def narrowest_of(op: Operator) -> str:
    """Return the same for the product of an operator; new data of known shapes does not trace it again."""
    leaves, treedef = jax.tree.flatten(op)
    return _narrowest_in(treedef, tuple(jax.eval_shape(_identity, *leaves)))


@lru_cache(maxsize=256)
def _narrowest_in(treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> str:
    def product(leaves: tuple[Any, ...], vector: PyTree) -> PyTree:
        return treedef.unflatten(leaves).mv(vector)

    return narrowest_float(product, leaves, treedef.unflatten(leaves).template)


@jax.jit
def _identity(*leaves: Any) -> tuple[Any, ...]:
    return leaves


def _float_results(fn: Callable[..., Any], *args: Any) -> Iterator[NarrowFloat]:
    return _walk(jax.make_jaxpr(fn)(*args).jaxpr)


def _walk(jaxpr: Jaxpr) -> Iterator[NarrowFloat]:
    for equation in jaxpr.eqns:
        for out in equation.outvars:
            dtype = getattr(out.aval, "dtype", None)
            if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
                yield NarrowFloat(equation.primitive.name, dtype.name)
        for inside in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inside):
                yield from _walk(inside.jaxpr if isinstance(inside, ClosedJaxpr) else inside)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)
