"""plan, apply_plan and deform: the algebra of THEORY.md 0 against NumPy, every pytree, every refusal."""

from __future__ import annotations

import math

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import specdef_jax as sd
from specdef_jax.subspace import Status

KEY = jax.random.key(0)
BASES = ("symmetric", "rotated", "axis")
SIDES = ("output", "input")
DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)


def normal(seed, *shape, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def deform(kernel, alpha=16.0, key=KEY, **settings):
    return sd.deform({"w": kernel}, sd.SpecDef(alpha=alpha, **settings), where="w", key=key)["w"]


def factors(leaf):
    """Weight and comp in float64."""
    return np.asarray(leaf.weight, np.float64), np.asarray(leaf.comp, np.float64)


def product(leaf):
    weight, comp = factors(leaf)
    return weight @ comp if leaf.side == "output" else comp @ weight


def T(alpha, U):
    return np.eye(len(U)) + (alpha - 1) * U @ U.T


def allowance(kernel, leaf, alpha):
    """Backward error of forming, storing and multiplying two factors, Frobenius norm (THEORY.md 1.2)."""
    u = float(jnp.finfo(leaf.weight.dtype).eps) / 2
    sizes = np.linalg.norm(np.asarray(kernel, np.float64)) + np.linalg.norm(factors(leaf)[0])
    return (4 * sum(kernel.shape) + 40) * u * sizes * max(1, 1 / alpha)


# The algebra

ALGEBRA = {
    "shape": st.sampled_from([(5, 3), (3, 5), (4, 4), (6, 1)]),
    "k": st.sampled_from([1, 3]),
    "alpha": st.sampled_from([1.0, 0.25, 3.7, 2.0**13, 1e4, 1e7]) | st.floats(1e-4, 1e6),
    "basis": st.sampled_from(BASES),
    "side": st.sampled_from(SIDES),
    "directions": st.sampled_from(["top", "bottom", "random"]),
    "seed": st.integers(0, 99),
}


@hypothesis.given(**ALGEBRA)
def test_comp_times_weight_is_the_kernel_and_the_spectra_are_those_of_the_theory(
    shape, k, alpha, basis, side, directions, seed
):
    k = min(k, *shape)
    W = normal(seed, *shape)
    plan = sd.plan(
        {"w": W},
        sd.SpecDef(alpha=alpha, k=k, basis=basis, side=side, directions=directions, budget=math.inf),
        where="w",
        key=jax.random.key(seed),
    )
    leaf = sd.apply_plan({"w": W}, plan)["w"]
    weight, comp = factors(leaf)
    U = np.asarray(plan["w"].U)
    d = shape[1] if side == "output" else shape[0]

    assert np.linalg.norm(product(leaf) - W) <= allowance(W, leaf, alpha)
    assert np.linalg.norm(sd.merge({"w": leaf})["w"] - W) <= 2 * allowance(W, leaf, alpha)
    # comp has the singular values {1/alpha x k, 1 x (d - k)}, whatever the basis.
    expected = np.sort([1 / alpha] * k + [1.0] * (d - k))
    spectrum = np.sort(np.linalg.svd(comp, compute_uv=False))
    np.testing.assert_allclose(spectrum, expected, atol=50 * d * 2**-53 * max(1, 1 / alpha))
    # weight scales the chosen directions by alpha and leaves the others: T(a) M on the left of features.
    M = W.T if side == "output" else W
    stretched = T(alpha, U) @ M
    np.testing.assert_allclose(
        np.linalg.svd(weight, compute_uv=False),
        np.linalg.svd(stretched, compute_uv=False),
        atol=1e-13 * np.linalg.norm(stretched) * d,
    )
    if basis != "rotated":  # not only the spectrum: the factors themselves
        np.testing.assert_allclose(
            weight, stretched.T if side == "output" else stretched, atol=1e-13 * d * np.linalg.norm(stretched)
        )
        np.testing.assert_allclose(comp, T(1 / alpha, U), atol=1e-14 * d * max(1, 1 / alpha))


@hypothesis.given(k=st.integers(1, 4), log_alpha=st.floats(-8, 8), seed=st.integers(0, 99))
def test_T_of_alpha_times_T_of_one_over_alpha_is_the_identity(k, log_alpha, seed):
    alpha = 10**log_alpha
    # Deforming the identity shows the two transformations themselves.
    leaf = deform(
        np.eye(4), alpha, k=k, directions="random", key=jax.random.key(seed), side="output", budget=math.inf
    )
    weight, comp = factors(leaf)
    np.testing.assert_allclose(weight, weight.T, atol=1e-14 * max(1, alpha))
    scale = max(alpha, 1 / alpha)
    np.testing.assert_allclose(comp @ weight, np.eye(4), atol=1e-14 * scale)
    other = deform(
        np.eye(4),
        1 / alpha,
        k=k,
        directions="random",
        key=jax.random.key(seed),
        side="output",
        budget=math.inf,
    )
    np.testing.assert_allclose(factors(other)[0], comp, rtol=0, atol=1e-14 * scale)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(6, 4), (4, 4)])
def test_symmetric_scales_the_top_singular_values_by_alpha(side, shape):
    W = normal(1, *shape)
    sigma = np.linalg.svd(W, compute_uv=False)
    for directions, chosen in (("top", [0, 1]), ("bottom", [2, 3])):
        weight, _ = factors(deform(W, 100.0, k=2, side=side, directions=directions))
        expected = sigma.copy()
        expected[chosen] *= 100
        np.testing.assert_allclose(
            np.linalg.svd(weight, compute_uv=False), np.sort(expected)[::-1], rtol=1e-12, err_msg=directions
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("side", SIDES)
def test_axis_with_a_power_of_two_merges_to_equal_numbers(dtype, side):
    W = jnp.asarray(normal(2, 7, 5), dtype)
    leaf = deform(W, 2.0**12, k=2, basis="axis", side=side)
    assert not np.array_equal(leaf.weight, W)
    np.testing.assert_array_equal(np.asarray(sd.merge({"w": leaf})["w"]), np.asarray(W))


def test_axis_takes_the_features_of_largest_or_smallest_norm():
    W = normal(3, 5, 4) * np.array([1.0, 9.0, 0.1, 3.0])
    scaled = {}
    for directions in ("top", "bottom"):
        _, comp = factors(deform(W, 8.0, k=2, basis="axis", side="output", directions=directions))
        np.testing.assert_array_equal(comp, np.diag(np.diag(comp)))
        scaled[directions] = np.flatnonzero(np.diag(comp) == 1 / 8).tolist()
    assert scaled == {"top": [1, 3], "bottom": [0, 2]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_alpha_one_symmetric_is_the_kernel_and_the_identity(dtype, side):
    W = jnp.asarray(normal(4, 6, 5), dtype)
    leaf = deform(W, 1.0, k=3, side=side)
    np.testing.assert_array_equal(np.asarray(leaf.weight), np.asarray(W))
    np.testing.assert_array_equal(np.asarray(leaf.comp, float), np.eye(5 if side == "output" else 6))


@pytest.mark.parametrize("basis", BASES)
def test_a_rotated_comp_is_a_scaled_orthogonal_matrix_and_others_are_symmetric(basis):
    _, comp = factors(deform(normal(5, 6, 5), 32.0, k=2, basis=basis, side="output"))
    rows = np.sort(np.linalg.norm(comp, axis=1))
    if basis == "rotated":
        np.testing.assert_allclose(rows, [1 / 32, 1 / 32, 1, 1, 1], rtol=1e-14)
        assert np.abs(comp - comp.T).max() > 0.1
    else:
        np.testing.assert_allclose(comp, comp.T, atol=1e-15)
        assert np.count_nonzero(comp) == (5 if basis == "axis" else 25)


def test_options_differ():
    W = normal(13, 5, 5)
    # Both factors: with singular directions the weights of the two sides are equal, W T(a) = T'(a) W.
    found = [
        np.stack(factors(deform(W, 16.0, k=2, basis=basis, side=side, directions=directions)))
        for basis in BASES
        for side in SIDES
        for directions in ("top", "bottom", "random")[: 2 if basis == "axis" else 3]  # axes may coincide
    ]
    for i, a in enumerate(found):
        assert all(np.abs(a - b).max() > 1e-6 for b in found[:i])


def test_auto_takes_the_side_with_fewer_features():
    for shape, side, d in (((6, 4), "output", 4), ((4, 6), "input", 4), ((5, 5), "output", 5)):
        leaf = deform(normal(7, *shape))
        assert (leaf.side, leaf.comp.shape) == (side, (d, d))
    conv = deform(normal(7, 3, 3, 2, 8))
    assert (conv.side, conv.comp.shape) == ("input", (2, 2))


def test_given_directions_are_used_and_orthonormalized():
    W, given = normal(8, 6, 4), normal(9, 4, 2)
    Q = np.linalg.qr(given)[0]
    for directions in (given, jnp.asarray(given), given.astype(np.float32)):
        _, comp = factors(deform(W, 16.0, k=2, directions=directions))
        np.testing.assert_allclose(comp, T(1 / 16, Q), atol=1e-6 if directions.dtype == np.float32 else 1e-13)
    stack = normal(10, 3, 6, 4)
    one_each = normal(11, 3, 4, 2)
    for directions in (given, one_each):
        spec = sd.SpecDef(alpha=16.0, k=2, directions=directions, side="output")
        leaf = sd.deform({"w": stack}, spec, key=KEY, stacked=True)["w"]
        for i in range(3):
            Q = np.linalg.qr(np.broadcast_to(directions, (3, 4, 2))[i])[0]
            np.testing.assert_allclose(leaf.comp[i], T(1 / 16, Q), atol=1e-13)


def test_random_directions_depend_on_the_key_alone():
    W = normal(12, 6, 4)
    for basis in BASES:
        settings = {"basis": basis, "directions": "random", "k": 1, "side": "output"}
        comps = [factors(deform(W, key=jax.random.key(i), **settings))[1] for i in range(6)]
        assert len({c.tobytes() for c in comps}) > 1
        np.testing.assert_array_equal(factors(deform(W, key=jax.random.key(0), **settings))[1], comps[0])


# Each of these fails when what its name says is broken


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("side", SIDES)
def test_fails_if_the_deformation_does_nothing_or_inverts_alpha_or_swaps_the_factors(shape, side):
    alpha = 64.0
    W = normal(13, *shape)
    weight, comp = factors(deform(W, alpha, side=side))
    sigma = np.linalg.svd(W, compute_uv=False)
    assert np.linalg.norm(weight, 2) == pytest.approx(alpha * sigma[0], rel=1e-12)
    assert np.linalg.norm(comp, 2) == pytest.approx(1, rel=1e-12)
    assert np.linalg.svd(comp, compute_uv=False)[-1] == pytest.approx(1 / alpha, rel=1e-12)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("side", SIDES)
def test_fails_if_the_compensation_stands_on_the_wrong_side(shape, side):
    W = normal(14, *shape)
    left, _, right = np.linalg.svd(W)  # kernel = left S right: inputs on the left, outputs on the right
    u = right[:1].T if side == "output" else left[:, :1]
    leaf = deform(W, 64.0, side=side)
    np.testing.assert_allclose(leaf.comp, T(1 / 64, u), atol=1e-13)
    np.testing.assert_allclose(leaf.weight, W @ T(64, u) if side == "output" else T(64, u) @ W, atol=1e-11)


@pytest.mark.parametrize("shape", [(6, 4), (5, 5)])
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("side", SIDES)
def test_fails_if_the_kernel_is_transposed(shape, basis, side):
    W = normal(15, *shape)
    leaf = deform(W, 64.0, k=2, basis=basis, side=side)
    assert leaf.weight.shape == W.shape
    np.testing.assert_allclose(sd.merge({"w": leaf})["w"], W, atol=1e-12)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("features", [4, 6])
def test_fails_if_the_bias_comes_before_the_compensation(side, features):
    model = nn.Dense(features, param_dtype=jnp.float64, bias_init=nn.initializers.normal(10.0))
    x = normal(16, 3, 6)
    params = model.init(KEY, x)
    plain = model.apply(params, x)
    deformed = sd.deform(params, sd.SpecDef(alpha=64.0, side=side), where="kernel", key=KEY)
    np.testing.assert_allclose(sd.layered(model.apply)(deformed, x), plain, atol=1e-11)
    if side == "output":  # and the wrong order is far outside that tolerance
        leaf, bias = deformed["params"]["kernel"], deformed["params"]["bias"]
        assert np.abs((x @ leaf.weight + bias) @ leaf.comp - plain).max() > 1e-3


# Any pytree


def check_same_function(model_apply, params, deformed, x, atol):
    np.testing.assert_allclose(model_apply(sd.merge(deformed), x), model_apply(params, x), atol=atol)
    np.testing.assert_allclose(sd.layered(model_apply)(deformed, x), model_apply(params, x), atol=atol)
    merged = sd.merge(deformed)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert [a.dtype for a in jax.tree.leaves(merged)] == [a.dtype for a in jax.tree.leaves(params)]


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(5, 7, rngs=rngs, param_dtype=jnp.float64)
        self.drop = nnx.Dropout(0.5, rngs=rngs)  # holds a key, which no selector may stumble over
        self.down = nnx.Linear(7, 3, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        return self.down(jnp.tanh(self.drop(self.up(x), deterministic=True)))


@pytest.mark.parametrize("basis", ["symmetric", "rotated"])
def test_an_nnx_state(basis):
    graph, state = nnx.split(Net(nnx.Rngs(0)))
    x = normal(17, 4, 5)

    def apply(state, x):
        return nnx.merge(graph, state)(x)

    spec = sd.SpecDef(alpha=256.0, k=2, basis=basis)
    plan = sd.plan(state, spec, where=None, key=KEY)
    assert list(plan) == ["down/kernel", "up/kernel"]
    deformed = sd.apply_plan(state, plan)
    np.testing.assert_allclose(apply(sd.merge(deformed), x), apply(state, x), atol=1e-11)
    np.testing.assert_allclose(sd.layered(apply)(deformed, x), apply(state, x), atol=1e-11)
    assert jax.tree.structure(sd.merge(deformed)) == jax.tree.structure(state)


LINEN = {
    "dense": (nn.Dense(4, param_dtype=jnp.float64), (3, 6), {}),
    "split": (
        nn.DenseGeneral((2, 4), param_dtype=jnp.float64),
        (3, 6),
        {"axes": ((0,), (1, 2))},
    ),
    "joined": (
        nn.DenseGeneral(5, axis=(-2, -1), param_dtype=jnp.float64),
        (3, 2, 4),
        {"axes": {"*/kernel": ((0, 1), (2,))}},
    ),
    "conv": (nn.Conv(4, (3, 2), param_dtype=jnp.float64), (2, 5, 5, 3), {}),
}


@pytest.mark.parametrize(
    ("name", "side"),
    [("dense", "input"), ("split", "output"), ("joined", "input"), ("conv", "output"), ("conv", "input")],
)
def test_linen_modules(name, side):
    model, shape, settings = LINEN[name]
    x = normal(18, *shape)
    params = model.init(KEY, x)
    spec = sd.SpecDef(alpha=256.0, k=2, side=side)
    deformed = sd.deform(params, spec, where="**/kernel", key=KEY, **settings)
    leaf = deformed["params"]["kernel"]
    features = {
        "dense": (6, 4),
        "split": (6, 8),
        "joined": (8, 5),
        "conv": (3, 4),
    }[name]
    assert leaf.comp.shape == (features[side == "output"],) * 2
    assert np.linalg.norm(leaf.weight) > 10 * np.linalg.norm(params["params"]["kernel"])
    check_same_function(jax.jit(model.apply), params, deformed, x, 1e-11)


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        def layer(module, h, _):
            return jnp.tanh(nn.Dense(5, name="dense", param_dtype=jnp.float64)(h)), None

        scanned = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned(self, x, None)[0]


@pytest.mark.parametrize("side", SIDES)
def test_layers_stacked_by_nn_scan_each_get_their_own_pair(side):
    model, x = Stacked(), normal(19, 4, 5)
    params = model.init(KEY, x)
    kernel = params["params"]["dense"]["kernel"]
    assert kernel.shape == (3, 5, 5)
    spec = sd.SpecDef(alpha=64.0, side=side)
    plan = sd.plan(params, spec, where="kernel", key=KEY, stacked=True)
    deformed = sd.apply_plan(params, plan)
    leaf = deformed["params"]["dense"]["kernel"]
    assert leaf.comp.shape == (3, 5, 5)
    assert plan["params/dense/kernel"].residual.shape == (3,)
    for i in range(3):
        alone = deform(kernel[i], 64.0, side=side)
        np.testing.assert_allclose(leaf.weight[i], alone.weight, atol=1e-11)
        np.testing.assert_allclose(leaf.comp[i], alone.comp, atol=1e-12)
    check_same_function(model.apply, params, deformed, x, 1e-11)


def test_a_raw_dict_of_numpy_leaves_is_not_modified():
    params = {"w": normal(20, 6, 4, dtype=np.float32), "steps": 3, "names": [np.arange(3)]}
    before = params["w"].copy()
    deformed = sd.deform(params, sd.SpecDef(alpha=256.0), key=KEY)
    np.testing.assert_array_equal(params["w"], before)
    assert deformed["steps"] == 3
    assert deformed["names"][0] is params["names"][0]
    assert deformed["w"].weight.dtype == deformed["w"].comp.dtype == np.float32


# The plan is data, its application pure


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis", BASES)
def test_every_storage_dtype_is_kept_and_the_pair_is_accurate_to_its_rounding(dtype, basis):
    W = jnp.asarray(normal(21, 8, 6), dtype)
    leaf = deform(W, 8.0, k=2, basis=basis)
    assert leaf.weight.dtype == leaf.comp.dtype == sd.merge({"w": leaf})["w"].dtype == dtype
    assert np.linalg.norm(product(leaf) - np.asarray(W, float)) <= allowance(W, leaf, 8.0)
    merged = sd.merge({"w": leaf})
    assert sd.merge(merged)["w"] is merged["w"]


@pytest.mark.parametrize("basis", ["symmetric", "rotated"])
def test_jit_and_vmap_over_alpha_give_what_one_call_gives(basis):
    params = {"w": normal(22, 6, 4), "v": normal(23, 3, 5), "b": normal(24, 4)}
    plan = sd.plan(params, sd.SpecDef(k=2, basis=basis), where="*", key=KEY)
    alphas = jnp.array([1.0, 3.0, 2.0**13])
    expected = [sd.apply_plan(params, plan.with_alpha(float(a))) for a in alphas]
    many = jax.vmap(lambda a: sd.apply_plan(params, plan.with_alpha(a)))(alphas)
    jitted = jax.jit(lambda params, plan: sd.apply_plan(params, plan))
    for i, one in enumerate(expected):
        for found in (jax.tree.map(lambda x, i=i: x[i], many), jitted(params, plan.with_alpha(alphas[i]))):
            assert jax.tree.structure(found) == jax.tree.structure(one)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    assert jitted._cache_size() == 1
    assert np.abs(many["w"].weight[0] - many["w"].weight[1]).max() > 0.1


def test_apply_plan_is_differentiable_in_alpha():
    W = normal(25, 6, 4)
    plan = sd.plan({"w": W}, sd.SpecDef(alpha=4.0), key=KEY)

    def size(alpha):
        return jnp.sum(sd.apply_plan({"w": W}, plan.with_alpha(alpha))["w"].weight ** 2)

    # ||Wt||^2 = ||W||^2 + (a^2 - 1) sigma_1^2
    assert float(jax.grad(size)(4.0)) == pytest.approx(8 * np.linalg.norm(W, 2) ** 2, rel=1e-12)


@pytest.mark.parametrize(
    ("basis", "spec"),
    [("symmetric", P("x", None)), ("rotated", P(None, "x")), ("axis", P("x", None))],
)
def test_eight_devices_give_the_same_pair_and_the_weight_keeps_its_sharding(basis, spec):
    assert jax.device_count() == 8
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), spec)
    W = normal(26, 16, 8)
    sharded = {"w": jax.device_put(W, sharding)}
    settings = sd.SpecDef(alpha=64.0, k=2, basis=basis)
    plan = sd.plan({"w": W}, settings, key=KEY)
    alone = sd.apply_plan({"w": W}, plan)["w"]
    asked = {"w": sd.Deformed(sharding, None, alone.side, alone.axes)}
    for found in (
        sd.apply_plan(sharded, plan)["w"],
        jax.jit(sd.apply_plan, out_shardings=asked)(sharded, plan)["w"],
        sd.deform(sharded, settings, key=KEY)["w"],
    ):
        np.testing.assert_allclose(found.weight, alone.weight, atol=1e-11)
        np.testing.assert_allclose(found.comp, alone.comp, atol=1e-12)
        assert found.weight.sharding.is_equivalent_to(sharding, 2), found.weight.sharding
        np.testing.assert_allclose(sd.merge({"w": found})["w"], W, atol=1e-11)


@pytest.mark.parametrize(
    ("basis", "side"), [("symmetric", "input"), ("rotated", "output"), ("axis", "output")]
)
def test_without_x64_a_float32_pair_is_accurate_to_storage_rounding(basis, side):
    W = normal(27, 40, 30, dtype=np.float32)
    alpha = 1024.0
    with jax.enable_x64(False):
        params = {"w": jnp.asarray(W)}
        plan = sd.plan(params, sd.SpecDef(alpha=alpha, k=3, basis=basis, side=side), key=KEY)
        found = sd.apply_plan(params, plan)["w"]
        jitted = jax.jit(sd.apply_plan)(params, plan)["w"]
        many = jax.vmap(lambda a: sd.apply_plan(params, plan.with_alpha(a)))(jnp.array([1.0, alpha]))["w"]
    assert found.weight.dtype == found.comp.dtype == np.float32
    weight, comp = (np.abs(x) for x in factors(found))
    magnitude = weight @ comp if side == "output" else comp @ weight
    # Half a unit for each of the two stored factors, and the float32 product M U of the symmetric basis.
    u = 2.0**-24
    assert (np.abs(product(found) - W) <= 3 * u * magnitude + 40 * u * np.linalg.norm(W, 2)).all()
    assert np.linalg.norm(product(found) - W) <= 2 * u * np.linalg.norm(magnitude)
    np.testing.assert_array_equal(jitted.weight, found.weight)
    np.testing.assert_allclose(many.weight[1], found.weight, rtol=1e-6, atol=1e-6)


def test_with_alpha_replaces_alpha_alone_and_a_plan_reads_like_a_mapping():
    params = {"w": normal(28, 6, 4), "v": normal(29, 4, 4)}
    plan = sd.plan(params, sd.SpecDef(alpha=4.0), key=KEY)
    other = plan.with_alpha(8.0)
    assert list(plan) == ["v", "w"]
    assert len(plan) == 2
    assert {float(layer.alpha) for _, layer in other.items()} == {8.0}
    assert float(plan["w"].alpha) == 4.0
    assert other["w"].U is plan["w"].U
    for bad in (0.0, -1.0, math.nan, math.inf, np.float64(0)):
        with pytest.raises(sd.SpecError, match="alpha"):
            plan.with_alpha(bad)


# Quality of the subspace is recorded


def test_residual_and_status_are_recorded():
    W = normal(30, 30, 20)
    layer = sd.plan({"w": W}, sd.SpecDef(k=2), key=KEY)["w"]
    assert int(layer.status) == Status.EXACT
    assert float(layer.residual) < 1e-12
    np.testing.assert_allclose(layer.singular_values, np.linalg.svd(W, compute_uv=False)[:2], rtol=1e-12)
    np.testing.assert_allclose(layer.U.T @ layer.U, np.eye(2), atol=1e-13)
    # The residual says how far given directions are from singular ones.
    spec = sd.SpecDef(k=1, directions=np.eye(20)[:, :1], side="output")
    assert float(sd.plan({"w": W}, spec, key=KEY)["w"].residual) > 0.1


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("directions", ["top", "bottom"])
def test_zero_and_rank_deficient_matrices_work_and_the_status_says_why(basis, directions):
    rank_one = np.outer(normal(31, 6), normal(32, 4))
    for W, k in ((np.zeros((6, 4)), 2), (rank_one, 2)):
        spec = sd.SpecDef(alpha=64.0, k=k, basis=basis, directions=directions, side="output")
        plan = sd.plan({"w": W}, spec, key=KEY)
        leaf = sd.apply_plan({"w": W}, plan)["w"]
        np.testing.assert_allclose(product(leaf), W, atol=1e-12)
        spectrum = np.sort(np.linalg.svd(np.asarray(leaf.comp), compute_uv=False))
        np.testing.assert_allclose(spectrum, [1 / 64, 1 / 64, 1, 1], rtol=1e-12)
        if basis != "axis" or not W.any():  # the columns of a rank-one matrix need not be zero
            assert int(plan["w"].status) == Status.RANK_DEFICIENT
            assert "rank" in Status(int(plan["w"].status)).advice


def test_the_paper_setting():
    spec = sd.SpecDef.paper()
    assert (spec.alpha, spec.k, spec.basis, spec.directions) == (1e4, 25, "symmetric", "top")


# Bad input


def refusal(error_class, call):
    with pytest.raises(error_class) as error:
        call()
    assert isinstance(error.value, sd.SpecDefError)
    return str(error.value)


def says(message, *words):
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 0.0}, ["alpha = 0.0", "positive and finite"]),
        ({"alpha": -2.0}, ["alpha = -2.0", "positive"]),
        ({"alpha": math.nan}, ["alpha = nan", "finite"]),
        ({"alpha": math.inf}, ["alpha = inf", "finite"]),
        ({"alpha": True}, ["alpha = True", "number"]),
        ({"alpha": "2"}, ["alpha = '2'", "number"]),
        ({"alpha": np.complex64(2)}, ["alpha", "number"]),
        ({"k": 0}, ["k = 0", "integer >= 1"]),
        ({"k": -1}, ["k = -1", "integer >= 1"]),
        ({"k": 1.0}, ["k = 1.0", "integer >= 1"]),
        ({"k": True}, ["k = True", "integer >= 1"]),
        ({"basis": "diagonal"}, ["basis = 'diagonal'", "'symmetric', 'rotated', 'axis'"]),
        ({"side": "left"}, ["side = 'left'", "'auto', 'output', 'input'"]),
        ({"directions": "middle"}, ["directions = 'middle'", "'top', 'bottom', 'random'"]),
        ({"directions": [[1.0]]}, ["directions", "list", "array (features, k)"]),
        ({"directions": np.ones((4, 1)), "basis": "axis"}, ["'axis'", "no directions array"]),
        ({"tol": 0.0}, ["tol = 0.0", "positive"]),
        ({"budget": -0.1}, ["budget = -0.1", "positive"]),
        ({"budget": math.nan}, ["budget = nan", "positive"]),
        ({"budget": "much"}, ["budget = much", "positive"]),
    ],
)
def test_a_spec_without_meaning_is_refused(settings, words):
    says(refusal(sd.SpecError, lambda: sd.SpecDef(**settings)), *words)


def plan_of(kernel, where="w", stacked=False, axes=None, **settings):
    spec = sd.SpecDef(**{"alpha": 4.0} | settings)
    return lambda: sd.plan({"block": {"w": kernel}}, spec, where=where, key=KEY, stacked=stacked, axes=axes)


NAN, INF = normal(33, 6, 4), normal(33, 6, 4)
NAN[1, 2], INF[3, 0] = np.nan, np.inf


@pytest.mark.parametrize(
    ("error_class", "call", "words"),
    [
        (sd.LeafError, plan_of(NAN), ["'block/w'", "NaN or Inf", "repair"]),
        (sd.LeafError, plan_of(INF), ["'block/w'", "NaN or Inf", "repair"]),
        (sd.SpecError, plan_of(normal(0, 6, 4), k=5), ["'block/w'", "k = 5", "= 4", "(6, 4)", "smaller k"]),
        (sd.LeafError, plan_of(np.ones((6, 4), np.int8)), ["'block/w'", "int8", "dequantize"]),
        (sd.LeafError, plan_of(np.ones((6, 4), np.complex64)), ["'block/w'", "complex64"]),
        (sd.LeafError, plan_of(jnp.ones((6, 4), jnp.float8_e4m3fn)), ["'block/w'", "float8", "dequantize"]),
        (sd.LeafError, plan_of(np.ones((0, 4))), ["'block/w'", "(0, 4)", "no entries"]),
        (sd.SpecError, plan_of(np.ones((2, 3, 4))), ["'block/w'", "(2, 3, 4)", "ambiguous", "stacked=True"]),
        (sd.SpecError, plan_of(np.ones((2,) * 5)), ["'block/w'", "ambiguous", "axes="]),
        (sd.SpecError, plan_of(np.ones((2, 3, 4)), axes=((0,), (1, 3))), ["'block/w'", "(0,), (1, 3)", "-3"]),
        (sd.SpecError, plan_of(np.ones((2, 3)), axes=((0,), (0, 1))), ["axes", "exactly once"]),
        (
            sd.SpecError,
            plan_of(np.ones((2, 3)), axes=sd.KernelAxes((0,), (1, 2))),
            ["'block/w'", "(2, 3)", "another number of axes"],
        ),
        (
            sd.SpecError,
            plan_of(normal(0, 6, 4), directions=np.ones((6, 1))),
            ["'block/w'", "(6, 1)", "(features, k) = (4, 1)"],
        ),
        (sd.SpecError, plan_of(normal(0, 6, 4), directions=np.ones(4)), ["'block/w'", "(4,)", "(4, 1)"]),
        (sd.SpecError, plan_of(normal(0, 6, 4), directions=np.ones((2, 4, 1))), ["'block/w'", "(2, 4, 1)"]),
        (sd.SpecError, plan_of(normal(0, 6, 4), directions=np.ones((4, 2)), k=2), ["rank 1"]),
        (sd.SelectionError, plan_of(normal(0, 6, 4), where="q"), ["match('q')", "nothing", "'block/w'"]),
        (
            sd.SelectionError,
            plan_of(normal(0, 4)),
            ["match('w')", "no kernels", "'block/w' (4,)", "rank two"],
        ),
        (sd.SelectionError, plan_of(normal(0, 4), where=None), ["matrices()", "nothing", "none"]),
        (
            sd.BudgetError,
            plan_of(normal(0, 6, 4, dtype=np.float32), alpha=1e12),
            ["'block/w'", "alpha = 1e+12", "float32", "alpha_max", "wider dtype"],
        ),
        (
            sd.BudgetError,
            plan_of(jnp.asarray(normal(0, 6, 4), jnp.bfloat16), alpha=256.0),
            ["'block/w'", "alpha = 256", "bfloat16", "budget 0.1", "rotated"],
        ),
        (
            sd.BudgetError,
            plan_of(normal(0, 6, 4, dtype=np.float16), alpha=1e5, basis="axis"),
            ["'block/w'", "alpha = 100000", "float16", "range", "wider dtype"],
        ),
        (
            sd.BudgetError,
            plan_of(normal(0, 6, 4, dtype=np.float32), alpha=1e-9, directions="bottom"),
            ["'block/w'", "alpha = 1e-09", "float32"],
        ),
    ],
)
def test_what_cannot_be_deformed_says_where_and_why_and_what_to_do(error_class, call, words):
    says(refusal(error_class, call), *words)


def test_a_budget_of_infinity_accepts_any_error_but_not_an_overflow():
    W = normal(0, 6, 4, dtype=np.float32)
    sd.plan({"w": W}, sd.SpecDef(alpha=1e12, budget=math.inf), key=KEY)
    says(refusal(sd.BudgetError, plan_of(W, alpha=1e39, budget=math.inf)), "range", "wider dtype")


def test_embeddings_and_vectors_are_refused_unless_the_glob_also_matched_matrices():
    params = {
        "Embed_0": {"embedding": normal(34, 9, 4)},
        "dense": {"kernel": normal(35, 4, 3), "bias": normal(36, 3)},
    }
    message = refusal(sd.SelectionError, lambda: sd.plan(params, sd.SpecDef(), where="embedding", key=KEY))
    says(message, "match('embedding')", "embeddings", "'Embed_0/embedding' (9, 4)", "multiplies its input")
    for where in ("**", None, ["embedding", "kernel"]):
        assert list(sd.plan(params, sd.SpecDef(), where=where, key=KEY)) == ["dense/kernel"]


def test_a_leaf_deformed_already_is_refused_by_plan_and_by_apply_plan():
    params = {"w": normal(37, 6, 4)}
    plan = sd.plan(params, sd.SpecDef(), key=KEY)
    deformed = sd.apply_plan(params, plan)
    for call in (
        lambda: sd.plan(deformed, sd.SpecDef(), key=KEY),
        lambda: sd.plan(deformed, sd.SpecDef(), where="w", key=KEY),
        lambda: sd.apply_plan(deformed, plan),
    ):
        says(refusal(sd.LeafError, call), "'w'", "deformed already", "sd.merge")


@pytest.mark.parametrize(
    ("params", "error_class", "words"),
    [
        ({"v": normal(38, 6, 4)}, sd.StructureError, ["'w'", "lack", "same tree"]),
        ({"w": normal(38, 6, 3)}, sd.StructureError, ["'w'", "(6, 3)", "4 features", "same tree"]),
        ({"w": normal(38, 2, 6, 4)}, sd.StructureError, ["'w'", "(2, 6, 4)", "same tree"]),
        ({"w": np.ones((6, 4), np.int32)}, sd.LeafError, ["'w'", "int32", "dequantize"]),
    ],
)
def test_a_plan_for_another_tree_is_refused(params, error_class, words):
    plan = sd.plan({"w": normal(38, 6, 4)}, sd.SpecDef(side="output"), key=KEY)
    says(refusal(error_class, lambda: sd.apply_plan(params, plan)), *words)


def test_a_stack_of_another_height_is_refused():
    plan = sd.plan({"w": normal(39, 3, 6, 4)}, sd.SpecDef(), key=KEY, stacked=True)
    says(refusal(sd.StructureError, lambda: sd.apply_plan({"w": normal(39, 2, 6, 4)}, plan)), "'w'", "(3,)")
