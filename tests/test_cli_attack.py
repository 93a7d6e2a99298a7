"""`specdef attack`: the ledger of a task of one's own, and of the bundled one."""

import json
import sys
from pathlib import Path

import pytest

from specdef_jax import attacks, campaign
from specdef_jax.cli import attack as command
from specdef_jax.cli import main

MODULE = """
import jax, jax.numpy as jnp

def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - y) ** 2)

x = jax.random.normal(jax.random.key(0), (24, 4))
data = (x, jnp.sin(x @ jax.random.normal(jax.random.key(1), (4, 3))))
tree = {"up": jax.random.normal(jax.random.key(2), (4, 5)) / 2,
        "down": jax.random.normal(jax.random.key(3), (5, 3)) / 2}
"""
OWN = ["--loss", "own:loss", "--params", "own:tree", "--data", "own:data", "--target", "0.3"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "own.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    sys.modules.pop("own", None)
    few = {name: attacks.ATTACKS[name] for name in ("fuse", "freeze")}
    full = campaign.ledger
    monkeypatch.setattr(command.campaign, "ledger", lambda *a, **k: full(*a, **k, attacks=few))
    return tmp_path


def test_the_ledger_of_a_task_of_ones_own(here: Path, capsys):
    asked = ["--layers", "up", "--layout", "jax", "--optimizers", "sgd", "--steps", "600", "--alpha", "8"]
    assert main(["attack", "ledger", *OWN, *asked, "--write", "book.json"]) == 0
    printed = capsys.readouterr().out
    rows = {row["attack"]: row for row in json.loads((here / "book.json").read_text())}
    assert list(rows) == ["undefended", "fine-tune as released", "fuse", "freeze"]
    assert rows["fuse"]["recovered"]["sgd"]["value"] == pytest.approx(1, rel=1e-6)
    slow = rows["fine-tune as released"]["recovered"]["sgd"]["value"]
    assert slow > 1.5
    assert f"Trained as released: {slow:.3g} times the steps." in printed
    assert "Who knows which layers:" in printed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["fuse"], "fuse needs two directories"),
        (["ledger", "somewhere"], "ledger takes no directory"),
        (["ledger", "--optimizers", "nadir"], "unknown optimizer 'nadir'"),
        (["ledger", "--loss", "own:loss"], "needs --params and --target"),
    ],
)
def test_bad_input(here: Path, capsys, given, message):
    assert main(["attack", *given]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
