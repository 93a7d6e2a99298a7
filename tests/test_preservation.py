"""Certificates of preservation: they hold, they see sabotage, and a broken bound breaks them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax.preservation import DTYPES, bit_identical, preservation

KEY = jax.random.key(0)
module = importlib.import_module("specdef_jax.preservation")  # sd.preservation is the function


def apply(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"]


def network():
    rng = np.random.default_rng(0)

    def layer(n, m):
        return {
            "kernel": jnp.asarray(rng.standard_normal((n, m)) / n**0.5, jnp.float32),
            "bias": jnp.asarray(rng.standard_normal(m), jnp.float32),
        }

    return {"up": layer(10, 16), "down": layer(16, 6)}


PARAMS = network()
X = jnp.asarray(np.random.default_rng(1).standard_normal((12, 10)), jnp.float32)


def deform(alpha, basis="symmetric", **settings):
    spec = sd.SpecDef(alpha=alpha, basis=basis, budget=math.inf, **settings)
    return sd.deform(PARAMS, spec, where="kernel", key=KEY)


@pytest.fixture(scope="module")
def certificate():
    return preservation(apply, PARAMS, deform(256.0), X)


def test_the_certificate_holds_in_every_format_at_alpha_256(certificate):
    assert certificate.holds
    assert tuple(f.format for f in certificate.formats) == DTYPES
    for form in certificate.formats:
        assert form.holds
        assert [layer.path for layer in form.layers] == ["down/kernel", "up/kernel"]
        for layer in form.layers:
            assert layer.word is sd.Word.PROVED
            assert 0 < layer.bound_ratio <= 1
            assert layer.error <= layer.bound < math.inf
            if form.format != "float64":  # the kernels are float32, so storage is rounded by that
                assert layer.expected / 10 < layer.error < 10 * layer.expected
    errors = {f.format: f.error for f in certificate.formats}
    assert errors["float32"] < errors["tf32"] < errors["bfloat16"]
    assert errors["float32"] < 1e-3
    assert errors["bfloat16"] > 10 * certificate["bfloat16"].baseline > 0
    assert certificate["float32"].baseline < 1e-6


def test_a_certificate_is_plain_json(certificate):
    text = json.dumps(certificate.to_dict(), allow_nan=False)
    back = json.loads(text)
    assert back["holds"] is True
    assert back["formats"][0]["format"] == "float64"
    assert back["formats"][0]["layers"][0]["word"] == "proved"


def test_errors_grow_with_alpha_in_the_symmetric_basis_alone():
    def errors(basis):
        rows = (
            preservation(apply, PARAMS, deform(a, basis), X, dtypes=["float32"])
            for a in (1.0, 2.0**6, 2.0**12)
        )
        return [row["float32"].error for row in rows]

    one, middle, large = errors("symmetric")
    assert large > 10 * middle > 10 * 10 * one
    one, middle, large = errors("rotated")
    assert large < 3 * one


def replace(tree, **changes):
    kernel = dataclasses.replace(tree["up"]["kernel"], **changes)
    return {**tree, "up": {**tree["up"], "kernel": kernel}}


@pytest.mark.parametrize("sabotage", ["no compensation", "weight changed by a percent"])
def test_a_sabotaged_pair_is_seen(sabotage):
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
    spec = sd.SpecDef(alpha=256.0)
    good = sd.deform(wide, spec, where="kernel", key=KEY)
    leaf = good["up"]["kernel"]
    if sabotage == "no compensation":
        bad = replace(good, comp=jnp.eye(len(leaf.comp)))
    else:
        bad = replace(good, weight=leaf.weight * 1.01)
    before, after = (
        preservation(apply, wide, tree, X, dtypes=["float64", "float32"]) for tree in (good, bad)
    )
    assert before["float64"].error < 1e-12
    for form in ("float64", "float32"):
        assert after[form].error > 1e-3
        layer = next(x for x in after[form].layers if x.path == "up/kernel")
        assert layer.error > 9e-3
        assert layer.bound > 9e-3  # the bound counts the residual W - A B, so it is large and not broken


def test_fails_if_a_bound_is_too_small(monkeypatch):
    real = module.pair_error_bound
    deformed = deform(256.0)
    monkeypatch.setattr(module, "pair_error_bound", lambda *args: real(*args) / 1e6)
    found = preservation(apply, PARAMS, deformed, X, dtypes=["float32", "bfloat16"])
    assert not found.holds
    assert not found["float32"].holds
    assert found["float32"].layers[0].bound_ratio > 1


def test_a_broken_bound_of_one_layer_of_a_stack_is_not_hidden_by_an_overflow_of_another(monkeypatch):
    rng = np.random.default_rng(2)
    stack = {"w": jnp.asarray(rng.standard_normal((2, 5, 4)) * np.array([1.0, 1e4])[:, None, None])}
    deformed = sd.deform(stack, sd.SpecDef(alpha=64.0), key=KEY, stacked=True)
    real = module.pair_error_bound
    monkeypatch.setattr(module, "pair_error_bound", lambda *args: real(*args) / 1e6)

    def first(params, x):
        return x @ params["w"][0]

    assert not preservation(first, stack, deformed, jnp.ones((2, 5)), dtypes=["float16"]).holds


def test_overflow_in_float16_is_estimated_and_never_proved():
    found = preservation(apply, PARAMS, deform(2.0**18), X, dtypes=["float16", "float32"])
    words = [layer.word for layer in found["float16"].layers]
    assert sd.Word.ESTIMATED in words
    worst = next(x for x in found["float16"].layers if x.word is sd.Word.ESTIMATED)
    assert worst.error == worst.bound == math.inf
    assert {layer.word for layer in found["float32"].layers} == {sd.Word.PROVED}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_axis_equals_the_undeformed_network_to_the_bit_and_rotated_its_own_alpha_one(dtype):
    cast = jax.tree.map(lambda x: x.astype(dtype), PARAMS)

    def made(alpha, basis):
        spec = sd.SpecDef(alpha=alpha, basis=basis, k=2, budget=math.inf)
        return sd.deform(cast, spec, where="kernel", key=KEY)

    assert bit_identical(apply, cast, made(2.0**12, "axis"), X, dtype=dtype)
    assert bit_identical(apply, made(1.0, "rotated"), made(2.0**12, "rotated"), X, dtype=dtype)
    assert not bit_identical(apply, cast, made(2.0**12, "symmetric"), X, dtype=dtype)
    assert not bit_identical(apply, cast, made(1000.0, "axis"), X, dtype=dtype)  # not a power of two
    broken = jax.tree.map(lambda x: x * jnp.nan, cast)
    assert not bit_identical(apply, broken, broken, X, dtype=dtype)


def test_the_probes_are_the_same_each_time_unless_a_key_is_given():
    deformed = deform(64.0)

    def row(**settings):
        return preservation(apply, PARAMS, deformed, X, dtypes=["float32"], **settings).to_dict()

    assert row() == row()
    assert row() != row(key=jax.random.key(7))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: {"up": p["up"]}, ["'down/kernel'", "deformed", "no leaf"]),
        (lambda p: {**p, "down": {**p["down"], "kernel": jnp.ones((3, 6))}}, ["'down/kernel'", "shape"]),
        (lambda p: {**p, "down": {**p["down"], "bias": jnp.ones(7)}}, ["'down/bias'", "(7,)", "(6,)"]),
        (lambda p: {**p, "extra": jnp.ones(7)}, ["'extra'", "missing"]),
    ],
)
def test_trees_that_do_not_belong_together_are_refused(change, words):
    with pytest.raises(sd.StructureError) as error:
        preservation(apply, change(PARAMS), deform(4.0), X)
    assert all(word in str(error.value) for word in words), str(error.value)
