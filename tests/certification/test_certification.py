import json
from dataclasses import replace
from pathlib import Path

import pytest

import specdef_jax as sd
from specdef_jax import certification
from specdef_jax.certification import Config, certify, load_results, race_stage, stages, store
from specdef_jax.tasks import digits
from specdef_jax.tasks.networks import mlp


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("certify")


@pytest.fixture(scope="module")
def smoke(out):
    told = []
    made = certify(out, Config.preset("smoke"), progress=lambda *step: told.append(step))
    return made, told


def ratios(made, kind):
    return [r for r in made.results["race"]["ratios"] if r["kind"] == kind]


def test_every_certificate_of_the_smoke_size_holds(smoke):
    made, _ = smoke
    assert made.holds
    assert made.results["preservation"]["word"] == "proved"
    assert made.results["curvature"]["word"] == "checked"


def test_every_question_has_an_answer(smoke):
    """Also where preservation was not measured at the largest alpha raced, but at a larger one."""
    config = smoke[0].results["config"]
    assert config["alphas"][-1] not in config["error_alphas"]
    assert all(row["answer"] for row in smoke[0].summary_rows())


def test_curvature_is_bracketed_and_congruent(smoke):
    rows = smoke[0].results["curvature"]["rows"]
    for row in rows:
        assert row["lower"] <= row["sharpness"] + row["allowance"]
        assert row["sharpness"] <= row["upper"] + row["allowance"]
        assert row["congruence_error"] <= 1e-10
    # The upper side alone grows as alpha^2, so a bracket that ignores alpha would not hold.
    assert rows[-1]["sharpness"] > rows[0]["upper"]


def test_null_control_of_injection_is_one(smoke):
    for ratio in ratios(smoke[0], "null control"):
        if ratio["arm"] == "inject":
            assert ratio["value"] == pytest.approx(1.0, abs=1e-6)


def test_every_arm_was_raced_with_every_optimizer(smoke):
    arms = smoke[0].results["race"]["arms"]
    assert set(arms) == {
        "original", "original_other_seeds", "top_1", "top_4", "bottom", "scalar",
        "fuse", "freeze", "freeze_bottom", "inject",
    }  # fmt: skip
    for row in arms.values():
        assert set(row["optimizers"]) == {"sgd", "momentum", "adam"}
    assert {a for a, row in arms.items() if row["bill"]} == {"fuse", "freeze", "freeze_bottom", "inject"}


def test_controls_have_the_sharpness_of_top(smoke):
    arms = smoke[0].results["race"]["arms"]
    for name in ("bottom", "scalar"):
        assert arms[name]["sharpness"] == pytest.approx(arms["top_4"]["sharpness"], rel=0.03)


def test_progress_names_the_stages_and_ends_them(smoke):
    told = smoke[1]
    for stage in ("preservation", "curvature", "race"):
        steps = [(done, total) for name, done, total in told if name == stage]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


def test_files_are_whole_and_load_again(smoke, out):
    loaded = load_results(out / "results.json")
    assert loaded.results["config"] == json.loads(json.dumps(smoke[0].results["config"]))
    assert (out / "report.html").read_text().rstrip().endswith("</html>")
    assert {p.name for p in out.iterdir()} == {"results.json", "report.html", "state"}


def test_a_rerun_resumes_and_fresh_does_not(smoke, out, monkeypatch):
    def refuse(*args):
        raise AssertionError("computed again")

    monkeypatch.setattr(stages, "preserved", refuse)
    monkeypatch.setattr(stages, "curved", refuse)
    monkeypatch.setattr(race_stage, "_race_arm", refuse)
    again = certify(out, Config.preset("smoke"))
    assert store.dumps(again.results["race"]) == store.dumps(smoke[0].results["race"])
    with pytest.raises(AssertionError, match="computed again"):
        certify(out, Config.preset("smoke"), fresh=True)


def test_an_interrupt_leaves_finished_stages_and_no_results(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "preserved", lambda *args: {"holds": True})

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "curved", interrupted)
    with pytest.raises(KeyboardInterrupt):
        certify(tmp_path, Config.preset("smoke"))
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["preservation.json", "task.json"]


def test_stored_stages_of_other_settings_are_not_used(tmp_path):
    first = store.staged(tmp_path, "key", "x", lambda: [1.0, float("nan")], fresh=False)
    assert first[0] == 1.0
    assert store.staged(tmp_path, "key", "x", lambda: [2.0], fresh=False)[0] == 1.0
    assert store.staged(tmp_path, "other", "x", lambda: [2.0], fresh=False) == [2.0]


def test_a_stage_is_known_by_its_settings_and_its_task():
    task = digits.task(1, examples=8, network=mlp((64, 4, 10)))
    moved = replace(task, args=(task.args[0].at[0, 0].add(1e-3), task.args[1]))
    config = Config.preset("smoke")
    keys = [store.fingerprint(config, t) for t in (task, moved, replace(task, where="*/w"))]
    assert len({*keys, store.fingerprint(Config(), task)}) == 4
    assert store.fingerprint(config, digits.task(1, examples=8, network=mlp((64, 4, 10)))) == keys[0]


def test_a_damaged_stage_is_computed_again(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "x.json").write_text('{"fingerprint":')
    assert store.staged(tmp_path, "key", "x", lambda: 3, fresh=False) == 3


def test_non_finite_numbers_survive_strict_json():
    values = {"a": [float("inf"), -float("inf"), 1.5], "b": None, "c": "text"}
    assert store.loads(store.dumps(values), "here") == values


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ('{"schema": 999}', "schema version 999"), ("[1]", "schema version None")],
)
def test_results_that_cannot_be_read_say_why(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(sd.FileError, match=message):
        load_results(path)


def test_missing_results_say_what_to_run():
    with pytest.raises(sd.FileError, match="Run specdef certify first"):
        load_results(Path("nowhere") / "results.json")


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(sd.FileError, match="choose another"):
        certify(tmp_path / "taken", Config.preset("smoke"))


def test_configs_that_mean_nothing_are_refused():
    with pytest.raises(sd.SpecError, match="start at 1"):
        Config(alphas=(2.0, 4.0))
    with pytest.raises(sd.SpecError, match="one of the alphas"):
        Config(matched=3.0)
    with pytest.raises(sd.SpecError, match="smoke, default, model, full"):
        Config.preset("huge")


def test_a_broken_certificate_is_not_reported_as_holding(smoke):
    results = json.loads(json.dumps(smoke[0].results, default=str))
    results["curvature"]["holds"] = False
    assert not certification.Certification(results).holds
