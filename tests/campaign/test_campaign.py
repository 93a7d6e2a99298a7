"""Campaigns on a small network: what they recover, in which order, and when they must not succeed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import specdef_jax as sd
from specdef_jax import attacks, campaign, race
from specdef_jax.attacks import Knowledge
from specdef_jax.campaign.relative import relative
from specdef_jax.campaign.setting import Setting
from specdef_jax.errors import ProblemError, SelectionError

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (24, 5))
Y = jnp.sin(X @ jax.random.normal(jax.random.key(1), (5, 3)))


def network(seed=0, width=6):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "w1": jax.random.normal(keys[0], (5, width)) / 2,
        "b1": jnp.full(width, 0.1),
        "w2": jax.random.normal(keys[1], (width, 3)) / 2,
    }


def apply(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"]


def loss(params, x, y):
    return jnp.mean((apply(params, x) - y) ** 2)


def utility(params):
    return -float(loss(params, X, Y))


def setting(**changes):
    given = {"args": (X, Y), "target": 0.25, "optimizers": {"sgd": race.sgd}, "steps": 1500, "decades": 3}
    return Setting(**(given | changes))


def deformed(seed=0, alpha=12.0, **spec):
    return sd.deform(network(seed), sd.SpecDef(alpha, **({"k": 1} | spec)), where="w1", key=KEY)


FEW = {name: attacks.ATTACKS[name] for name in ("freeze", "fuse", "inject")}


@pytest.fixture(scope="module")
def book():
    released = [deformed(seed) for seed in range(2)]
    return campaign.ledger(loss, released, setting(), attacks=FEW, utility=utility)


def test_the_ledger_holds_what_races_say(book):
    assert [e.attack for e in book.entries] == ["undefended", "fine-tune as released", *FEW]
    undefended, direct = book.entries[:2]
    assert undefended.recovered["sgd"].value == 1
    assert direct.recovered["sgd"].value > 3, "the defence does nothing: the test is empty"
    for name in ("fuse", "inject"):
        assert book.entry(name).recovered["sgd"].value == pytest.approx(1, rel=1e-6)
    assert book.entry("freeze").recovered["sgd"].value < direct.recovered["sgd"].value / 2
    for entry in book.entries:
        # at the end of its best run each network has just passed the target
        assert -0.26 < entry.utility <= -0.2
    assert book.entry("inject").bill.added_parameters == 5 * 6 + 5 * 5  # the fewer features are the inputs
    assert book.entry("fuse").seconds > 0


def test_strongest_of_each_rung_within_the_budget(book):
    found = book.strongest()
    assert found[Knowledge.BLACK_BOX].attack == "fine-tune as released"
    assert found[Knowledge.WHICH_LAYERS].attack in ("fuse", "inject")
    strict = campaign.Ledger(book.entries, utility_budget=-1.0)  # nothing gains so much
    assert strict.strongest() == {}
    assert set(book.entries[0].to_dict()) >= {"attack", "knowledge", "bill", "recovered"}


def test_an_attack_that_does_not_apply_is_listed_with_its_reason():
    plain = campaign.ledger(loss, [network()], setting(), attacks={"fuse": attacks.fuse})
    assert "nothing to attack" in plain.entry("fuse").refused
    assert plain.strongest()[Knowledge.BLACK_BOX].attack == "fine-tune as released"


def test_auto_stops_at_the_cheapest_that_works():
    told = []
    found = campaign.auto(
        campaign.of_tree(loss, deformed()), setting(), attacks=FEW, progress=lambda *a: told.append(a[0])
    )
    assert found.trials[0].attack == "as released"
    assert found.resistance > 3
    assert not found.resistance_is_bound
    assert found.cheapest is found.trials[-1]
    assert found.cheapest.ratio <= 2
    assert found.cheapest.knowledge <= Knowledge.WHICH_LAYERS
    assert [t.attack for t in found.trials if not t.refused] == told
    assert found.cheapest.attack in str(found)
    assert f"{found.resistance:.3g}" in str(found)


def test_auto_finds_nothing_to_do_without_a_defence():
    found = campaign.auto(campaign.of_tree(loss, deformed(alpha=1.0)), setting(), attacks=FEW)
    assert found.cheapest.attack == "as released"


def test_who_knows_the_change_undoes_it():
    one = campaign.Defence("hidden", loss, {"q": network()}, network(), Partial(opened, 3e3))
    found = campaign.auto(one, setting(steps=60), attacks={})
    assert found.trials[0].attack == "as released"
    assert found.resistance_is_bound
    assert (found.cheapest.attack, found.cheapest.knowledge) == ("read back", Knowledge.EVERYTHING)


def test_auto_that_does_not_win_says_so():
    found = campaign.auto(campaign.of_tree(loss, deformed()), setting(), attacks={}, within=0.01)
    assert found.cheapest is None
    assert [t.attack for t in found.trials] == ["as released", "relative steps", "read back"]
    assert "none of 3 attacks undoes it" in str(found)


def opened(alpha, params):
    """A function-preserving change of parameters: the identity, but steep in one direction."""
    q = params["q"]
    start = network()
    return {**q, "w2": start["w2"] + alpha * (q["w2"] - start["w2"])}


def test_rescaled_channels_are_undone_by_relative_steps():
    scales = jnp.asarray([1e-3, 1e3, 30.0, 0.02, 1.0, 200.0])
    one = campaign.rescaled_channels(loss, network(), ("w1", "b1"), "w2", scales)
    found = campaign.auto(one, setting(), within=1.5)
    assert found.resistance > 3
    assert (found.cheapest.attack, found.cheapest.knowledge) == ("relative steps", Knowledge.WEIGHTS)
    # the preconditioned run does not see the channels at all
    plain, other = (
        race.replay(p, relative(race.sgd), 0.01, 50, sample=race.full_batch(X, Y), key=KEY)
        for p in (campaign.of_tree(loss, network()).problem(X, Y), one.problem(X, Y))
    )
    bare = {"w1": other["w1"] / scales, "b1": other["b1"] / scales, "w2": other["w2"] * scales[:, None]}
    np.testing.assert_allclose(bare["w2"] @ jnp.eye(3), plain["w2"], rtol=1e-9, atol=1e-11)


def test_a_linear_chain_is_read_back():
    one = campaign.chain(loss, network(), "w1", 6.0, factors=3)
    np.testing.assert_allclose(one.params["w1"].materialize(), network()["w1"], rtol=1e-14)
    found = campaign.auto(one, setting())
    assert found.resistance > 2
    assert found.cheapest is not None


def test_frontier_and_planner():
    specs = {
        "weak": (sd.SpecDef(2.0), "w1"),
        "strong, both layers": (sd.SpecDef(12.0), "w*"),
    }
    points = campaign.frontier(loss, network(), specs, setting(), key=KEY)
    by = {p.name: p for p in points}
    assert by["weak"].verdict.resistance < by["strong, both layers"].verdict.resistance
    assert all(p.price < 60 for p in points), "no attack costs more than seconds"
    proposals = campaign.planner(
        loss, [network(s) for s in range(2)], "w1", setting(), steps=3000.0, dtype="float32", error=1e-3,
        key=KEY, bases=("symmetric",), directions=("top", "bottom"),
    )  # fmt: skip
    assert [p.steps[1] for p in proposals] == sorted((p.steps[1] for p in proposals), reverse=True)
    for p in proposals:
        assert 1 <= p.spec.alpha <= p.limit
        assert p.exponent[1] < p.exponent[0] < p.exponent[2]
        assert p.enough == (p.steps[1] >= 0.999 * 3000)
        assert p.cheapest is not None
    half = campaign.planner(
        loss, [network()], "w1", setting(), steps=3000.0, dtype="bfloat16", error=0.02, key=KEY,
        bases=("symmetric",), directions=("top",),
    )[0]  # fmt: skip
    assert half.limit < proposals[0].limit
    assert math.isnan(half.exponent[1])


def too_low():
    return campaign.auto(campaign.of_tree(loss, deformed()), setting(target=-1.0, steps=5))


def other_function():
    return campaign.Defence("x", loss, network(1), network()).problem(X, Y)


def no_steps():
    more = {"steps": 0.0, "dtype": "float32", "error": 1.0, "key": KEY}
    return campaign.planner(loss, [network()], "w1", setting(), **more)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (other_function, ProblemError, "changes the function"),
        (lambda: campaign.chain(loss, network(), "b1", 2.0), SelectionError, "no matrix 'b1'"),
        (
            lambda: campaign.rescaled_channels(loss, network(), ("w9",), "w2", jnp.ones(6)),
            SelectionError,
            "'w9'",
        ),
        (no_steps, ProblemError, "steps = 0.0"),
        (too_low, ProblemError, "reaches its target with none"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        change()
