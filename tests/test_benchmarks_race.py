"""The race tables at the size of a test: every config runs, and what is said of the rows is true of them."""

import numpy as np
import pytest

from benchmarks import _race_arms as arms
from benchmarks import _race_exponents as exponents
from benchmarks import _race_figures as figures
from benchmarks import race as tables

CONFIGS = sorted(path.stem for path in tables.CONFIGS.glob("*.json"))


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "STATE", tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_table_runs_small(name, tmp_path):
    config = tables.smoke(tables.load(name))
    task = arms.task_of(config["task"], 0)
    rows = tables.table(task, config)
    assert len(rows) == len(config["arms"]) * len(config["optimizers"])
    assert all(len(row["steps"]) == 2 for row in rows)
    ratios = tables.ratios(rows, config)
    by = {(row["arm"], row["optimizer"]): row for row in rows}
    for r in ratios:
        if r["to"] == "target" and not r["censored"]:
            a, b = (np.array(by[r[k], r["optimizer"]]["steps"]) for k in ("arm", "baseline"))
            assert r["value"] == pytest.approx(np.exp(np.mean(np.log(a / b))), nan_ok=True)
    if ratios:
        figures.draw(config, ratios, tmp_path / "figure.svg")
        assert (tmp_path / "figure.svg").stat().st_size > 2000


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_names_what_exists(name):
    config = tables.load(name)
    names = [arm["name"] for arm in config["arms"]]
    assert len(set(names)) == len(names)
    assert {arm["baseline"] for arm in config["arms"] if "baseline" in arm} <= set(names)
    assert set(config["optimizers"]) <= set(tables.ALL)


def test_exponents_are_fitted():
    alphas = np.array([4.0, 8, 16, 32, 64, 128])
    values = alphas[:, None] ** 2 * np.array([1.0, 5.0, 9.0])
    values[2, 2] = np.nan
    row = exponents._fit(alphas, values, "axis", "sgd", exponents.STEPS)
    assert row["fit"] == pytest.approx(2)
    assert (row["seeds"], row["dropped"], row["agrees"], row["last"]) == (2, 1, True, pytest.approx(2))
    slower = exponents._fit(alphas, np.sqrt(values), "axis", "sgd", exponents.STEPS)
    assert not slower["agrees"]
    assert exponents._fit(alphas, values, "symmetric", "muon", exponents.BEST)["agrees"] is None


def test_the_figure_of_exponents(tmp_path):
    alphas = np.geomspace(4, 32, 6)
    values = np.outer(alphas**-1.0, [1.0, 1.1])
    fitted = [
        exponents._fit(alphas, values, "axis", name, quantity)
        for name in ("sgd", "adam", "muon")
        for quantity in (exponents.BEST, exponents.STEPS, exponents.STABLE)
    ]
    exponents.draw(fitted, tmp_path / "e.svg")
    assert (tmp_path / "e.svg").stat().st_size > 2000
