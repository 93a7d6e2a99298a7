"""verify holds on what deform wrote, and on nothing else: one change at a time, its hash forged as well."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import specdef_jax as sd
from specdef_jax import hub
from specdef_jax.errors import FileError
from tests.hub.helpers_checkpoints import DATA, checkpoint

Q = "model.layers.{}.self_attn.q_proj.weight"
V = "model.layers.{}.self_attn.v_proj.weight"
K = "model.layers.{}.self_attn.k_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
SPEC = sd.SpecDef(alpha=64.0, budget=hub.BUDGET)


def toy(to: Path, config: dict | None = None) -> Path:
    """Write a checkpoint with two kernels, one of 200 inputs."""
    rng = np.random.default_rng(0)
    shapes = {"square.weight": (16, 16), "wide.weight": (16, 200), "norm.weight": (16,)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    to.mkdir(parents=True)
    safetensors.numpy.save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(config or {"model_type": "toy", "architectures": ["Toy"]}))
    return to


def metadata_of(shard: Path) -> dict[str, str]:
    with safetensors.safe_open(shard, "numpy") as file:
        return file.metadata()


def change(
    out: Path,
    tensors: Callable[[dict[str, np.ndarray]], object] = lambda tensors: None,
    metadata: Callable[[dict[str, str]], object] = lambda metadata: None,
) -> None:
    """Write the shards of a directory again after a change to all of their tensors together."""
    shards = {p: safetensors.numpy.load_file(p) for p in sorted(out.glob("model*.safetensors"))}
    found = {name: tensor for held in shards.values() for name, tensor in held.items()}
    names = set(found)
    tensors(found)
    for path, held in shards.items():
        added = set(found) - names if path == max(shards) else set()
        kept = {name: found[name] for name in (*held, *sorted(added)) if name in found}
        texts = metadata_of(path)
        metadata(texts)
        safetensors.numpy.save_file(kept, path, metadata=texts)
    index = out / "model.safetensors.index.json"
    if index.exists():
        told = json.loads(index.read_text())
        told["weight_map"] = {n: p.name for p in shards for n in safetensors.numpy.load_file(p)}
        index.write_text(json.dumps(told))


def edit(path: Path, function: Callable[[dict], object]) -> None:
    found = json.loads(path.read_text())
    function(found)
    path.write_text(json.dumps(found))


def forge_hashes(out: Path) -> None:
    def forge(manifest: dict) -> None:
        for name in manifest["files"]:
            data = (out / name).read_bytes() if (out / name).exists() else b""
            manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}

    edit(out / "specdef.json", forge)


def flip(name: str, byte: int) -> Callable[[Path], None]:
    """Flip a bit of one byte of one entry; byte 0 of a float32 holds the lowest of its significand."""

    def apply(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1).view(np.uint8)[4 * (tensors[name].size // 2) + byte] ^= 4

    return lambda out: change(out, apply)


def enlarge(name: str) -> Callable[[Path], None]:
    """Multiply the largest entry by 256, as a flipped bit of its exponent may; a shrunk one does no harm."""

    def apply(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        flat = tensors[name].reshape(-1)
        flat[np.argmax(np.abs(flat))] *= 256

    return lambda out: change(out, apply)


def swap(*names: str) -> Callable[[Path], None]:
    def apply(tensors: dict[str, np.ndarray]) -> None:
        for a, b in zip(names[::2], names[1::2], strict=True):
            tensors[a], tensors[b] = tensors[b], tensors[a]

    return lambda out: change(out, apply)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("llama")
    source = checkpoint("llama_tiny", root / "in")
    hub.deform(source, root / "out", SPEC, [Q.format("*"), DOWN])
    return source, root / "out"


@pytest.fixture(scope="module")
def gauged(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("gpt_oss")
    source = checkpoint("gpt_oss_tiny", root / "in")
    hub.deform(source, root / "out", SPEC, V.format("[01]"), placement="gauge")
    return source, root / "out"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("toy")
    source = toy(root / "in")
    hub.deform(source, root / "out", SPEC, ["square.weight", "wide.weight"])
    return source, root / "out"


@pytest.fixture
def tampered(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda out: Path(shutil.copytree(out, tmp_path / "tampered"))


def failed(found: hub.Verification) -> set[str]:
    assert not found.holds
    return {name for name, layer in found.layers.items() if not layer.holds}


# ----------------------------------------------------------------------------------- what deform wrote


def test_it_holds_on_an_inserted_directory(llama):
    source, out = llama
    found = hub.verify(out, source)
    assert found.holds
    assert found.problems == ()
    assert set(found.layers) == {Q.format(0), Q.format(1), DOWN}
    assert found.identical == len(hub.read_tree(source).params) - 3
    assert found.files == len(list(out.iterdir())) - 1
    for name, layer in hub.load_manifest(out).layers.items():
        assert found.layers[name].measured.bound_ratio <= 1
        # The probes are secret and new each time: 16 of them told up to 1.7 times as much in 180 trials.
        assert 0.2 < found.layers[name].measured.error / layer.measured.error < 5
        assert found.layers[name].measured.error < hub.BUDGET


def test_it_holds_on_a_gauge_and_tells_exact_ones(gauged, tmp_path: Path):
    source, out = gauged
    found = hub.verify(out, source)
    assert found.holds
    assert not any(layer.exact for layer in found.layers.values())
    spec = sd.SpecDef(alpha=2.0**12, basis="axis", budget=hub.BUDGET)
    hub.deform(source, tmp_path / "out", spec, placement="gauge")
    found = hub.verify(tmp_path / "out", source)
    assert found.holds
    assert len(found.layers) == 4
    assert all(layer.exact for layer in found.layers.values())


def test_it_holds_on_dequantized_experts_and_compares_all_of_them(tmp_path: Path):
    source, out = checkpoint("gpt_oss_tiny_mxfp4", tmp_path / "in"), tmp_path / "out"
    hub.deform(source, out, SPEC, "layers.0.mlp.experts.down_proj", dequantize="float32")
    assert hub.verify(out, source).holds
    name = "model.layers.1.mlp.experts.gate_up_proj"
    flip(name, 0)(out)
    forge_hashes(out)
    assert hub.verify(out, source).problems == (f"'{name}' differs from the original",)


def test_it_is_strict_json_whatever_was_measured(small, tampered):
    source, out = small
    out = tampered(out)
    change(out, lambda tensors: tensors["square.weight"].fill(np.inf))
    text = json.dumps(hub.verify(out, source).to_dict(), allow_nan=False)
    told = json.loads(text)
    assert told["holds"] is False
    assert told["layers"]["square.weight"]["measured"]["error"] == "inf"


def test_it_leaves_both_directories_alone(small):
    source, out = small
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for d in small for p in d.iterdir()}
    hub.verify(out, source)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for d in (source, out) for p in d.iterdir()} == before


# --------------------------------------------------------------------------------- one change at a time


TENSORS = {
    "a byte of an untouched tensor": (flip("model.norm.weight", 0), "'model.norm.weight' differs"),
    "two untouched tensors swapped": (swap(K.format(0), K.format(1)), f"'{K.format(0)}' differs"),
    "an untouched tensor in another dtype": (
        lambda out: change(out, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].view(np.int32)})),
        "'lm_head.weight' differs",
    ),
    "an untouched tensor of another shape": (
        lambda out: change(out, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].reshape(-1)})),
        "'lm_head.weight' differs",
    ),
    "a tensor removed": (
        lambda out: change(out, lambda t: t.pop("model.norm.weight")),
        "'model.norm.weight' is missing",
    ),
    "a tensor added": (
        lambda out: change(out, lambda t: t.update({"model.extra": np.ones(2, np.float32)})),
        "'model.extra' is in neither the original nor the manifest",
    ),
    "a config entry": (
        lambda out: edit(out / "config.json", lambda c: c.update(rms_norm_eps=1e-6)),
        "config.json differs from the original in 'rms_norm_eps'",
    ),
    "a config entry removed": (
        lambda out: edit(out / "config.json", lambda c: c.pop("rope_parameters")),
        "config.json differs from the original in 'rope_parameters'",
    ),
    "a config entry added": (
        lambda out: edit(out / "config.json", lambda c: c.update(auto_map={"AutoModel": "x.Y"})),
        "config.json differs from the original in 'auto_map'",
    ),
    "a stock config": (
        lambda out: shutil.copyfile(DATA / "llama_tiny" / "config.json", out / "config.json"),
        "config.json differs from the original in 'architectures'",
    ),
    "a model_type of the stock architecture": (
        lambda out: edit(out / "config.json", lambda c: c.update(model_type="llama")),
        "config.json",
    ),
    "a file removed": (
        lambda out: (out / "generation_config.json").unlink(),
        "generation_config.json is missing",
    ),
    "a file changed": (
        lambda out: (out / "generation_config.json").write_text("{}"),
        "generation_config.json differs from the original",
    ),
    "a file added": (lambda out: (out / "code.py").write_text("1"), "code.py is not in the original"),
    "a pickle added": (lambda out: (out / "pytorch_model.bin").write_bytes(b"1"), "pytorch_model.bin"),
    "an adapter added": (
        lambda out: safetensors.numpy.save_file({"a": np.ones(2)}, out / "adapter_model.safetensors"),
        "adapter_model.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("forged", [False, True], ids=["", "forged"])
@pytest.mark.parametrize("case", TENSORS)
def test_a_change_outside_of_the_pairs_is_reported(llama, tampered, case, forged):
    apply, problem = TENSORS[case]
    source, out = llama
    out = tampered(out)
    apply(out)
    if forged:
        forge_hashes(out)
    found = hub.verify(out, source)
    assert not found.holds
    assert any(told.startswith(problem) for told in found.problems)
    assert not failed(found)


def original(name: str) -> np.ndarray:
    shard = next(p for p in sorted((DATA / "llama_tiny").glob("model*.safetensors")) if name in names_in(p))
    return safetensors.numpy.load_file(shard)[name]


def names_in(shard: Path) -> list[str]:
    with safetensors.safe_open(shard, "numpy") as file:
        return list(file.keys())


PAIRS = {
    "a weight": (enlarge(DOWN), {DOWN}),
    "a compensation": (enlarge(DOWN + ".comp"), {DOWN}),
    "two weights swapped": (swap(Q.format(0), Q.format(1)), {Q.format(0), Q.format(1)}),
    "two pairs swapped": (
        swap(Q.format(0), Q.format(1), Q.format(0) + ".comp", Q.format(1) + ".comp"),
        {Q.format(0), Q.format(1)},
    ),
    "a weight that is not finite": (
        lambda out: change(out, lambda t: t[DOWN].reshape(-1).put(7, np.nan)),
        {DOWN},
    ),
    "an undeformed weight": (
        lambda out: change(out, lambda t: t.update({DOWN: original(DOWN)})),
        {DOWN},
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_a_change_to_a_pair_is_measured(llama, tampered, case):
    apply, names = PAIRS[case]
    source, out = llama
    out = tampered(out)
    apply(out)
    assert any("sha256 differs" in problem for problem in hub.verify(out, source).problems)
    forge_hashes(out)
    found = hub.verify(out, source)
    assert found.problems == ()
    assert failed(found) == names


def test_the_lowest_bit_of_a_weight_changes_its_hash(llama, tampered):
    source, out = llama
    out = tampered(out)
    flip(DOWN, 0)(out)
    found = hub.verify(out, source)
    assert not found.holds
    assert [problem for problem in found.problems if "sha256 differs" in problem]


GAUGES = {
    "a value": enlarge(V.format(0)),
    "a bias": enlarge(V.format(0).replace("weight", "bias")),
    "an output": enlarge("model.layers.0.self_attn.o_proj.weight"),
    "two values swapped": swap(V.format(0), V.format(1)),
    "a feature scaled": lambda out: change(
        out, lambda t: np.multiply(t[V.format(0)][5], 2, t[V.format(0)][5])
    ),
}


@pytest.mark.parametrize("case", GAUGES)
def test_a_change_to_a_gauge_is_measured(gauged, tampered, case):
    source, out = gauged
    out = tampered(out)
    GAUGES[case](out)
    forge_hashes(out)
    found = hub.verify(out, source)
    assert found.problems == ()
    assert V.format(0) in failed(found)


def test_a_change_outside_of_a_gauge_is_reported(gauged, tampered):
    source, out = gauged
    out = tampered(out)
    flip("model.layers.0.self_attn.o_proj.bias", 0)(out)
    flip("model.layers.2.self_attn.v_proj.weight", 0)(out)
    edit(out / "config.json", lambda c: c.update(sliding_window=9))
    forge_hashes(out)
    assert set(hub.verify(out, source).problems) == {
        "'model.layers.0.self_attn.o_proj.bias' differs from the original",
        "'model.layers.2.self_attn.v_proj.weight' differs from the original",
        "config.json differs from the original in 'sliding_window'",
    }


def test_another_original_is_told_from_the_right_one(llama, small, tmp_path: Path):
    source, out = llama
    other = Path(shutil.copytree(source, tmp_path / "other"))
    change(other, lambda t: np.multiply(t[DOWN], -1, t[DOWN]))
    assert failed(hub.verify(out, other)) == {DOWN}
    found = hub.verify(out, small[0])
    assert not found.holds
    assert f"'{DOWN}' of the manifest is not in the original" in found.problems
    with pytest.raises(FileError, match="is no directory"):
        hub.verify(out, tmp_path / "nothing")


def test_what_was_not_deformed_has_no_manifest(small):
    source, _ = small
    with pytest.raises(FileError, match=r"has no specdef.json.*give its output"):
        hub.verify(source, source)


# ----------------------------------------------------------------------------------- a forged manifest


def layer(manifest: dict, name: str = "square.weight") -> dict:
    return manifest["layers"][name]["entry"]


LIES = {
    "a name that is not there": lambda m: m["layers"].update(
        {"other.weight": m["layers"].pop("square.weight")}
    ),
    "a name too few": lambda m: m["layers"].pop("square.weight"),
    "axes the other way": lambda m: layer(m)["axes"].update(inputs=[0], outputs=[1]),
    "the other side": lambda m: layer(m).update(side="input"),
    "a smaller budget": lambda m: m["spec"].update(budget=1e-12),
    "a file too few": lambda m: m["files"].pop("model.safetensors"),
    "a file that leads out": lambda m: m["files"].update({"../in/config.json": {"sha256": "", "size": 0}}),
}


@pytest.mark.parametrize("case", LIES)
def test_a_manifest_that_does_not_fit_does_not_hold(small, tampered, case):
    source, out = small
    out = tampered(out)
    edit(out / "specdef.json", LIES[case])
    assert not hub.verify(out, source).holds


DAMAGE = {
    "another format": lambda m: m.update(format=2),
    "another placement": lambda m: m.update(placement="gauge"),
    "a placement unknown": lambda m: m.update(placement="else"),
    "layers no mapping": lambda m: m.update(layers=[]),
    "axes that do not fit": lambda m: layer(m, "wide.weight")["axes"].update(inputs=[0], outputs=[1]),
    "axes out of range": lambda m: layer(m)["axes"].update(inputs=[2], outputs=[0]),
    "axes that are no numbers": lambda m: layer(m)["axes"].update(inputs=["1"]),
    "a side unknown": lambda m: layer(m).update(side="both"),
    "a vector named": lambda m: m["layers"].update({"norm.weight": m["layers"]["square.weight"]}),
    "a dtype unknown": lambda m: m["layers"]["square.weight"].update(dtype="float1"),
    "a measure missing": lambda m: m["layers"]["square.weight"]["measured"].pop("error"),
    "no spec": lambda m: m.pop("spec"),
    "no budget": lambda m: m["spec"].pop("budget"),
    "a budget of text": lambda m: m["spec"].update(budget="small"),
    "a budget of nothing": lambda m: m["spec"].update(budget=None),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_manifest_is_an_error_that_says_so(small, tampered, case):
    source, out = small
    out = tampered(out)
    edit(out / "specdef.json", DAMAGE[case])
    with pytest.raises(FileError, match=r"specdef.json|do not fit the record|which is missing"):
        hub.verify(out, source)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "[" * 10_000])
def test_a_manifest_that_is_none_is_an_error_that_says_so(small, tampered, text):
    source, out = small
    out = tampered(out)
    (out / "specdef.json").write_text(text)
    with pytest.raises(FileError, match=r"specdef.json"):
        hub.verify(out, source)


def test_a_placement_unknown_is_none_of_the_others(gauged, tampered):
    source, out = gauged
    out = tampered(out)
    edit(out / "specdef.json", lambda m: m.update(placement="else"))
    with pytest.raises(FileError, match=r"specdef.json is damaged.*placement 'else'"):
        hub.verify(out, source)


def test_a_config_entry_cannot_be_hidden_behind_the_manifest(small, tmp_path: Path):
    source, out = toy(tmp_path / "in", {"model_type": "toy", "rope_theta": 5.0}), tmp_path / "out"
    hub.deform(source, out, SPEC, "square.weight")
    edit(out / "config.json", lambda c: c.update(rope_theta=7.0))
    edit(
        out / "specdef.json",
        lambda m: m.update(config=json.dumps(json.loads(m["config"]) | {"rope_theta": 7.0})),
    )
    forge_hashes(out)
    assert not hub.verify(out, source).holds


def test_a_quantization_config_cannot_be_hidden_behind_the_manifest(tmp_path: Path):
    config = {"model_type": "toy", "quantization_config": {"quant_method": "fp8"}}
    source, out = toy(tmp_path / "in", config), tmp_path / "out"
    hub.deform(source, out, SPEC, "square.weight")
    edit(out / "config.json", lambda c: c.pop("quantization_config"))
    edit(out / "specdef.json", lambda m: m.update(dequantized={"wide.weight": "float32"}))
    forge_hashes(out)
    assert not hub.verify(out, source).holds


def test_a_tensor_cannot_be_hidden_as_the_bias_of_a_gauge(tmp_path: Path):
    source, out = checkpoint("llama_tiny", tmp_path / "in"), tmp_path / "out"
    hub.deform(source, out, SPEC, V.format(0), placement="gauge")
    enlarge("lm_head.weight")(out)
    edit(out / "specdef.json", lambda m: layer(m, V.format(0)).update(bias="lm_head.weight"))
    forge_hashes(out)
    assert not hub.verify(out, source).holds


@pytest.mark.parametrize("lie", ["another side", "nothing"])
def test_the_records_in_the_headers_are_checked_as_loaders_go_by_them(small, tampered, lie):
    source, out = small
    out = tampered(out)

    def forge(metadata: dict[str, str]) -> None:
        record = json.loads(metadata.pop("specdef"))
        if lie == "another side":
            record["tensors"]["square.weight"]["side"] = "input"
            metadata["specdef"] = json.dumps(record)

    change(out, metadata=forge)
    forge_hashes(out)
    try:
        assert not hub.verify(out, source).holds
    except FileError:
        return


def test_an_error_that_fixed_inputs_do_not_see_is_found(small, tampered):
    """Whoever knows the probes can hide a change of any size from them, so they must not be known."""
    source, out = small
    out = tampered(out)
    name = "wide.weight"
    key = jax.random.split(jax.random.key(0), 2)[sorted(hub.load_manifest(out).layers).index(name)]
    probes = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 7), 0), (64, 200), np.float32)
    unseen = np.linalg.svd(np.asarray(probes, float))[2][-1]

    def forge(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = (tensors[name] + np.outer(np.ones(16), 100 * unseen)).astype(np.float32)

    change(out, forge)
    forge_hashes(out)
    pair = hub.read_tree(out).params[name]
    original = hub.open_shards(source).read(name)
    assert np.linalg.norm(pair.materialize() - original) > 0.1 * np.linalg.norm(original)
    found = hub.verify(out, source)
    assert failed(found) == {name}
    assert math.isfinite(found.layers[name].measured.error)
