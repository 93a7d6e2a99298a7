"""What a race may be cut into (chunks, folders, meshes, milestones), and what that must not change."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from specdef_jax import race
from specdef_jax.errors import ProblemError, SpecError
from specdef_jax.parametrization import Problem
from specdef_jax.race import Outcome, runner, store
from specdef_jax.race.refinement import wanted
from specdef_jax.race.result import CELLS
from tests.processes import last_lines

KEY = jax.random.key(5)
GRID = (0.05, 0.3, 1.2)
X = jax.random.normal(KEY, (12, 3))
Y = 0.6 * jnp.tanh(X @ jnp.asarray([[1.0, -0.5], [0.3, 0.8], [-0.7, 0.2]]))


def mse(params, x, y):
    return jnp.mean(jnp.square(jnp.tanh(x @ params["w"] + params["b"]) - y))


def same(params):
    return params


def problem_of(params, loss):
    return Problem(params, Partial(loss), Partial(same))


def problems(count=3):
    starts = ({"w": jax.random.normal(jax.random.key(s), (3, 2)), "b": jnp.zeros(2)} for s in range(count))
    return [problem_of(start, mse) for start in starts]


def raced(count=3, optimizers=None, **changes):
    settings = {
        "sample": race.minibatches(4, X, Y), "steps": 60, "step_sizes": GRID, "target": 0.05, "key": KEY,
        "orders": 2, "eval_args": (X, Y), "lanes": 2,
    }  # fmt: skip
    return race.run_problems(problems(count), optimizers or {"sgd": race.sgd}, **(settings | changes))


def assert_equal(a, b):
    for field in ("step_sizes", *CELLS):
        a_tree, b_tree = (jax.tree.flatten(getattr(found, field)) for found in (a, b))
        assert a_tree[1] == b_tree[1], field
        for x, y in zip(a_tree[0], b_tree[0], strict=True):
            assert x.dtype == y.dtype, field
            np.testing.assert_array_equal(x, y, err_msg=field)


@pytest.fixture(scope="module")
def whole():
    found = raced()
    assert (found.outcome == Outcome.REACHED).sum() > 6
    assert (found.outcome == Outcome.CENSORED).sum() > 2
    return found


@pytest.mark.parametrize("chunk", [1, 2, 4, 5])
def test_chunks_change_no_bit(whole, chunk):
    assert_equal(raced(chunk=chunk), whole)


@pytest.mark.parametrize("orders", [1, 2, 3])
def test_races_of_more_and_of_fewer_problems_share_a_program(orders):
    settings = {"chunk": 2, "orders": orders, "optimizers": {"sgd": race.sgd}}
    few = raced(count=3, **settings)
    before = runner.advance._cache_size()
    many = raced(count=5, **settings)
    assert runner.advance._cache_size() == before
    for field in CELLS:
        if (found := getattr(few, field)) is not None:
            np.testing.assert_array_equal(getattr(many, field)[:, :, : 3 * orders], found, err_msg=field)


@pytest.mark.parametrize("shape", [(8,), (2, 2)])
def test_a_mesh_changes_no_bit(whole, shape):
    axes = ("a", "b")[: len(shape)]
    mesh = jax.make_mesh(shape, axes, devices=jax.devices()[: int(np.prod(shape))])
    calls = []
    found = raced(mesh=mesh, progress=lambda done, total: calls.append((done, total)))
    assert_equal(found, whole)
    assert calls[-1] == (18, 18)
    assert_equal(raced(mesh=mesh, chunk=4), whole)


def test_a_mesh_spreads_pruned_and_large_races():
    mesh = jax.make_mesh((4,), ("runs",), devices=jax.devices()[:4])
    alone, spread = raced(5, prune=True), raced(5, prune=True, mesh=mesh)
    np.testing.assert_array_equal(alone.steps("sgd"), spread.steps("sgd"))


PROCESSES = textwrap.dedent("""
    from tests.race.test_at_scale import raced

    found = raced(mesh=jax.make_mesh((2,), ("runs",)), chunk=4)
    print(found.crossings.tobytes().hex(), flush=True)
""")


def test_a_mesh_over_two_processes_changes_no_bit(whole):
    for line in last_lines(PROCESSES):
        assert line == whole.crossings.tobytes().hex()


# ------------------------------------------------------------------------------------------- on disk


def test_a_folder_is_filled_and_taken_from(whole, tmp_path, monkeypatch):
    assert_equal(raced(folder=tmp_path, chunk=4), whole)
    assert len(list(tmp_path.glob("sgd-*.npz"))) == 2
    with monkeypatch.context() as patched:
        patched.setattr(race.rounds.execution, "race_one", forbidden)
        assert_equal(raced(folder=str(tmp_path), chunk=4), whole)
        for change in (
            {"target": 0.06},
            {"key": jax.random.key(6)},
            {"steps": 61},
            {"eval_args": (X, Y + 1e-9)},
            {"prune": True},
            {"step_sizes": (0.05, 0.3, 1.3)},
            {"optimizers": {"sgd": race.momentum}},
            {"sample": race.minibatches(5, X, Y)},
            {"max_evaluations": 50.0},
        ):
            with pytest.raises(AssertionError, match="raced again"):
                raced(**({"folder": tmp_path, "chunk": 4} | change))
    for path, damage in zip(tmp_path.glob("*.npz"), (b"", b"PK\x03\x04 no archive"), strict=True):
        path.write_bytes(damage)
    assert_equal(raced(folder=tmp_path, chunk=4), whole)


def forbidden(*args):
    raise AssertionError("raced again")


def test_a_killed_race_goes_on(tmp_path):
    script = textwrap.dedent("""
        import sys, time, jax
        jax.config.update("jax_enable_x64", True)
        sys.path.insert(0, sys.argv[2])
        from tests.race.test_at_scale import raced
        def slow(done, total):
            print(done, flush=True)
            time.sleep(0.2)
        found = raced(folder=sys.argv[1], chunk=1, progress=slow, ends=True)
        print(found.ends["w"].tobytes().hex())
    """)
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    command = [sys.executable, "-c", script, str(tmp_path), root]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 100
        while len(list(tmp_path.glob("*.npz"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    left = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    assert 2 <= len(left) < 6
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.glob("*.npz"))) == 6
    assert all(path.stat().st_mtime_ns == at for path, at in left.items())
    assert done.stdout.split()[-1] == raced(ends=True).ends["w"].tobytes().hex()


def test_the_fingerprint_sees_constants_of_the_program(tmp_path):
    def with_constant(c):
        return [
            Problem({"x": jnp.asarray(9.0)}, Partial(lambda p, *args: jnp.abs(p["x"] - c)), Partial(same))
        ]

    def stored(c):
        settings = {
            "sample": race.full_batch(),
            "steps": 9,
            "step_sizes": (1.0,),
            "target": 2.5,
            "folder": tmp_path,
        }
        return race.run_problems(with_constant(c), {"sgd": race.sgd}, **settings).steps("sgd")[0]

    assert stored(0.0) == 6.5
    assert stored(jnp.asarray(1.0)) == 5.5
    assert len(list(tmp_path.iterdir())) == 2
    assert store.log.name == "specdef_jax.race.store"


# ------------------------------------------------------------------------------- targets and what they cost


def test_milestones_are_races_to_higher_targets(whole):
    found = raced(milestones=(0.3, 0.1), prune=True)
    np.testing.assert_array_equal(found.targets, [[0.3, 0.1, 0.05]] * 6)
    np.testing.assert_array_equal(found.steps("sgd"), whole.steps("sgd"))
    for i, target in enumerate((0.3, 0.1, 0.05)):
        alone = raced(target=target)
        np.testing.assert_allclose(found.at(i).steps("sgd"), alone.steps("sgd"), rtol=1e-12)
        np.testing.assert_array_equal(found.at(i).gradients("sgd"), alone.gradients("sgd"))
    assert (found.at(0).steps("sgd") < found.at(2).steps("sgd")).all()


def test_evaluations_of_first_order_methods_are_steps_and_cap_them(whole):
    reached = whole.outcome == Outcome.REACHED
    np.testing.assert_array_equal(whole.evaluations[reached, -1], np.ceil(whole.to_target[reached] - 1e-9))
    assert (whole.spent[~reached] == 60).all()
    capped = raced(max_evaluations=10.0)
    assert (capped.spent <= 10).all()
    early = whole.to_target <= 10
    np.testing.assert_array_equal(capped.to_target[early], whole.to_target[early])
    assert np.isnan(capped.to_target[~early]).all()


def test_evaluations_count_what_optimizers_do_inside_a_step():
    def quadratic(params, *args):
        return jnp.sum(jnp.asarray([1.0, 100.0]) * params["x"] ** 2)

    one = [problem_of({"x": jnp.ones(2)}, quadratic)]
    optimizers = {"newton": race.SECOND_ORDER["newton_cg"], "sgd": race.sgd}
    found = race.run_problems(
        one, optimizers, sample=race.full_batch(), steps=40, target=1e-8, lanes=1,
        step_sizes={"newton": (1.0,), "sgd": (1e-3, 5e-3)},
    )  # fmt: skip
    assert np.isnan(found.step_sizes[0, 1])
    assert found.outcome[0, 1, 0] == Outcome.ABSENT
    # one gradient and a Hessian product or two (two evaluations each) in every step
    newton = found.gradients("newton")[0]
    assert 3 * found.steps("newton")[0] <= newton <= 5 * (found.steps("newton")[0] + 1)
    assert found.slowdown(found, "evaluations")["newton"].value == 1
    with pytest.raises(SpecError, match="unit = 'hours'"):
        found.slowdown(found, "hours")


def test_a_censored_ratio_in_evaluations_is_what_was_spent():
    settings = {"orders": 1, "optimizers": {"sgd": race.sgd}}
    base, slow = raced(**settings), raced(target=1e-9, **settings)
    ratio = slow.slowdown(base, "evaluations")["sgd"]
    assert ratio.censored
    assert ratio.value == pytest.approx(np.exp(np.mean(np.log(60 / base.gradients("sgd")))))
    with pytest.raises(ProblemError, match="baseline reaches its target with none of sgd within 60 steps"):
        base.slowdown(slow)


def test_seconds_are_throughput(whole):
    per_step = whole.step_seconds[0]
    assert 0 < per_step < 1
    np.testing.assert_allclose(whole.seconds_to_target("sgd"), whole.steps("sgd") * per_step)


# -------------------------------------------------------------------------------------------- refinement


def parabola(params, *args):
    return 0.5 * params["x"] ** 2 + params["c"] * 0


def test_refinement_brackets_the_best_step_size_from_afar():
    one = [problem_of({"x": jnp.asarray(1.0), "c": jnp.asarray(0.0)}, parabola)]
    settings = {"sample": race.full_batch(), "steps": 3000, "target": 1e-12, "lanes": 1}
    for grid in ((1e-3, 1e-2), (20.0, 60.0)):  # the best is 1 - far above, or far below
        found = race.run_problems(one, {"sgd": race.sgd}, step_sizes=grid, refine=1.1, **settings)
        best = found.grid("sgd")[found.best_index("sgd")[0]]
        assert 1 / 1.1 <= best <= 1.1
        assert not found.at_edge("sgd")
        assert (np.diff(found.grid("sgd")) > 0).all()
        pruned = race.run_problems(
            one, {"sgd": race.sgd}, step_sizes=grid, refine=1.1, prune=True, **settings
        )
        np.testing.assert_array_equal(pruned.steps("sgd"), found.steps("sgd"))
        assert (pruned.outcome == Outcome.DOMINATED).any()
    near = race.run_problems(one, {"sgd": race.sgd}, step_sizes=(0.99, 1.0, 1.01), refine=1.1, **settings)
    assert near.grid("sgd").size == 3  # nothing to refine


def test_refinement_asks_for_what_each_seed_lacks(whole):
    new = wanted(whole, 1.5)
    best = set(whole.best_index("sgd").tolist())
    assert (2 in best) == bool(np.isclose(new, 1.2 * 4).any())
    if 1 in best:
        assert np.isclose(new, np.sqrt(0.05 * 0.3)).any()
    refined = raced(refine=1.5)
    for seed, best in enumerate(refined.best_index("sgd")):
        grid = refined.grid("sgd")
        assert 0 < best < grid.size - 1, "the best step size is at an edge"
        assert grid[best + 1] / grid[best] <= 1.5 * (1 + 1e-9)
        assert grid[best] / grid[best - 1] <= 1.5 * (1 + 1e-9)
        assert refined.steps("sgd")[seed] <= whole.steps("sgd")[seed]


def test_refinement_that_finds_no_edge_stops_and_says_so():
    # the larger the better, without end
    def falling(params, *args):
        return params["x"]

    one = [problem_of({"x": jnp.asarray(1e40)}, falling)]
    found = race.run_problems(
        one, {"sgd": race.sgd}, sample=race.full_batch(), steps=5, step_sizes=(1.0, 2.0), target=0.0,
        refine=1.2, lanes=1,
    )  # fmt: skip
    assert np.isnan(found.steps("sgd")).all()
    assert found.grid("sgd").size <= 2 + 16 * 2
    with pytest.raises(SpecError, match=r"refine = 1\.0"):
        raced(refine=1.0)


def test_a_run_can_be_had_again():
    found = raced(1, step_sizes=(0.3,), target=1e-9)
    for order in range(2):
        params = race.replay(
            problems(1)[0],
            race.sgd,
            0.3,
            60,
            sample=race.minibatches(4, X, Y),
            key=jax.random.split(KEY, 2)[order],
        )
        assert float(mse(params, X, Y)) == pytest.approx(found.last[0, 0, order], rel=1e-12)


# ------------------------------------------------------------------------------- switches and samples


def trained(factory, start, gradient, steps, step_size):
    params, optimizer = start, factory(step_size)
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_switches_do_what_they_say():
    start, slope = jnp.asarray([3.0, 4.0]), jnp.asarray([30.0, 40.0])

    def moved(**switches):
        return trained(race.Switched(race.sgd, **switches), start, lambda p: slope, 1, 0.1)

    np.testing.assert_allclose(moved(), start - 0.1 * slope)
    np.testing.assert_allclose(moved(clip=5.0), start - 0.1 * slope / 10)
    np.testing.assert_allclose(moved(warmup=4), start - 0.1 * slope / 4)
    np.testing.assert_allclose(moved(decay=0.5), start - 0.1 * slope - 0.05 * start)
    twice = trained(race.Switched(race.sgd, warmup=2), start, lambda p: slope, 3, 0.1)
    np.testing.assert_allclose(twice, start - 0.1 * slope * 2.5)
    adamw = trained(lambda s: optax.adamw(s, weight_decay=0.2), start, lambda p: 2 * p, 7, 0.1)
    ours = trained(race.Switched(race.FIRST_ORDER["adam"], decay=0.2), start, lambda p: 2 * p, 7, 0.1)
    np.testing.assert_allclose(ours, adamw, rtol=1e-12)
    assert race.Switched(race.sgd, clip=1.0) == race.Switched(race.sgd, clip=1.0)
    for wrong in ({"clip": 0.0}, {"warmup": -1}, {"decay": -1.0}):
        with pytest.raises(SpecError, match=f"{next(iter(wrong))} = {next(iter(wrong.values()))}"):
            race.Switched(race.sgd, **wrong)


def test_clipping_hides_an_explosion():
    one = [problem_of({"x": jnp.asarray(1.0037), "c": jnp.asarray(0.0)}, parabola)]
    optimizers = {"sgd": race.sgd, "clipped": race.Switched(race.sgd, clip=0.01)}
    settings = {"sample": race.full_batch(), "steps": 2000, "step_sizes": (5.0,), "target": 1e-9, "lanes": 1}
    found = race.run_problems(one, optimizers, **settings)
    assert found.diverged("sgd") == 1
    assert found.diverged("clipped") == 0
    assert np.isnan(found.steps("clipped")).all()


def test_minibatches_draw_what_was_asked():
    sample = race.minibatches(5, X, Y)
    x, y = sample(jax.random.key(0))
    assert x.shape == (5, 3)
    rows = [int(np.flatnonzero((np.asarray(X) == row).all(1))[0]) for row in np.asarray(x)]
    np.testing.assert_array_equal(y, Y[np.array(rows)])
    assert jax.tree.structure(race.minibatches(5, X, Y)) == jax.tree.structure(sample)
    assert not np.array_equal(sample(jax.random.key(1))[0], x)
    assert race.full_batch(X, Y)(KEY)[0] is X
    with pytest.raises(SpecError, match="size = 0"):
        race.minibatches(0, X)
    few = race.minibatches(5, X, Y, among=7)
    np.testing.assert_array_equal(few(KEY)[0], race.minibatches(5, X[:7], Y[:7])(KEY)[0])
    assert jax.tree.structure(few) == jax.tree.structure(sample)  # one program
    for among in (0, 13):
        with pytest.raises(SpecError, match=f"among = {among} of 12"):
            race.minibatches(5, X, Y, among=among)
    with pytest.raises(SpecError, match="lengths"):
        race.minibatches(2, X, Y[:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": race.full_batch(X, Y)}, "2 data orders of a sample that is the same whatever its key"),
        ({"milestones": (0.1, 0.2)}, "must descend"),
        ({"milestones": (0.01,)}, "must descend and end above"),
        ({"chunk": 0}, "chunk = 0"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(SpecError, match=message):
        raced(**changes)


def test_lanes_stay_within_the_memory():
    settings = {"step_sizes": np.linspace(0.1, 0.2, 20), "lanes": None, "steps": 5}
    assert raced(memory=1.0, **settings).lanes == 1
