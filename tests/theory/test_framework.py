"""Certificates that can fail, a falsifier that finds planted errors, and the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax.words import Word
from theory import __main__ as command
from theory import catalogue, table
from theory.assumptions import require_alpha, require_invariance, require_smooth
from theory.certificate import (
    AssumptionViolated,
    Search,
    Verdict,
    equality,
    fit,
    inequality,
    refuses,
    refuted,
    seen,
    tight,
    under_assumptions,
    violation,
)
from theory.draws import over_draws
from theory.falsifier import falsify
from theory.fits import exponent
from theory.instances.matrices import FAMILIES, orthonormal
from theory.instances.networks import BUILDERS
from theory.sizes import Size

KEY = jax.random.key(0)
NAN = float("nan")


@pytest.mark.parametrize(
    ("certificate", "holds"),
    [
        (equality("", "", [1.0, 2.0], [1.0, 2.0]), True),
        (equality("", "", [1.0, 2.0 + 1e-9], [1.0, 2.0]), False),
        (equality("", "", [1.0, 2.0 + 1e-9], [1.0, 2.0], allowance=1e-8), True),
        (equality("", "", [1.0, NAN], [1.0, NAN]), False),
        (equality("", "", [[0.0, 0.0]], [[0.0, 0.0]]), True),
        (inequality("", "", [1.0, 2.0], [1.0, 3.0]), True),
        (inequality("", "", [1.0, 2.0], [1.0, 1.9]), False),
        (inequality("", "", [1.0, 2.0], [1.0, 1.9], allowance=0.2), True),
        (inequality("", "", NAN, 1.0), False),
        (inequality("", "", 0.0, NAN), False),
        (inequality("", "", 0.0, 1.0, search=Search(1, 1, 1, -1e-9)), False),
        (inequality("", "", 0.0, 1.0, search=Search(1, 1, 1, 1e-9)), True),
        (tight("", "", 1.0, 1.5, factor=2.0), True),
        (tight("", "", 1.0, 2.5, factor=2.0), False),
        (tight("", "", 1.0, 0.9, factor=2.0), False),
        (tight("", "", NAN, 0.9, factor=2.0), False),
        (refuted("", "", [0.0, 2.0], [1.0, 1.0]), True),
        (refuted("", "", [0.0, 1.0], [1.0, 1.0]), False),
        (refuted("", "", NAN, 1.0), False),
        (fit("", "", 1.95, 2.0, tolerance=0.1, count=6), True),
        (fit("", "", 1.85, 2.0, tolerance=0.1, count=6), False),
        (fit("", "", NAN, 2.0, tolerance=0.1, count=6), False),
        (seen("", "", 1.0, True), True),
        (seen("", "", 1.0, False), False),
    ],
)
def test_verdicts(certificate, holds):
    assert certificate.holds is holds
    assert certificate.fails is not holds


def test_a_certificate_shows_its_worst_instance():
    found = inequality("", "", [1.0, 5.0, 2.0], [9.0, 5.5, 3.0], scale=[1.0, 5.0, 2.0])
    assert (found.lhs, found.rhs, found.count) == (5.0, 5.5, 3)
    assert found.slack == pytest.approx(0.1)
    assert refuted("", "", [2.0, 5.0], [1.0, 1.0]).lhs == 5.0
    assert equality("", "", [[1.0, 2.0], [3.0, 4.5]], [[1.0, 2.0], [3.0, 4.0]]).slack == pytest.approx(0.125)


def test_a_violated_assumption_neither_holds_nor_fails():
    def outside():
        require_alpha(0.5)
        return equality("", "", 0.0, 1.0)

    (found,) = under_assumptions("claim", "instance", outside)
    assert found.verdict is Verdict.VIOLATED
    assert not found.holds
    assert not found.fails
    assert "alpha >= 1" in found.violated
    assert refuses("", "", [found], "alpha >= 1").holds
    assert refuses("", "", [found], "r1 >= rank").fails
    assert refuses("", "", [equality("", "", 0.0, 0.0)], "alpha").fails
    assert refuses("", "", [], "alpha").fails
    (inside,) = under_assumptions("claim", "instance", lambda: equality("", "", 0.0, 0.0))
    assert inside.holds


def test_points_without_a_second_derivative():
    require_smooth(lambda x: jnp.sum(jax.nn.relu(x)), jnp.array([1.0, -1.0]))
    with pytest.raises(AssumptionViolated, match="1 ties in 'max'"):
        require_smooth(lambda x: jnp.sum(jax.nn.relu(x)), jnp.array([1.0, 0.0]))


def test_a_nonlinear_map_between_the_factors():
    def phi(p):
        return {"a": 2 * p["a"], "b": p["b"] / 2}

    params = {"a": jnp.zeros(()), "b": jnp.ones(())}
    require_invariance(lambda p: p["a"] * p["b"], phi, params, key=KEY)
    # tanh(0) = 0: the two agree at params itself.
    with pytest.raises(AssumptionViolated, match="nothing nonlinear"):
        require_invariance(lambda p: jnp.tanh(p["a"]) * p["b"], phi, params, key=KEY)


def planted(point):
    """A wrong inequality, sum x^2 >= x_0^2 + 1/2 x_1^2 + .999 x_2^2 + 1e-3, false near the origin only."""
    x = point
    return jnp.sum(x**2) - x[0] ** 2 - 0.5 * x[1] ** 2 - 0.999 * x[2] ** 2 - 1e-3


def test_the_falsifier_finds_what_random_search_misses():
    def sample(key):
        return jax.random.normal(key, (3,)) * 10

    found = falsify(planted, sample, KEY, tried=200, climbed=16, steps=300, step_size=0.1)
    assert found.search.worst < 0
    assert float(planted(found.point)) == pytest.approx(found.search.worst, rel=1e-9)
    blind = falsify(planted, sample, KEY, tried=200, climbed=16, steps=0)
    assert blind.search.worst > 0
    true = falsify(lambda x: jnp.sum(x**2), sample, KEY, tried=200, climbed=16, steps=100)
    assert true.search.worst >= 0


def test_the_falsifier_passes_over_what_is_not_finite():
    found = falsify(lambda x: jnp.log(x[0]), lambda k: jax.random.normal(k, (1,)), KEY, tried=100, steps=20)
    assert np.isfinite(found.search.worst)


def test_exponents():
    x = np.array([1.0, 2.0, 4.0, 8.0])
    found = exponent(x, 3 * x**-1.5)
    assert found.slope == pytest.approx(-1.5)
    assert found.low == pytest.approx(-1.5)
    noisy = exponent(x, 3 * x**-1.5 * np.array([1.1, 0.9, 1.1, 0.9]))
    assert noisy.low < -1.5 < noisy.high
    assert np.isnan(exponent(x[:2], x[:2]).low)


def test_draws_are_those_of_their_keys():
    found = over_draws(lambda key, scale: scale * jax.random.normal(key), KEY, 7, 2.0)
    want = [2.0 * float(jax.random.normal(k)) for k in jax.random.split(KEY, 7)]
    np.testing.assert_allclose(found, want, rtol=1e-12)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_matrix_families_are_what_they_say(name):
    values = np.linalg.svd(np.asarray(FAMILIES[name](KEY, (5, 4))), compute_uv=False)
    decades = np.log10(values[0] / np.maximum(values[-1], 1e-300))
    spans = {"gaussian": (0, 3), "graded": (5.9, 6.1), "rank deficient": (13, 400), "clustered": (0, 1e-3)}
    assert spans[name][0] <= decades <= spans[name][1]
    Q = orthonormal(KEY, 5, 3)
    np.testing.assert_allclose(Q.T @ Q, np.eye(3), atol=1e-14)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_networks_are_small_and_not_fitted(name):
    instance = BUILDERS[name](KEY)
    sizes = [leaf.size for leaf in jax.tree.leaves(instance.params)]
    assert sum(sizes) < 200
    grad = jax.grad(instance.loss)(instance.params, *instance.args)
    assert float(max(jnp.abs(g).max() for g in jax.tree.leaves(grad))) > 1e-2
    require_smooth(instance.loss, instance.params, *instance.args)
    assert instance.where in instance.network.kernels


def test_every_statement_is_there():
    numbers = [s.number for s in catalogue.statements()]
    want = (
        "0 1.1 1.2 1.3 1.4 1.5 2.1 2.2 2.3 2.4 3.1 3.2 3.3 3.3iv 3.3v 3.3vi 3.4 3.5 3.6 3.7 "
        "4.1 4.2 4.3 4.4 5.1 5.2 5.2b 5.3 5.4 5.5 5.6"
    )
    assert [n for n in numbers if n in want.split()] == want.split()
    for statement in catalogue.statements():
        assert statement.title
        assert set(statement.standing.split()) & {
            "paper",
            "paper,",
            "ours",
            "ours,",
            "standard",
            "seen",
        } or any(word in statement.standing for word in ("paper", "ours", "standard", "seen"))


@pytest.fixture
def one_statement(monkeypatch):
    """Put one statement in place of all, its certificates given."""

    def put(*certificates, error=None):
        statement = catalogue.Statement("s9_9_planted", "9.9", "Planted", "ours")

        def run(module, seed, size):
            return catalogue.Report(statement, certificates, 0.1, error or "")

        monkeypatch.setattr(catalogue, "statements", lambda: [statement])
        monkeypatch.setattr(catalogue, "run", run)

    return put


def test_the_command_tells_by_its_exit_status(one_statement, capsys):
    one_statement(equality("one is one", "numbers", 1.0, 1.0), violation("x", "y", "alpha >= 1"))
    assert command.main(["--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "holds  checked   one is one" in printed
    assert "assumption violated: alpha >= 1" in printed
    one_statement(equality("one is two", "numbers", 1.0, 2.0))
    assert command.main(["--jobs", "1"]) == 1
    assert "FAILS" in capsys.readouterr().out
    one_statement(error="ValueError: broken")
    assert command.main(["--jobs", "1"]) == 1
    one_statement()
    assert command.main(["--jobs", "1"]) == 1, "a statement without certificates proves nothing"
    assert command.main(["--only", "7.7"]) == 2
    assert "no statement 7.7; statements: 9.9" in capsys.readouterr().err


def test_json(one_statement, capsys, tmp_path):
    one_statement(inequality("a <= b", "numbers", 1.0, np.inf, word=Word.PROVED, search=Search(3, 2, 1, 0.5)))
    assert command.main(["--jobs", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    (found,) = record["statements"][0]["certificates"]
    assert (found["claim"], found["rhs"], found["word"]) == ("a <= b", "inf", "proved")
    assert found["search"]["worst"] == 0.5
    assert record["environment"]["packages"]["jax"]
    assert command.main(["--jobs", "1", "--json", str(tmp_path / "out.json")]) == 0
    assert "falsifier: smallest slack 0.5" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["schema"] == 1


def test_an_exception_in_a_statement_is_reported(monkeypatch):
    statement = catalogue.Statement("s9_9_planted", "9.9", "Planted", "ours")
    monkeypatch.setattr(catalogue, "describe", lambda module: statement)
    report = catalogue.run("s9_9_planted", 0, Size.SMALL)
    assert not report.holds
    assert "ModuleNotFoundError" in report.error
    assert "FAILS" in table.table([report])


def test_statements_are_replaced_in_a_file_of_the_same_size_and_seed(tmp_path):
    path = tmp_path / "theory.json"
    old = [{"statement": n, "seconds": 1} for n in ("1.1", "2.4")]
    new = [{"statement": n, "seconds": 2} for n in ("2.4", "3.1")]
    assert command._among(path, new, "small", 0) == new
    path.write_text(json.dumps({"size": "small", "seed": 0, "statements": old}))
    assert command._among(path, new, "small", 0) == [old[0], *new]
    assert command._among(path, new, "small", 1) == command._among(path, new, "full", 0) == new
