"""Configs: what they must say, what they may, and what is refused by name."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax import models
from specdef_jax.errors import ConfigError
from specdef_jax.models import gpt_oss, llama
from specdef_jax.models.fields import Fields
from specdef_jax.models.rope import Rope, frequencies, read_rope, tables
from tests.models.helpers_models import MODULES, SMALL, config_of

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}


def test_the_released_models_have_their_numbers_of_parameters():
    config = llama.Config.from_json(LLAMA_8B)
    found = llama.shapes(config)
    assert (len(found), sum(map(math.prod, found.values()))) == (291, 8_030_261_248)
    assert config.head_dim == 128
    config = gpt_oss.Config.from_json(GPT_OSS_20B)
    found = gpt_oss.shapes(config)
    # two of a layer's tensors are stored as blocks and scales
    assert len(found) + 2 * 24 == 459
    assert found["model.layers.3.mlp.experts.gate_up_proj"] == (32, 2880, 5760)
    assert config.windows == (128, None) * 12
    packed = sum(math.prod(s) for n, s in found.items() if n.endswith(("gate_up_proj", "down_proj")))
    plain = sum(map(math.prod, found.values())) - packed
    assert packed // 2 + packed // 32 + 2 * plain == 13_761_264_768


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_sizes_are_never_filled_in(name, field):
    found = {k: v for k, v in SMALL[name].items() if k != field}
    with pytest.raises(ConfigError, match=f"'{field}' is absent"):
        MODULES[name].Config.from_json(found)


@pytest.mark.parametrize(
    "field",
    ["head_dim", "num_key_value_heads", "num_local_experts", "num_experts_per_tok", "sliding_window",
     "rms_norm_eps", "rope_theta", "rope_scaling"],
)  # fmt: skip
def test_gpt_oss_takes_nothing_from_another_size(field):
    found = {k: v for k, v in SMALL["gpt_oss"].items() if k != field}
    with pytest.raises(ConfigError, match="is absent"):
        gpt_oss.Config.from_json(found)


def test_what_may_be_absent():
    config = llama.Config.from_json({k: v for k, v in SMALL["llama"].items() if k != "num_key_value_heads"})
    assert (config.num_key_value_heads, config.head_dim, config.rope) == (4, 4, Rope("default", 10_000.0))
    config = gpt_oss.Config.from_json(SMALL["gpt_oss"])
    assert config.layer_types == ("sliding_attention", "full_attention")
    assert (config.swiglu_alpha, config.swiglu_limit, config.attention_bias) == (1.702, 7.0, True)
    no_window = SMALL["gpt_oss"] | {"layer_types": ["full_attention"] * 2, "sliding_window": None}
    assert gpt_oss.Config.from_json(no_window).windows == (None, None)


BAD = [
    ("llama", {"sliding_window": 128}, "'sliding_window' is 128: it is not known here"),
    ("llama", {"clip_qkv": 8.0}, "'clip_qkv' is 8.0"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "'quantization_config'"),
    ("llama", {"num_local_experts": 8}, "'num_local_experts' is 8"),
    ("llama", {"model_type": "mistral"}, "'model_type' is 'mistral'"),
    ("llama", {"hidden_act": "xielu"}, "'hidden_act' is 'xielu': it must be one of 'gelu'"),
    ("llama", {"hidden_size": 0}, "'hidden_size' is 0: it must be a positive integer"),
    ("llama", {"hidden_size": 16.0}, "'hidden_size' is 16.0"),
    ("llama", {"hidden_size": True}, "'hidden_size' is True"),
    ("llama", {"hidden_size": 18}, "'head_dim' is absent: it is needed: 4 heads do not divide 18"),
    ("llama", {"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads 3"),
    ("llama", {"head_dim": 5}, "head_dim 5 must be even"),
    ("llama", {"rms_norm_eps": 0.0}, "'rms_norm_eps' is 0.0: it must be a positive number"),
    ("llama", {"rms_norm_eps": math.nan}, "'rms_norm_eps' is nan"),
    ("llama", {"attention_bias": 1}, "'attention_bias' is 1: it must be true or false"),
    ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
    ("llama", {"rope_theta": 1.0}, "'rope_theta' is 1.0: it must be greater than 1"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'rope_type' is 'dynamic'"),
    ("llama", {"rope_scaling": {"type": "longrope"}}, "'rope_type' is 'longrope'"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "'factor' is absent"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'low_freq_factor' is absent"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "'mrope_section'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0},
               "rope_parameters": {"rope_type": "linear", "factor": 3.0}}, "contradicts rope_parameters"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                                "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
     "must exceed low_freq_factor"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "'original_max_position_embeddings'"),
    ("gpt_oss", {"num_experts_per_tok": 5}, "must be at most the 4 experts"),
    ("gpt_oss", {"layer_types": ["full_attention"]}, "'layer_types'"),
    ("gpt_oss", {"layer_types": ["full_attention", "chunked_attention"]}, "'layer_types'"),
    ("gpt_oss", {"hidden_act": "relu"}, "'hidden_act' is 'relu'"),
    ("gpt_oss", {"use_qk_norm": True}, "'use_qk_norm' is True"),
    ("gpt_oss", {"swiglu_limit": -7.0}, "'swiglu_limit' is -7.0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "told"), BAD)
def test_what_is_refused(name, changes, told):
    with pytest.raises(ConfigError, match=r"config of|^rope: |^head_dim|^num_") as caught:
        MODULES[name].Config.from_json(SMALL[name] | changes)
    assert told in str(caught.value)


def test_fields_without_a_meaning_here_or_that_are_off_are_passed_over():
    harmless = {"torch_dtype": "bfloat16", "use_cache": True, "anything": None, "use_qk_norm": False, "x": []}
    assert llama.Config.from_json(SMALL["llama"] | harmless) == llama.Config.from_json(SMALL["llama"])


def test_configs_are_hashable_and_tell_models_apart():
    configs = [m.Config.from_json(SMALL[n]) for n, m in MODULES.items()]
    assert len({*configs, *configs}) == 2
    assert models.architecture(config_of("gpt_oss_tiny")).shapes is gpt_oss.shapes
    with pytest.raises(ConfigError, match="is of a 'bert'"):
        models.architecture({"model_type": "bert"})


def test_llama3_frequencies_are_those_of_its_definition():
    rope = read_rope(Fields(LLAMA_8B, "Llama"))
    found = frequencies(rope, 128)
    for i, f in enumerate(500000.0 ** -(np.arange(0, 128, 2) / 128)):
        length = 2 * math.pi / f
        if length > 8192:
            want = f / 8
        elif length < 8192 / 4:
            want = f
        else:
            s = (8192 / length - 1) / (4 - 1)
            want = (1 - s) * f / 8 + s * f
        assert found[i] == pytest.approx(want, rel=2e-6)


def test_yarn_frequencies_and_scale_are_those_of_its_definition():
    rope = read_rope(Fields(GPT_OSS_20B, "GPT-OSS"))
    assert rope.scale == pytest.approx(1.346574, abs=1e-6)
    assert not rope.truncate
    found = frequencies(rope, 64)
    at = [64 * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(150000)) for turns in (32, 1)]
    for i, f in enumerate(150000.0 ** -(np.arange(0, 64, 2) / 64)):
        slow = min(max((i - at[0]) / (at[1] - at[0]), 0), 1)
        assert found[i] == pytest.approx(slow * f / 32 + (1 - slow) * f, rel=3e-6)
    cos, sin = tables(rope, 64, jnp.arange(5), jnp.float32)
    np.testing.assert_allclose(cos**2 + sin**2, rope.scale**2, rtol=1e-5)


def test_truncation_changes_yarn():
    rope = read_rope(Fields(GPT_OSS_20B, "GPT-OSS"))
    other = Rope(**{**vars(rope), "truncate": True})
    assert np.abs(frequencies(rope, 64) / frequencies(other, 64) - 1).max() > 1e-3


def test_linear_scaling_divides_and_old_names_are_read():
    rope = read_rope(
        Fields({"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, "Llama")
    )
    np.testing.assert_allclose(frequencies(rope, 8) * 2, frequencies(Rope("default", 100.0), 8), rtol=1e-7)
