import builtins
import copy
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from specdef_jax import report
from specdef_jax.errors import MissingExtra
from specdef_jax.report import cards, facts, notes, svg, words
from specdef_jax.report.axes import apart
from specdef_jax.report.numbers import factor, given, interval, number

SAMPLE = Path(__file__).parents[1] / "data" / "results_smoke.json"
NAN_RATIO = {"value": math.nan, "low": math.nan, "high": math.nan, "censored": False, "seeds": 2}


def restore(value):
    """Undo what results.json does to non-finite numbers."""
    if isinstance(value, dict):
        return {k: restore(v) for k, v in value.items()}
    if isinstance(value, list):
        return [restore(v) for v in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


@pytest.fixture
def results():
    return restore(json.loads(SAMPLE.read_text()))


@pytest.fixture(scope="module")
def page():
    return report.render(restore(json.loads(SAMPLE.read_text())))


class Reader(HTMLParser):
    """Collects tags, ids and references, and checks that elements close in order."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.refs = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._note(tag, dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def _note(self, tag, attrs):
        self.tags.append(tag)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        self.refs += [v for k, v in attrs.items() if k in ("href", "xlink:href", "src")]
        self.refs += [f"#{r}" for v in attrs.values() for r in re.findall(r"url\(#([^)]*)\)", v or "")]


def test_is_one_well_formed_file_that_needs_no_network(page):
    reader = Reader(page)
    assert reader.open == []
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert all(ref.startswith("#") for ref in reader.refs)
    assert len(reader.ids) == len(set(reader.ids))
    assert {ref[1:] for ref in reader.refs} <= set(reader.ids)
    assert len(page) < 1.5e6


def test_figures_are_described_and_follow_the_colours_of_the_page(page):
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(figures) == 6
    for figure in figures:
        assert 'role="img"' in figure
        assert "<title>" in figure
        assert "<desc>" in figure
        used = set(re.findall(r"#[0-9a-f]{6}\b", figure))
        assert not used, f"colours that no theme can change: {used}"
        assert set(re.findall(r"var\(--([a-z]+)\)", figure)) <= set(svg.COLOURS)
        assert "DejaVu" not in figure
    assert "prefers-color-scheme: dark" in page
    for role, (light, dark) in svg.COLOURS.items():
        assert f"--{role}: {light};" in page
        assert f"--{role}: {dark};" in page


def test_is_deterministic(results, page):
    assert report.render(results) == page
    assert report.hero_figure(results) == report.hero_figure(results)


def test_leaves_the_results_as_they_were(results):
    before = copy.deepcopy(results)
    report.render(results)
    assert repr(results) == repr(before)


def _verdict(results):
    return " ".join([words.headline(results), *words.verdict(results)])


def _ratio(results, arm, baseline, optimizer):
    return next(
        r
        for r in results["race"]["ratios"]
        if (r["arm"], r["baseline"], r["optimizer"]) == (arm, baseline, optimizer)
    )


def _set_error(results):
    for row in results["preservation"]["formats"]:
        row["error"] = 1.7e-5
    return "1.7"


def _set_sharpness(results):
    results["race"]["arms"]["top_4"]["sharpness"] = [
        777 * s for s in results["race"]["arms"]["top_1"]["sharpness"]
    ]
    return "777×"


def _set_slowdown(results):
    _ratio(results, "top_4", "top_1", "momentum")["value"] = 12.34
    return "12.3×"


def _set_total(results):
    results["race"]["arms"]["top_4"]["optimizers"]["adam"]["steps"] = [
        55.5 * s for s in results["race"]["arms"]["original"]["optimizers"]["adam"]["steps"]
    ]
    return "55.5×"


def _set_fuse(results):
    _ratio(results, "fuse", "original", "adam")["value"] = 1.23
    return "1.23×"


def _set_seconds(results):
    results["race"]["arms"]["fuse"]["bill"]["conversion_seconds"] = 4.2
    return "undoing it takes 4.2"


def _set_freeze_seconds(results):
    results["race"]["arms"]["freeze"]["bill"]["conversion_seconds"] = 8.8
    return "8.8"


def _set_control(results):
    _ratio(results, "scalar", "original", "sgd")["value"] = 4321.0
    return "4321×"


@pytest.mark.parametrize(
    "change",
    [
        _set_error,
        _set_sharpness,
        _set_slowdown,
        _set_total,
        _set_fuse,
        _set_seconds,
        _set_freeze_seconds,
        _set_control,
    ],
)
def test_every_number_of_the_verdict_comes_from_the_results(results, change):
    before = _verdict(results)
    expected = change(results)
    assert expected not in before
    assert expected in _verdict(results)


def test_the_page_opens_with_the_verdict(results, page):
    shown = [words.headline(results), *words.verdict(results), *(c.answer for c in cards.cards(results))]
    assert re.sub(r"<[^>]*>", "", page[: page.index("<svg")]).count(shown[0]) == 1
    places = [page.index(f">{text}<") for text in shown]
    assert places == sorted(places)


def test_the_verdict_says_how_the_control_compares(results):
    for name in facts.optimizers(results):
        _ratio(results, "top_4", "top_1", name).update(value=10.0, low=9.0, high=11.0, censored=False)
    control = [_ratio(results, "scalar", "original", n) for n in ("sgd", "momentum", "adam")]
    control[0].update(value=2.0, low=1.5, high=2.5, censored=False)
    control[1].update(value=20.0, low=18.0, high=math.inf, censored=True)
    control[2].update(value=8.0, low=7.0, high=math.inf, censored=True)
    said = words.against_control(results)
    assert "beat this control for SGD" in said
    assert "do not beat it for momentum SGD" in said
    assert "cannot be told apart from it for Adam" in said


def test_the_verdict_follows_what_the_attacks_left(results):
    assert "undone in seconds and without data" in _verdict(results)
    for attack in facts.attacks(results):
        _ratio(results, attack, "original", "sgd").update(value=3.0, low=2.0, high=4.0)
    assert "do not undo it all" in words.headline(results)
    assert "leave some of it" in _verdict(results)
    assert "undone" not in _verdict(results)


def test_no_slowdown_is_said_to_be_none(results):
    for name in facts.optimizers(results):
        _ratio(results, "top_4", "top_1", name).update(value=1.1, low=0.9, high=1.3)
    assert words.headline(results) == "No slowdown of training was measured"


def test_the_headline_names_whom_it_slows_where_it_slows_some(results):
    names = facts.optimizers(results)
    for name in names:
        _ratio(results, "top_4", "top_1", name).update(value=2.0, low=1.5, high=3.0)
    assert words.headline(results).startswith("The deformation slows training; undoing it takes")
    _ratio(results, "top_4", "top_1", names[-1]).update(value=0.9, low=0.8, high=1.1)
    assert words.headline(results).startswith(
        "The deformation slows SGD and momentum SGD, not Adam; undoing it"
    )


def test_a_failed_certificate_is_shown_in_red(results, page):
    assert not re.search(r'class="[^"]*is-failed', page)
    assert 'role="alert"' not in page
    results["curvature"]["rows"][1]["sandwich_holds"] = False
    results["curvature"]["holds"] = False
    failed = report.render(results)
    assert "A certificate failed" in failed
    assert "Failed: σ₁ is outside its bounds at α = 4." in failed
    assert 'class="alert" role="alert"' in failed
    assert "is-failed" in failed
    assert failed.count('<span class="word failed">') > page.count('<span class="word failed">')


@pytest.mark.parametrize(
    ("section", "rows", "key", "said"),
    [
        ("preservation", "formats", "holds", "error bound of preservation is broken in float64"),
        ("preservation", "bit_identity", "identical", "not bit-identical with the axis basis in float64"),
        ("curvature", "rows", "congruence_holds", "congruence is broken"),
    ],
)
def test_each_way_to_fail_is_named(results, section, rows, key, said):
    results[section][rows][0][key] = False
    results[section]["holds"] = False
    assert any(said in f for f in words.failures(results))


def test_a_failure_that_no_row_explains_is_still_a_failure(results):
    results["preservation"]["holds"] = results["curvature"]["holds"] = False
    assert len(words.failures(results)) == 2


def test_nan_and_infinity_do_not_crash(results):
    for ratio in results["race"]["ratios"]:
        ratio.update(NAN_RATIO)
    for row in results["preservation"]["formats"]:
        row.update(error=math.inf, max_error=math.nan)
        row["layers"][0].update(error=math.inf, bound=math.inf, bound_ratio=math.nan, expected=math.nan)
    for row in results["curvature"]["rows"]:
        row.update(sharpness=math.nan, lower=math.nan, upper=math.inf, congruence_error=math.nan)
        row["eigenvalues"] = [math.nan] * 4
    for arm in results["race"]["arms"].values():
        arm["sharpness"] = [math.nan, math.inf]
        for run in arm["optimizers"].values():
            run.update(steps=[math.nan] * 2, best_step_size=[math.nan] * 2, censored=2)
            run["curves"] = [[math.nan] * len(arm["record_at"])] * 2
        if arm["bill"]:
            arm["bill"].update(added_flops=math.nan, added_flops_share=math.nan, conversion_seconds=math.nan)
    page = report.render(results)
    assert "n/a" in page
    assert "∞" in page
    assert "overflows" in page
    assert not re.search(r"\bnan\b|\binf\b", page)
    report.hero_figure(results)


def test_a_censored_ratio_is_a_lower_bound(page):
    assert "≥\u202f6.58×" in page
    assert "∞)" in page
    assert "&gt; 120" in page


def test_one_seed_has_no_interval(results):
    for ratio in results["race"]["ratios"]:
        ratio.update(low=math.nan, high=math.nan, seeds=1)
    assert "[" not in " ".join(line for card in cards.cards(results) for line in card.details)
    report.render(results)


def test_limits_of_the_race_are_noted(results):
    said = " ".join(notes.race_notes(results))
    assert "fewer than 50 steps" in said
    assert "3 of the races reached the target at no step size" in said
    assert "should be 1 and is not" not in said
    assert "edge of the grid" not in said
    results["race"]["arms"]["top_4"]["optimizers"]["sgd"]["at_edge"] = True
    _ratio(results, "inject", "original", "sgd").update(value=1.5, low=1.4, high=1.6)
    said = " ".join(notes.race_notes(results))
    assert "“inject” should be 1 and is not: SGD 1.50×" in said
    assert "edge of the grid, so a better one may exist: top, α = 4 (SGD)" in said.replace("\u00a0", " ")


def test_text_is_escaped(results):
    results["task"]["name"] = results["task"]["description"] = "<b>bold</b>"
    results["race"]["arms"]["top_4"]["label"] = "<i>&"
    results["race"]["arms"]["inject"]["bill"]["knowledge"] = "<u>"
    runs = results["race"]["arms"]
    for arm in runs.values():
        arm["optimizers"]["<s>"] = arm["optimizers"].pop("adam")
    for ratio in results["race"]["ratios"]:
        ratio["optimizer"] = ratio["optimizer"].replace("adam", "<s>")
    page = report.render(results)
    assert not {"b", "i", "u", "s"} & set(Reader(page).tags)
    assert "&lt;b&gt;" in page


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_the_command(results, monkeypatch, package):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=rf"{package}.*pip install 'specdef_jax\[cli\]'"):
        report.render(results)


def test_the_hero_is_an_svg_file_on_its_own_ground(results):
    text = report.hero_figure(results).decode()
    assert text.startswith("<svg")
    assert 'xmlns="http://www.w3.org/2000/svg"' in text
    assert f"fill: {svg.LIGHT['paper']}" in text
    assert "var(--" not in text
    assert "<text" not in text  # outlines: the same on every machine
    assert "<dc:date>" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1.00"),
        (2.3549, "2.35"),
        (999.6, "1000"),
        (12_345.6, "12\u202f346"),
        (0.00123, "0.00123"),
        (1e-14, "10⁻¹⁴"),
        (3.14e-14, "3.14\u202f×\u202f10⁻¹⁴"),
        (-20.5, "−20.5"),
        (math.nan, "n/a"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
    ],
)
def test_numbers_keep_their_significant_digits(value, text):
    assert number(value) == (text if value != 1 else "1")


def test_given_numbers_carry_no_idle_zeros():
    assert [given(v) for v in (0.1, 1.5, 64.0, 100.0, 65536)] == ["0.1", "1.5", "64", "100", "65\u202f536"]


def test_ratios_say_what_is_known():
    one = {"value": 2.0, "low": 1.5, "high": math.inf, "censored": True, "seeds": 2}
    assert factor(one) == "≥\u202f2×"
    assert interval(one) == "[1.50, ∞)"
    assert factor(NAN_RATIO) == "n/a"
    assert interval(NAN_RATIO) == ""


def test_labels_keep_their_order_and_their_distance():
    places = [0.1, 0.11, 0.12, 0.5, 0.93, 0.94]
    moved = apart(places, 0.1)
    assert all(b - a >= 0.1 - 1e-12 for a, b in itertools.pairwise(moved))
    assert moved[3] == 0.5
    assert sum(moved[:3]) == pytest.approx(sum(places[:3]))
