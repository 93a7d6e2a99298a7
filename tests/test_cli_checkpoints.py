"""The command on checkpoint directories: exit codes 0, 1 and 2, errors in one line, strict JSON."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from specdef_jax import hub
from specdef_jax.cli import main
from tests.hub.helpers_checkpoints import checkpoint, tensors_in

NAME = "model.layers.0.mlp.up_proj.weight"
VALUE = "model.layers.0.self_attn.v_proj.weight"


def strict(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return checkpoint("llama_tiny", tmp_path_factory.mktemp("source") / "in")


@pytest.fixture(scope="module")
def inserted(source: Path) -> Path:
    out = source.parent / "inserted"
    assert main(["deform", str(source), str(out), "--alpha", "64", "--layers", "up_proj.weight"]) == 0
    return out


@pytest.fixture(scope="module")
def gauged(source: Path) -> Path:
    out = source.parent / "gauged"
    options = ["--placement", "gauge", "--basis", "axis", "--alpha", "4096"]
    assert main(["deform", str(source), str(out), *options]) == 0
    return out


def refused(capsys, *command: object) -> str:
    """Run a command that must fail with exit code 2, and return the one line that says why."""
    capsys.readouterr()
    assert main([str(part) for part in command]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("specdef: ")
    assert told.err.count("\n") == 1
    return told.err


# ---------------------------------------------------------------------------------------------- deform


def test_deform_shows_each_tensor_with_its_error(source: Path, tmp_path: Path, capsys):
    options = ["--layers", "layers.*.mlp.up_proj.weight", "lm_head.weight", "--alpha", "64", "--k", "2"]
    assert main(["deform", str(source), str(tmp_path / "out"), *options]) == 0
    told = capsys.readouterr()
    manifest = hub.load_manifest(tmp_path / "out")
    assert set(manifest.layers) == {NAME, NAME.replace("0", "1"), "lm_head.weight"}
    assert f"3 deformed (insert), written to {tmp_path / 'out'}" in told.out.replace("\n", "")
    assert f"{manifest.layers[NAME].measured.error:.1e}" in told.out
    assert "proved" in told.out
    assert told.err == ""
    assert manifest.spec == {
        "alpha": 64.0,
        "k": 2,
        "basis": "symmetric",
        "side": "auto",
        "directions": "top",
        "tol": 1e-2,
        "budget": hub.BUDGET,
        "seed": 0,
    }


def test_deform_passes_every_option_on(source: Path, tmp_path: Path):
    options = "--basis rotated --side output --directions random --tol 0.5 --budget inf --seed 7 --layout jax"
    out = tmp_path / "out"
    assert main(["deform", str(source), str(out), "--layers", "up_proj.weight", *options.split()]) == 0
    manifest = hub.load_manifest(out)
    expected = {
        "alpha": 8192.0,
        "k": 1,
        "basis": "rotated",
        "side": "output",
        "directions": "random",
        "tol": 0.5,
        "budget": math.inf,
        "seed": 7,
    }
    assert manifest.spec == expected
    assert manifest.layers[NAME].entry["axes"].inputs == (0,)


def test_deform_gauge_keeps_a_stock_checkpoint(source: Path, gauged: Path):
    assert (gauged / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert tensors_in(gauged).keys() == tensors_in(source).keys()
    assert hub.load_manifest(gauged).placement == "gauge"
    assert all(layer.exact for layer in hub.load_manifest(gauged).layers.values())


def test_deform_dequantizes_on_request(tmp_path: Path):
    source = checkpoint("gpt_oss_tiny_mxfp4", tmp_path / "in")
    options = ["--layers", "layers.0.mlp.experts.down_proj", "--dequantize", "bfloat16", "--alpha", "16"]
    assert main(["deform", str(source), str(tmp_path / "out"), *options]) == 0
    assert set(hub.load_manifest(tmp_path / "out").dequantized.values()) == {"bfloat16"}


def test_what_deform_refuses(source: Path, inserted: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    cases = [
        ([source, out, "--layers", "nothing"], "matched nothing"),
        ([source, out, "--k", "65", "--layers", "up_proj.weight"], "k = 65 exceeds"),
        ([source, out, "--alpha", "-1"], "alpha = -1"),
        ([source, out, "--budget", "1e-17", "--layers", "up_proj.weight"], "beyond the budget"),
        ([source, out, "--overwrite"], "never overwritten"),
        ([source, source / "out"], "lies in it"),
        ([source, inserted], "exists already"),
        ([inserted, out], "deformed already"),
        (
            [source, out, "--placement", "gauge", "--layers", "up_proj.weight"],
            "no value or output projection",
        ),
    ]
    for command, reason in cases:
        assert reason in refused(capsys, "deform", *command)
    assert not out.exists()
    (tmp_path / "bare").mkdir()
    shutil.copyfile(source / "model-00001-of-00006.safetensors", tmp_path / "bare" / "model.safetensors")
    assert "has no config.json" in refused(capsys, "deform", tmp_path / "bare", out)
    file = tmp_path / "bare" / "model.safetensors"
    assert "no directory" in refused(
        capsys, "deform", file, tmp_path / "o.safetensors", "--placement", "gauge"
    )


def test_a_source_that_is_missing_or_holds_a_pickle_is_called_so(source: Path, tmp_path: Path, capsys):
    (tmp_path / "bin").mkdir()
    shutil.copyfile(source / "config.json", tmp_path / "bin" / "config.json")
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"1")
    for command in (["inspect", tmp_path / "{}"], ["deform", tmp_path / "{}", tmp_path / "out"]):
        none, bin_ = ([str(part).format(name) for part in command] for name in ("none", "bin"))
        assert "does not exist" in refused(capsys, *none)
        assert "convert the checkpoint to safetensors first" in refused(capsys, *bin_)


def test_an_unknown_choice_is_refused_by_the_parser(source: Path, tmp_path: Path, capsys):
    for option, value in (("--placement", "else"), ("--dequantize", "int8"), ("--layout", "torch")):
        assert main(["deform", str(source), str(tmp_path / "out"), option, value]) == 2
    capsys.readouterr()


# ---------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("which", ["inserted", "gauged"])
def test_verify_says_that_everything_holds(source: Path, which, request, capsys):
    out = request.getfixturevalue(which)
    capsys.readouterr()
    assert main(["verify", str(out), "--against", str(source)]) == 0
    told = capsys.readouterr()
    assert "everything holds" in told.out
    assert "NOT" not in told.out
    assert "FAILS" not in told.out
    assert ("bit-identical" in told.out) == (which == "gauged")


def test_verify_writes_strict_json(source: Path, inserted: Path, tmp_path: Path, capsys):
    capsys.readouterr()
    assert main(["verify", str(inserted), "--against", str(source), "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert found["holds"] is True
    assert set(found["layers"]) == {NAME, NAME.replace("0", "1")}
    assert found["layers"][NAME]["measured"]["word"] == "proved"
    bad = Path(shutil.copytree(inserted, tmp_path / "bad"))
    shard = next(p for p in bad.glob("*.safetensors") if NAME in safetensors.numpy.load_file(p))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 0x40  # an exponent
    shard.write_bytes(data)
    assert main(["verify", str(bad), "--against", str(source), "--json"]) == 1
    found = strict(capsys.readouterr().out)
    assert found["holds"] is False
    assert any(shard.name in problem for problem in found["problems"])


def test_verify_names_what_fails_and_exits_with_1(source: Path, inserted: Path, tmp_path: Path, capsys):
    bad = Path(shutil.copytree(inserted, tmp_path / "bad"))
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1.0}))
    manifest = json.loads((bad / "specdef.json").read_text())
    manifest["spec"]["budget"] = 1e-12
    (bad / "specdef.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main(["verify", str(bad), "--against", str(source)]) == 1
    told = capsys.readouterr().out
    assert "FAILS: config.json differs from the original in 'rms_norm_eps'\n" in told
    assert told.count("│ FAILS ") == 2
    assert "NOT everything holds" in told


def test_what_verify_refuses(source: Path, inserted: Path, tmp_path: Path, capsys):
    assert "has no specdef.json" in refused(capsys, "verify", source, "--against", source)
    assert "is no directory" in refused(capsys, "verify", inserted, "--against", tmp_path / "none")
    bad = Path(shutil.copytree(inserted, tmp_path / "bad"))
    (bad / "specdef.json").write_text("{}")
    assert "specdef.json is damaged" in refused(capsys, "verify", bad, "--against", source)
    assert main(["verify", str(inserted)]) == 2
    capsys.readouterr()


# ---------------------------------------------------------------------------------------------- attack


def test_attack_fuse_brings_the_original_back(source: Path, inserted: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(["attack", "fuse", str(inserted), str(out)]) == 0
    assert capsys.readouterr().out == f"fuse: 2 compensations multiplied in, written to {out}\n"
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    originals, found = tensors_in(source), tensors_in(out)
    assert found.keys() == originals.keys()
    np.testing.assert_allclose(found[NAME], originals[NAME], atol=1e-5)


def test_attack_fuse_balances_a_gauge(gauged: Path, tmp_path: Path, capsys):
    capsys.readouterr()
    assert main(["attack", "fuse", str(gauged), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("fuse: 2 attentions balanced, written to ")
    assert main(["inspect", str(tmp_path / "out"), "--layers", "v_proj.weight", "--json"]) == 0
    assert [row["suspected"] for row in strict(capsys.readouterr().out)["tensors"]] == ["", ""]


def test_what_attack_refuses(inserted: Path, tmp_path: Path, capsys):
    assert "is no directory" in refused(capsys, "attack", "fuse", tmp_path / "none", tmp_path / "out")
    assert "lies in it" in refused(capsys, "attack", "fuse", inserted, inserted / "out")
    assert main(["attack", "break", str(inserted), str(tmp_path / "out")]) == 2
    capsys.readouterr()
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- inspect


def test_inspect_suspects_nothing_of_an_undeformed_directory(source: Path, capsys):
    assert main(["inspect", str(source), "--json"]) == 0
    rows = strict(capsys.readouterr().out)["tensors"]
    assert {row["name"] for row in rows} == set(tensors_in(source))
    assert {row["suspected"] for row in rows} == {""}
    assert {row["deformed"] for row in rows} == {None}
    for row in rows:
        tensor = tensors_in(source)[row["name"]]
        assert (row["shape"], row["dtype"], row["note"]) == (list(tensor.shape), "float32", "")
        if tensor.ndim == 2:
            exact = np.linalg.svd(tensor.astype(float), compute_uv=False)[:3]
            np.testing.assert_allclose(row["singular_values"], exact, rtol=1e-3)
        else:
            assert row["singular_values"] is None


def test_inspect_shows_what_is_deformed_and_what_looks_so(inserted: Path, capsys):
    capsys.readouterr()
    assert main(["inspect", str(inserted), "--json", "--layers", "mlp.*.weight", "**.comp"]) == 0
    rows = {row["name"]: row for row in strict(capsys.readouterr().out)["tensors"]}
    told = {"side": "input", "basis": "symmetric", "alpha": 64.0, "k": 1}
    up = {NAME, NAME.replace("0", "1")}
    assert {name for name, row in rows.items() if row["deformed"]} == up
    assert {name for name, row in rows.items() if row["suspected"].startswith("gap ")} == up
    assert rows[NAME]["deformed"] == told
    assert rows[NAME + ".comp"]["singular_values"] is None
    assert main(["inspect", str(inserted), "--layers", "up_proj.weight"]) == 0
    shown = capsys.readouterr().out
    assert "alpha 64.0" in shown
    assert "2 tensors in" in shown


def test_inspect_sees_a_gauge_that_nothing_tells_of(gauged: Path, tmp_path: Path, capsys):
    bare = Path(shutil.copytree(gauged, tmp_path / "bare"))
    (bare / "specdef.json").unlink()
    capsys.readouterr()
    assert main(["inspect", str(bare), "--json", "--layers", "self_attn.*.weight"]) == 0
    rows = {row["name"]: row for row in strict(capsys.readouterr().out)["tensors"]}
    assert {row["deformed"] for row in rows.values()} == {None}
    assert {n for n, row in rows.items() if "out of balance" in row["suspected"]} == {
        VALUE,
        VALUE.replace("0", "1"),
    }


def test_what_inspect_refuses(source: Path, tmp_path: Path, capsys):
    assert "'nothing' matched nothing" in refused(capsys, "inspect", source, "--layers", "nothing")
    assert "does not exist" in refused(capsys, "inspect", tmp_path / "none")
