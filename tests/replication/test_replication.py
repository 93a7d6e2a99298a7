"""Replications at the size of a test: every section is there, resumes, and says what its numbers say."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import specdef_jax as sd
from specdef_jax import replication
from specdef_jax.certification.arms import sharpness
from specdef_jax.cli import main
from specdef_jax.parametrization import merge
from specdef_jax.replication import (
    Config,
    cells,
    gallery,
    networks,
    reading,
    replicate,
    rows,
    sections,
    tables,
    words,
)
from specdef_jax.tasks import vision

SMOKE = replace(Config.preset("smoke"), attacks=("fuse",), directions=())


@pytest.fixture(scope="module", autouse=True)
def single():
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def experiment():
    return vision.vision("cnn", vision.SIZES["smoke"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("replication")
    told = []
    found = replicate("vision/cnn", "smoke", out, config=SMOKE, progress=lambda *step: told.append(step[0]))
    return found, out, told


def test_every_section_is_there(made):
    results, out, told = made
    assert set(results["matrix"]) >= {"never learned", "NPO", "gradient ascent", "one entry rescaled"}
    assert any("float64" in name for name in results["matrix"])
    assert len(results["attacks"]) == len(SMOKE.attacks)
    assert set(results["optimizers"]) == {"undefended", "SpecDef"}
    assert len(results["lora"]) == 3
    assert {row["format"] for row in results["utility"]} == set(sections.FORMATS)
    assert {p.name for p in out.iterdir()} == {"results.json", "tables.md", "report.html", "state"}
    assert {"pretraining and unlearning", "defences", "optimizers", "attacks"} <= set(told)


def test_it_resumes(made, monkeypatch):
    results, out, _ = made

    def refuse(*args, **kwargs):
        raise AssertionError("raced again")

    monkeypatch.setattr(cells, "raced", refuse)
    again = replicate("vision/cnn", "smoke", out, config=SMOKE)
    assert json.dumps(again["matrix"]) == json.dumps(results["matrix"])
    with pytest.raises(AssertionError, match="raced again"):
        replicate("vision/cnn", "smoke", out, config=SMOKE, fresh=True)


def test_a_deformed_start_is_the_function_it_was(experiment):
    """In double precision, and the released weights are other ones."""
    for alpha in SMOKE.wide_alphas:
        with jax.enable_x64(True):
            tree = rows.released(experiment, SMOKE, rows.Way(alpha, wide=True), 0)
            plain = experiment.networks[experiment.defended][0]
            before = float(experiment.loss(plain, *experiment.judged_on))
            assert float(experiment.loss(merge(tree), *experiment.judged_on)) == pytest.approx(
                before, rel=1e-6
            )


def test_the_control_is_as_sharp_as_the_smallest_deformation(experiment):
    key = jax.random.key(0)
    control = next(r for r in rows.rows(experiment, SMOKE) if r.name == "one entry rescaled").make(0)
    model = rows.deformed(experiment, SMOKE, rows.Way(SMOKE.alphas[0]), 0)
    sharp = [sharpness(p, experiment.judged_on, key) for p in (control, model)]
    assert sharp[0] == pytest.approx(sharp[1], rel=0.1)


def test_a_cell_is_what_a_loop_finds(experiment):
    """One step size, one network: Adam by hand, judged every few steps."""
    config = replace(SMOKE, steps=20, step_sizes=(3e-2,))
    problem = rows.plain(experiment, "ignorant", 0)
    found = cells.row(experiment, config, rows.Row("never learned", lambda _: problem), None)["cells"][0][
        "networks"
    ][0]
    adam = sd.race.FIRST_ORDER["adam"](3e-2)
    params, state = problem.params, adam.init(problem.params)
    key = jax.random.split(jax.random.key(config.seed), 1)[0]
    reached, before = math.nan, math.inf
    for t in range(21):
        if t % config.judge_every == 0:
            now, judged = float(experiment.loss(params, *experiment.judged_on)), params
            if now <= experiment.targets[0]:
                share = (before - experiment.targets[0]) / (before - now)
                reached = t - config.judge_every * (1 - share) if t else 0.0
                break
            before = now
        args = experiment.sample(jax.random.fold_in(key, t))
        updates, state = adam.update(jax.grad(experiment.loss)(params, *args), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert found["steps"] == pytest.approx(reached, nan_ok=True, rel=1e-3)
    assert found["retained"] == pytest.approx(float(experiment.retained(judged)), rel=1e-3)


def test_what_meets_the_target_at_the_start_is_told_and_not_raced(experiment):
    easy = replace(experiment, targets=(1e9, 1e9))
    found = cells.row(easy, SMOKE, rows.rows(easy, SMOKE)[0], None)
    assert "meets the target" in found["refused"]
    assert found["cells"] == []


def test_tables_say_what_the_numbers_are(made):
    results = json.loads(json.dumps(made[0], default=str))
    row = results["matrix"]["never learned"]
    worse = [one["retained"] + 1.0 for one in row["start"]]
    found = [
        {"steps": 3.0, "capability": 0.5, "retained": worse[0], "peak": 1.0},
        {"steps": math.nan, "capability": 0.7, "retained": worse[1], "peak": 1.0},
    ]
    row["cells"] = [{"step_size": 1e-2, "networks": found}]
    cell = str(tables.matrix(results).rows[0][1])
    assert cell == "6 [3, 10], 1 not / 0.6 [0.5, 0.7] †"
    row["cells"][0]["networks"][1]["steps"] = 5.0
    row["cells"][0]["networks"][0]["retained"] = row["cells"][0]["networks"][1]["retained"] = 0.0
    assert str(tables.matrix(results).rows[0][1]) == "4 [3, 5] / 0.6 [0.5, 0.7]"


def test_the_headline_counts(made):
    results = json.loads(json.dumps(made[0], default=str))
    results["task"]["variants"] = {"known": [{"capability": 0.9}], "ignorant": [{"capability": 0.1}]}
    stuck = {"cells": [{"networks": [{"steps": math.nan, "capability": 0.1}]}]}
    results["matrix"] = {"SpecDef 1": stuck, "SpecDef 2": {"cells": [{"networks": [{"steps": 3.0}]}]}}
    results["attacks"] = [{"refused": "", "adam": {"steps": [3.0]}}, {"refused": "no"}]
    assert words.headline(results) == (
        "Adam does not reach the target under 1 of 2 deformations; 1 of 2 attacks bring it back"
    )
    results["task"]["variants"]["known"][0]["capability"] = 0.1
    assert "not learned" in words.headline(results)


def test_the_best_step_size_is_the_attackers():
    def cell(*steps, capability=0.5):
        return {"networks": [{"steps": s, "capability": capability} for s in steps]}

    slow, half, never = (
        cell(9.0, 11.0, math.nan),
        cell(1.0, math.nan),
        cell(math.nan, math.nan, capability=0.7),
    )
    assert reading.best({"cells": [half, slow, never]}) is slow
    assert reading.steps(slow) == 10.0
    assert math.isnan(reading.steps(half))  # half of the networks is not most of them
    assert reading.best({"cells": [half, never]}) is never  # none arrives: what it is good for
    assert reading.best({"cells": []}) is None
    assert not reading.reached({"cells": []})


def test_headline_rows_are_raced_on_every_network(experiment):
    """One network elsewhere, all of them where a row is a headline; only there samples are kept."""
    config = replace(SMOKE, seeds=1)
    told = replace(experiment, samples=lambda params: ["a line"])
    counts, shown = {}, {}
    for one in rows.rows(told, config):
        if one.name in ("never learned", "NPO"):
            found = cells.row(told, config, one, None)["cells"][0]["networks"]
            counts[one.name], shown[one.name] = len(found), [n.get("samples") for n in found]
    assert counts == {"never learned": experiment.seeds, "NPO": 1}
    assert shown == {"never learned": [["a line"], None], "NPO": [None]}


def test_what_undoes_the_defence_is_raced_from_the_defended_network(experiment):
    (start,) = cells.states(experiment, [rows.plain(experiment, experiment.defended, 0)])
    undone = [one for one in rows.rows(experiment, SMOKE) if one.name.split()[0] in rows.UNDOING]
    assert len(undone) == len(rows.UNDOING)
    for one in undone:
        assert one.headline
        assert cells.states(experiment, [one.make(0)])[0] == pytest.approx(start, rel=1e-4, abs=1e-4)


def test_networks_wait_for_a_rerun(tmp_path):
    made = ({"a": {"w": jnp.arange(6.0).reshape(2, 3)}, "b.weight": jnp.ones(2)},) * 2
    calls = []

    def make():
        calls.append(1)
        return made

    def get(key, fresh=False):
        return networks.kept(tmp_path, key, "known", make, fresh=fresh)

    for _ in range(2):
        assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), get("x"), made))
    assert len(calls) == 1
    get("other code"), get("other code", fresh=True)
    assert len(calls) == 3
    (tmp_path / "state" / "networks_known.safetensors").write_bytes(b"cut")
    get("other code")
    assert len(calls) == 4
    networks.kept(None, "x", "known", make, fresh=False)
    assert len(calls) == 5


def test_samples_that_are_images_are_drawn(made):
    results = json.loads(json.dumps(made[0], default=str))
    image = {"width": 2, "grey": "00ff80c0"}
    results["task"]["samples"] = {"known": [image] * 3}
    results["matrix"]["never learned"]["cells"] = [
        {"networks": [{"steps": 3.0, "capability": 1.0, "samples": [image] * 3}]}
    ]
    assert list(gallery.pictures(results)) == ["known, before", "never learned, after"]
    assert gallery.painted(results).count("<image") == 6
    assert gallery.standalone(results).count(b"<image") == 6
    results["task"]["samples"] = {"known": ["text"]}
    assert "known, before" not in gallery.pictures(results)


def test_the_report_is_one_file(made):
    text = (made[1] / "report.html").read_text()
    assert text.rstrip().endswith("</html>")
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "<svg" in text


def test_the_command(made, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(replication, "replicate", lambda *args, **kwargs: made[0])
    assert main(["certify", "--task", "vision/cnn", "--size", "smoke", "--out", str(tmp_path)]) == 0
    assert "attacks bring it back" in capsys.readouterr().out
    assert main(["certify", "--size", "small"]) != 0
    assert "--task" in capsys.readouterr().err


def test_what_takes_long_to_compile_races_less():
    small, lean = Config.preset("small"), Config.preset("small", lean=True)
    assert set(lean.attacks) < set(small.attacks)
    assert set(lean.optimizers) < set(small.optimizers)
    assert Config.preset("full", lean=True) == Config.preset("full")
    assert set(replication.LONG) < set(replication.TASKS)


def test_bad_names():
    with pytest.raises(sd.SpecError, match="text/llama"):
        replicate("text/nothing", "smoke")
    with pytest.raises(sd.SpecError, match="smoke, small, full"):
        replicate("vision/cnn", "large")
    with pytest.raises(sd.SpecError, match="ascending"):
        Config(step_sizes=(1e-2, 1e-3))
