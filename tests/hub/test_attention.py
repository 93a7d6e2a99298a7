"""Which tensors are value and output projections, their heads, and every reason to refuse them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdef_jax import hub
from specdef_jax.errors import StructureError
from specdef_jax.hub.safetensors_header import TensorInfo
from specdef_jax.hub.shards import Shard

BLOCK = "model.layers.0.self_attn."
UNET = "transformer_blocks.0.attn1."
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def shards(shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> hub.Shards:
    """Return a checkpoint of which there is only the header."""
    dtype = np.dtype(np.float32)
    tensors = {name: TensorInfo(dtype, shape, 0, 0) for name, shape in shapes.items()}
    return hub.Shards(Path("here"), config, (Shard("model.safetensors", tensors, {}),), None, {}, (), ())


def llama(prefix: str = BLOCK, **more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Four heads of 8 features, two of them for keys and values, 24 features in and out."""
    shapes = {"q_proj": (32, 24), "k_proj": (16, 24), "v_proj": (16, 24), "o_proj": (24, 32)}
    found = {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}
    found |= {f"{prefix}{name.replace('__', '.')}": shape for name, shape in more.items()}
    return found | {"model.layers.0.mlp.up_proj.weight": (48, 24), "lm_head.weight": (100, 24)}


def unet(prefix: str) -> dict[str, tuple[int, ...]]:
    names = ("to_q", "to_k", "to_v", "to_out.0")
    return {f"{prefix}{UNET}{name}.weight": (48, 48) for name in names}


def test_grouped_queries():
    pair = hub.pair_at(shards(llama(), HEADS), f"{BLOCK}v_proj.weight")
    assert pair == hub.AttentionPair(
        f"{BLOCK}v_proj.weight", f"{BLOCK}o_proj.weight", None, groups=2, heads=4
    )


def test_biases_sinks_and_norms_of_queries_and_keys_are_no_obstacle():
    known = {
        "q_proj__bias": (32,),
        "k_proj__bias": (16,),
        "v_proj__bias": (16,),
        "o_proj__bias": (24,),
        "sinks": (4,),
        "q_norm__weight": (8,),
        "k_norm__weight": (8,),
        "rotary_emb__inv_freq": (4,),
    }
    pair = hub.pair_at(shards(llama(**known), HEADS), f"{BLOCK}v_proj.weight")
    assert pair.bias == f"{BLOCK}v_proj.bias"


def test_without_groups_each_head_is_its_own():
    shapes = llama() | {f"{BLOCK}{name}_proj.weight": (32, 24) for name in "kv"}
    pair = hub.pair_at(shards(shapes, {"num_attention_heads": 4}), f"{BLOCK}v_proj.weight")
    assert (pair.groups, pair.heads) == (4, 4)


@pytest.mark.parametrize(
    ("prefix", "heads", "expected"),
    [
        ("down_blocks.0.", 8, 8),
        ("down_blocks.0.", [2, 4, 8], 2),
        ("down_blocks.2.", [2, 4, 8], 8),
        ("mid_block.", [2, 4, 8], 8),
        ("up_blocks.0.", [2, 4, 8], 8),
        ("up_blocks.2.", [2, 4, 8], 2),
    ],
)
def test_a_unet_says_heads_and_means_their_number(prefix, heads, expected):
    config = {"_class_name": "UNet2DConditionModel", "attention_head_dim": heads, "num_attention_heads": None}
    pair = hub.pair_at(shards(unet(prefix), config), f"{prefix}{UNET}to_v.weight")
    assert (pair.groups, pair.heads, pair.second) == (expected, expected, f"{prefix}{UNET}to_out.0.weight")


def test_a_number_of_heads_goes_before_the_misnamed_one():
    config = {"_class_name": "UNet2DConditionModel", "attention_head_dim": 8, "num_attention_heads": 6}
    assert hub.pair_at(shards(unet("mid_block."), config), f"mid_block.{UNET}to_v.weight").heads == 6
    other = {"_class_name": "Transformer2DModel", "attention_head_dim": 8, "num_attention_heads": 6}
    assert hub.pair_at(shards(unet(""), other), f"{UNET}to_v.weight").heads == 6


def test_a_model_of_several_parts_has_a_config_for_each():
    config = {
        "text_config": HEADS,
        "vision_config": {"num_attention_heads": 2, "num_key_value_heads": 1},
        "num_attention_heads": 3,
    }
    for prefix, heads in (("model.language_model.self_attn.", 4), ("model.vision_tower.self_attn.", 2)):
        assert hub.pair_at(shards(llama(prefix), config), f"{prefix}v_proj.weight").heads == heads


def test_pairs_are_found_by_whole_names_of_both_projections():
    shapes = {
        **llama(),
        **unet("mid_block."),
        "v_proj.weight": (8, 8),
        "o_proj.weight": (8, 8),
        "b.kv_proj.weight": (8, 8),  # ends like one
        "b.ko_proj.weight": (8, 8),
        "c.v_proj.weight": (8, 8),  # without its output
        "d.v_proj.lora_A.weight": (8, 8),
        "d.o_proj.weight": (8, 8),
    }
    assert hub.find_pairs(shards(shapes, {})) == {
        f"{BLOCK}v_proj.weight": (f"{BLOCK}o_proj.weight", BLOCK),
        f"mid_block.{UNET}to_v.weight": (f"mid_block.{UNET}to_out.0.weight", f"mid_block.{UNET}"),
        "v_proj.weight": ("o_proj.weight", ""),
    }


def refused(shapes: dict[str, tuple[int, ...]], config: dict[str, Any], match: str) -> None:
    first = next(name for name in shapes if name.endswith(("v_proj.weight", "to_v.weight")))
    with pytest.raises(StructureError, match=match):
        hub.pair_at(shards(shapes, config), first)


@pytest.mark.parametrize(
    "name",
    [
        "attn_sub_norm.weight",
        "v_norm.weight",
        "gate_proj.weight",
        "lambda_q1",
        "v_proj.weight_scale_inv",
        "v_proj.lora_A.weight",
        "o_proj.weight_scale",
        "sinks.weight",
    ],
)
def test_a_parameter_that_is_not_known_in_a_block_is_refused(name):
    shapes = llama() | {f"{BLOCK}{name}": (8,)}
    refused(shapes, HEADS, rf"'{BLOCK}{name}' stands in the attention.*placement insert")
    other = f"model.layers.1.self_attn.{name}"
    assert hub.pair_at(shards(llama() | {other: (8,)}, HEADS), f"{BLOCK}v_proj.weight")


@pytest.mark.parametrize(
    "name", ["group_norm.weight", "add_v_proj.weight", "to_add_out.weight", "to_out.2.weight"]
)
def test_a_parameter_that_is_not_known_in_a_diffusers_block_is_refused(name):
    shapes = unet("mid_block.") | {f"mid_block.{UNET}{name}": (8,)}
    refused(shapes, {"num_attention_heads": 4}, rf"{name}' stands in the attention")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clip_qkv", 8.0),
        ("attn_output_gate", True),
        ("num_kv_shared_layers", 2),
        ("attention_k_eq_v", True),
    ],
)
def test_a_setting_that_puts_something_between_is_refused(key, value):
    refused(llama(), HEADS | {key: value}, rf"the config has {key} = {value}.*not adjacent.*placement insert")
    refused(llama(), {"text_config": HEADS | {key: value}}, key)
    for off in (None, False, 0):
        assert hub.pair_at(shards(llama(), HEADS | {key: off}), f"{BLOCK}v_proj.weight")


@pytest.mark.parametrize(
    "model_type",
    ["gemma3n_text", "gemma4_text", "gemma4_unified_text", "diffusion_gemma_text", "embedding_gemma2_text"],
)
def test_values_that_are_normalized_without_a_parameter_are_refused(model_type):
    """Their v_norm has no scale, so that no tensor tells of it."""
    config = HEADS | {"model_type": model_type, "num_kv_shared_layers": 0, "attention_k_eq_v": False}
    refused(llama(), config, "placement insert")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_attention_heads": None},
        {"num_attention_heads": 0},
        {"num_attention_heads": "4"},
        {"num_attention_heads": 4.0},
        {"num_attention_heads": True},
        {"num_attention_heads": 4, "num_key_value_heads": [2]},
        {"num_attention_heads": 4, "num_key_value_heads": -2},
        {"attention_head_dim": 4},  # that of a head, in what is no UNet
        {"_class_name": None},
    ],
)
def test_a_config_without_numbers_of_heads_is_refused(config):
    refused(llama(), config, r"gives no number of heads.*placement insert")


@pytest.mark.parametrize("heads", [[], [4]])
@pytest.mark.parametrize("prefix", ["down_blocks.1.", "attentions."])
def test_a_list_of_heads_that_leaves_out_the_block_is_refused(prefix, heads):
    refused(unet(prefix), {"_class_name": "UNet", "attention_head_dim": heads}, "gives no number of heads")


@pytest.mark.parametrize(
    ("heads", "groups"),
    [(4, 3), (4, 4), (5, 2), (2, 2), (8, 2), (64, 32)],
)
def test_heads_that_do_not_fit_the_shapes_are_refused(heads, groups):
    config = {"num_attention_heads": heads, "num_key_value_heads": groups}
    refused(llama(), config, rf"do not fit {heads} heads in {groups} groups; check the config")


def test_heads_that_are_no_multiple_of_the_groups_are_refused():
    shapes = llama() | {f"{BLOCK}{name}_proj.weight": (24, 24) for name in "kv"}
    refused(shapes, {"num_attention_heads": 4, "num_key_value_heads": 3}, "do not fit 4 heads in 3 groups")


def test_queries_that_are_wider_than_their_heads_are_refused():
    """A gate on the output computed beside the queries makes them twice as wide."""
    refused(llama() | {f"{BLOCK}q_proj.weight": (64, 24)}, HEADS, r"gives 64 features.*something else")


def test_what_is_no_matrix_is_refused():
    refused(llama() | {f"{BLOCK}v_proj.weight": (16, 24, 1)}, HEADS, "are no matrices")
    refused(llama() | {f"{BLOCK}o_proj.weight": (32,)}, HEADS, "are no matrices")


def test_another_name_is_no_value_projection():
    for name in (f"{BLOCK}o_proj.weight", f"{BLOCK}q_proj.weight", "lm_head.weight", "nothing"):
        with pytest.raises(StructureError, match=f"no value projection '{name}'"):
            hub.pair_at(shards(llama(), HEADS), name)
