"""A checkpoint and an attack on it, as a task to certify: the network in float64, and as it is stored."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specdef_jax import trees
from specdef_jax.errors import ProblemError, StructureError
from specdef_jax.hub import Model, load, selector
from specdef_jax.parametrization import is_structured
from specdef_jax.spec import Plan
from specdef_jax.specdef import apply_plan
from specdef_jax.tasks.task import Task

Loss = Callable[..., Array]
LAYERS = ("**/v_proj/weight", "**/attn2/to_v/weight")  # value projections, of text and of images
CONTROLS = ("conv_out.bias", "model.norm.weight")  # one entry of it scales a channel of the output
SHARE = 0.75


def model_task(
    directory: Path | str,
    data: Sequence[Any],
    loss: Loss | None = None,
    *,
    held: Sequence[Any] | None = None,
    target: float | None = None,
    layers: Sequence[str] = (),
) -> Task:
    """Return the task of fine-tuning a checkpoint.

    Args:
      directory: of config.json and safetensors files, undeformed.
      data: the attacker's, loss(params, *data).
      loss: of the plain network, kernels (in, out); of a text model by default the cross-entropy of next
        tokens.
      held: inputs on which the function is compared, apply(params, *held); by default the data of a text
        model.
      target: loss at which the attack has succeeded; by default three quarters of where it starts.
      layers: globs of the layers to deform; by default every value projection.

    Raises:
      FileError, ConfigError, StructureError: as hub.load.
      StructureError: the directory is deformed already.
      ProblemError: a model that writes no text needs a loss and held inputs.
    """
    model = load(directory)
    if any(map(is_structured, jax.tree.leaves(model.params, is_leaf=is_structured))):
        raise StructureError(f"{directory} is deformed already; certify the directory it was made from.")
    is_text = model.generate is not None
    if loss is None and not is_text:
        raise ProblemError(f"{directory} writes no text: give a loss of your own, loss(params, *data).")
    if held is None and not is_text:
        raise ProblemError(f"{directory} writes no text: give inputs to compare it on, apply(params, *held).")
    function = model.loss if loss is None else loss
    compared = tuple(data[:1] if held is None else held)
    with jax.enable_x64(True):
        params, args = trees.double(model.params), trees.double(tuple(data))
        inputs = trees.double(compared)
        start = float(function(params, *args))
    goal = SHARE * start if target is None else target
    return Task(
        name=Path(directory).name,
        description=(
            f"{type(model.config).__module__.rsplit('.', 1)[-1]} of {trees.size(params):,} parameters, from "
            f"{Path(directory).name}. The attacker fine-tunes on {trees.size(args):,} numbers, full batch, "
            f"float64, until the loss falls from {start:.4g} to {goal:.4g}."
        ),
        networks=(params,),
        apply=model.apply,
        loss=function,
        args=args,
        inputs=inputs,
        where=selector(layers or LAYERS),
        control=next((name for name in CONTROLS if name in params), sorted(params)[0]),
        target=goal,
        facts={},
        released=functools.partial(_released, model, compared, is_text),
    )


def _released(model: Model, held: tuple[Any, ...], is_text: bool, planned: Plan) -> dict[str, Any]:
    """Compare the network with its deformation, both in the format that it is stored in."""
    deformed = apply_plan(model.params, planned)
    before, after = (jax.jit(model.apply)(tree, *held) for tree in (model.params, deformed))
    dtypes = sorted({str(model.params[path].dtype) for path in planned})
    found: dict[str, Any] = {"dtype": ", ".join(dtypes), "error": _relative(before, after)}
    if not is_text:
        return found
    tokens = held[0]
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (before, after))
    losses = [float(jax.jit(model.loss)(tree, tokens)) for tree in (model.params, deformed)]
    return found | {
        "divergence": float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))),
        "largest_logit_change": float(jnp.max(jnp.abs(before - after))),
        "same_top_token": float(jnp.mean(before.argmax(-1) == after.argmax(-1))),
        "perplexity": math.exp(losses[0]),
        "perplexity_deformed": math.exp(min(losses[1], 700.0)),
    }


def _relative(before: Float[Array, "..."], after: Float[Array, "..."]) -> float:
    a, b = (np.asarray(x, np.float64) for x in (before, after))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))
