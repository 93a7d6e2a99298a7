"""hub.load: from a directory to logits, deformed directories included, each process with its own slices."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import specdef_jax as sd
from specdef_jax import hub, models
from specdef_jax.errors import ConfigError, FileError, SpecError, StructureError
from specdef_jax.parametrization import Deformed
from tests.hub.helpers_checkpoints import DATA, checkpoint, tensors_in

TEXT = ["llama_tiny", "gpt_oss_tiny", "gpt_oss_tiny_mxfp4"]


def told(name: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(DATA / name / "reference.safetensors")


def off(path: Path, name: str, **options: Any) -> float:
    model, reference = hub.load(path, **options), told(name)
    return np.abs(jax.jit(model.apply)(model.params, reference["input_ids"]) - reference["logits"]).max()


def edit(path: Path, change: Any) -> Path:
    """Rewrite the tensors of a directory as one file."""
    tensors = tensors_in(path)
    for file in [*path.glob("*.safetensors"), *path.glob("*.index.json")]:
        file.unlink()
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path


def test_parameters_are_the_tensors_with_linear_maps_transposed():
    params, stored = hub.load(DATA / "llama_tiny").params, tensors_in(DATA / "llama_tiny")
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(params[name], stored[name].T)
    np.testing.assert_array_equal(params["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert params.keys() == stored.keys() - {"input_ids", "logits"}


def test_mxfp4_experts_become_plain_ones():
    plain, packed = (hub.load(DATA / name).params for name in ("gpt_oss_tiny", "gpt_oss_tiny_mxfp4"))
    for name, leaf in plain.items():
        np.testing.assert_array_equal(packed[name], leaf, err_msg=name)
    half = hub.load(DATA / "gpt_oss_tiny_mxfp4", jnp.bfloat16).params
    name = "model.layers.0.mlp.experts.down_proj"
    assert half[name].dtype == jnp.bfloat16
    np.testing.assert_array_equal(half[name].astype(jnp.float32), plain[name])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_a_dtype_is_that_of_every_parameter(dtype):
    model = hub.load(DATA / "llama_tiny", dtype)
    assert {leaf.dtype for leaf in model.params.values()} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("placement", ["insert", "gauge"])
@pytest.mark.parametrize("name", TEXT[:2])
def test_deformed_directories_compute_the_same(tmp_path: Path, name, placement):
    source = checkpoint(name, tmp_path / "in")
    spec = sd.SpecDef(alpha=16.0, budget=hub.BUDGET)
    where = ["layers.*.self_attn.*_proj.weight"] if placement == "insert" else None
    hub.deform(source, tmp_path / "out", spec, where, placement=placement)
    assert 0 < off(tmp_path / "out", name) < 2e-4
    params = hub.load(tmp_path / "out").params
    pairs = [leaf for leaf in params.values() if isinstance(leaf, Deformed)]
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    assert len(pairs) == (4 * layers if placement == "insert" else 0)
    assert all(pair.axes.inputs == (0,) and pair.axes.outputs == (1,) for pair in pairs)
    for leaf in hub.load(tmp_path / "out", jnp.bfloat16).params.values():
        kept = isinstance(leaf, Deformed)
        assert all(x.dtype == (jnp.float32 if kept else jnp.bfloat16) for x in jax.tree.leaves(leaf))


def test_inserted_experts_are_loaded_as_stacks_of_pairs(tmp_path: Path):
    source = checkpoint("gpt_oss_tiny", tmp_path / "in")
    spec = sd.SpecDef(alpha=16.0, budget=hub.BUDGET)
    hub.deform(source, tmp_path / "out", spec, ["experts.*_proj"])
    assert 0 < off(tmp_path / "out", "gpt_oss_tiny") < 2e-4
    leaf = hub.load(tmp_path / "out").params["model.layers.0.mlp.experts.down_proj"]
    assert isinstance(leaf, Deformed)
    assert leaf.axes.stack == (0,)


def test_older_configs_tied_embeddings_and_leftovers(tmp_path: Path):
    path = checkpoint("llama_tiny", tmp_path / "old")
    config = (DATA / "llama_tiny" / "config.legacy.json").read_text()
    (path / "config.json").write_text(config)
    edit(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}))
    assert off(path, "llama_tiny") < 2e-4
    tied = json.loads(config) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(tied))
    model = hub.load(path)
    assert "lm_head.weight" not in model.params
    head = model.params["model.embed_tokens.weight"].T
    open_config = models.llama.Config.from_json(json.loads(config))
    ids = jnp.asarray(told("llama_tiny")["input_ids"])
    want = models.llama.apply(open_config, model.params | {"lm_head.weight": head}, ids)
    np.testing.assert_allclose(model.apply(model.params, ids), want, atol=1e-5)


def test_a_directory_with_other_weights_beside_the_stock_file():
    assert (DATA / "gpt_oss_tiny" / "reference.safetensors").exists()
    assert hub.open_shards(DATA / "gpt_oss_tiny").left_out == ("reference.safetensors",)


@pytest.mark.parametrize("layout", [models.sharding.TENSOR_PARALLEL | models.sharding.FSDP])
@pytest.mark.parametrize("name", TEXT)
def test_parameters_are_read_onto_a_mesh_slice_by_slice(name, layout):
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    place = models.sharding.placement(mesh, layout)
    plain, laid = hub.load(DATA / name), hub.load(DATA / name, place=place)
    for path, leaf in laid.params.items():
        assert leaf.sharding == place(path, leaf.shape)
        np.testing.assert_array_equal(leaf, plain.params[path], err_msg=path)
    assert off(DATA / name, name, place=place) < 2e-4


def test_only_the_slices_of_a_process_are_copied(monkeypatch):
    copied = []
    keep = np.ascontiguousarray
    monkeypatch.setattr(np, "ascontiguousarray", lambda x: copied.append(x.shape) or keep(x))
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    layout = models.sharding.TENSOR_PARALLEL | models.sharding.FSDP
    hub.load(DATA / "llama_tiny", place=models.sharding.placement(mesh, layout))
    assert (32, 40) in copied  # of up_proj, (64, 160)
    assert (64, 160) not in copied


def test_inserted_pairs_lie_on_a_mesh(tmp_path: Path):
    source = checkpoint("llama_tiny", tmp_path / "in")
    spec = sd.SpecDef(alpha=16.0, budget=hub.BUDGET)
    hub.deform(source, tmp_path / "out", spec, ["layers.*.mlp.*_proj.weight"])
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    layout = models.sharding.TENSOR_PARALLEL | models.sharding.FSDP
    place = models.sharding.placement(mesh, layout)
    assert off(tmp_path / "out", "llama_tiny", place=place) < 2e-4
    for leaf in hub.load(tmp_path / "out", place=place).params.values():
        if isinstance(leaf, Deformed):
            assert not leaf.comp.sharding.is_fully_replicated


def test_what_does_not_fit(tmp_path: Path):
    with pytest.raises(SpecError, match="parameters are floating"):
        hub.load(DATA / "llama_tiny", jnp.int8)
    with pytest.raises(FileError, match="is no directory"):
        hub.load(tmp_path / "nowhere")
    path = checkpoint("llama_tiny", tmp_path / "in")
    config = json.loads((path / "config.json").read_text())
    for change, error, message in (
        ({"model_type": "bert"}, ConfigError, "is of a 'bert'"),
        ({"hidden_size": None}, ConfigError, "'hidden_size' is absent"),
        ({"intermediate_size": 128}, StructureError, r"the config asks for \(64, 128\)"),
        ({"num_hidden_layers": 3}, StructureError, "lacks 9 tensors .* 'model.layers.2.input_layernorm"),
        ({"num_hidden_layers": 1}, StructureError, "'model.layers.1.input_layernorm.weight' is no parameter"),
        ({"attention_bias": True}, StructureError, "lacks 8 tensors"),
    ):
        (path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(error, match=message):
            hub.load(path)
