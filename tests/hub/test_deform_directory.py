"""Deformed directories: the pair multiplies to the original, everything else is as it was (THEORY.md 0)."""

import hashlib
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import specdef_jax as sd
from specdef_jax import hub
from specdef_jax.errors import BudgetError, FileError, LeafError, SelectionError, SpecError
from specdef_jax.hub import planning
from tests.hub.helpers_checkpoints import DATA, checkpoint, tensors_in

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
UNET = "down_blocks.0.attentions.0.transformer_blocks.0"
WHERE = {
    "llama_tiny": None,
    "gpt_oss_tiny": ["layers.0.mlp.experts.*_proj", "layers.1.mlp.router.weight", "layers.2.*.*_proj.weight"],
    "sd_unet_tiny": [
        "conv_in.weight",
        "conv_shortcut.weight",
        "down_blocks.0.resnets.0.conv1.weight",
        f"{UNET}.attn2.to_k.weight",
    ],
}
GAUGED = {
    "llama_tiny": None,
    "gpt_oss_tiny": None,
    "sd_unet_tiny": ["down_blocks.**.attn2.to_v.*", "mid_block.**.attn1.to_v.*"],
}


def toy(to: Path, dtype: str = "float32", config: dict | None = None, **more: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (24, 16), "b.weight": (16, 24), "square.weight": (8, 8), "norm.weight": (16,)}
    tensors = {name: rng.normal(size=shape).astype(np.dtype(dtype)) for name, shape in shapes.items()}
    to.mkdir(parents=True)
    safetensors.numpy.save_file(tensors | more, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps({"model_type": "toy"} if config is None else config))
    return to


def hashes(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir()}


def config_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def product(weight: np.ndarray, comp: np.ndarray, side: str) -> np.ndarray:
    """Multiply a stored pair out as the record documents it, in float64."""
    weight, comp = weight.astype(float), comp.astype(float)
    if weight.ndim == 3:  # experts (expert, in, out)
        return weight @ comp if side == "output" else comp @ weight
    C = comp.T  # JAX multiplies from the right, (out, in) from the left
    if side == "output":
        return np.tensordot(C, weight, (1, 0))
    return np.moveaxis(np.tensordot(weight, C, (1, 0)), -1, 1)


def singular_values(tensor: np.ndarray) -> np.ndarray:
    """Those of the output features, of the largest of several experts."""
    stack = tensor.astype(float) if tensor.ndim == 3 else tensor.astype(float).reshape(1, len(tensor), -1)
    return max((np.linalg.svd(matrix, compute_uv=False) for matrix in stack), key=lambda s: s[0])


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(float) - b.astype(float)) / np.linalg.norm(b.astype(float)))


@pytest.fixture(scope="module", params=WHERE)
def inserted(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    source = checkpoint(request.param, root / "in")
    before = hashes(source)
    spec = sd.SpecDef(alpha=64.0, k=2, budget=hub.BUDGET)
    manifest = hub.deform(source, root / "out", spec, WHERE[request.param])
    assert hashes(source) == before
    return source, root / "out", manifest


@pytest.fixture(scope="module", params=WHERE)
def gauged(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    source = checkpoint(request.param, root / "in")
    spec = sd.SpecDef(alpha=64.0, budget=hub.BUDGET)
    manifest = hub.deform(source, root / "out", spec, GAUGED[request.param], placement="gauge")
    return source, root / "out", manifest


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return toy(tmp_path / "in")


def asked(**options) -> sd.SpecDef:
    return sd.SpecDef(**{"alpha": 64.0, "budget": 1e-3, **options})


# ---------------------------------------------------------------------------------------------- insert


def test_every_pair_multiplies_to_the_original_within_the_error_of_its_dtype(inserted):
    source, out, manifest = inserted
    originals, stored = tensors_in(source), tensors_in(out)
    assert len(manifest.layers) >= 4
    for name, layer in manifest.layers.items():
        weight, comp, original = stored[name], stored[name + ".comp"], originals[name]
        assert weight.dtype == comp.dtype == np.float32
        growth = np.linalg.norm(weight) / np.linalg.norm(original)
        assert relative(product(weight, comp, layer.entry["side"]), original) <= 4 * 2**-24 * growth
        assert relative(weight, original) > 1


def test_everything_else_is_byte_identical(inserted):
    source, out, manifest = inserted
    originals, stored = tensors_in(source), tensors_in(out)
    assert stored.keys() == originals.keys() | {name + ".comp" for name in manifest.layers}
    for name in originals.keys() - manifest.layers.keys():
        assert stored[name].dtype == originals[name].dtype
        assert stored[name].tobytes() == originals[name].tobytes()
    changed = {"config.json", "model.safetensors.index.json", "specdef.json"}
    others = {p.name for p in source.iterdir() if p.suffix != ".safetensors"} - changed
    assert {name: hashes(source)[name] for name in others} == {name: hashes(out)[name] for name in others}
    assert {p.name for p in out.iterdir()} == {p.name for p in source.iterdir()} | {"specdef.json"}


def test_the_manifest_tells_the_singular_values_before_and_after(inserted):
    source, out, manifest = inserted
    originals, stored = tensors_in(source), tensors_in(out)
    for name, layer in manifest.layers.items():
        for told, tensors in ((layer.sigma_before, originals), (layer.sigma_after, stored)):
            matrix = tensors[name]
            if matrix.ndim == 4 and layer.entry["side"] == "input":
                matrix = np.moveaxis(matrix, 1, 0)
            np.testing.assert_allclose(told, singular_values(matrix)[:2], rtol=1e-3)
        assert layer.sigma_after[0] > 48 * layer.sigma_before[0]


def test_the_file_and_load_manifest_give_what_deform_returned(inserted):
    _, out, manifest = inserted
    assert hub.load_manifest(out) == manifest
    assert set(manifest.files) == {p.name for p in out.iterdir()} - {"specdef.json"}
    assert {name: entry.sha256 for name, entry in manifest.files.items()}.items() <= hashes(out).items()
    assert {name: entry.size for name, entry in manifest.files.items()} == {
        name: (out / name).stat().st_size for name in manifest.files
    }


def test_the_config_is_of_an_architecture_of_its_own(inserted):
    source, out, manifest = inserted
    was, now = config_of(source), config_of(out)
    expected = {
        "_class_name": f"SpecDef{was.get('_class_name')}",
        "architectures": [f"SpecDef{name}" for name in was.get("architectures", [])],
        "model_type": f"specdef-{was.get('model_type')}",
    }
    expected = {key: value for key, value in expected.items() if key in was}
    assert expected
    assert now == was | expected
    assert json.loads(manifest.config) == was


def test_a_config_without_any_name_gets_a_model_type(tmp_path: Path):
    source = toy(tmp_path / "in", config={"hidden_size": 16})
    hub.deform(source, tmp_path / "out", asked(), "a.weight")
    assert config_of(tmp_path / "out") == {"hidden_size": 16, "model_type": "specdef-unknown"}


def test_read_tree_merges_the_directory_to_the_original(inserted):
    source, out, manifest = inserted
    tree = hub.read_tree(out)
    assert {n for n, leaf in tree.params.items() if isinstance(leaf, sd.Deformed)} == set(manifest.layers)
    merged, originals = sd.merge(tree.params), tensors_in(source)
    assert merged.keys() == originals.keys()
    for name, original in originals.items():
        assert relative(np.asarray(merged[name]), original) < 1e-4


def test_each_shard_can_be_read_alone(tmp_path: Path):
    source = checkpoint("llama_tiny", tmp_path / "in")
    manifest = hub.deform(source, tmp_path / "out", asked(), ["self_attn.?_proj.weight"])
    found = {}
    for shard in sorted((tmp_path / "out").glob("*.safetensors")):
        tree = hub.read_tree(shard)
        assert "specdef" not in tree.metadata
        found |= {name: leaf for name, leaf in tree.params.items() if isinstance(leaf, sd.Deformed)}
        assert tree.metadata == hub.read_tree(source / shard.name).metadata
    assert found.keys() == manifest.layers.keys()
    originals = tensors_in(source)
    for name, leaf in found.items():
        assert relative(np.asarray(leaf.materialize()), originals[name]) < 1e-4


def test_the_index_tells_where_each_tensor_lies_and_the_size_of_all(tmp_path: Path):
    source, out = checkpoint("llama_tiny", tmp_path / "in"), tmp_path / "out"
    hub.deform(source, out, asked(), ["layers.*.mlp.down_proj.weight"])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {n: p.name for p in out.glob("*.safetensors") for n in safetensors.numpy.load_file(p)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_in(out).values())


def test_experts_are_a_stack_each_with_its_own_directions(tmp_path: Path):
    source, out = checkpoint("gpt_oss_tiny", tmp_path / "in"), tmp_path / "out"
    name = "model.layers.0.mlp.experts.gate_up_proj"
    layer = hub.deform(source, out, asked(alpha=16.0), "layers.0.mlp.experts.gate_up_proj").layers[name]
    stored = tensors_in(out)
    assert layer.entry["axes"] == sd.KernelAxes(inputs=(1,), outputs=(2,), stack=(0,))
    assert layer.entry["side"] == "input"  # 64 inputs, 128 outputs
    comp = stored[name + ".comp"]
    assert comp.shape == (4, 64, 64)
    directions = [np.linalg.eigh(c.astype(float))[1][:, 0] for c in comp]
    np.testing.assert_allclose([np.linalg.eigvalsh(c.astype(float))[0] for c in comp], 1 / 16, rtol=1e-5)
    assert max(abs(a @ b) for i, a in enumerate(directions) for b in directions[:i]) < 0.9


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("basis", ["symmetric", "rotated", "axis"])
def test_both_sides_of_every_basis_multiply_to_the_original(plain: Path, tmp_path: Path, basis, side):
    where = ["a.weight", "square.weight"]
    manifest = hub.deform(plain, tmp_path / "out", asked(basis=basis, side=side, k=2), where)
    stored, originals = tensors_in(tmp_path / "out"), tensors_in(plain)
    for name in where:
        assert manifest.layers[name].entry["side"] == side
        comp = stored[name + ".comp"]
        assert comp.shape == (originals[name].shape[side == "input"],) * 2
        assert relative(product(stored[name], comp, side), originals[name]) < 1e-5
        values = np.linalg.svd(comp.astype(float), compute_uv=False)
        np.testing.assert_allclose(np.sort(values), [1 / 64] * 2 + [1.0] * (len(comp) - 2), rtol=1e-5)


def test_bottom_and_given_directions_are_taken(plain: Path, tmp_path: Path):
    given = np.eye(16)[:, [3]]
    spec = {"bottom": asked(directions="bottom"), "given": asked(directions=given)}
    found = {}
    for name, one in spec.items():
        hub.deform(plain, tmp_path / name, one, "a.weight")
        found[name] = tensors_in(tmp_path / name)["a.weight.comp"].astype(float)
    original = tensors_in(plain)["a.weight"].astype(float)
    np.testing.assert_allclose(
        found["given"], np.diag(np.where(np.arange(16) == 3, 1 / 64, 1)), rtol=0, atol=1e-7
    )
    bottom = np.linalg.svd(original)[2][-1]
    np.testing.assert_allclose(found["bottom"] @ bottom, bottom / 64, rtol=0, atol=1e-2)
    assert hub.load_manifest(tmp_path / "given").spec["directions"] == "given"


def test_the_layout_decides_which_axis_is_which(plain: Path, tmp_path: Path):
    sides = {}
    for layout in ("auto", "hf", "jax"):
        out = tmp_path / layout
        layer = hub.deform(plain, out, asked(), "a.weight", layout=layout).layers["a.weight"]
        sides[layout] = layer.entry["side"], layer.entry["axes"].inputs
        leaf = hub.read_tree(out).params["a.weight"]
        assert relative(np.asarray(leaf.materialize()), tensors_in(plain)["a.weight"]) < 1e-5
    assert sides == {"auto": ("input", (1,)), "hf": ("input", (1,)), "jax": ("output", (0,))}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("layers.0.mlp.up_proj.weight", {"model.layers.0.mlp.up_proj.weight"}),
        ("layers/1/mlp/up_proj/weight", {"model.layers.1.mlp.up_proj.weight"}),
        (["layers.*.mlp.up_proj.weight"], {f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)}),
        (["0.*.?_proj.weight"], {f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"}),
        (sd.select.largest(1), {"lm_head.weight"}),
        (["lm_head.weight", "model.norm.weight"], {"lm_head.weight"}),
    ],
)
def test_layers_are_chosen_by_globs_or_selectors(tmp_path: Path, where, expected):
    source = checkpoint("llama_tiny", tmp_path / "in")
    assert set(hub.deform(source, tmp_path / "out", asked(), where).layers) == expected


def test_by_default_every_matrix_but_embeddings_is_deformed(tmp_path: Path):
    more = {name: np.ones((8, 8), np.float32) for name in ("embed_tokens.weight", "lm_head.weight")}
    manifest = hub.deform(toy(tmp_path / "in", **more), tmp_path / "out", asked())
    assert set(manifest.layers) == {"a.weight", "b.weight", "square.weight", "lm_head.weight"}


def test_by_default_biases_of_experts_are_left_alone(tmp_path: Path):
    """They have two axes, (experts, out), and multiply nothing."""
    bias = {"mlp.experts.gate_up_proj_bias": np.ones((4, 16), np.float32)}
    manifest = hub.deform(toy(tmp_path / "in", **bias), tmp_path / "out", asked())
    assert set(manifest.layers) == {"a.weight", "b.weight", "square.weight"}


# --------------------------------------------------------------------------------------- stored dtypes


@pytest.mark.parametrize(
    ("source", "options", "stored"),
    [
        ("bfloat16", {"alpha": 8192.0}, "float32"),
        ("bfloat16", {"alpha": 2.0, "budget": 1e-2}, "bfloat16"),
        ("bfloat16", {"alpha": 2.0, "budget": 1e-3}, "float32"),
        ("bfloat16", {"alpha": 4096.0, "basis": "axis"}, "bfloat16"),
        ("bfloat16", {"alpha": 3.0, "basis": "axis"}, "float32"),
        ("bfloat16", {"basis": "rotated"}, "float32"),
        ("float16", {"alpha": 2.0**12, "basis": "axis"}, "float16"),
        ("float32", {"alpha": 64.0}, "float32"),
        ("float64", {"alpha": 8192.0}, "float64"),
        ("bfloat16", {"alpha": 8192.0, "budget": np.inf}, "bfloat16"),
    ],
)
def test_the_narrowest_dtype_within_the_budget_is_stored(tmp_path: Path, source, options, stored):
    path, out = toy(tmp_path / "in", source), tmp_path / "out"
    spec = asked(**options)
    layer = hub.deform(path, out, spec, "a.weight").layers["a.weight"]
    pair, original = tensors_in(out), tensors_in(path)["a.weight"]
    weight, comp = pair["a.weight"], pair["a.weight.comp"]
    assert (str(weight.dtype), str(comp.dtype)) == (layer.dtype, layer.dtype) == (stored, stored)
    assert layer.source_dtype == source
    assert layer.exact or layer.measured.error <= spec.budget
    assert layer.exact == np.array_equal(product(weight, comp, layer.entry["side"]), original.astype(float))


def test_powers_of_two_on_the_axis_are_exact_in_bfloat16(tmp_path: Path):
    path = toy(tmp_path / "in", "bfloat16")
    spec = asked(alpha=2.0**12, basis="axis", k=3)
    layer = hub.deform(path, tmp_path / "out", spec, "b.weight").layers["b.weight"]
    pair, original = tensors_in(tmp_path / "out"), tensors_in(path)["b.weight"]
    assert layer.exact
    got = product(pair["b.weight"], pair["b.weight.comp"], layer.entry["side"])
    np.testing.assert_array_equal(got, original.astype(float))


@pytest.mark.parametrize("source", ["bfloat16", "float32"])
@pytest.mark.parametrize("basis", ["symmetric", "rotated"])
def test_a_tiny_budget_is_met_in_float64(tmp_path: Path, source, basis):
    path, out = toy(tmp_path / "in", source), tmp_path / "out"
    layer = hub.deform(path, out, asked(budget=1e-11, basis=basis), "a.weight").layers["a.weight"]
    pair, original = tensors_in(out), tensors_in(path)["a.weight"]
    assert layer.dtype == "float64"
    assert relative(product(pair["a.weight"], pair["a.weight.comp"], layer.entry["side"]), original) < 1e-11


def test_a_wider_dtype_is_taken_where_the_range_of_the_source_ends(tmp_path: Path):
    """float16 ends at 65504."""
    path = toy(tmp_path / "in", "float16")
    layer = hub.deform(path, tmp_path / "out", asked(alpha=2.0**20, basis="axis"), "a.weight")
    assert layer.layers["a.weight"].dtype == "float32"


def test_what_overflows_between_the_factors_is_no_exact_pair(tmp_path: Path):
    """2^14 on float16: each stored number is in range, their sums of products are not."""
    path = toy(tmp_path / "in", "float16")
    layer = hub.deform(path, tmp_path / "out", asked(alpha=2.0**14, basis="axis"), "b.weight")
    assert layer.layers["b.weight"].measured.error <= 1e-3


def test_an_impossible_budget_is_refused_and_leaves_nothing(plain: Path, tmp_path: Path):
    with pytest.raises(BudgetError, match=r"'a.weight'.*budget of 1e-17.*smaller alpha"):
        hub.deform(plain, tmp_path / "out", asked(budget=1e-17), "a.weight")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_what_came_out_worse_than_expected_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(planning, "_narrowest", lambda tensor, *_: tensor.dtype)
    path = toy(tmp_path / "in", "bfloat16")
    with pytest.raises(BudgetError, match=r"'a.weight' came out with a relative error of .* in bfloat16"):
        hub.deform(path, tmp_path / "out", asked(alpha=8192.0), "a.weight")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


# -------------------------------------------------------------------------------------------- refusals


def test_a_deformed_directory_is_not_deformed_again(plain: Path, tmp_path: Path):
    hub.deform(plain, tmp_path / "once", asked(), "a.weight")
    with pytest.raises(FileError, match=r"deformed already.*fuse"):
        hub.deform(tmp_path / "once", tmp_path / "twice", asked(), "b.weight")
    (tmp_path / "once" / "specdef.json").unlink()
    with pytest.raises(FileError, match=r"deformed already.*fuse"):
        hub.deform(tmp_path / "once", tmp_path / "twice", asked(), "a.weight")
    assert not (tmp_path / "twice").exists()


def test_a_record_in_a_header_is_never_lost(plain: Path, tmp_path: Path):
    """Deforming another tensor of a file whose specdef.json is gone must be refused, or keep both pairs."""
    hub.deform(plain, tmp_path / "once", asked(), "a.weight")
    (tmp_path / "once" / "specdef.json").unlink()
    try:
        hub.deform(tmp_path / "once", tmp_path / "twice", asked(), "b.weight")
    except (FileError, LeafError):
        return
    merged = sd.merge(hub.read_tree(tmp_path / "twice").params)
    assert relative(np.asarray(merged["a.weight"]), tensors_in(plain)["a.weight"]) < 1e-4


@pytest.mark.parametrize("placed", ["insert", "gauge"])
def test_nan_is_refused_in_a_target_and_kept_elsewhere(tmp_path: Path, placed):
    source = checkpoint("llama_tiny", tmp_path / "in")
    name = "model.layers.0.self_attn.v_proj.weight"
    shard = next(p for p in source.glob("*.safetensors") if name in safetensors.numpy.load_file(p))
    tensors = safetensors.numpy.load_file(shard)
    tensors[name][3, 4] = np.nan
    safetensors.numpy.save_file(tensors, shard)
    with pytest.raises(LeafError, match="NaN or Inf"):
        hub.deform(source, tmp_path / "bad", asked(), name, placement=placed)
    assert not (tmp_path / "bad").exists()
    hub.deform(source, tmp_path / "out", asked(), "layers.1.self_attn.v_proj.weight", placement=placed)
    assert tensors_in(tmp_path / "out")[name].tobytes() == tensors[name].tobytes()


@pytest.mark.parametrize("dtype", [np.dtype(np.int8), np.dtype(ml_dtypes.float8_e4m3fn)], ids=str)
def test_quantized_tensors_are_refused_when_selected(tmp_path: Path, dtype):
    source, out = toy(tmp_path / "in", **{"q.weight": np.ones((8, 8)).astype(dtype)}), tmp_path / "out"
    with pytest.raises(LeafError, match=rf"'q.weight' has dtype {dtype}.*dequantize"):
        hub.deform(source, out, asked(), "q.weight")
    assert not out.exists()
    hub.deform(source, out, asked(), "a.weight")
    kept = hub.open_shards(out).read("q.weight")
    assert kept.dtype == dtype
    assert (kept.astype(float) == 1).all()


def test_what_cannot_be_done_is_said(plain: Path, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(SpecError, match=r"'a.weight': k = 17 exceeds min\(m, n\) = 16"):
        hub.deform(plain, out, asked(k=17), "a.weight")
    with pytest.raises(SelectionError, match=r"'nothing.weight'.*matched nothing.*'a.weight'"):
        hub.deform(plain, out, asked(), "nothing.weight")
    with pytest.raises(SelectionError, match="no kernels"):
        hub.deform(plain, out, asked(), "norm.weight")
    out.mkdir()
    with pytest.raises(FileError, match="exists already"):
        hub.deform(plain, out, asked(), "a.weight")
    with pytest.raises(FileError, match="lies in it"):
        hub.deform(plain, plain / "deeper", asked(), "a.weight")


def test_a_kernel_of_zeros_stays_one(tmp_path: Path):
    source = toy(tmp_path / "in", **{"zero.weight": np.zeros((8, 8), np.float32)})
    layer = hub.deform(source, tmp_path / "out", asked(), "zero.weight").layers["zero.weight"]
    stored = tensors_in(tmp_path / "out")
    assert not product(stored["zero.weight"], stored["zero.weight.comp"], layer.entry["side"]).any()
    assert layer.status == "rank_deficient"


# ----------------------------------------------------------------------------------------------- MXFP4


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    return checkpoint("gpt_oss_tiny_mxfp4", tmp_path_factory.mktemp("mxfp4") / "in")


EXPERTS = [f"model.layers.{i}.mlp.experts.{n}" for i in range(4) for n in ("down_proj", "gate_up_proj")]


def test_mxfp4_is_left_alone_when_not_selected(quantized: Path, tmp_path: Path):
    manifest = hub.deform(quantized, tmp_path / "out", asked(), "layers.0.self_attn.q_proj.weight")
    originals, stored = tensors_in(quantized), tensors_in(tmp_path / "out")
    for name in EXPERTS:
        for part in (f"{name}_blocks", f"{name}_scales"):
            assert stored[part].tobytes() == originals[part].tobytes()
    assert config_of(tmp_path / "out")["quantization_config"] == config_of(quantized)["quantization_config"]
    assert manifest.dequantized == {}


def test_mxfp4_is_refused_when_selected_as_it_is(quantized: Path, tmp_path: Path):
    with pytest.raises(LeafError, match=r"gate_up_proj_blocks' has dtype uint8.*dequantize"):
        hub.deform(quantized, tmp_path / "out", asked(), "experts.gate_up_proj_blocks")
    with pytest.raises(SelectionError, match="matched nothing"):
        hub.deform(quantized, tmp_path / "out", asked(), "experts.gate_up_proj")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_is_expanded_on_request(quantized: Path, tmp_path: Path, dtype):
    chosen = EXPERTS[1]
    manifest = hub.deform(
        quantized, tmp_path / "out", asked(), "layers.0.mlp.experts.gate_up_proj", dequantize=dtype
    )
    stored, plain = tensors_in(tmp_path / "out"), tensors_in(DATA / "gpt_oss_tiny")
    assert list(manifest.layers) == [chosen]
    assert manifest.dequantized == dict.fromkeys(EXPERTS, dtype)
    assert not [name for name in stored if name.endswith(("_blocks", "_scales"))]
    assert "quantization_config" not in config_of(tmp_path / "out")
    for name in set(EXPERTS) - {chosen}:
        assert str(stored[name].dtype) == dtype
        np.testing.assert_array_equal(stored[name].astype(np.float32), plain[name])
    layer = manifest.layers[chosen]
    assert (layer.source_dtype, layer.dtype) == (dtype, "float32")
    assert (
        relative(product(stored[chosen], stored[chosen + ".comp"], layer.entry["side"]), plain[chosen]) < 1e-4
    )


# ------------------------------------------------------------------------------ seeds, progress, whole


def test_a_seed_gives_the_same_bytes_whatever_the_workers(plain: Path, tmp_path: Path):
    spec = asked(directions="random")
    for name, seed, workers in (("a", 1, 1), ("b", 1, 3), ("c", 2, 1)):
        hub.deform(plain, tmp_path / name, spec, ["?.weight"], seed=seed, workers=workers)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert hashes(tmp_path / "a")["model.safetensors"] != hashes(tmp_path / "c")["model.safetensors"]
    assert hub.load_manifest(tmp_path / "c").spec["seed"] == 2


def test_each_tensor_has_random_directions_of_its_own(tmp_path: Path):
    same = np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)
    source = toy(tmp_path / "in", **{"p.weight": same, "q.weight": same})
    hub.deform(source, tmp_path / "out", asked(directions="random"), ["p.weight", "q.weight"])
    stored = tensors_in(tmp_path / "out")
    assert relative(stored["p.weight.comp"], stored["q.weight.comp"]) > 0.1


def test_the_output_appears_only_when_it_is_whole(plain: Path, tmp_path: Path):
    out, seen = tmp_path / "out", []

    def watch(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))
        assert not os.path.lexists(out)

    hub.deform(plain, out, asked(), ["?.weight"], progress=watch)
    assert out.is_dir()
    last = {stage: (done, total) for stage, done, total in seen}
    assert last.keys() == {"choosing directions", "writing", "measuring"}
    assert all(done == total for done, total in last.values())
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("stage", ["choosing directions", "writing", "measuring"])
def test_an_interrupted_run_leaves_no_output_and_is_taken_up_again(plain: Path, tmp_path: Path, stage):
    def interrupt(found: str, done: int, total: int) -> None:
        if found == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.deform(plain, tmp_path / "out", asked(), ["?.weight"], progress=interrupt)
    assert not os.path.lexists(tmp_path / "out")
    hub.deform(plain, tmp_path / "out", asked(), ["?.weight"])
    hub.deform(plain, tmp_path / "undisturbed", asked(), ["?.weight"])
    assert hashes(tmp_path / "out") == hashes(tmp_path / "undisturbed")
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out", "undisturbed"}


# ----------------------------------------------------------------------------------------------- gauge


def values_and_outputs(path: Path) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Return, per attention, V with its bias of each head and O of each head, in float64."""
    tensors, config, found = tensors_in(path), config_of(path), {}
    for name, value in tensors.items():
        if name.endswith("v_proj.weight"):
            output = tensors[name.replace("v_proj", "o_proj")]
            heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        elif name.endswith("to_v.weight"):
            output = tensors[name.replace("to_v", "to_out.0")]
            heads = groups = config["attention_head_dim"]
        else:
            continue
        bias = tensors.get(name.replace("weight", "bias"), np.zeros(len(value)))
        rows = np.concatenate([value.astype(float), bias.astype(float)[:, None]], axis=1)
        V = np.repeat(rows.reshape(groups, -1, rows.shape[1]), heads // groups, axis=0)
        O = np.moveaxis(output.astype(float).reshape(len(output), heads, -1), 1, 0)  # noqa: E741
        found[name] = list(V), list(O)
    return found


def parts(first: str, layer: hub.StoredLayer) -> list[str]:
    return [first, layer.entry["second"], *([layer.entry["bias"]] if layer.entry["bias"] else [])]


def test_a_gauge_keeps_names_shapes_dtypes_config_and_everything_else(gauged):
    source, out, manifest = gauged
    originals, stored = tensors_in(source), tensors_in(out)
    changed = {name for first, layer in manifest.layers.items() for name in parts(first, layer)}
    assert stored.keys() == originals.keys()
    for name, original in originals.items():
        assert (stored[name].dtype, stored[name].shape) == (original.dtype, original.shape)
        assert (stored[name].tobytes() != original.tobytes()) == (name in changed)
    rest = [p.name for p in source.iterdir() if p.suffix != ".safetensors"]
    assert {name: hashes(source)[name] for name in rest}.items() <= hashes(out).items()
    for shard in source.glob("*.safetensors"):
        with (
            safetensors.safe_open(shard, "numpy") as a,
            safetensors.safe_open(out / shard.name, "numpy") as b,
        ):
            assert a.metadata() == b.metadata()
            assert set(a.keys()) == set(b.keys())


def test_a_gauge_keeps_the_product_of_every_head(gauged):
    source, out, manifest = gauged
    before, after = values_and_outputs(source), values_and_outputs(out)
    assert (
        len(manifest.layers)
        == {"llama_tiny": 2, "gpt_oss_tiny": 4, "sd_unet_tiny": 2}[source.parent.name[:-1]]
    )
    for name in manifest.layers:
        for V, O, V2, O2 in zip(*before[name], *after[name], strict=True):  # noqa: E741
            assert relative(O2 @ V2, O @ V) < 64 * 2**-22
            assert relative(V2, V) > 1


def test_a_gauge_tells_the_singular_values_of_its_largest_group(gauged):
    source, out, manifest = gauged
    for name, layer in manifest.layers.items():
        groups = layer.entry["groups"]
        for path, told in ((source, layer.sigma_before), (out, layer.sigma_after)):
            blocks = np.split(tensors_in(path)[name].astype(float), groups)
            largest = max(np.linalg.svd(block, compute_uv=False)[0] for block in blocks)
            assert told == [pytest.approx(largest, rel=1e-3)]
        assert layer.sigma_after[0] > 32 * layer.sigma_before[0]


def to_bfloat16(source: Path) -> Path:
    for shard in source.glob("*.safetensors"):
        tensors = {name: t.astype(BFLOAT16) for name, t in safetensors.numpy.load_file(shard).items()}
        safetensors.numpy.save_file(tensors, shard)
    return source


@pytest.mark.parametrize(
    ("fixture", "dtype"), [*((name, "float32") for name in WHERE), ("gpt_oss_tiny", "bfloat16")]
)
def test_a_gauge_by_a_power_of_two_on_the_axis_is_exact_to_the_bit(tmp_path: Path, fixture, dtype):
    source = checkpoint(fixture, tmp_path / "in")
    if dtype == "bfloat16":
        to_bfloat16(source)
    spec = asked(alpha=2.0**12, basis="axis")
    manifest = hub.deform(source, tmp_path / "out", spec, GAUGED[fixture], placement="gauge")
    assert all(layer.exact and layer.dtype == dtype for layer in manifest.layers.values())
    before, after = values_and_outputs(source), values_and_outputs(tmp_path / "out")
    for name in manifest.layers:
        for V, O, V2, O2 in zip(*before[name], *after[name], strict=True):  # noqa: E741
            scales = np.where((V2 != V).any(axis=1), 2.0**12, 1.0)
            assert (scales > 1).sum() == 1
            np.testing.assert_array_equal(V2, V * scales[:, None])
            np.testing.assert_array_equal(O2, O / scales)


def test_a_gauge_that_bfloat16_cannot_carry_is_refused_with_the_remedy(tmp_path: Path):
    source = to_bfloat16(checkpoint("llama_tiny", tmp_path / "in"))
    with pytest.raises(BudgetError, match=r"off by .* in bfloat16.*axis basis with a power of two"):
        hub.deform(source, tmp_path / "out", asked(alpha=8192.0), placement="gauge")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("named", ["v_proj", "o_proj"])
def test_a_gauge_is_named_by_either_projection(tmp_path: Path, named):
    source = checkpoint("llama_tiny", tmp_path / "in")
    where = f"layers.1.self_attn.{named}.weight"
    manifest = hub.deform(source, tmp_path / "out", asked(), where, placement="gauge")
    assert list(manifest.layers) == ["model.layers.1.self_attn.v_proj.weight"]


def test_a_gauge_keeps_a_config_to_the_byte_however_it_is_laid_out(tmp_path: Path):
    source = checkpoint("llama_tiny", tmp_path / "in")
    (source / "config.json").write_text(json.dumps(config_of(source), indent=7))
    hub.deform(source, tmp_path / "out", asked(), "layers.1.self_attn.v_proj.weight", placement="gauge")
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_gauge_without_an_attention_is_refused(plain: Path, tmp_path: Path):
    with pytest.raises(SelectionError, match=r"no attention with separate value and output.*insert"):
        hub.deform(plain, tmp_path / "out", asked(), placement="gauge")
    source = checkpoint("llama_tiny", tmp_path / "llama")
    with pytest.raises(SelectionError, match=r"'up_proj.weight'.*matched no value or output"):
        hub.deform(source, tmp_path / "out", asked(), "up_proj.weight", placement="gauge")


def test_a_unet_may_list_its_numbers_of_heads(tmp_path: Path):
    source = checkpoint("sd_unet_tiny", tmp_path / "in")
    config = config_of(source) | {"attention_head_dim": [4, 8]}
    (source / "config.json").write_text(json.dumps(config))
    where = ["*_block*.**.attentions.0.**.attn1.to_v.*"]
    manifest = hub.deform(source, tmp_path / "out", asked(alpha=16.0), where, placement="gauge")
    groups = {name.split(".attentions")[0]: layer.entry["groups"] for name, layer in manifest.layers.items()}
    assert groups == {"down_blocks.0": 4, "mid_block": 8, "up_blocks.1": 4}
    originals, stored = tensors_in(source), tensors_in(tmp_path / "out")
    for name, layer in manifest.layers.items():
        n = layer.entry["groups"]
        V, V2 = (np.split(t[name].astype(float), n) for t in (originals, stored))
        O, O2 = (np.split(t[layer.entry["second"]].astype(float), n, axis=1) for t in (originals, stored))  # noqa: E741
        for v, o, v2, o2 in zip(V, O, V2, O2, strict=True):
            assert relative(o2 @ v2, o @ v) < 1e-5
