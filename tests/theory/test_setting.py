"""Statement 0: allowances against exact arithmetic, placements by hand, planted errors that are caught."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax import bounds
from specdef_jax.pair import build_pair
from specdef_jax.parametrization import merge
from specdef_jax.precision import gamma
from theory import pair_factors, placements, s0_0_setting
from theory.instances import adjacent
from theory.instances.matrices import orthonormal
from theory.instances.networks import mlp_instance
from theory.sizes import Size

KEY = jax.random.key(3)
UNIT = 2.0**-53


def exact(x):
    """Return an array of fractions."""
    return np.vectorize(Fraction, otypes=[object])(np.asarray(x, float))


def norm(x):
    return float(np.sqrt(float(np.sum(x * x))))


# The paper's compensation


def by_numpy(W, k, alpha):
    U, S, _ = np.linalg.svd(W, full_matrices=False)
    grown = np.diag(np.where(np.arange(len(S)) < k, alpha * S, S))
    return U @ np.diag(S) @ np.linalg.pinv(grown, rcond=1e-12) @ U.T


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("k", [1, 2])
def test_the_papers_compensation_against_a_pseudoinverse(shape, k):
    W = np.random.default_rng(k).standard_normal(shape)
    W[-1] = 2 * W[0]  # singular
    expected = by_numpy(W, k, 7.0)
    np.testing.assert_allclose(bounds.paper_compensation(jnp.asarray(W), k, 7.0), expected, atol=1e-12)
    rank = np.linalg.matrix_rank(W)
    assert np.linalg.matrix_rank(expected) == rank < shape[0]


def test_the_papers_compensation_under_jit_and_vmap():
    W = jax.random.normal(KEY, (2, 3, 4))
    together = jax.jit(jax.vmap(bounds.paper_compensation, in_axes=(0, None, 0)))(W, 1, jnp.array([2.0, 5.0]))
    one = [bounds.paper_compensation(w, 1, a) for w, a in zip(W, (2.0, 5.0), strict=True)]
    np.testing.assert_allclose(together, one, atol=1e-14)
    T = [np.eye(3) + (1 / a - 1) * np.outer(u, u) for a, u in zip((2.0, 5.0), top(W), strict=True)]
    np.testing.assert_allclose(together, T, atol=1e-13)  # full row rank: T(1/a)


def top(W):
    return [np.linalg.svd(np.asarray(w))[0][:, 0] for w in W]


def test_a_compensation_without_the_projector_is_caught(monkeypatch):
    def unprojected(W, k, alpha):
        U = jnp.linalg.svd(W, full_matrices=False)[0][:, :2]
        return jnp.eye(len(W)) + (1 / alpha - 1) * U @ U.T

    assert all(c.holds for c in s0_0_setting._paper(KEY, Size.SMALL))
    monkeypatch.setattr(bounds, "paper_compensation", unprojected)
    failed = {c.claim for c in s0_0_setting._paper(KEY, Size.SMALL) if c.fails}
    assert failed == {
        "U S S~^+ U^T = T(1/a) P",
        "U S S~^+ U^T = T(1/a)",
        "||U S S~^+ U^T - T(1/a)|| = 1",
    }


# The pair


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_allowances_hold_in_exact_arithmetic_and_are_not_vacuous(k):
    shares = []
    for seed in range(8):
        w_key, u_key = jax.random.split(jax.random.key(seed))
        W, U = jax.random.normal(w_key, (3, 4)), orthonormal(u_key, 4, k)
        alpha = jnp.asarray(10.0**seed)
        allowed = s0_0_setting._allowances(W, U, alpha)
        for basis in ("symmetric", "rotated"):
            weight, comp = build_pair(W, U, alpha, basis, "output")
            error = norm(exact(weight) @ exact(comp) - exact(W))
            assert error <= allowed[basis]
            shares.append(error / float(allowed[basis]))
    assert max(shares) > 0.02


@pytest.mark.parametrize("d", [2, 5, 9])
def test_the_multiple_for_householder_in_exact_arithmetic(d):
    for seed in range(5):
        for k in (1, d):
            U = np.random.default_rng(seed).standard_normal((d, k))
            Q = exact(jnp.linalg.qr(jnp.asarray(U), mode="complete")[0])
            defect = norm(Q @ Q.T - exact(np.eye(d)))
            assert defect <= 4 * d**0.5 * gamma(d * k, UNIT)


@pytest.mark.parametrize("wrong", ["comp", "weight"])
def test_a_wrong_pair_is_caught(monkeypatch, wrong):
    def planted(matrix, U, alpha, basis, side):
        weight, comp = build_pair(matrix, U, alpha, basis, side)
        off = build_pair(matrix, U, alpha * (1 + 1e-12), basis, side)
        return (weight, off[1]) if wrong == "comp" else (off[0], comp)

    assert all(c.holds for c in s0_0_setting._exact(KEY, Size.SMALL))
    monkeypatch.setattr(s0_0_setting, "build_pair", planted)
    assert all(c.fails for c in s0_0_setting._exact(KEY, Size.SMALL))


# Factors


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_factor_between_the_two_keeps_the_kernel(side):
    instance = mlp_instance(KEY)
    tree = sd.deform(instance.params, sd.SpecDef(alpha=7.0, side=side), where=instance.where, key=KEY)
    d = tree["layer_1"]["w"].comp.shape[0]
    R = jax.random.normal(KEY, (d, d)) + 2 * jnp.eye(d)
    moved = pair_factors._with_factor(tree, instance.where, R)
    pair, before = moved["layer_1"]["w"], tree["layer_1"]["w"]
    np.testing.assert_allclose(
        merge(moved)["layer_1"]["w"], instance.params["layer_1"]["w"], rtol=1e-11, atol=1e-11
    )
    assert np.abs(pair.weight - before.weight).max() > 0.1
    weight = before.weight @ R.T if side == "output" else jnp.linalg.solve(R.T, before.weight)
    if side == "output":
        np.testing.assert_allclose(pair.weight, weight, atol=1e-12)


# Placements


def attention_by_loops(params, x):
    """Grouped attention with NumPy, head by head and position by position."""
    q, k, v = (np.asarray(x @ params[n]["w"] + params[n]["b"]) for n in ("q", "k", "first"))
    batch, t, _ = x.shape
    mixed = np.zeros((batch, t, 12))
    for b in range(batch):
        for i in range(4):
            group = slice(3 * (i // 2), 3 * (i // 2) + 3)
            for now in range(t):
                seen = range(max(0, now - 2), now + 1)
                scores = np.exp([q[b, now, 3 * i : 3 * i + 3] @ k[b, s, group] for s in seen])
                weights = scores / (scores.sum() + 1)  # the sink has score 0
                mixed[b, now, 3 * i : 3 * i + 3] = sum(
                    w * v[b, s, group] for w, s in zip(weights, seen, strict=True)
                )
    return mixed @ np.asarray(params["second"]["w"]) + np.asarray(params["second"]["b"])


def test_the_grouped_attention_is_what_it_says():
    network = adjacent.grouped_attention(KEY)
    expected = attention_by_loops(network.params, network.x)
    np.testing.assert_allclose(network.apply(network.params, network.x), expected, atol=1e-13)
    others = [adjacent.grouped_attention(KEY, b) for b in ("norm", "quantization")]
    for other in others:
        assert np.abs(other.apply(other.params, other.x) - expected).max() > 1e-3


def on(network, basis="symmetric"):
    U = placements._random(network, KEY)
    return placements.on_placement(network, sd.SpecDef(alpha=5.0, k=1, basis=basis), U=U, key=KEY)


def test_a_placement_that_forgets_the_bias_is_caught(monkeypatch):
    network = adjacent.grouped_attention(KEY)
    assert [c.holds for c in on(network)] == [True]

    def forgetful(first, second, spec, *, key, bias, groups):
        pair = sd.gauge.deform_pair(first, second, spec, key=key, bias=bias, groups=groups)
        return dataclasses.replace(pair, bias=bias)

    monkeypatch.setattr(sd, "deform_pair", forgetful)
    assert [c.fails for c in on(network)] == [True]


def test_what_stands_between_is_named_and_never_passes_or_fails():
    for network in (adjacent.perceptron(KEY, "relu"), adjacent.gated(KEY, clamp=0.5)):
        (found,) = on(network)
        assert not found.holds
        assert not found.fails
        assert "nothing nonlinear" in found.violated


def test_instances_differ():
    networks = [
        adjacent.perceptron(KEY, "relu"),
        adjacent.perceptron(KEY, "leaky relu"),
        adjacent.perceptron(KEY, "gelu"),
    ]
    outputs = [np.asarray(n.apply(n.params, n.x)) for n in networks]
    assert not any(np.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    clamped, free = adjacent.gated(KEY, clamp=0.5), adjacent.gated(KEY)
    assert not np.allclose(clamped.apply(clamped.params, free.x), free.apply(free.params, free.x))
