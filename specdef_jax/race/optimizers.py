"""The optimizers that can be raced: step_size -> optax transformation, each a function of its own.

Race them by name: {name: FIRST_ORDER[name] for name in (...)}. Other settings than the step size are optax's
defaults; none decays but AdamW. The runner hands every update value, grad, value_fn, obj_fn and hvp, so what
reads the loss (L-BFGS, K-FAC) or the Hessian (Sophia, SECOND_ORDER) runs by the same protocol.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from jaxtyping import Array, PyTree
from optax import contrib

from specdef_jax import optim

Rate = Array | float


def sgd(step_size: Rate) -> optax.GradientTransformation:
    """Return plain gradient descent."""
    return optax.sgd(step_size)


def momentum(step_size: Rate) -> optax.GradientTransformation:
    """Return heavy-ball momentum .9."""
    return optax.sgd(step_size, momentum=0.9)


def nesterov(step_size: Rate) -> optax.GradientTransformation:
    """Return Nesterov momentum .9 in optax's form."""
    return optax.sgd(step_size, momentum=0.9, nesterov=True)


def rmsprop(step_size: Rate) -> optax.GradientTransformation:
    """Return RMSProp with optax's defaults."""
    return optax.rmsprop(step_size)


def adagrad(step_size: Rate) -> optax.GradientTransformation:
    """Return Adagrad with optax's defaults."""
    return optax.adagrad(step_size)


def adam(step_size: Rate) -> optax.GradientTransformation:
    """Return Adam with optax's defaults."""
    return optax.adam(step_size)


def adamw(step_size: Rate) -> optax.GradientTransformation:
    """Return Adam with decoupled weight decay 1e-4."""
    return optax.adamw(step_size)


def lion(step_size: Rate) -> optax.GradientTransformation:
    """Return Lion without decay."""
    return optax.lion(step_size, weight_decay=0.0)


def sign(step_size: Rate) -> optax.GradientTransformation:
    """Return sign descent."""
    return optax.sign_sgd(step_size)


def muon(step_size: Rate) -> optax.GradientTransformation:
    """Return Muon on matrices, Adam on the rest."""
    return contrib.muon(step_size)


def schedule_free(step_size: Rate) -> optax.GradientTransformation:
    """Return schedule-free SGD; the loss raced is that of the point it differentiates at."""
    return contrib.schedule_free_sgd(step_size)


def adafactor(step_size: Rate) -> optax.GradientTransformation:
    """Return Adafactor, its step scaled by the parameters as optax has it."""
    return optax.adafactor(step_size)


def lbfgs(step_size: Rate) -> optax.GradientTransformation:
    """Return L-BFGS with its zoom line search; the step size is the largest tried."""
    search = optax.scale_by_zoom_linesearch(max_linesearch_steps=20, max_learning_rate=step_size)
    inner = optax.with_extra_args_support(optax.lbfgs(linesearch=search))

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        # its line search refuses arguments that value_fn does not take
        known = {name: extra[name] for name in ("value", "grad", "value_fn")}
        return inner.update(updates, state, params, **known)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def sophia(step_size: Rate) -> optax.GradientTransformation:
    """Return Sophia-H with optax's defaults, without decay."""
    return contrib.sophia(step_size, weight_decay=0.0)


def newton_cg(step_size: Rate) -> optax.GradientTransformation:
    """Return truncated Newton, every step taken."""
    return optim.newton_cg(step_size)


def cubic_newton(step_size: Rate) -> optax.GradientTransformation:
    """Return cubic-regularized Newton; the step size is 1 / sigma at the start."""
    return optim.cubic_newton(1 / step_size)


def adahessian(step_size: Rate) -> optax.GradientTransformation:
    """Return AdaHessian, one probe a step."""
    return optim.adahessian(step_size, key=jax.random.key(0))


def kfac(step_size: Rate) -> optax.GradientTransformation:
    """Return K-FAC of the dense kernels with the empirical Fisher matrix, damping 1e-3."""
    return optim.kfac(step_size)


DEFAULT = {"sgd": sgd, "momentum": momentum, "adam": adam}
FIRST_ORDER = {
    "sgd": sgd,
    "momentum": momentum,
    "nesterov": nesterov,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
    "adam": adam,
    "adamw": adamw,
    "lion": lion,
    "sign": sign,
    "muon": muon,
    "schedule_free": schedule_free,
    "adafactor": adafactor,
}
SECOND_ORDER = {
    "lbfgs": lbfgs,
    "sophia": sophia,
    "newton_cg": newton_cg,
    "cubic_newton": cubic_newton,
    "adahessian": adahessian,
    "kfac": kfac,
}
