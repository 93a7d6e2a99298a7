"""The parameters a race ends with: against single runs, its own losses, and itself cut into pieces."""

import textwrap
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from specdef_jax import race
from specdef_jax.errors import ProblemError, SpecError
from specdef_jax.race import Outcome
from tests.processes import last_lines
from tests.race.test_at_scale import (
    GRID,
    KEY,
    X,
    Y,
    assert_equal,
    forbidden,
    mse,
    problem_of,
    problems,
    raced,
)
from tests.race.test_driver import KEY as OTHER_KEY
from tests.race.test_driver import from_table, nothing, value_of


@pytest.fixture(scope="module")
def whole():
    return raced(ends=True)


@pytest.mark.parametrize("lanes", [1, 2, 16])
@pytest.mark.parametrize("every", [1, 7])
def test_ends_are_those_of_single_runs(lanes, every):
    found = raced(ends=True, lanes=lanes, eval_every=every)
    steps = found.to_target[0]
    steps = np.where(np.isnan(steps), 60 // every * every, np.ceil(steps / every) * every)
    assert set(found.outcome.ravel()) == {Outcome.REACHED, Outcome.CENSORED}
    assert len(np.unique(steps)) > 3
    for i, seed in np.ndindex(*steps.shape):
        alone = race.replay(
            problems()[seed // 2], race.sgd, GRID[i], int(steps[i, seed]), sample=race.minibatches(4, X, Y),
            key=jax.random.split(KEY, 2)[seed % 2],
        )  # fmt: skip
        end = found.end("sgd", i, seed)
        for name in ("w", "b"):
            np.testing.assert_allclose(end[name], alone[name], rtol=1e-12, atol=1e-13)


def assert_losses_are_the_last(found, loss):
    """For every run there is, also the dominated."""
    for name in found.names:
        for i, seed in np.ndindex(found.grid(name).size, len(found.targets)):
            last = found.last[found.index(name), i, seed]
            assert loss(found.end(name, i, seed)) == pytest.approx(last, rel=1e-12, nan_ok=True)


def test_ends_of_every_outcome_optimizer_and_round_have_the_last_losses():
    adam = {"sgd": race.sgd, "adam": race.FIRST_ORDER["adam"]}
    found = raced(ends=True, optimizers=adam, refine=1.5, prune=True, eval_every=3, lanes=3)
    assert {Outcome.REACHED, Outcome.DOMINATED, Outcome.ABSENT} <= set(found.outcome.ravel())
    assert_losses_are_the_last(found, lambda params: mse(params, X, Y))
    absent = found.outcome == Outcome.ABSENT
    assert np.isnan(found.ends["w"][absent]).all()
    assert np.isfinite(found.ends["w"][~absent]).all()
    # without eval_args the loss of the step itself is judged, that before the step
    found = raced(ends=True, eval_args=None, sample=race.full_batch(X, Y), orders=1, eval_every=4)
    assert_losses_are_the_last(found, lambda params: mse(params, X, Y))


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_run_that_diverged_ends_where_it_was_seen(lanes):
    found = race.run(
        value_of, {"x": jnp.asarray(1.3)}, {"table": from_table}, sample=nothing, steps=4,
        step_sizes=np.arange(1.0, 7.0), target=0.8, key=OTHER_KEY, lanes=lanes, ends=True,
    )  # fmt: skip
    assert found.diverged("table") == 3
    np.testing.assert_array_equal(found.ends["x"], found.last)
    np.testing.assert_array_equal(found.ends["x"][0, :, 0], [0.5, np.nan, np.inf, -np.inf, 0.9, 0.8])


@pytest.mark.parametrize("cut", [{"chunk": 1}, {"chunk": 4}, {"mesh": 4}, {"mesh": 8, "chunk": 4}])
def test_cuts_change_no_bit_of_the_ends(whole, cut):
    cut = dict(cut)
    if "mesh" in cut:
        count = cut["mesh"]
        cut["mesh"] = jax.make_mesh((count,), ("runs",), devices=jax.devices()[:count])
    assert_equal(raced(ends=True, **cut), whole)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_ends_of_parameters_on_a_mesh(kind):
    mesh = jax.make_mesh((2,), ("m",), axis_types=(kind,), devices=jax.devices()[:2])
    found = race.run_problems(
        [laid(one, mesh) for one in problems()], {"sgd": race.sgd}, sample=race.minibatches(4, X, Y),
        steps=60, step_sizes=GRID, target=0.05, key=KEY, orders=2, eval_args=(X, Y), lanes=1, ends=True,
    )  # fmt: skip
    alone = raced(ends=True, lanes=1)
    for name in ("w", "b"):
        np.testing.assert_allclose(found.ends[name], alone.ends[name], rtol=1e-12, atol=1e-13)


def laid(one, mesh):
    """Lay the outputs of the layer out over a mesh, from what every process holds."""

    def place(x, *axes):
        return jax.device_put(np.asarray(x), NamedSharding(mesh, PartitionSpec(*axes)))

    return replace(one, params={"w": place(one.params["w"], None, "m"), "b": place(one.params["b"], "m")})


PROCESSES = textwrap.dedent("""
    from specdef_jax import race
    from specdef_jax.errors import SpecError
    from tests.race.test_at_scale import GRID, KEY, X, Y, problems
    from tests.race.test_ends import laid

    mesh = jax.make_mesh((2,), ("m",))
    ones = [laid(one, mesh) for one in problems()]
    try:
        race.run_problems(ones, {"sgd": race.sgd}, sample=race.full_batch(X, Y), steps=9, step_sizes=GRID,
                          target=0.05, ends=True)
    except SpecError as error:
        print(error)
""")


def test_ends_that_span_processes_are_refused():
    for line in last_lines(PROCESSES):
        assert "ends=True, but 'b' lies on devices of several processes" in line


def test_keeping_changes_no_result(whole):
    plain = raced()
    assert plain.ends is None
    for field in ("outcome", "to_target", "last", "trace"):
        np.testing.assert_allclose(getattr(plain, field), getattr(whole, field), rtol=1e-12)


def test_ends_come_from_a_folder_in_their_dtype(tmp_path, monkeypatch):
    def loss(params, *args):
        return jnp.sum(jnp.square(params["x"]).astype(float)) + jnp.square(params["y"])

    one = [problem_of({"x": jnp.asarray([3.0, 4.0], jnp.bfloat16), "y": jnp.asarray(1.0)}, loss)]

    def stored(**changes):
        settings = {"sample": race.full_batch(), "steps": 9, "step_sizes": (0.01, 0.1), "target": 1e-9}
        return race.run_problems(
            one, {"sgd": race.sgd}, folder=tmp_path, lanes=1, **(settings | {"ends": True} | changes)
        )

    found = stored()
    assert found.ends["x"].dtype == jnp.bfloat16
    assert_losses_are_the_last(found, lambda params: float(loss(params)))
    with monkeypatch.context() as patched:
        patched.setattr(race.rounds.execution, "race_one", forbidden)
        assert_equal(stored(), found)
        with pytest.raises(AssertionError, match="raced again"):
            stored(ends=False)
    assert stored(ends=False).ends is None


def test_what_was_not_kept_is_not_had(whole):
    assert isinstance(whole.at(0).end("sgd", 0, 0)["w"], np.ndarray)
    with pytest.raises(ProblemError, match="race with ends=True"):
        raced().end("sgd", 0, 0)
    with pytest.raises(ProblemError, match="'adam' was not raced"):
        whole.end("adam", 0, 0)
    for step, seed in ((3, 0), (0, 6), (-1, 0)):
        with pytest.raises(SpecError, match=r"no run .* of 'sgd': there are \(3, 6\)"):
            whole.end("sgd", step, seed)
