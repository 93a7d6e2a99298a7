"""The UNet computes what the PyTorch implementation does, and refuses what it does not know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax.errors import ConfigError, ProblemError, StructureError
from specdef_jax.models import unet, unet_params
from specdef_jax.models.unet_config import UNetConfig
from specdef_jax.models.unet_layers import convolve
from tests.models.helpers_unet import CONFIG, CONFIGS, SMALL, fixture, inputs, perturbed, reference

apply = jax.jit(unet.apply, static_argnums=0, static_argnames="remat")


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-5), ("bfloat16", 0.05)])
def test_the_fixture_gives_the_reference(dtype, bound):
    told = reference()
    args = told["sample"], told["timestep"], told["encoder_hidden_states"]
    found = apply(CONFIG, fixture(dtype), *args)
    assert found.dtype == dtype
    error = np.abs(np.asarray(found, np.float64) - told["out"]).max() / np.abs(told["out"]).max()
    assert 0 < error < bound


def test_the_timestep_may_be_one_for_all():
    config = UNetConfig.from_json(SMALL)
    params = perturbed(config)
    sample, _, states = inputs(config)
    one = apply(config, params, sample, 21, states)
    np.testing.assert_array_equal(apply(config, params, sample, jnp.array([21, 21]), states), one)
    assert float(jnp.abs(apply(config, params, sample, 22, states) - one).max()) > 1e-4


CHANGES = [
    {"act_fn": "relu"},
    {"center_input_sample": True},
    {"downsample_padding": 0},
    {"flip_sin_to_cos": False},
    {"freq_shift": 1},
    {"mid_block_scale_factor": 2.0},
    {"norm_eps": 1e-2},
    {"norm_num_groups": 2},
    {"attention_head_dim": 4},
]


def test_every_field_makes_a_difference():
    base = UNetConfig.from_json(SMALL)
    params = perturbed(base, jnp.float32)
    args = inputs(base, batch=1, dtype=jnp.float32)
    outputs = [apply(UNetConfig.from_json(SMALL | change), params, *args) for change in [{}, *CHANGES]]
    for i, first in enumerate(outputs):
        for second in outputs[:i]:
            assert float(jnp.abs(first - second).max()) > 1e-4


def test_every_layout_has_its_own_tensors():
    shapes = [tuple(unet_params.shapes(UNetConfig.from_json(told)).items()) for told in CONFIGS.values()]
    same = [name for name, found in zip(CONFIGS, shapes, strict=True) if shapes.count(found) > 1]
    assert set(same) == {"small", "gelu", "other activation, epsilon, scale", "centred, sines first"}


def test_the_layout_of_stable_diffusion():
    published = {  # the config.json of v1.5 has no more than this
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    config = UNetConfig.from_json(published)
    shapes = unet_params.shapes(config)
    assert len(shapes) == 686
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 859_520_964
    assert shapes["up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v.weight"] == (768, 1280)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    sample, states = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, 4, 64, 64), (1, 77, 768)))
    out = jax.eval_shape(unet.bound(config), params, sample, jax.ShapeDtypeStruct((), jnp.int32), states)
    assert (out.shape, out.dtype) == ((1, 4, 64, 64), jnp.bfloat16)
    assert len(unet_params.gauge_pairs(config)) == 32


def test_without_attention_no_states_are_read():
    config = UNetConfig.from_json(CONFIGS["no attention"])
    params = perturbed(config)
    sample, timestep, states = inputs(config)
    plain = apply(config, params, sample, timestep)
    np.testing.assert_array_equal(plain, apply(config, params, sample, timestep, states))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("window", [(1, 1), (3, 3), (5, 2)])
def test_a_convolution_in_float64_is_that_of_xla(stride, window):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, 9, 8, 3)), jax.random.normal(keys[1], (*window, 3, 4))
    bias, padding = jax.random.normal(keys[2], (4,)), ((1, 0), (2, 1))
    padding = ((0, 0), (0, 0)) if window == (1, 1) else padding
    expected = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    for dtype, bound in ((jnp.float64, 1e-13), (jnp.float32, 1e-5)):
        found = convolve(*(a.astype(dtype) for a in (x, kernel, bias)), stride=stride, padding=padding)
        np.testing.assert_allclose(found, expected + bias, atol=bound * 10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "UNet2DModel"}, "UNet2DModel"),
        (
            {"addition_embed_type": "text_time"},
            "addition_embed_type = 'text_time' makes another",
        ),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"encoder_hid_dim": 4}, "encoder_hid_dim"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"time_cond_proj_dim": 4}, "time_cond_proj_dim"),
        ({"use_rope": True}, "not known here, use_rope = True"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "'AttnDownBlock2D'; here are"),
        ({"down_block_types": ["UpBlock2D", "DownBlock2D"]}, "'UpBlock2D'; here are"),
        ({"up_block_types": ["UpBlock2D"]}, "one for each of 2"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"act_fn": "tanh"}, "act_fn = 'tanh'"),
        ({"norm_num_groups": None}, "norm_num_groups = None"),
        ({"norm_num_groups": 3}, "cannot be split into norm_num_groups = 3"),
        ({"attention_head_dim": [1, 2, 3]}, "attention_head_dim"),
        ({"attention_head_dim": 0}, "attention_head_dim = 0"),
        ({"attention_head_dim": 17}, "17 attention heads share 8 channels"),
        ({"cross_attention_dim": None}, "cross_attention_dim = None"),
        ({"layers_per_block": [1]}, "layers_per_block"),
        ({"transformer_layers_per_block": [[1], [2]]}, "reverse_transformer_layers_per_block"),
        ({"transformer_layers_per_block": 0}, "0 transformer layers in down_blocks.0"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"downsample_padding": 2}, "downsample_padding = 2"),
    ],
)
def test_a_config_that_is_not_known_is_refused(change, words):
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        UNetConfig.from_json(SMALL | change)


def test_harmless_fields_are_not_refused():
    more = {"sample_size": 64, "dropout": 0.1, "model_type": "x", "_name_or_path": "y", "something_new": None}
    assert UNetConfig.from_json(SMALL | more) == UNetConfig.from_json(SMALL)


def test_a_number_of_heads_goes_before_the_misnamed_one():
    assert UNetConfig.from_json(SMALL | {"num_attention_heads": 4}).down[0].heads == 4


def test_a_checkpoint_that_does_not_fit_is_refused():
    config = UNetConfig.from_json(SMALL)
    tensors = unet_params.to_checkpoint(perturbed(config))
    again = unet_params.from_checkpoint(config, tensors)
    assert all(np.array_equal(again[name], leaf) for name, leaf in perturbed(config).items())
    name = "down_blocks.0.attentions.0.proj_in.weight"
    with pytest.raises(StructureError, match=f"lacks '{name}'"):
        unet_params.from_checkpoint(config, {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(StructureError, match="does not ask for"):
        unet_params.from_checkpoint(config, tensors | {"add_embedding.weight": np.ones(2)})
    with pytest.raises(StructureError, match="has shape"):
        unet_params.from_checkpoint(config, tensors | {name: np.ones((8, 8, 3, 3))})


def test_inputs_that_do_not_fit_are_refused():
    config = UNetConfig.from_json(SMALL)
    params = perturbed(config, jnp.float32)
    sample, timestep, states = inputs(config, dtype=jnp.float32)
    for bad, words in (
        ((jnp.moveaxis(sample, 1, -1), timestep, states), "4 channels"),
        ((sample, jnp.arange(3), states), "timestep has shape"),
        ((sample, timestep, None), "absent"),
        ((sample, timestep, states[..., :3]), "of shape"),
    ):
        with pytest.raises(ProblemError, match=words):
            unet.apply(config, params, *bad)
    mixed = UNetConfig.from_json(SMALL | {"cross_attention_dim": [6, 5]})
    with pytest.raises(ProblemError, match="no states fit them all"):
        unet.apply(mixed, params, sample, timestep, states[..., :5])
