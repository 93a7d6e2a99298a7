"""What optax offers, and which of it sees where the parameters are (THEORY.md 5.3).

An optimizer is translation-equivariant if its updates stay the same when one constant is added to all the
parameters it is shown, gradients and losses being the same. It may read parameters, as differences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import optax
from optax import contrib

LOSS = ("value", "grad", "value_fn")
GRADIENTS = "reads gradients and its own state"
DIFFERENCES = "reads parameters, but only how far they have come"
VALUES = "reads gradients and values of the loss"
DECAYS = "decays the weights"
MEASURES = "measures the weights"


@dataclass(frozen=True)
class Entry:
    """One optimizer as it is run.

    Attributes:
      name: its name in optax or optax.contrib, and what is special after a comma.
      make: builds it; AttributeError where the installed optax has none.
      reason: why it is translation-equivariant, or why not.
      equivariant: which of the two.
      given: what its update is handed beside gradient, state and parameters.
      steps: followed.
      allowance: relative, for what rounds in float32 or branches on rounding.
    """

    name: str
    make: Callable[[], optax.GradientTransformation]
    reason: str
    equivariant: bool = True
    given: tuple[str, ...] = LOSS
    steps: int = 60
    allowance: float = 1e-9


def _yes(reason: str, made: dict[str, Callable[[], Any]], **more: Any) -> list[Entry]:
    return [Entry(name, make, reason, **more) for name, make in made.items()]


def _no(reason: str, made: dict[str, Callable[[], Any]], **more: Any) -> list[Entry]:
    return [Entry(name, make, reason, equivariant=False, **more) for name, make in made.items()]


R = 0.01
EQUIVARIANT: list[Entry] = [
    *_yes(GRADIENTS, {
        "sgd": lambda: optax.sgd(0.1),
        "adam": lambda: optax.adam(R),
        "sgd, momentum": lambda: optax.sgd(0.02, momentum=0.9),
        "sgd, nesterov": lambda: optax.sgd(0.02, momentum=0.9, nesterov=True),
        "nadam": lambda: optax.nadam(R),
        "amsgrad": lambda: optax.amsgrad(R),
        "adamax": lambda: optax.adamax(R),
        "adabelief": lambda: optax.adabelief(R),
        "adadelta": lambda: optax.adadelta(1.0),
        "adagrad": lambda: optax.adagrad(0.05),
        "adan": lambda: optax.adan(R),
        "adafactor, no parameter scale": lambda: optax.adafactor(
            1e-3, multiply_by_parameter_scale=False, min_dim_size_to_factor=3
        ),
        "lion, no decay": lambda: optax.lion(1e-3, weight_decay=0.0),
        "novograd": lambda: optax.novograd(R),
        "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(0.05),
        "radam": lambda: optax.radam(0.05),
        "rmsprop": lambda: optax.rmsprop(1e-3),
        "rprop": lambda: optax.rprop(1e-3),
        "sign_sgd": lambda: optax.sign_sgd(1e-3),
        "sm3": lambda: optax.sm3(R),
        "yogi": lambda: optax.yogi(R),
        "noisy_sgd": lambda: optax.noisy_sgd(0.05, key=0),
        "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(R)),
        "acprop": lambda: contrib.acprop(1e-3),
        "ademamix": lambda: contrib.ademamix(R),
        "adopt": lambda: contrib.adopt(R),
        "dadapt_adamw": lambda: contrib.dadapt_adamw(),
        "muon": lambda: contrib.muon(R),
    }),
    # It decomposes gradients in float32: what rounds there is 1e-7, however exact the rest.
    Entry("galore", lambda: contrib.galore(R, rank=2), GRADIENTS, allowance=1e-5),
    *_yes(DIFFERENCES, {
        "cocob": lambda: contrib.cocob(alpha=1e3),
        "dog, initial distance": lambda: contrib.dog(0.2, init_step=("distance", 1e-2)),
        "dowg": lambda: contrib.dowg(0.2),
        "madgrad": lambda: contrib.madgrad(R),
        "mechanize, no decay": lambda: contrib.mechanize(optax.sgd(0.1), weight_decay=0.0),
        "momo": lambda: contrib.momo(0.1),
        "momo_adam": lambda: contrib.momo_adam(R),
        "prodigy": lambda: contrib.prodigy(estim_lr0=1e-3),
        "schedule_free_sgd": lambda: contrib.schedule_free_sgd(0.1),
        "schedule_free_adamw": lambda: contrib.schedule_free_adamw(R),
    }),
    Entry("sam", lambda: contrib.sam(optax.sgd(0.1), optax.chain(contrib.normalize(), optax.sgd(0.05))),
          DIFFERENCES, given=()),
    # A line search decides by comparing values that differ by rounding once it has converged.
    Entry("lbfgs", lambda: optax.lbfgs(), DIFFERENCES, steps=8),
    *_yes(VALUES, {
        "polyak_sgd": lambda: optax.polyak_sgd(0.1),
        "reduce_on_plateau": lambda: optax.chain(
            optax.sgd(0.1), contrib.reduce_on_plateau(patience=3, rtol=0.05)
        ),
    }),
    Entry("sophia, no decay", lambda: contrib.sophia(1e-3, weight_decay=0.0), "reads gradients and curvature",
          given=("obj_fn",)),
    # The last VARIANTS of the list are close to one above.
    *_yes(GRADIENTS, {
        "adamw, no decay": lambda: optax.adamw(R, weight_decay=0.0),
        "nadamw, no decay": lambda: optax.nadamw(R, weight_decay=0.0),
        "adamaxw, no decay": lambda: optax.adamaxw(R, weight_decay=0.0),
        "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(R),
        "rmsprop, centered": lambda: optax.rmsprop(1e-3, centered=True, momentum=0.9),
        "signum": lambda: optax.signum(1e-3),
        "simplified_ademamix": lambda: contrib.simplified_ademamix(1e-4),
    }),
]  # fmt: skip
VARIANTS = 7
SIGHTED: list[Entry] = [
    *_no(DECAYS, {
        "adamw": lambda: optax.adamw(R, weight_decay=0.1),
        "lion": lambda: optax.lion(1e-3, weight_decay=0.1),
    }),
    *_no(MEASURES, {
        "lamb": lambda: optax.lamb(R),
        "adafactor": lambda: optax.adafactor(R),
        "lars": lambda: optax.lars(1.0, trust_coefficient=0.05),
        "fromage": lambda: optax.fromage(R),
        "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
        "dog, heuristic": lambda: contrib.dog(init_step=("heuristic", 1e-2)),
        "scale_by_trust_ratio": lambda: optax.chain(optax.scale_by_trust_ratio(), optax.scale(-R)),
        "scale_by_param_block_norm": lambda: optax.chain(optax.scale_by_param_block_norm(), optax.scale(-R)),
        "scale_by_param_block_rms": lambda: optax.chain(optax.scale_by_param_block_rms(), optax.scale(-R)),
        "scale_by_distance_over_gradients": lambda: optax.chain(
            optax.scale_by_distance_over_gradients(reps_rel=1e-2), optax.scale(-1.0)
        ),
        "mechanize": lambda: contrib.mechanize(optax.sgd(0.1), weight_decay=1.0, s_init=1e-2),
    }),
    *_no("keeps the weights it is shown at 0 or above", {
        "keep_params_nonnegative": lambda: optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative()),
    }),
    *_no(DECAYS, {
        "nadamw": lambda: optax.nadamw(R, weight_decay=0.1),
        "adamaxw": lambda: optax.adamaxw(R, weight_decay=0.1),
        "adadelta, decay": lambda: optax.adadelta(1.0, weight_decay=0.1),
        "adan, decay": lambda: optax.adan(R, weight_decay=0.1),
        "novograd, decay": lambda: optax.novograd(R, weight_decay=0.1),
        "add_decayed_weights": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
        "acprop, decay": lambda: contrib.acprop(R, weight_decay=0.1),
        "ademamix, decay": lambda: contrib.ademamix(R, weight_decay=0.1),
        "cocob, decay": lambda: contrib.cocob(weight_decay=0.1),
        "dadapt_adamw, decay": lambda: contrib.dadapt_adamw(estim_lr0=1e-3, weight_decay=1.0),
        "dowg, decay": lambda: contrib.dowg(weight_decay=0.1),
        "galore, decay": lambda: contrib.galore(R, rank=2, weight_decay=0.1),
        "madgrad, decay": lambda: contrib.madgrad(R, weight_decay=0.1),
        "momo, decay": lambda: contrib.momo(0.1, weight_decay=0.1),
        "momo_adam, decay": lambda: contrib.momo_adam(R, weight_decay=0.1),
        "muon, decay": lambda: contrib.muon(R, weight_decay=0.1),
        "prodigy, decay": lambda: contrib.prodigy(estim_lr0=1e-3, weight_decay=0.1),
        "schedule_free_sgd, decay": lambda: contrib.schedule_free_sgd(0.1, weight_decay=0.1),
        "schedule_free_adamw, decay": lambda: contrib.schedule_free_adamw(R, weight_decay=0.1),
    }),
    *_no(DECAYS, {"sophia": lambda: contrib.sophia(R, weight_decay=0.1)}, given=("obj_fn",)),
]  # fmt: skip

# Not optimizers: combinators and wrappers, equivariant if what they wrap is; filters that see the gradient
# alone; parts of the optimizers above; optimistic_adam, the former name of optimistic_adam_v2; and two that
# need a gradient for each example.
PARTS = frozenset({
    "add_noise", "apply_every", "apply_if_finite", "centralize", "chain", "clip", "clip_by_block_rms",
    "conditionally_mask", "conditionally_transform", "differentially_private_aggregate", "dpsgd", "ema",
    "flatten", "freeze", "hutchinson_estimator_diag_hessian", "identity", "inject_hyperparams",
    "inject_stateful_hyperparams", "lookahead", "masked", "measure_with_ema", "monitor", "multi_transform",
    "named_chain", "normalize", "normalize_by_update_norm", "optimistic_adam", "partition", "scale",
    "schedule_free", "selective_transform", "set_to_zero", "snapshot", "split_real_and_imaginary",
    "stateless", "stateless_with_tree_map", "trace", "with_extra_args_support", "zero_nans",
})  # fmt: skip


def unclassified() -> list[str]:
    """Return the public gradient transformations of the installed optax that this catalogue does not name.

    Transformations called scale_by_... are parts of the optimizers, unless they are entries themselves.
    """
    known = {entry.name.partition(",")[0] for entry in (*EQUIVARIANT, *SIGHTED)} | PARTS
    offered = {name for module in (optax, contrib) for name in _transformations(module)}
    return sorted(name for name in offered - known if not name.startswith("scale_by_"))


def _transformations(module: ModuleType) -> list[str]:
    functions = {name: f for name, f in vars(module).items() if not name.startswith("_") and callable(f)}
    return [name for name, f in functions.items() if not inspect.isclass(f) and _makes_one(f)]


def _makes_one(function: Callable[..., Any]) -> bool:
    """Tell whether a function returns a gradient transformation: it says so, or does so when called."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return False
    if signature.return_annotation is not signature.empty:
        return "GradientTransformation" in str(signature.return_annotation)
    if any(p.default is p.empty for p in signature.parameters.values()):
        return False
    return isinstance(function(), optax.GradientTransformation)
