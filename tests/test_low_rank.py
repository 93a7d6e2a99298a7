"""A compensation stored as directions and factors computes what the dense one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax.errors import SpecError, StructureError
from specdef_jax.low_rank import LowRank, compact
from specdef_jax.models.linear import linear

KEY = jax.random.key(3)


def both(kernel, *, alpha=64.0, **options):
    axes = {name: options.pop(name) for name in ("axes", "stacked") if name in options}
    spec = sd.SpecDef(alpha=alpha, **options)
    made = sd.plan({"w": kernel}, spec, where="w", key=KEY, **axes)
    dense = sd.apply_plan({"w": kernel}, made)
    return dense["w"], compact(dense, made)["w"]


def normal(*shape, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(sum(shape)), shape, dtype)


@pytest.mark.parametrize("basis", ["symmetric", "axis"])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_it_applies_and_reads_back_as_the_dense_pair(basis, side, stack):
    kernel, h = normal(*stack, 6, 5), normal(4, 6)
    dense, found = both(kernel, k=2, basis=basis, side=side, stacked=bool(stack))
    np.testing.assert_allclose(linear(h, found), linear(h, dense), atol=1e-13)
    np.testing.assert_allclose(linear(h, found), h @ kernel, atol=1e-13)
    np.testing.assert_allclose(found.materialize(), kernel, atol=1e-13)


def test_a_convolution_is_read_back_and_not_applied():
    kernel = normal(3, 3, 4, 5)
    _, found = both(kernel, side="output")
    np.testing.assert_allclose(found.materialize(), kernel, atol=1e-13)
    with pytest.raises(StructureError, match="convolution"):
        found.apply(normal(2, 4))


def test_slopes_of_the_weight_are_those_of_the_dense_pair():
    h = normal(4, 6)
    dense, found = both(normal(6, 5), side="output")

    def loss(leaf):
        return jnp.sum(jnp.sin(linear(h, leaf)))

    slopes = jax.grad(loss)(found)
    np.testing.assert_allclose(slopes.weight, jax.grad(loss)(dense).weight, atol=1e-12)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(slopes))


def test_half_precision_costs_no_more_than_the_dense_pair():
    kernel, h = normal(64, 48, dtype=jnp.bfloat16), normal(32, 64, dtype=jnp.bfloat16)
    dense, found = both(kernel, alpha=16.0)
    assert linear(h, found).dtype == jnp.bfloat16
    assert found.U.dtype == jnp.float32
    exact = np.asarray(h, np.float64) @ np.asarray(kernel, np.float64)
    errors = [np.linalg.norm(np.asarray(linear(h, w), np.float64) - exact) for w in (found, dense)]
    assert errors[0] <= errors[1]


def test_it_stores_k_columns():
    dense, found = both(normal(6, 5, dtype=jnp.float32), side="output", k=2)
    assert sd.trees.size(found) == sd.trees.size(dense) - 25 + 5 * 2 + 2


def test_the_rotated_basis_and_trees_not_as_planned_are_refused():
    kernel = normal(6, 5, dtype=jnp.float32)
    with pytest.raises(SpecError, match="rotated"):
        both(kernel, basis="rotated")
    made = sd.plan({"w": kernel}, sd.SpecDef(alpha=4.0), where="w", key=KEY)
    with pytest.raises(StructureError, match="not deformed as planned"):
        compact({"w": kernel}, made)
    with pytest.raises(StructureError, match="lacks"):
        compact({"v": kernel}, made)


def test_a_model_reads_it_as_it_reads_a_pair():
    config = sd.models.llama.Config.from_json(
        {
            "model_type": "llama", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "rms_norm_eps": 1e-5,
        }
    )  # fmt: skip
    params = sd.models.llama.init(config, KEY, jnp.float64)
    made = sd.plan(params, sd.SpecDef(alpha=256.0), where="*_proj.weight", key=KEY)
    found = compact(sd.apply_plan(params, made), made)
    assert sum(isinstance(leaf, LowRank) for leaf in found.values()) == 14
    tokens = jnp.arange(6)[None]
    plain = sd.models.llama.apply(config, params, tokens)
    np.testing.assert_allclose(sd.models.llama.apply(config, found, tokens), plain, atol=1e-12)
