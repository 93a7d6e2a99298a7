"""`specdef race`: a race on the user's own loss."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from specdef_jax.cli import main

MODULE = """
import jax, jax.numpy as jnp

def loss(params, x, y):
    hidden = jnp.tanh(x @ params["up"])
    return jnp.mean((hidden @ params["down"] + params["bias"] - y) ** 2)

x = jax.random.normal(jax.random.key(0), (24, 4))

def data():
    teacher = {n: jax.random.normal(jax.random.key(i), s) for i, (n, s) in
               enumerate({"up": (4, 5), "down": (5, 3), "bias": (3,)}.items(), 7)}
    return x, jnp.tanh(x @ teacher["up"]) @ teacher["down"] + teacher["bias"]

def tree():
    return {"up": jnp.eye(4, 5), "down": jnp.ones((5, 3)) / 3 + jnp.eye(5, 3), "bias": jnp.zeros(3)}

def flat(params, x, y):
    return jnp.sum(params["bias"]) + 5.0
"""
OPTIONS = ["--loss", "mine:loss", "--data", "mine:data", "--target", "0.5", "--layers", "up", "--alpha", "8"]
OPTIONS += ["--optimizers", "sgd", "adam", "--steps", "400", "--decades", "3", "--layout", "jax", "--double"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    rng = np.random.default_rng(0)
    arrays = {"up": rng.standard_normal((4, 5)), "down": rng.standard_normal((5, 3)), "bias": np.zeros(3)}
    saved = {name: a.astype(np.float32) for name, a in arrays.items()}
    safetensors.numpy.save_file(saved, tmp_path / "in.safetensors")
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    sys.modules.pop("mine", None)
    return tmp_path


def test_slowdown_of_a_loss_of_ones_own(here: Path, capsys):
    assert main(["race", "in.safetensors", *OPTIONS, "--out", "run"]) == 0
    printed = capsys.readouterr().out
    rows = {(row["arm"], row["optimizer"]): row for row in json.loads((here / "run/race.json").read_text())}
    assert set(rows) == {(a, o) for a in ("original", "alpha 1", "alpha 8") for o in ("sgd", "adam")}
    slow = rows["alpha 8", "sgd"]
    assert slow["baseline"] == "alpha 1"
    ratio = slow["steps"][0] / rows["alpha 1", "sgd"]["steps"][0]
    assert slow["slowdown"]["value"] == pytest.approx(ratio)
    assert f"{ratio:.3g}" in printed
    assert ratio > 1.5, "nothing was deformed"
    assert rows["alpha 1", "sgd"]["baseline"] == "original"
    files = {path: path.stat().st_mtime_ns for path in (here / "run/state").iterdir()}
    assert main(["race", "in.safetensors", *OPTIONS, "--out", "run"]) == 0  # everything is there already
    assert {path: path.stat().st_mtime_ns for path in (here / "run/state").iterdir()} == files


def test_a_tree_of_ones_own_with_batches_and_switches(here: Path, capsys):
    more = ["--batch", "8", "--seeds", "2", "--clip", "1.0", "--warmup", "5", "--alpha", "2"]
    assert main(["race", "mine:tree", *OPTIONS, *more]) == 0
    assert "alpha 2" in capsys.readouterr().out
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--optimizers", "sgd", "nadir"], "unknown optimizer 'nadir'; there are: sgd, momentum"),
        (["--target", "100"], "meets the target 100 already"),
        (
            ["--target", "-1", "--steps", "3"],
            "the baseline reaches its target with none of sgd within 3",
        ),
        (["--seeds", "2"], "2 data orders of a sample that is the same whatever its key"),
        (["--loss", "mine:flat"], "the Hessian at the start is zero"),
        (["--loss", "mine:absent"], "mine has no 'absent'"),
        (["--layers", "nothing"], "nothing"),
    ],
)
def test_bad_input(here: Path, capsys, change, message):
    assert main(["race", "in.safetensors", *OPTIONS, "--optimizers", "sgd", *change]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
