"""Emulate accelerators that round the operands of products, equation by equation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jaxtyping import PyTree

from specdef_jax.errors import SpecError
from specdef_jax.layered_views import bind
from specdef_jax.precision import Format

PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
INLINED = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")


def round_products(fn: Callable[..., PyTree], form: Format) -> Callable[..., PyTree]:
    """Return fn with the operands of every matrix product and convolution rounded as `form` does.

    An emulation, for CPUs, of accelerators that run float32 products in TF32: the equations of fn
    are evaluated one by one. Operands of another dtype than the format's stay as they are.

    Raises:
      SpecError: (when called) a product stands inside control flow (scan, while, cond, checkpoint).
    """

    def rounded(*args: PyTree) -> PyTree:
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        outputs = _eval_rounded(closed.jaxpr, closed.consts, jax.tree.leaves(args), form)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return rounded


def _eval_rounded(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], form: Format) -> list[Any]:
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        if eqn.primitive.name in PRODUCTS:
            out = bind(eqn, [form.round_operand(v) if v.dtype == form.dtype else v for v in values])
        elif eqn.primitive.name in INLINED:
            inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
            out = _eval_rounded(inner.jaxpr, inner.consts, values, form)
        elif _has_products(eqn):
            raise SpecError(f"products inside '{eqn.primitive.name}' cannot be rounded; unroll it first.")
        else:
            out = bind(eqn, values)
        env |= dict(zip(eqn.outvars, out, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]


def _has_products(eqn: JaxprEqn) -> bool:
    return any(name in str(eqn.params) for name in PRODUCTS)
