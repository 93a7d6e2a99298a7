"""Llama and GPT-OSS of other shapes than the reference checkpoints, beside stock PyTorch in one process.

Runs where torch and transformers are installed beside this package; no test needs them.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax import hub
from specdef_jax.models import decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1000.0,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LLAMAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one key-value head": {"num_key_value_heads": 1},
    "no grouping": {"num_key_value_heads": 6},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 10},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "yarn, mscale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 37.0}},
    "gelu": {"hidden_act": "gelu", "rms_norm_eps": 1e-3},
    "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 3},
}
GPT_OSS = {
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_local_experts": 5,
    "num_experts_per_tok": 3,
    "sliding_window": 5,
    "max_position_embeddings": 128,
    "rope_parameters": YARN | {"truncate": False, "factor": 4.0, "rope_theta": 150000.0},
}
GPT_OSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one expert": {"num_experts_per_tok": 1},
    "every expert": {"num_experts_per_tok": 5, "num_local_experts": 5},
    "tied, no biases": {"tie_word_embeddings": True, "attention_bias": False},
    "full attention": {"layer_types": ["full_attention"] * 3},
    "sliding last": {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    "other activation": {"swiglu_alpha": 1.1, "swiglu_limit": 0.5},
    "truncated yarn": {"rope_parameters": YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": True}},
    "plain rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    "no grouping": {"num_key_value_heads": 6, "sliding_window": 1},
}


def make(family: str, fields: dict[str, Any], to: Path, dtype: Any = None) -> Any:
    """Save a stock model with random weights, each of them large enough to matter."""
    torch.manual_seed(len(fields))
    config = getattr(transformers, f"{family}Config")(**fields)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            width = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            noise = torch.randn_like(parameter) * (width if "embed" not in name else 1.0)
            parameter.copy_(noise + (1.0 if name.endswith("norm.weight") else 0.0))
    model = model.to(dtype or torch.float32)
    model.save_pretrained(to)
    return model


def compare(family: str, fields: dict[str, Any], to: Path) -> float:
    stock = make(family, fields, to)
    ids = np.random.default_rng(0).integers(0, 96, (2, 60))
    with torch.no_grad():
        want = stock(torch.from_numpy(ids)).logits.numpy()
    ours = hub.load(to)
    found = np.asarray(jax.jit(ours.apply)(ours.params, jnp.asarray(ids)))
    assert np.abs(want).max() > 1
    return np.abs(found - want).max()


@pytest.mark.parametrize("name", LLAMAS)
def test_llama(tmp_path: Path, name):
    assert compare("Llama", LLAMA | LLAMAS[name], tmp_path) < 2e-4


@pytest.mark.parametrize("name", GPT_OSSES)
def test_gpt_oss(tmp_path: Path, name):
    assert compare("GptOss", GPT_OSS | GPT_OSSES[name], tmp_path) < 2e-4


@pytest.mark.parametrize(
    ("family", "fields"), [("Llama", LLAMA | {"rope_parameters": LLAMA3}), ("GptOss", GPT_OSS)]
)
def test_greedy_text_is_that_of_stock_generation(tmp_path: Path, family, fields):
    stock = make(family, fields, tmp_path)
    ids = np.random.default_rng(1).integers(0, 96, (2, 20))
    with torch.no_grad():
        want = stock.generate(
            torch.from_numpy(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        ).numpy()
    ours = hub.load(tmp_path)
    np.testing.assert_array_equal(ours.generate(ours.params, jnp.asarray(ids), 12), want)


@pytest.mark.parametrize(("family", "fields"), [("Llama", LLAMA), ("GptOss", GPT_OSS)])
def test_loss_and_gradients(tmp_path: Path, family, fields):
    stock = make(family, fields, tmp_path)
    ids = np.random.default_rng(2).integers(0, 96, (2, 20))
    text = torch.from_numpy(ids)
    told = stock(text, labels=text).loss
    told.backward()
    ours = hub.load(tmp_path)
    value, slopes = jax.jit(jax.value_and_grad(ours.loss))(ours.params, jnp.asarray(ids))
    assert float(value) == pytest.approx(float(told), rel=1e-5)
    for name, parameter in stock.named_parameters():
        want = parameter.grad.numpy()
        want, found = want.transpose(decoder.layout(name, want.ndim)), np.asarray(slopes[name])
        np.testing.assert_allclose(
            found, want, rtol=0, atol=2e-4 * max(np.abs(want).max(), 1e-3), err_msg=name
        )


@pytest.mark.parametrize(("family", "fields"), [("Llama", LLAMA), ("GptOss", GPT_OSS)])
def test_bfloat16_is_no_farther_from_float32_than_stock_bfloat16(tmp_path: Path, family, fields):
    exact = make(family, fields, tmp_path)
    ids = np.random.default_rng(3).integers(0, 96, (2, 40))
    with torch.no_grad():
        want = exact(torch.from_numpy(ids)).logits.numpy()
        theirs = exact.to(torch.bfloat16)(torch.from_numpy(ids)).logits.float().numpy()
    ours = hub.load(tmp_path, jnp.bfloat16)
    found = np.asarray(jax.jit(ours.apply)(ours.params, jnp.asarray(ids)), np.float32)
    assert np.median(np.abs(found - want)) < 1.2 * np.median(np.abs(theirs - want))


def test_configs_written_by_the_stock_library_are_read(tmp_path: Path):
    make("Llama", LLAMA, tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert {"rope_parameters", "rms_norm_eps"} <= found.keys()
