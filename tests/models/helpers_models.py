"""Small models: the reference checkpoints, and configs that are cheap to run in float64."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from specdef_jax import hub
from specdef_jax.models import gpt_oss, llama
from tests.hub.helpers_checkpoints import DATA

MODULES = {"llama": llama, "gpt_oss": gpt_oss}
SMALL: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
}


def small(name: str, dtype: Any = jnp.float64, **changes: Any) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Return module, config and parameters of some size, so that every one of them matters."""
    module = MODULES[name]
    config = module.Config.from_json(SMALL[name] | changes)
    params = {}
    for i, (leaf, shape) in enumerate(sorted(module.shapes(config).items())):
        rng = np.random.default_rng(i)
        scale = shape[-2] ** -0.5 if len(shape) > 1 and not leaf.endswith("bias") else 0.3
        params[leaf] = jnp.asarray(scale * rng.normal(size=shape) + leaf.endswith("norm.weight"), dtype)
    return module, config, params


def logits_of(module: Any, config: Any, params: Any, ids: jax.Array) -> jax.Array:
    return jax.jit(module.apply, static_argnums=0)(config, params, ids)


def tokens(batch: int = 2, time: int = 9, vocab: int = 32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(7).integers(0, vocab, (batch, time)), jnp.int32)


def fixture(name: str, dtype: Any = None) -> tuple[hub.Model, jax.Array, np.ndarray]:
    """Return a reference checkpoint, its input and the logits PyTorch found."""
    told = safetensors.numpy.load_file(DATA / name / "reference.safetensors")
    return hub.load(DATA / name, dtype), jnp.asarray(told["input_ids"]), told["logits"]


def config_of(name: str, file: str = "config.json") -> dict[str, Any]:
    return json.loads((DATA / name / file).read_text())
