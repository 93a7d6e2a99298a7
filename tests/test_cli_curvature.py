"""`specdef inspect --loss`: the curvature of each tensor's Hessian block."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import specdef_jax as sd
from specdef_jax import curvature, hub
from specdef_jax.cli import main
from specdef_jax.cli.importing import imported

MODULE = """
import jax.numpy as jnp

def loss(params, x):
    hidden = jnp.tanh(x @ params["up"])
    return jnp.mean((hidden @ params["down"] - 1.0) ** 2) + 0.0 * jnp.sum(params["bias"])

def nothing(params):
    return params["up"]

def data():
    return (jnp.linspace(-1.0, 1.0, 24).reshape(6, 4),)

pair = (jnp.ones((6, 4)),)
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch) -> Path:
    rng = np.random.default_rng(0)
    arrays = {"up": rng.standard_normal((4, 5)), "down": rng.standard_normal((5, 3)), "bias": np.ones(3)}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    safetensors.numpy.save_file(arrays | {"steps": np.array([3])}, tmp_path / "in.safetensors")
    (tmp_path / "their_losses.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    sys.modules.pop("their_losses", None)
    return tmp_path / "in.safetensors"


def inspected(capsys, *arguments: str) -> dict[str, dict]:
    assert main(["inspect", *arguments, "--json"]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)["tensors"]}


def test_each_block_is_that_of_the_dense_hessian(source: Path, capsys):
    with jax.enable_x64(False):  # as a user has it
        rows = inspected(
            capsys,
            str(source),
            "--layout",
            "jax",
            "--loss",
            "their_losses:loss",
            "--data",
            "their_losses:data",
        )
    loss, data = (imported(f"their_losses:{name}") for name in ("loss", "data"))

    params = {n: jnp.asarray(v, jnp.float64) for n, v in hub.read_tree(source).params.items() if n != "steps"}
    (x,) = data()
    hessians = jax.hessian(loss)(params, x)
    for name, leaf in params.items():
        matrix = np.asarray(hessians[name][name]).reshape(leaf.size, leaf.size)
        expected = np.abs(np.linalg.eigvalsh(matrix)).max()
        found = rows[name]["curvature"]
        assert found["sigma_1"] == pytest.approx(expected, rel=1e-6, abs=1e-12)
        assert found["lower_bound"] <= expected
        assert (found["status"], found["narrowest"]) == ("CONVERGED", "float64")
    assert rows["steps"]["curvature"] is None


def test_a_deformed_kernel_tells_weight_and_compensation(source: Path, tmp_path: Path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(["deform", str(source), str(out), "--layers", "up", "--alpha", "64", "--layout", "jax"]) == 0
    capsys.readouterr()
    options = ["--loss", "their_losses:loss", "--data", "their_losses:pair"]
    rows = inspected(capsys, str(out), "--layers", "up", *options)
    plain = inspected(capsys, str(source), "--layers", "up", *options)
    found = rows["up"]["curvature"]
    assert isinstance(hub.read_tree(out).params["up"], sd.Deformed)
    assert max(found["sigma_1"], found["comp"]["sigma_1"]) > 10 * plain["up"]["curvature"]["sigma_1"]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_table_and_the_picture(source: Path, tmp_path: Path, capsys, suffix: str):
    picture = tmp_path / f"curvature.{suffix}"
    options = ["--loss", "their_losses:loss", "--data", "their_losses:data", "--plot", str(picture)]
    assert main(["inspect", str(source), *options]) == 0
    printed = capsys.readouterr().out
    assert "curvature" in printed
    assert "products" in printed
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss", "their_losses"], "module:function"),
        (["--loss", "no_such_module:loss"], "cannot be imported"),
        (["--loss", "their_losses:lost"], "has no 'lost'"),
        (["--loss", "their_losses:nothing"], "one real scalar"),
        (["--loss", "their_losses:loss"], "cannot be evaluated"),
        (["--data", "their_losses:data"], "without --loss"),
        (["--plot", "x.svg"], "without --loss"),
        (
            ["--loss", "their_losses:loss", "--data", "their_losses:data", "--plot", "x.xyz"],
            ".svg, .png or .pdf",
        ),
    ],
)
def test_bad_input_is_told(source: Path, capsys, options: list[str], message: str):
    assert main(["inspect", str(source), *options]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert message in told
    assert not Path("x.xyz").exists()


def test_by_leaf_is_below_the_whole(source: Path):
    loss, data = (imported(f"their_losses:{name}") for name in ("loss", "data"))

    params = {n: jnp.asarray(v, jnp.float64) for n, v in hub.read_tree(source).params.items() if n != "steps"}
    (x,) = data()
    key = jax.random.key(0)
    whole = curvature.eigsh(curvature.hessian(loss, params, x), key=key)
    found = dict(curvature.by_leaf(loss, params, x, key=key, tol=1e-9))
    assert list(found) == sorted(params)
    assert max(float(abs(e.values[0])) for e in found.values()) <= float(abs(whole.values[0])) * (1 + 1e-9)
