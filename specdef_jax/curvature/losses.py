"""Curvature operators of a loss: Hessian, Gauss-Newton, Fisher.

With J the Jacobian of the outputs f(theta), each is a product of two or three derivatives, never a matrix:

    hessian            d2 L / d theta2
    gauss_newton       J^T (d2 l / d f2) J, for L = l(f(theta))
    fisher             (1 / N) sum_n J_n^T F_n J_n, F_n the Fisher matrix of the distribution with
                       natural parameters f_n
    empirical_fisher   (1 / N) sum_n g_n g_n^T, g_n the gradient of example n

Source: Martens, JMLR 21 (2020) 146; Kunstner, Balles and Hennig, NeurIPS 2019, on what the empirical Fisher
is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from specdef_jax.curvature.operators import Operator, check_choice, layout
from specdef_jax.errors import ProblemError
from specdef_jax.parametrization import function_on, loss_on

Family = Literal["categorical", "bernoulli", "gaussian"]


def hessian(loss: Callable[..., Array], params: PyTree, *args: Any) -> Operator:
    """Return the Hessian of loss(params, *args) in params, as forward over reverse products.

    Args:
      loss: loss(params, *args) -> real scalar. A loss for plain parameters also takes a deformed tree:
        the Hessian is then in (weight, comp) (THEORY.md 2.1).
      params: tree of float arrays, at which the Hessian is taken.
      *args: data of the loss. Pass it here and not by closure; keep one `loss` object, or every call
        compiles again.

    Raises:
      ProblemError: a leaf of params is not a real float, or the loss does not evaluate to a real scalar.

    Example:
      >>> op = hessian(lambda x, a: a * jnp.sum(x**4), jnp.ones(3), 2.0)
      >>> op.mv(jnp.ones(3))
      Array([24., 24., 24.], dtype=float32)
    """
    domain = layout(params)
    return Operator(Partial(_hessian_product, loss_on(loss, params, *args), params, *args), domain, "hessian")


def gauss_newton(
    model: Callable[..., PyTree], criterion: Callable[..., Array], params: PyTree, inputs: Any, *args: Any
) -> Operator:
    """Return the Gauss-Newton matrix of criterion(model(params, inputs), *args) in params.

    It is the Hessian of the loss with the model replaced by its linearization, positive semidefinite where
    the criterion is convex in the outputs, and equal to the Hessian where the model is linear.

    Args:
      model: model(params, inputs) -> tree of real outputs. One for plain parameters also takes a deformed
        tree.
      criterion: criterion(outputs, *args) -> real scalar.
      params: tree of float arrays.
      inputs: what the model reads.
      *args: what the criterion reads besides the outputs, targets say.

    Raises:
      ProblemError: a leaf of params is not a real float, or the criterion does not give a real scalar.
    """
    domain = layout(params)
    outputs_of = function_on(model, params, inputs)
    outputs = _outputs(outputs_of, params, inputs)
    layout(outputs)
    data = (outputs_of, loss_on(criterion, outputs, *args), params, inputs, *args)
    return Operator(Partial(_gauss_newton_product, *data), domain, "Gauss-Newton matrix")


def fisher(
    model: Callable[..., Array], params: PyTree, inputs: Any, family: Family = "categorical"
) -> Operator:
    """Return the exact Fisher matrix of the model's own distribution, averaged over the examples.

    The expectation over labels drawn from the model is taken in closed form, not sampled. An example is all
    axes of the outputs but the last.

    Args:
      model: model(params, inputs) -> (*examples, c), the natural parameters of the family.
      params: tree of float arrays.
      inputs: what the model reads.
      family: "categorical" (outputs are logits over c classes: F_n = diag(p) - p p^T), "bernoulli" (c
        independent logits: diag(p (1 - p))), "gaussian" (c means, unit variance: the identity).

    Raises:
      ProblemError: a leaf of params is not a real float, the outputs are not one real array with an axis, or
        the family is not known.
    """
    check_choice("family", family, _OUTPUT_FISHER)
    domain = layout(params)
    outputs_of = function_on(model, params, inputs)
    outputs = _outputs(outputs_of, params, inputs)
    if jnp.ndim(outputs) < 1 or not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ProblemError(f"fisher needs one real array (*examples, c) from the model, it gives {outputs}.")
    product = Partial(_FisherProduct(family), outputs_of, params, inputs)
    return Operator(product, domain, f"{family} Fisher matrix")


def empirical_fisher(losses: Callable[..., Array], params: PyTree, *args: Any) -> Operator:
    """Return (1 / N) sum_n g_n g_n^T, with g_n the gradient of the loss of example n.

    Args:
      losses: losses(params, *args) -> (N,), one loss for each example. One for plain parameters also takes a
        deformed tree.
      params: tree of float arrays.
      *args: data of the losses.

    Raises:
      ProblemError: a leaf of params is not a real float, or the losses are not one real vector.
    """
    domain = layout(params)
    losses_on = function_on(losses, params, *args)
    out = _outputs(losses_on, params, *args)
    if jnp.ndim(out) != 1 or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ProblemError(f"empirical_fisher needs losses (N,), one for each example; these are {out}.")
    return Operator(Partial(_empirical_product, losses_on, params, *args), domain, "empirical Fisher matrix")


def _outputs(fn: Partial, params: PyTree, *args: Any) -> Any:
    try:
        return jax.eval_shape(fn, params, *args)
    except Exception as error:
        raise ProblemError(
            f"the model cannot be evaluated on these parameters and arguments: {error}"
        ) from error


def _hessian_product(loss: Partial, params: PyTree, *args: Any) -> PyTree:
    *data, tangent = args
    return jax.jvp(lambda p: jax.grad(loss)(p, *data), (params,), (tangent,))[1]


def _gauss_newton_product(
    model: Partial, criterion: Partial, params: PyTree, inputs: Any, *args: Any
) -> PyTree:
    *targets, tangent = args

    def middle(outputs: PyTree, outputs_tangent: PyTree) -> PyTree:
        gradient = jax.grad(lambda out: criterion(out, *targets))
        return jax.jvp(gradient, (outputs,), (outputs_tangent,))[1]

    return _sandwiched(lambda p: model(p, inputs), params, tangent, middle)


def _empirical_product(losses: Partial, params: PyTree, *args: Any) -> PyTree:
    *data, tangent = args
    return _sandwiched(lambda p: losses(p, *data), params, tangent, lambda _, out: out / out.size)


def _sandwiched(
    model: Callable[[PyTree], PyTree],
    params: PyTree,
    tangent: PyTree,
    middle: Callable[[PyTree, PyTree], PyTree],
) -> PyTree:
    """Return J^T M(J tangent), M given the outputs and J tangent."""
    outputs, push = jax.linearize(model, params)
    return jax.linear_transpose(push, params)(middle(outputs, push(tangent)))[0]


@dataclass(frozen=True)
class _FisherProduct:
    """The product for one family: equal where the family is, so that it compiles once."""

    family: Family

    def __call__(self, model: Partial, params: PyTree, inputs: Any, tangent: PyTree) -> PyTree:
        def middle(outputs: Array, out: Array) -> Array:
            examples = outputs.size // outputs.shape[-1]
            return _OUTPUT_FISHER[self.family](outputs, out) / examples

        return _sandwiched(lambda p: model(p, inputs), params, tangent, middle)


def _categorical(logits: Array, out: Array) -> Array:
    p = jax.nn.softmax(logits)
    return p * (out - jnp.sum(p * out, axis=-1, keepdims=True))


def _bernoulli(logits: Array, out: Array) -> Array:
    return jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits) * out


def _gaussian(_: Array, out: Array) -> Array:
    return out


_OUTPUT_FISHER = {"categorical": _categorical, "bernoulli": _bernoulli, "gaussian": _gaussian}
