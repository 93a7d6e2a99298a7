"""Second-order optimizers that optax lacks, as optax GradientTransformationExtraArgs.

Each takes the current curvature by keyword, so any loop that can differentiate can drive it:

    updates, state = optimizer.update(grads, state, params, value=value, value_fn=value_fn, hvp=hvp)

with hvp(tree) the Hessian product at params, value_fn(params) the loss. What an optimizer needs is in its
docstring; a missing one is a ProblemError that names it. `work` reads from the state of any optimizer, ours
or optax's, how many gradients its last step was worth.
"""

from specdef_jax.optim.adahessian import adahessian
from specdef_jax.optim.cubic_newton import cubic_newton
from specdef_jax.optim.kfac import kfac
from specdef_jax.optim.levenberg_marquardt import damped_gauss_newton
from specdef_jax.optim.newton_cg import newton_cg
from specdef_jax.optim.work import work

__all__ = ["adahessian", "cubic_newton", "damped_gauss_newton", "kfac", "newton_cg", "work"]
