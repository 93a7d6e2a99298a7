"""Fusing undoes a deformed directory, with specdef.json or without (THEORY.md 5.1)."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import specdef_jax as sd
from specdef_jax import hub
from specdef_jax.errors import FileError
from tests.hub.helpers_checkpoints import DATA, checkpoint, tensors_in

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
WHERE = {
    "llama_tiny": ["layers.0.*.*.weight", "lm_head.weight"],
    "gpt_oss_tiny": ["layers.0.mlp.experts.*_proj", "layers.2.self_attn.*_proj.weight"],
    "sd_unet_tiny": ["conv_in.weight", "conv_shortcut.weight", "mid_block.**.attn2.*.weight"],
}


def stored_as(name: str, to: Path, dtype: np.dtype | None = None) -> Path:
    checkpoint(name, to)
    for shard in sorted(to.glob("*.safetensors")) if dtype else ():
        tensors = {name: t.astype(dtype) for name, t in safetensors.numpy.load_file(shard).items()}
        safetensors.numpy.save_file(tensors, shard, metadata={"format": "pt"})
    for index in to.glob("*.index.json") if dtype else ():
        told = json.loads(index.read_text())
        told["metadata"]["total_size"] = sum(t.nbytes for t in tensors_in(to).values())
        index.write_text(json.dumps(told))
    return to


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(float) - b.astype(float)) / np.linalg.norm(b.astype(float)))


def is_stock(path: Path, source: Path) -> None:
    """Check that a directory has the files, names, dtypes, shapes, metadata and index of another."""
    assert {p.name for p in path.iterdir()} == {p.name for p in source.iterdir()}
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            with (
                safetensors.safe_open(path / file.name, "numpy") as a,
                safetensors.safe_open(file, "numpy") as b,
            ):
                assert a.metadata() == b.metadata()
                assert set(a.keys()) == set(b.keys())
        elif file.name.endswith("index.json"):
            assert json.loads((path / file.name).read_text()) == json.loads(file.read_text())
        else:
            assert (path / file.name).read_bytes() == file.read_bytes()
    ours, theirs = tensors_in(path), tensors_in(source)
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {
        n: (t.dtype, t.shape) for n, t in theirs.items()
    }


# ---------------------------------------------------------------------------------------------- insert


@pytest.fixture(scope="module", params=WHERE)
def inserted(request, tmp_path_factory) -> tuple[Path, Path, set[str]]:
    root = tmp_path_factory.mktemp(request.param)
    source = stored_as(request.param, root / "in")
    spec = sd.SpecDef(alpha=64.0, k=2, budget=hub.BUDGET)
    manifest = hub.deform(source, root / "deformed", spec, WHERE[request.param])
    return source, root / "deformed", set(manifest.layers)


@pytest.mark.parametrize("told", [True, False], ids=["", "without manifest"])
def test_inserted_pairs_come_back_as_the_original(inserted, tmp_path: Path, told):
    source, deformed, names = inserted
    if not told:
        deformed = Path(shutil.copytree(deformed, tmp_path / "untold"))
        (deformed / "specdef.json").unlink()
    calls = []
    fused = hub.fuse(deformed, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert set(fused.multiplied) == names
    assert fused.balanced == ()
    assert calls[-1][0] == "writing"
    assert calls[-1][1] == calls[-1][2] > 0
    is_stock(tmp_path / "out", source)
    originals, stored = tensors_in(source), tensors_in(tmp_path / "out")
    for name, original in originals.items():
        if name in names:
            assert relative(stored[name], original) < 64 * 2**-23
        else:
            assert stored[name].tobytes() == original.tobytes()


@pytest.mark.parametrize("basis", ["symmetric", "rotated", "axis"])
def test_a_float64_pair_of_bfloat16_comes_back_to_the_bit(tmp_path: Path, basis):
    source = stored_as("llama_tiny", tmp_path / "in", BFLOAT16)
    spec = sd.SpecDef(alpha=1000.0, basis=basis, budget=5e-8)
    where = ["layers.0.mlp.*_proj.weight", "layers.0.self_attn.o_proj.weight"]
    manifest = hub.deform(source, tmp_path / "deformed", spec, where)
    assert {layer.dtype for layer in manifest.layers.values()} == {"float64"}
    hub.fuse(tmp_path / "deformed", tmp_path / "out")
    is_stock(tmp_path / "out", source)
    for name, original in tensors_in(source).items():
        assert tensors_in(tmp_path / "out")[name].tobytes() == original.tobytes()


def test_without_the_manifest_the_dtype_of_the_pair_stays(tmp_path: Path):
    source = stored_as("llama_tiny", tmp_path / "in", BFLOAT16)
    hub.deform(source, tmp_path / "deformed", sd.SpecDef(64.0, budget=1e-3), "lm_head.weight")
    (tmp_path / "deformed" / "specdef.json").unlink()
    hub.fuse(tmp_path / "deformed", tmp_path / "out")
    stored = tensors_in(tmp_path / "out")
    assert stored["lm_head.weight"].dtype == np.float32
    assert relative(stored["lm_head.weight"], tensors_in(source)["lm_head.weight"]) < 1e-5


@pytest.mark.parametrize(
    "text",
    ['{\n    "model_type": "toy",\n    "eps": 0.00001\n}', '{"model_type": "\\u00e9"}\n'],
    ids=["four spaces", "one line"],
)
def test_the_config_comes_back_to_the_byte_however_it_was_laid_out(tmp_path: Path, text):
    source = tmp_path / "in"
    source.mkdir()
    safetensors.numpy.save_file({"w.weight": np.eye(8, dtype=np.float32)}, source / "model.safetensors")
    (source / "config.json").write_text(text)
    hub.deform(source, tmp_path / "deformed", sd.SpecDef(4.0, budget=1e-3), "w.weight")
    hub.fuse(tmp_path / "deformed", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(text)
    assert (tmp_path / "out" / "config.json").read_bytes() == text.encode()


def test_dequantized_experts_come_back_plain(tmp_path: Path):
    source = stored_as("gpt_oss_tiny_mxfp4", tmp_path / "in")
    name = "model.layers.0.mlp.experts.down_proj"
    spec = sd.SpecDef(2.0**12, basis="axis", budget=1e-3)
    hub.deform(source, tmp_path / "deformed", spec, name, dequantize="bfloat16")
    hub.fuse(tmp_path / "deformed", tmp_path / "out")
    stored, plain = tensors_in(tmp_path / "out"), tensors_in(DATA / "gpt_oss_tiny")
    assert stored[name].dtype == BFLOAT16
    np.testing.assert_array_equal(stored[name].astype(np.float32), plain[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {
        k: v
        for k, v in json.loads((source / "config.json").read_text()).items()
        if k != "quantization_config"
    }


# ----------------------------------------------------------------------------------------------- gauge


def projections(path: Path, name: str, groups: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (in, d) with the bias, and (d, heads * out), of each group in float64."""
    tensors = tensors_in(path)
    second = name.replace("v_proj", "o_proj").replace("to_v", "to_out.0")
    V, O = tensors[name].astype(float), tensors[second].astype(float)  # noqa: E741
    bias = tensors.get(name.replace("weight", "bias"))
    V = V if bias is None else np.concatenate([V, bias.astype(float)[:, None]], axis=1)
    blocks = V.reshape(groups, -1, V.shape[1])
    heads = O.reshape(len(O), groups, -1, blocks.shape[1])
    return [(V.T, heads[:, i].transpose(2, 1, 0).reshape(blocks.shape[1], -1)) for i, V in enumerate(blocks)]


def suspected(path: Path) -> set[str]:
    shards = hub.open_shards(path)
    pairs = [hub.pair_at(shards, first) for first in hub.find_pairs(shards)]
    assert pairs
    return {p.first for p in pairs if hub.suspect_gauge(*hub.matrices_of(shards, p), p.groups)}


@pytest.fixture(scope="module", params=["llama_tiny", "gpt_oss_tiny", "sd_unet_tiny"])
def gauged(request, tmp_path_factory) -> tuple[Path, Path, hub.Manifest]:
    root = tmp_path_factory.mktemp(request.param)
    source = stored_as(request.param, root / "in", np.dtype(np.float64))
    spec = sd.SpecDef(alpha=1024.0, budget=hub.BUDGET)
    where = ["layers.[01].**", "mid_block.**.attn1.**"]
    return source, root / "deformed", hub.deform(source, root / "deformed", spec, where, placement="gauge")


@pytest.mark.parametrize("told", [True, False], ids=["", "without manifest"])
def test_a_gauge_is_balanced_and_nothing_is_suspected_any_more(gauged, tmp_path: Path, told):
    source, deformed, manifest = gauged
    assert suspected(deformed) == set(manifest.layers)
    if not told:
        deformed = Path(shutil.copytree(deformed, tmp_path / "untold"))
        (deformed / "specdef.json").unlink()
    fused = hub.fuse(deformed, tmp_path / "out")
    assert fused.multiplied == ()
    everywhere = set(hub.find_pairs(hub.open_shards(source)))
    assert set(fused.balanced) == (set(manifest.layers) if told else everywhere)
    is_stock(tmp_path / "out", source)
    assert suspected(tmp_path / "out") == set()
    for name, layer in manifest.layers.items():
        groups = layer.entry["groups"]
        triples = zip(
            *(projections(p, name, groups) for p in (source, deformed, tmp_path / "out")), strict=True
        )
        for (V, O), (V2, O2), (X, Y) in triples:  # noqa: E741
            assert relative(X @ Y, V @ O) < 1e-12 + relative(V2 @ O2, V @ O)
            assert relative(X @ Y, V2 @ O2) < 1e-12
            np.testing.assert_allclose(X.T @ X, Y @ Y.T, rtol=0, atol=1e-12 * np.abs(X.T @ X).max())
    parts = {
        part
        for name, layer in manifest.layers.items()
        for part in (name, layer.entry["second"], layer.entry["bias"])
    }
    originals, stored = tensors_in(source), tensors_in(tmp_path / "out")
    untouched = set(originals) - parts if told else {n for n in originals if "norm" in n or "mlp" in n}
    assert untouched
    for name in untouched:
        assert stored[name].tobytes() == originals[name].tobytes()


# -------------------------------------------------------------------------------------------- refusals


def test_what_holds_nothing_to_undo_is_refused(tmp_path: Path):
    source = tmp_path / "in"
    source.mkdir()
    safetensors.numpy.save_file({"w.weight": np.eye(3, dtype=np.float32)}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    with pytest.raises(FileError, match="nothing to undo"):
        hub.fuse(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_outputs_are_checked_before_any_work(inserted, tmp_path: Path):
    _, deformed, _ = inserted
    with pytest.raises(FileError, match="lies in it"):
        hub.fuse(deformed, deformed / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileError, match="exists already"):
        hub.fuse(deformed, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("damage", ["missing", "shape", "dtype", "record"])
def test_a_pair_that_does_not_fit_its_record_is_refused(tmp_path: Path, damage):
    source = tmp_path / "in"
    source.mkdir()
    file = source / "model.safetensors"
    safetensors.numpy.save_file({"w.weight": np.eye(8, 6, dtype=np.float32)}, file)
    (source / "config.json").write_text("{}")
    hub.deform(source, tmp_path / "deformed", sd.SpecDef(4.0, budget=1e-3), "w.weight")
    file = tmp_path / "deformed" / "model.safetensors"
    with safetensors.safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    tensors, comp = safetensors.numpy.load_file(file), "w.weight.comp"
    if damage == "missing":
        del tensors[comp]
    elif damage == "shape":
        tensors[comp] = np.eye(8, dtype=np.float32)
    elif damage == "dtype":
        tensors[comp] = tensors[comp].astype(float)
    else:
        metadata["specdef"] = metadata["specdef"].replace("input", "sideways")
    safetensors.numpy.save_file(tensors, file, metadata=metadata)
    with pytest.raises(FileError, match=r"missing|do not fit the record|record is damaged"):
        hub.fuse(tmp_path / "deformed", tmp_path / "out")
    assert not (tmp_path / "out").exists()
