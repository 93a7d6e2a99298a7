"""Certification of a checkpoint: what becomes of it, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import specdef_jax as sd
from specdef_jax import attacks, race, report
from specdef_jax.certification import Config, certify, ledger_stage, model_task
from specdef_jax.cli import main
from specdef_jax.select import as_selector
from tests.hub.helpers_checkpoints import DATA

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.int32)
SMALL = replace(
    Config.preset("model"), alphas=(1.0, 4.0), matched=4.0, steps=25, decades=1.0, refine=4.0,
    error_alphas=(1.0, 16.0), eigenvalues=2,
)  # fmt: skip


def unet_data():
    keys = jax.random.split(jax.random.key(0), 3)
    latents, noise = (jax.random.normal(k, (2, 4, 8, 8)) for k in keys[:2])
    states = jax.random.normal(keys[2], (2, 5, 24))
    return (latents, noise, jnp.asarray([10, 500]), states), (latents, jnp.asarray([10, 500]), states)


def one_layer(source, directory):
    """Write a checkpoint with the first layer of another only."""
    directory.mkdir()
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {}
    for path in source.glob("model*.safetensors"):
        tensors |= load_file(path)
    kept = {name: x for name, x in tensors.items() if ".layers." not in name or ".layers.0." in name}
    save_file(kept, directory / "model.safetensors")


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    out, shallow = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("stored")
    directory = shallow / "llama_tiny"
    one_layer(DATA / "llama_tiny", directory)
    few = {name: attacks.ATTACKS[name] for name in ("fuse", "blind")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_stage, "ATTACKS", few)
        patch.setattr(race, "DEFAULT", {name: race.DEFAULT[name] for name in ("sgd", "adam")})
        made = certify(
            out,
            SMALL,
            task=model_task(directory, (TOKENS,), layers=("layers.0.**.v_proj.weight",)),
        )
    return made, out, directory


def test_a_checkpoint_is_certified_end_to_end(certified):
    made, out, _ = certified
    assert made.holds
    assert made.results["task"]["name"] == "llama_tiny"
    assert {layer["path"] for layer in made.results["task"]["layers"]} == {
        "model.layers.0.self_attn.v_proj.weight"
    }
    assert "original_other_seeds" not in made.results["race"]["arms"]
    assert "every attack" in (out / "report.html").read_text().lower()


def test_the_stored_format_tells_what_changes(certified):
    one, four = certified[0].results["released"]["rows"]
    for row in (one, four):
        assert row["dtype"] == "float32"
        assert 0 <= row["error"] < 1e-5
        assert abs(row["divergence"]) < 1e-6
        assert row["same_top_token"] == 1
        assert row["perplexity_deformed"] == pytest.approx(row["perplexity"], rel=1e-5)
    model = sd.hub.load(certified[2])
    assert four["perplexity"] == pytest.approx(
        math.exp(float(model.loss(model.params, jnp.asarray(TOKENS)))), rel=1e-6
    )


def test_a_narrow_format_shows_in_the_outputs(tmp_path):
    """Rounded to bfloat16 the pair is not what it was, and the table says by how much."""
    task = model_task(DATA / "llama_tiny", (TOKENS,), layers=("up_proj.weight",))
    model = sd.hub.load(DATA / "llama_tiny", jnp.bfloat16)
    narrow = replace(task, released=lambda p: task.released.func(model, (TOKENS,), True, p))
    with jax.enable_x64(True):
        planned = task.plan(sd.SpecDef(16.0, budget=math.inf), jax.random.key(0))
        found, wide = narrow.released(planned), task.released(planned)
    assert found["dtype"] == "bfloat16"
    assert found["error"] > 100 * wide["error"]
    assert found["divergence"] > 0


def test_the_ledger_names_the_strongest_and_refusals(certified):
    found = certified[0].results["ledger"]
    assert [e["attack"] for e in found["entries"]] == ["undefended", "fine-tune as released", "fuse", "blind"]
    assert set(found["strongest"].values()) <= {e["attack"] for e in found["entries"]}
    text = report.words.of_the_ledger(certified[0].results)
    assert text.startswith("Of 2 attacks that apply, none takes longer to prepare than")
    broken = json.loads(json.dumps(certified[0].results["ledger"]))
    broken["entries"][3] |= {"refused": "no pair", "bill": None}
    page = certified[0].results | {"ledger": broken}
    assert "no pair" in report.render(page)


def test_an_image_model_needs_a_loss_and_inputs():
    data, held = unet_data()
    directory = DATA / "sd_unet_tiny"
    with pytest.raises(sd.ProblemError, match="loss of your own"):
        model_task(directory, data)
    model = sd.hub.load(directory)
    with pytest.raises(sd.ProblemError, match="inputs to compare it on"):
        model_task(directory, data, model.loss)
    task = model_task(directory, data, model.loss, held=held)
    assert task.control == "conv_out.bias"
    with jax.enable_x64(True):
        planned = task.plan(sd.SpecDef(16.0), jax.random.key(0))
        assert all("attn2.to_v" in path for path in planned)
        assert 0 < task.released(planned)["error"] < 1e-4
        assert set(task.released(planned)) == {"dtype", "error"}


@pytest.mark.parametrize("name", ["gpt_oss_tiny", "gpt_oss_tiny_mxfp4"])
def test_experts_can_be_chosen(name):
    task = model_task(DATA / name, (TOKENS,), layers=("layers.0.mlp.experts.down_proj",))
    with jax.enable_x64(True):
        ((_, layer),) = task.plan(sd.SpecDef(4.0), jax.random.key(0)).items()
        assert layer.U.shape[0] == 4
    assert task.target == pytest.approx(0.75 * float(task.loss(task.networks[0], *task.args)))


def test_a_deformed_directory_is_refused(tmp_path):
    out = tmp_path / "made"
    assert (
        main(["deform", str(DATA / "llama_tiny"), str(out), "--alpha", "8", "--layers", "up_proj.weight"])
        == 0
    )
    with pytest.raises(sd.StructureError, match="deformed already"):
        model_task(out, (TOKENS,))


def test_the_command_asks_for_what_it_needs(capsys):
    assert main(["certify", "--model", str(DATA / "llama_tiny")]) != 0
    assert "--data" in capsys.readouterr().err
    assert main(["certify", "--target", "1.0"]) != 0
    assert "are for --model" in capsys.readouterr().err


def test_a_selection_is_described_alike():
    """The key of stored stages holds it."""
    a, b = (as_selector(model_task(DATA / "llama_tiny", (TOKENS,)).where).description for _ in range(2))
    assert a == b
    assert Path(DATA / "llama_tiny").name not in a
