"""Networks of the Hugging Face libraries as pure functions of a pytree, built from config.json alone.

Parameters are one flat dict under the names of the checkpoint, "model.layers.0.mlp.up_proj.weight", so that
what is deformed, measured or attacked here is what is stored. Kernels of linear maps are (in, out): those
that PyTorch stores as (out, in) are transposed once, when they are loaded (hub.load). Every linear map goes
through `models.linear.linear`, so a leaf may be a Deformed pair or any other structured weight.

Products of plain float32 kernels run in whatever precision JAX is told to: on a GPU that is TF32 unless
jax.default_matmul_precision("highest") holds. Those of pairs always run in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from specdef_jax.errors import ConfigError
from specdef_jax.models import diffusion, gpt_oss, llama, sharding, unet
from specdef_jax.models.decoder import gauge_pairs
from specdef_jax.models.linear import linear
from specdef_jax.models.pairing import deform_pairs
from specdef_jax.models.stacking import stack_layers, unstack_layers

__all__ = [
    "Architecture",
    "architecture",
    "deform_pairs",
    "diffusion",
    "gauge_pairs",
    "gpt_oss",
    "linear",
    "llama",
    "sharding",
    "stack_layers",
    "unet",
    "unstack_layers",
]


@dataclass(frozen=True)
class Architecture:
    """What a loader asks of a model.

    Attributes:
      read_config: config.json -> config, frozen and hashable.
      shapes: shapes(config) -> name -> shape of every parameter, as the model takes it.
      layout: layout(name, rank) -> the permutation of axes that turns a stored tensor into that.
      apply: apply(config, params, ...), the forward pass.
      loss: loss(config) -> loss(params, ...).
      generate: generate(config, params, tokens, steps, ...); None if the model writes no text.
    """

    read_config: Callable[[Mapping[str, Any]], Any]
    shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    layout: Callable[[str, int], tuple[int, ...]]
    apply: Callable[..., Any]
    loss: Callable[[Any], Callable[..., Any]]
    generate: Callable[..., Any] | None = None


_BY_NAME = {
    name: Architecture(
        module.Config.from_json,
        module.shapes,
        module.layout,
        module.apply,
        module.loss,
        getattr(module, "generate", None),
    )
    for name, module in (("llama", llama), ("gpt_oss", gpt_oss), ("UNet2DConditionModel", unet))
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the model that a config.json speaks of, by its model_type or _class_name.

    Raises:
      ConfigError: it names none of ours.

    Example:
      >>> architecture({"model_type": "llama"}).apply.__module__
      'specdef_jax.models.llama'
    """
    name = config.get("model_type", config.get("_class_name"))
    if name not in _BY_NAME:
        raise ConfigError(
            f"config.json is of a {name!r} (model_type or _class_name); known are {', '.join(_BY_NAME)}. "
            "Write an apply of your own, and use hub.read_tree for the weights."
        )
    return _BY_NAME[name]
