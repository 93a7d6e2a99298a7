"""The figure of the first screen and its sentence follow the numbers."""

import copy
import math

import pytest

from benchmarks import _replication_page as page
from benchmarks import _story as story
from tests.replication.test_page import NAN, RESULTS, networks, raced

ALPHA = 10000.0


@pytest.fixture
def results():
    found = copy.deepcopy(RESULTS)
    found["config"] |= {"optimizer_alpha": ALPHA, "optimizers": ["adam", "muon"], "ranks": [4]}
    found["task"] |= {
        "name": "text/llama",
        "variants": found["task"]["variants"] | {"npo": [{"capability": 0.2}]},
    }
    found["matrix"]["fuse on SpecDef 10000, top"] = copy.deepcopy(found["matrix"]["NPO"])
    found["matrix"]["SpecDef 10000, top"]["cells"][0]["networks"] = networks(NAN, NAN, capability=0.15)
    found["optimizers"] = {
        "undefended": {"adam": raced(20.0, 22.0), "muon": {"muon": raced(30.0)["adam"], "refused": ""}},
        "SpecDef": {"adam": raced(NAN, NAN), "muon": {"muon": raced(44.0, 46.0)["adam"], "refused": ""}},
    }
    found["utility"].append(found["utility"][0] | {"alpha": ALPHA})
    return found


def test_marks_are_medians_at_the_best_step_size(results):
    plain, defended, other, fused = story.marks(results).values()
    assert (plain.steps, plain.capability) == (21.0, 0.8)
    assert math.isnan(defended.steps)
    assert defended.capability == 0.15
    assert other.steps == 45.0
    assert (fused.steps, fused.capability) == (21.0, 0.8)


def test_the_sentence_counts(results):
    told = story.told([results])
    assert "stops Adam in 1 of them and slows it in 0 more" in told
    assert "(muon; not all in each) arrives in 1;" in told
    assert told.endswith("without the defence in 1.")
    results["optimizers"]["SpecDef"]["adam"] = raced(60.0, 62.0)
    assert "stops Adam in 0 of them and slows it in 1 more" in story.told([results])
    results["attacks"][1] = {"attack": "fuse", "refused": "no"}
    assert story.told([results]).endswith("without the defence in 0.")


def test_the_figure_has_a_row_per_system(results):
    other = copy.deepcopy(results)
    other["task"]["name"] = "another"
    drawn = story.figure([results, other])
    assert drawn.startswith(b"<svg")
    assert len(drawn) > len(story.figure([results]))


def test_the_page_has_a_row_per_system(results):
    lines = page._systems([results])
    row = next(line for line in lines if line.startswith("| Llama"))
    assert row == "| Llama | 0.20 | 21 / 0.80 | > 100 / 0.15 | 21 / 0.80 | 1 times |"
    assert any(
        line.startswith("| LoRA of rank 4 on Llama | 20 [20, 21] | 20 [20, 21] | 42 [40, 44] |")
        for line in lines
    )
