import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from specdef_jax.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks():
    """Return the examples that go on from one another; those of models stand alone (tests/models)."""
    found = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    return [code for code in found if "hub.load" not in code]


def test_the_python_example_runs_and_says_what_it_claims(capsys):
    code, *_ = blocks()
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("import")]) <= 12
    names = {}
    with jax.enable_x64(False):
        exec(code, names)
    change, plain, sharp = map(float, capsys.readouterr().out.split())
    assert change < 1e-3
    assert abs(sharp) > 100 * abs(plain)
    assert float(abs(names["restored"]["w1"] - names["params"]["w1"]).max()) < 1e-3


def test_the_curvature_example_goes_on_from_it(capsys):
    names = {}
    with jax.enable_x64(False):
        for code in blocks():
            exec(code, names)
    assert len(capsys.readouterr().out.splitlines()) >= 4
    assert names["top"].status.name == names["coupling"].status.name == "CONVERGED"
    share, stderr = names["spectrum"].share(1e3, 1e9)
    assert share >= 1 / names["op"].size
    assert stderr < 1e-3
    assert float(names["top"].lower_bound) > 1e3
    slow, edge = names["found"][64.0].slowdown(names["found"][1.0]), names["found"][64.0].at_edge("sgd")
    assert slow["sgd"].value > 30 > slow["adam"].value > slow["muon"].value > 1
    assert not edge


def test_numbers_are_those_of_the_committed_results():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import readme
    finally:
        sys.path.pop(0)
    section = README.split(readme.START)[1].split(readme.END)[0]
    assert section.strip() == readme.measured().strip()
    first = README.split(readme.STORY)[1].split(readme.STORY_END)[0]
    assert first.strip() == readme.story().strip()
    assert (ROOT / "docs" / "optimizers.md").read_text() == readme.page()
    assert (ROOT / "docs" / "replication.md").read_text() == readme.replication_page()


def test_nothing_costs_the_attacker_more_than_seconds():
    rows = json.loads((ROOT / "benchmarks" / "results" / "ledger.json").read_text())["rows"]
    bills = [row["bill"] for row in rows if row["bill"]]
    assert len({row["network"] for row in rows}) == 3
    assert len(bills) > 3 * 10
    assert max(bill["conversion_seconds"] for bill in bills) < 60
    assert "nothing we found costs the attacker more than seconds" in README


def test_the_commands_for_checkpoints_run_as_written(tmp_path, monkeypatch):
    commands = [shlex.split(line) for line in re.findall(r"^(specdef .*)$", README, flags=re.MULTILINE)]
    assert len(commands) >= 5
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    for _, *arguments in commands:
        with jax.enable_x64(False):
            assert main(arguments) == 0, arguments


@pytest.mark.parametrize("target", re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE))
def test_commands_are_targets_of_the_makefile(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_links_inside_the_repository_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
