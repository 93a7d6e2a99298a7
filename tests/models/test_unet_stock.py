"""Other configurations than the fixture's against the PyTorch implementation, where it is installed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax.errors import ConfigError
from specdef_jax.models import unet, unet_params
from specdef_jax.models.unet_config import UNetConfig
from tests.models.helpers_unet import CONFIGS, SMALL, THREE, inputs, perturbed

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def stock(told: dict[str, Any], params: dict[str, Any]) -> Any:
    """Return their model of a config with our weights, float64; names and shapes must be all theirs."""
    model = diffusers.UNet2DConditionModel(**told).double().eval()
    tensors = unet_params.to_checkpoint(params)
    model.load_state_dict({name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()})
    return model


def both(told: dict[str, Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    config = UNetConfig.from_json(told)
    params = perturbed(config)
    sample, timestep, states = inputs(config, **options)
    with torch.no_grad():
        model = stock(told, params)
        expected = model(*(torch.from_numpy(np.array(x)) for x in (sample, timestep, states))).sample.numpy()
    assert np.abs(expected).max() > 0.1
    return np.asarray(
        jax.jit(unet.apply, static_argnums=0)(config, params, sample, timestep, states)
    ), expected


@pytest.mark.parametrize("name", CONFIGS)
def test_other_configurations(name):
    found, expected = both(CONFIGS[name], size=(8, 12))
    # The embedding of the timestep is in float32 on both sides.
    assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("told", [SMALL, THREE], ids=["two levels", "three levels"])
@pytest.mark.parametrize("size", [(7, 9), (10, 6), (5, 8)])
def test_sides_that_cannot_be_halved(told, size):
    found, expected = both(told, size=size)
    assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("padding", [0, 1])
def test_odd_sides_with_either_padding(padding):
    found, expected = both(SMALL | {"downsample_padding": padding}, size=(9, 7))
    assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()


def test_the_config_that_they_write_is_read():
    told = CONFIGS["transformers of other depths"]
    written = dict(diffusers.UNet2DConditionModel(**told).config)
    assert UNetConfig.from_json(written) == UNetConfig.from_json(told)
    absent = {"block_out_channels": [32, 32, 32, 64]}  # small, and everything else by default
    small = dict(diffusers.UNet2DConditionModel(**absent).config)
    assert UNetConfig.from_json(absent) == UNetConfig.from_json(small)


def test_bfloat16():
    config = UNetConfig.from_json(THREE)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), perturbed(config))
    sample, timestep, states = inputs(config, dtype=jnp.bfloat16)
    wide = [np.array(x, np.float32) for x in (sample, timestep, states)]
    with torch.no_grad():
        model = stock(THREE, jax.tree.map(lambda x: x.astype(jnp.float64), params)).float()
        exact = model(*map(torch.from_numpy, wide)).sample.numpy()
        narrow = model.bfloat16()(
            torch.from_numpy(wide[0]).bfloat16(),
            torch.from_numpy(wide[1]),
            torch.from_numpy(wide[2]).bfloat16(),
        )
    ours = np.asarray(unet.apply(config, params, sample, timestep, states), np.float32)
    theirs = narrow.sample.float().numpy()
    scale = np.abs(exact).max()
    assert np.abs(ours - exact).max() < max(2 * np.abs(theirs - exact).max(), 0.01 * scale)


@pytest.mark.parametrize(
    "change",
    [
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 9,
        },
        {"num_class_embeds": 3},
        {"resnet_time_scale_shift": "scale_shift"},
        {"dual_cross_attention": True},
        {"time_embedding_type": "fourier"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_refused_would_have_had_other_tensors_or_outputs(change):
    torch.manual_seed(0)
    plain = diffusers.UNet2DConditionModel(**SMALL).state_dict()
    changed = diffusers.UNet2DConditionModel(**(SMALL | change)).state_dict()
    assert {n: t.shape for n, t in plain.items()} != {n: t.shape for n, t in changed.items()}
    with pytest.raises(ConfigError, match=next(iter(change))):
        UNetConfig.from_json(SMALL | change)
