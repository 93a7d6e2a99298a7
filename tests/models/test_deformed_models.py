"""A deformed model computes the same function: as released, merged, stacked, cached, in gauge placement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax import models
from specdef_jax.errors import ProblemError, StructureError
from specdef_jax.parametrization import is_structured
from tests.models.helpers_models import fixture, logits_of, small, tokens

KEY = jax.random.key(3)
EVERY = ("*_proj.weight", "*router.weight", "lm_head.weight")
EXPERTS = ("*experts.gate_up_proj", "*experts.down_proj")
SETTINGS = [("symmetric", "output"), ("symmetric", "input"), ("axis", "auto"), ("rotated", "output")]


def deformed_in(params, basis="symmetric", side="auto", alpha=8.0, where=EVERY):
    spec = sd.SpecDef(alpha=alpha, basis=basis, side=side, budget=float("inf"))
    found = sd.deform(params, spec, where=where, key=KEY)
    if any("experts" in name for name in params):
        found = sd.deform(found, spec, where=EXPERTS, key=KEY, stacked=True)
    return found


def count(params):
    return sum(map(is_structured, jax.tree.leaves(params, is_leaf=is_structured)))


@pytest.mark.parametrize(("basis", "side"), SETTINGS)
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_logits_stay_whichever_way_pairs_are_applied(name, basis, side):
    module, config, params = small(name)
    deformed = deformed_in(params, basis, side)
    assert count(deformed) == 2 * 7 + 1
    want = logits_of(module, config, params, tokens())
    found = logits_of(module, config, deformed, tokens())
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-11)
    assert bool((found != want).any()) or basis == "axis"
    apply = functools.partial(module.apply, config)
    for written in (apply, functools.partial(apply, remat=True)):
        traced = jax.jit(sd.layered(written))(deformed, tokens())
        np.testing.assert_allclose(traced, found, rtol=0, atol=1e-12)
    merged = logits_of(module, config, sd.merge(deformed), tokens())
    np.testing.assert_allclose(merged, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_gradients_in_both_factors_are_those_through_merge(name):
    module, config, params = small(name)
    deformed = deformed_in(params)
    loss = module.loss(config)
    found = jax.jit(jax.grad(loss))(deformed, tokens())
    want = jax.jit(jax.grad(lambda p, ids: loss(sd.merge(p), ids)))(deformed, tokens())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * max(1, np.abs(b).max()))
        assert np.abs(b).max() > 0


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_pairs_are_stacked_scanned_and_cached(name):
    module, config, params = small(name)
    deformed = deformed_in(params)
    want = logits_of(module, config, params, tokens(1))
    stacked = models.stack_layers(deformed)
    np.testing.assert_allclose(logits_of(module, config, stacked, tokens(1)), want, rtol=0, atol=1e-11)
    layered = sd.layered(functools.partial(module.apply, config))
    np.testing.assert_allclose(jax.jit(layered)(stacked, tokens(1)), want, rtol=0, atol=1e-11)
    again = models.unstack_layers(stacked)
    assert jax.tree.structure(again) == jax.tree.structure(deformed)
    for given in (deformed, stacked):
        text = module.generate(config, given, tokens(1, 4), 5)
        np.testing.assert_array_equal(text, module.generate(config, params, tokens(1, 4), 5))


def test_layers_deformed_here_and_there_are_not_stacked():
    _, _, params = small("llama")
    deformed = deformed_in(params, where="*layers.0.mlp.up_proj.weight")
    with pytest.raises(StructureError, match="in some layers only"):
        models.stack_layers(deformed)


@pytest.mark.parametrize("name", ["llama_tiny", "gpt_oss_tiny"])
def test_a_deformed_checkpoint_stays_within_the_bar_in_float32(name):
    model, ids, logits = fixture(name)
    found = jax.jit(model.apply)(deformed_in(model.params, alpha=16.0), ids)
    assert found.dtype == jnp.float32
    assert np.abs(found - logits).max() < 2e-4


def test_a_pair_stored_wider_leaves_a_bfloat16_model_in_bfloat16():
    module, config, params = small("llama", jnp.bfloat16)
    wide = sd.deform(params, sd.SpecDef(alpha=4.0), where="*up_proj.weight", key=KEY)
    wide = jax.tree.map(
        lambda leaf: jax.tree.map(lambda x: x.astype(jnp.float32), leaf) if is_structured(leaf) else leaf,
        wide,
        is_leaf=is_structured,
    )
    found = logits_of(module, config, wide, tokens())
    assert found.dtype == jnp.bfloat16
    want = logits_of(module, config, params, tokens()).astype(jnp.float32)
    assert float(jnp.abs(found - want).max()) < 0.1 * float(jnp.abs(want).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["llama_tiny", "gpt_oss_tiny"])
def test_a_gauge_by_a_power_of_two_is_equal_to_the_bit(name, dtype):
    model, ids, _ = fixture(name, dtype)
    spec = sd.SpecDef(alpha=2.0**12, basis="axis", budget=float("inf"))
    pairs = models.gauge_pairs(model.config)
    deformed = models.deform_pairs(model.params, pairs, spec, key=KEY)
    for pair in pairs:
        assert bool((deformed[pair.first] != model.params[pair.first]).any())
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(deformed, ids), apply(model.params, ids))


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_symmetric_gauge_is_equal_to_rounding_and_undone_by_rebalancing(name):
    module, config, params = small(name)
    pairs = models.gauge_pairs(config)
    deformed = models.deform_pairs(params, pairs, sd.SpecDef(alpha=64.0, k=2), key=KEY)
    want = logits_of(module, config, params, tokens())
    np.testing.assert_allclose(logits_of(module, config, deformed, tokens()), want, rtol=0, atol=1e-10)
    attack = sd.attacks.rebalance(module.loss(config), deformed, tokens(), pairs=pairs)
    balanced = attack.problem.params
    np.testing.assert_allclose(logits_of(module, config, balanced, tokens()), want, rtol=0, atol=1e-10)


def test_bad_pairs():
    _, config, params = small("llama")
    pairs = models.gauge_pairs(config)
    spec = sd.SpecDef(alpha=4.0)
    with pytest.raises(StructureError, match="unstack the layers first"):
        models.deform_pairs(models.stack_layers(params), pairs, spec, key=KEY)
    with pytest.raises(ProblemError, match="stand in two pairs"):
        models.deform_pairs(params, [*pairs, *pairs], spec, key=KEY)


def test_curvature_of_a_deformed_model_and_attacks_on_it():
    module, config, params = small("llama", num_hidden_layers=1)
    deformed = sd.deform(params, sd.SpecDef(alpha=64.0), where="*mlp.up_proj.weight", key=KEY)
    loss = module.loss(config)
    values = [
        sd.curvature.eigsh(sd.curvature.hessian(loss, p, tokens()), key=KEY, tol=0.05).values[0]
        for p in (params, deformed)
    ]
    assert float(values[1]) > 4 * float(values[0])
    fused = sd.attacks.fuse(loss, deformed, tokens()).problem.params
    np.testing.assert_allclose(
        fused["model.layers.0.mlp.up_proj.weight"], params["model.layers.0.mlp.up_proj.weight"], atol=1e-12
    )
    injected = sd.attacks.inject(loss, deformed, tokens()).problem
    assert float(injected.loss(injected.params, tokens())) == pytest.approx(
        float(loss(params, tokens())), rel=1e-10
    )


def test_every_kernel_of_a_mixture_is_found_and_no_bias():
    module, config, params = small("gpt_oss")
    found = sd.deform(params, sd.SpecDef(alpha=8.0), key=KEY)
    pairs = {name: leaf for name, leaf in found.items() if isinstance(leaf, sd.Deformed)}
    layer = {name.removeprefix("model.layers.0.") for name in pairs if ".layers.0." in name}
    attention = {f"self_attn.{x}_proj.weight" for x in "qkvo"}
    assert layer == attention | {"mlp.router.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert pairs["model.layers.0.mlp.experts.down_proj"].axes.stack == (0,)
    plain, after = (logits_of(module, config, p, tokens()) for p in (params, found))
    np.testing.assert_allclose(after, plain, atol=1e-10)
