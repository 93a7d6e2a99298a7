"""Stock PyTorch loads a gauge checkpoint and computes the same, to the bit where it can be (THEORY.md 1.3).

Runs where torch, transformers and diffusers are installed beside this package; no test needs them.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import specdef_jax as sd
from specdef_jax import hub
from specdef_jax.errors import StructureError
from tests.hub.helpers_checkpoints import DATA, checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

MODELS = ["llama_tiny", "gpt_oss_tiny"]
EXACT = sd.SpecDef(alpha=2.0**12, basis="axis", budget=hub.BUDGET)
SYMMETRIC = sd.SpecDef(alpha=64.0, budget=hub.BUDGET)


def stored_as(name: str, to: Path, dtype: str = "float32") -> Path:
    checkpoint(name, to)
    if dtype == "bfloat16":
        for shard in to.glob("*.safetensors"):
            tensors = safetensors.numpy.load_file(shard)
            tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
            safetensors.numpy.save_file(tensors, shard, metadata={"format": "pt"})
        config = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    return to


def reference(name: str) -> dict[str, Any]:
    found = safetensors.numpy.load_file(DATA / name / "reference.safetensors")
    return {key: torch.from_numpy(value) for key, value in found.items()}


@torch.no_grad()
def output(path: Path, name: str, **options: str) -> np.ndarray:
    """Load a directory as its users do, and run it on the reference's inputs."""
    told = reference(name)
    if name == "sd_unet_tiny":
        unet = diffusers.UNet2DConditionModel.from_pretrained(path).eval()
        return unet(told["sample"], told["timestep"], told["encoder_hidden_states"]).sample.numpy()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", **options).eval()
    return model(told["input_ids"]).logits.float().numpy()


@pytest.mark.parametrize("name", MODELS)
def test_the_fixtures_give_the_reference(tmp_path: Path, name):
    found = output(stored_as(name, tmp_path / "in"), name)
    assert np.abs(found - reference(name)["logits"].numpy()).max() < 2e-4


def test_the_unet_gives_the_reference(tmp_path: Path):
    found = output(stored_as("sd_unet_tiny", tmp_path / "in"), "sd_unet_tiny")
    expected = reference("sd_unet_tiny")["out"].numpy()
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "dtype", "attention"),
    [
        ("llama_tiny", "float32", "eager"),
        ("llama_tiny", "float32", "sdpa"),
        ("llama_tiny", "bfloat16", "eager"),
        ("gpt_oss_tiny", "float32", "eager"),
        ("gpt_oss_tiny", "bfloat16", "eager"),
        ("sd_unet_tiny", "float32", ""),
    ],
)
def test_a_gauge_by_a_power_of_two_is_equal_to_the_bit(tmp_path: Path, name, dtype, attention):
    source = stored_as(name, tmp_path / "in", dtype)
    manifest = hub.deform(source, tmp_path / "out", EXACT, placement="gauge")
    assert all(layer.sigma_after[0] > 1000 * layer.sigma_before[0] for layer in manifest.layers.values())
    options = {"attn_implementation": attention} if attention else {}
    before = output(source, name, **options)
    assert np.abs(before).max() > 0.1
    np.testing.assert_array_equal(output(tmp_path / "out", name, **options), before)


@pytest.mark.parametrize("name", [*MODELS, "sd_unet_tiny"])
def test_a_symmetric_gauge_is_equal_to_rounding(tmp_path: Path, name):
    source = stored_as(name, tmp_path / "in")
    hub.deform(source, tmp_path / "out", SYMMETRIC, placement="gauge")
    before, after = (output(path, name) for path in (source, tmp_path / "out"))
    assert 0 < np.abs(after - before).max() < 5e-5 * np.abs(before).max()


@pytest.mark.parametrize("name", [*MODELS, "sd_unet_tiny"])
def test_a_balanced_gauge_still_computes_the_same(tmp_path: Path, name):
    source = stored_as(name, tmp_path / "in")
    hub.deform(source, tmp_path / "deformed", EXACT, placement="gauge")
    hub.fuse(tmp_path / "deformed", tmp_path / "out")
    before, after = (output(path, name) for path in (source, tmp_path / "out"))
    assert 0 < np.abs(after - before).max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_an_inserted_checkpoint_is_refused_until_it_is_fused(tmp_path: Path, name):
    source = stored_as(name, tmp_path / "in")
    hub.deform(source, tmp_path / "deformed", SYMMETRIC, ["layers.0.self_attn.*_proj.weight"])
    model_type = json.loads((tmp_path / "deformed" / "config.json").read_text())["model_type"]
    with pytest.raises(ValueError, match=model_type):
        output(tmp_path / "deformed", name)
    hub.fuse(tmp_path / "deformed", tmp_path / "out")
    assert np.abs(output(tmp_path / "out", name) - output(source, name)).max() < 1e-4


TINY = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
GEMMA = TINY | {
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "layer_types": ["full_attention", "full_attention"],
}
FAMILIES = {
    "Qwen3": TINY,
    "Gemma3Text": TINY,
    "Olmo3": TINY,
    "Mixtral": TINY,
    "Gemma3nText": GEMMA | {"intermediate_size": [48, 48], "activation_sparsity_pattern": [0.0, 0.0]},
    "Gemma4Text": GEMMA | {"global_head_dim": 8},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gauge_is_refused_where_it_would_change_the_function(tmp_path: Path, family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    model(config).save_pretrained(tmp_path / "in")
    spec = sd.SpecDef(alpha=64.0, basis="axis", budget=hub.BUDGET)
    try:
        hub.deform(tmp_path / "in", tmp_path / "out", spec, placement="gauge")
    except StructureError:
        assert family.startswith("Gemma")
        return
    tokens = torch.arange(12)[None] + 5
    with torch.no_grad():
        before, after = (model.from_pretrained(tmp_path / d).eval()(tokens).logits for d in ("in", "out"))
    np.testing.assert_array_equal(after.numpy(), before.numpy())
