"""What weights give away, on every kind of layer, and how often layers that were never deformed do (5.6)."""

import doctest
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import specdef_jax as sd
from specdef_jax import attacks
from specdef_jax.attacks import AdjacentPair, Scores, roc
from specdef_jax.errors import LeafError, ProblemError
from specdef_jax.tasks.networks import cnn, mlp
from theory.instances.adjacent import grouped_attention

KEY = jax.random.key(9)
FORMS = [(side, basis) for side in ("output", "input") for basis in ("symmetric", "rotated", "axis")]
PAIR = AdjacentPair("first/w", "second/w", "first/b", groups=2)
EPS64, EPS32 = (float(jnp.finfo(t).eps) for t in (jnp.float64, jnp.float32))
ALPHAS = [2.0, 10.0, 100.0, 1e4, 1e6]


def trained(network, key, steps=150):
    """Return parameters after Adam on data that two directions of the input decide."""
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (64, 16)) * jnp.linspace(2, 0.2, 16)  # correlated, as data are
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(network.apply(params, x), y).mean()

    optimizer = optax.adam(1e-2)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[0][0]

    return run(network.init(keys[1]))


@pytest.fixture(scope="module")
def networks():
    """Return trained networks with the hidden kernel that is deformed in each."""
    keys = jax.random.split(KEY, 4)
    dense, conv = mlp((16, 12, 10, 3)), cnn((4, 4, 1), (6, 8), classes=3, window=2)
    made = [(trained(dense, k), "layer_1/w") for k in keys[:3]]
    return [*made, *((trained(conv, k), "conv_1/w") for k in keys[3:])]


@pytest.mark.parametrize(("side", "basis"), FORMS)
@pytest.mark.parametrize("number", [0, 3])
def test_alpha_and_k_are_read_off_the_pair(networks, number, side, basis):
    params, where = networks[number]
    for alpha in ALPHAS:
        spec = sd.SpecDef(alpha=alpha, k=2, side=side, basis=basis, budget=math.inf)
        found = attacks.detect(sd.deform(params, spec, where=where, key=KEY))[where]
        assert found.certain
        assert found.compensation.alpha == pytest.approx(alpha, rel=1e-6)
        assert found.compensation.k == 2
        assert "compensation" in found.signs(alpha)
        assert ("norm_jump" if basis == "axis" else "gap") in found.signs(alpha)
    assert "imbalance" in found.signs(1e6)


def test_whichever_factor_compensates(networks):
    """Call the compensation the weight: the scores of the pair do not ask."""
    matrix = jax.random.normal(KEY, (5, 5))
    pair = sd.deform({"w": matrix}, sd.SpecDef(alpha=32.0, side="output"), where="w", key=KEY)["w"]
    swapped = {"w": sd.Deformed(pair.comp.T, pair.weight.T, "output", pair.axes)}
    for tree in ({"w": pair}, swapped):
        found = attacks.detect(tree)["w"].compensation
        assert (found.alpha, found.k) == (pytest.approx(32.0), 1)


def test_undeformed_layers_are_never_certain(networks):
    for params, where in networks:
        inserted = sd.deform(params, sd.SpecDef(alpha=1.0), where=where, key=KEY)
        for scores in (attacks.detect(params), attacks.detect(inserted)):
            assert set(scores) == {name for name in scores if name.endswith("/w")}
            assert not any(s.certain for s in scores.values())
        assert attacks.detect(inserted)[where].signs(math.inf) == ()


def test_false_compensations_are_counted_not_hidden():
    """One in 2/tolerance matrices of size 2 has a singular value 1 to rounding; of size 4 none is known."""
    rng = np.random.default_rng(0)
    counts = {}
    for d, eps in ((2, 2.0**-7), (4, 2.0**-7), (2, EPS32), (4, EPS32)):
        draws = rng.standard_normal((4000, d, d))
        counts[d, eps] = sum(attacks.compensation_of(M, eps) is not None for M in draws)
    assert 4 < counts[2, 2.0**-7] < 120, "bfloat16, 2 x 2: some percent at most, and not none"
    assert counts[4, 2.0**-7] == counts[2, EPS32] == counts[4, EPS32] == 0
    assert attacks.compensation_of(np.eye(3), EPS64) is None
    assert attacks.compensation_of(np.diag([1.0, 1.0, 0.0]), EPS64) is None, "a projection"
    assert attacks.compensation_of(0.5 * np.eye(3), EPS64) is None, "k = d cannot be told"
    assert attacks.compensation_of(np.diag([1.0, 0.5, 0.25]), EPS64) is None
    assert attacks.compensation_of(np.diag([1.0, 0.5, 0.5]), EPS64).k == 2
    assert attacks.compensation_of(np.ones((2, 3)), EPS64) is None


def test_a_compensation_in_low_precision_and_after_a_step(networks):
    params, where = networks[0]
    half = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    deformed = sd.deform(half, sd.SpecDef(alpha=1e4, k=2, budget=math.inf), where=where, key=KEY)
    found = attacks.detect(deformed)[where]
    assert found.compensation.alpha == pytest.approx(1e4, rel=1e-2)
    moved = jax.tree.map(lambda x: x + 1e-3 * jax.random.normal(KEY, x.shape, x.dtype), deformed)
    assert not attacks.detect(moved)[where].certain
    assert "imbalance" in attacks.detect(moved)[where].signs(1e4)


@pytest.mark.parametrize("basis", ["symmetric", "rotated", "axis"])
def test_a_grouped_gauge(basis):
    net = grouped_attention(KEY)
    first, second = net.params["first"], net.params["second"]
    before = attacks.detect(net.params, [PAIR])[PAIR.name]
    for alpha in (8.0, 1e3):
        spec = sd.SpecDef(alpha=alpha, basis=basis)
        made = sd.deform_pair(first["w"], second["w"], spec, key=KEY, bias=first["b"], groups=2)
        released = {
            **net.params,
            "first": {"w": made.first, "b": made.bias},
            "second": {**second, "w": made.second},
        }
        found = attacks.detect(released, [PAIR])[PAIR.name]
        assert found.compensation is None, "nothing was inserted"
        assert math.isnan(found.gap)
        if basis == "axis":
            # One feature of three is multiplied by a^2: it stands off by at least a^2 over their spread.
            assert found.ratio_jump >= alpha**2 / before.ratio_jump**2
        else:
            assert found.pencil_gap > alpha**2 / 100
        assert found.imbalance > 1.1 * before.imbalance
        balanced = attacks.detect(
            attacks.rebalance(net_loss(net), released, net.x, pairs=[PAIR]).problem.params, [PAIR]
        )
        hidden = balanced[PAIR.name]
        np.testing.assert_allclose([hidden.imbalance, hidden.pencil_gap, hidden.ratio_jump], 1, atol=1e-7)
    assert before.signs(100.0) == ()


def net_loss(net):
    def loss(params, x):
        return jnp.mean(jnp.sin(3 * net.apply(params, x)))

    return loss


def test_scores_by_hand():
    matrix = np.diag([12.0, 4.0, 1.0])
    found = attacks.detect({"w": jnp.asarray(matrix), "b": jnp.ones(3), "n": jnp.ones((2, 2), int)})
    assert set(found) == {"w"}
    assert (found["w"].gap, found["w"].norm_jump) == (4.0, 4.0)
    rank_1 = {"w": jnp.outer(jnp.arange(1.0, 4.0), jnp.ones(2))}
    assert attacks.detect(rank_1)["w"].gap == 1.0, "what is zero to rounding makes no gap"
    X, Y = jnp.diag(jnp.array([8.0, 3.0])), jnp.diag(jnp.array([2.0, 6.0]))
    pair = attacks.detect({"X": X, "Y": Y}, [AdjacentPair("X", "Y")])["X + Y"]
    assert pair.imbalance == pytest.approx(math.sqrt(73 * 40) / 34)
    assert pair.pencil_gap == pytest.approx(8.0)
    assert pair.ratio_jump == pytest.approx(8.0)
    assert Scores(gap=10.0).signs(10.0) == ("gap",)
    assert Scores(gap=9.9).signs(10.0) == ()
    assert Scores(pencil_gap=100.0, ratio_jump=99.0).signs(10.0) == ("pencil_gap",)
    assert Scores(imbalance=2.0, imbalance_limit=2.0).signs(10.0) == ()
    assert Scores(imbalance=2.1, imbalance_limit=2.0).signs(10.0) == ("imbalance",)


def test_a_singular_pencil_is_taken_where_features_are_written_and_read():
    X = jnp.asarray(np.diag([4.0, 1.0, 0.0])), jnp.asarray(np.diag([1.0, 1.0, 5.0]))
    found = attacks.detect({"X": X[0], "Y": X[1]}, [AdjacentPair("X", "Y")])["X + Y"]
    assert found.pencil_gap == pytest.approx(4.0)
    Y = jnp.diag(jnp.array([1.0, 1.0, 0.0]))
    unread = attacks.detect({"X": jnp.diag(jnp.array([4.0, 1.0, 7.0])), "Y": Y}, [AdjacentPair("X", "Y")])
    assert unread["X + Y"].pencil_gap == pytest.approx(4.0)
    zero = attacks.detect({"X": jnp.zeros((3, 2)), "Y": jnp.ones((2, 3))}, [AdjacentPair("X", "Y")])["X + Y"]
    assert zero.pencil_gap == 1.0
    assert math.isnan(zero.imbalance)


def test_bad_input():
    with pytest.raises(LeafError, match="'w' holds NaN or Inf"):
        attacks.detect({"w": jnp.full((2, 2), jnp.inf)})
    with pytest.raises(ProblemError, match="'v' is no plain leaf"):
        attacks.detect({"w": jnp.eye(2)}, [AdjacentPair("w", "v")])


def low_rank(key, m, n):
    """A layer of rank two and a thousandth of noise, as after compression."""
    keys = jax.random.split(key, 3)
    signal = jax.random.normal(keys[0], (m, 2)) @ jax.random.normal(keys[1], (2, n))
    return signal + 1e-3 * jax.random.normal(keys[2], (m, n))


def test_roc_over_trained_and_natural_layers(networks):
    """Nothing is tuned: the pair separates perfectly, the weight alone where layers have no own gap."""
    plain = [(params, where) for params, where in networks]
    natural = [({"w": low_rank(k, 12, 10)}, "w") for k in jax.random.split(KEY, 4)]

    def table(layers, read):
        undeformed = [read(attacks.detect(inserted(params, where))[where]) for params, where in layers]
        rows = {}
        for alpha in ALPHAS:
            spec = sd.SpecDef(alpha=alpha, side="output", budget=math.inf)
            scores = [
                read(attacks.detect(sd.deform(params, spec, where=where, key=KEY))[where])
                for params, where in layers
            ]
            rows[alpha] = roc(np.array(undeformed + scores), np.arange(2 * len(layers)) >= len(layers))
        return rows

    def inserted(params, where):
        return sd.deform(params, sd.SpecDef(alpha=1.0, side="output"), where=where, key=KEY)

    certain = table([*plain, *natural], lambda s: float(s.certain))
    gaps, hard = table(plain, lambda s: s.gap), table([*plain, *natural], lambda s: s.gap)
    for alpha in ALPHAS:
        assert certain[alpha].area == 1.0
        assert certain[alpha].at(1.0) == (0.0, 1.0)
        # Every deformation of the top direction by alpha has a gap of alpha: none is missed there.
        assert gaps[alpha].at((1 - 1e-9) * alpha)[1] == 1.0
        # Low-rank layers reach 1000 by themselves: half of these layers are false positives up to there.
        assert hard[alpha].at((1 - 1e-9) * alpha)[0] >= (0.5 if alpha <= 100 else 0.0)
    assert gaps[100.0].area == 1.0
    assert hard[10.0].area < 0.95
    assert hard[1e6].area == 1.0


def test_roc_against_pairs_counted_one_by_one():
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
    found = roc(scores, labels)
    up, down = scores[labels][:, None], scores[~labels][None]
    assert found.area == pytest.approx(np.mean((up > down) + 0.5 * (up == down)))
    for threshold in (0.0, 2.0, 2.5, 5.0, 9.0):
        want = np.mean(scores[~labels] >= threshold), np.mean(scores[labels] >= threshold)
        assert found.at(threshold) == pytest.approx(want)
    assert (found.false_positives[0], found.true_positives[-1]) == (0.0, 1.0)
    with pytest.raises(ProblemError, match="are NaN"):
        roc(np.array([np.nan, 1.0]), np.array([True, False]))
    with pytest.raises(ProblemError, match="needs both"):
        roc(np.array([2.0, 1.0]), np.array([True, True]))
    with pytest.raises(ProblemError, match="one label for each"):
        roc(np.array([2.0, 1.0]), np.array([True]))


@pytest.mark.parametrize("name", ["detect", "roc"])
def test_examples(name):
    module = importlib.import_module(f"specdef_jax.attacks.{name}")
    assert doctest.testmod(module).failed == 0
