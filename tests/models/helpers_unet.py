"""The small UNet of tests/data and other configurations, as the tests of the UNet use them."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from specdef_jax.models import unet_params
from specdef_jax.models.unet_config import UNetConfig

DATA = Path(__file__).parents[1] / "data" / "sd_unet_tiny"
TOLD: dict[str, Any] = json.loads((DATA / "config.json").read_text())
CONFIG = UNetConfig.from_json(TOLD)

SMALL: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
}
THREE: dict[str, Any] = SMALL | {
    "block_out_channels": [8, 16, 24],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
# One for each way in which configs differ; all of them differ in their outputs or shapes.
CONFIGS: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "three levels, a number of heads each": THREE | {"attention_head_dim": [1, 4, 3]},
    "linear projections": SMALL | {"use_linear_projection": True, "upcast_attention": True},
    "transformers of two": SMALL | {"transformer_layers_per_block": 2, "layers_per_block": 2},
    "transformers of other depths": THREE
    | {"transformer_layers_per_block": [1, 2, 3], "use_linear_projection": True},
    "other depths on the way up": SMALL
    | {
        "transformer_layers_per_block": [[2], [1]],
        "reverse_transformer_layers_per_block": [[1, 1], [3, 1]],
    },
    "other layers": THREE | {"layers_per_block": [1, 2, 3]},
    "no attention": SMALL
    | {
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
        "mid_block_type": "UNetMidBlock2D",
    },
    "no middle": SMALL | {"mid_block_type": None},
    "attention on the way down only": SMALL | {"up_block_types": ["UpBlock2D"] * 2},
    "one level": SMALL
    | {
        "block_out_channels": [8],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
    },
    "only cross-attention": SMALL | {"only_cross_attention": [True, False]},
    "heads that do not divide": SMALL | {"attention_head_dim": 3},
    "heads that do not divide, linear": SMALL | {"attention_head_dim": 3, "use_linear_projection": True},
    "other activation, epsilon, scale": SMALL
    | {"act_fn": "mish", "norm_eps": 1e-2, "mid_block_scale_factor": 1.7},
    "odd width": SMALL | {"block_out_channels": [9, 18], "norm_num_groups": 3, "attention_head_dim": 3},
    "gelu": SMALL | {"act_fn": "gelu"},
    "centred, sines first": SMALL
    | {"center_input_sample": True, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0},
    "other windows and channels": SMALL
    | {
        "conv_in_kernel": 5,
        "conv_out_kernel": 1,
        "in_channels": 3,
        "out_channels": 5,
        "time_embedding_dim": 20,
    },
}


def reference() -> dict[str, np.ndarray]:
    """Return inputs and output of the PyTorch implementation."""
    return safetensors.numpy.load_file(DATA / "reference.safetensors")


def fixture(dtype: Any = None) -> dict[str, Any]:
    """Return the parameters of the fixture."""
    tensors = safetensors.numpy.load_file(DATA / "diffusion_pytorch_model.safetensors")
    return unet_params.from_checkpoint(CONFIG, tensors, dtype)


def inputs(config: UNetConfig, size: tuple[int, int] = (8, 6), batch: int = 2, dtype: Any = "float64") -> Any:
    """Return a sample, a timestep for each of the batch, and states of an encoder."""
    draw = np.random.default_rng(5).standard_normal
    context = max(block.context for block in config.blocks)
    sample, states = draw((batch, config.in_channels, *size)), draw((batch, 5, context))
    return jnp.asarray(sample, dtype), jnp.arange(batch) * 3 + 1, jnp.asarray(states, dtype)


def perturbed(config: UNetConfig, dtype: Any = "float64") -> dict[str, Any]:
    """Return random parameters in which no bias is zero and no scale one."""
    draw = np.random.default_rng(2).standard_normal
    found = {}
    for name, shape in unet_params.shapes(config).items():
        if len(shape) > 1:
            values = draw(shape) / np.sqrt(np.prod(shape[:-1]))
        else:
            values = name.endswith("weight") + 0.1 * draw(shape)
        found[name] = jnp.asarray(values, dtype)
    return found
