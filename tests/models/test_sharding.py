"""Models on a mesh of eight devices compute what they compute on one."""

import functools
import re

import jax
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax import models, race
from specdef_jax.errors import StructureError
from specdef_jax.models import sharding
from specdef_jax.models.sharding import EXPERT_PARALLEL, FSDP, RULES, TENSOR_PARALLEL
from specdef_jax.parametrization import Deformed, is_structured, problem
from specdef_jax.race import inputs
from specdef_jax.trees import named_leaves
from tests.models.helpers_models import logits_of, small, tokens

KEY = jax.random.key(0)
LAYOUTS = {
    "tensor": TENSOR_PARALLEL,
    "fsdp": FSDP,
    "both": TENSOR_PARALLEL | FSDP,
    "experts": EXPERT_PARALLEL | FSDP,
}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"))


def made(name):
    return small(name, vocab_size=64) if name == "llama" else small(name, vocab_size=64, head_dim=8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_logits_loss_and_gradients(mesh, name, layout):
    module, config, params = made(name)
    step = jax.jit(jax.value_and_grad(module.loss(config)))
    want, slopes = step(params, tokens())
    laid = sharding.shard(params, mesh, LAYOUTS[layout])
    places = {path: leaf.sharding for path, leaf in laid.items()}
    step = jax.jit(jax.value_and_grad(module.loss(config)), out_shardings=(None, places))
    found, moved = step(laid, tokens())
    assert float(found) == pytest.approx(float(want), rel=1e-13)
    for path, leaf in moved.items():
        np.testing.assert_allclose(leaf, slopes[path], rtol=0, atol=1e-13, err_msg=path)
        assert leaf.sharding == places[path], path
    logits = logits_of(module, config, params, tokens())
    np.testing.assert_allclose(logits_of(module, config, laid, tokens()), logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_no_leaf_that_a_rule_names_is_left_whole_on_every_device(mesh, name, stacked):
    _, _, params = made(name)
    params = models.stack_layers(params) if stacked else params
    laid = sharding.shard(params, mesh, TENSOR_PARALLEL | FSDP)
    whole = {path.rsplit(".", 2)[-2] for path, leaf in laid.items() if leaf.sharding.is_fully_replicated}
    assert whole <= {"input_layernorm", "post_attention_layernorm", "norm", "o_proj", "down_proj", "router"}
    for path, leaf in laid.items():
        if path.endswith(("_proj.weight", "experts.gate_up_proj", "experts.down_proj")):
            assert leaf.addressable_shards[0].data.size == leaf.size // 8, path


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_deformation_of_sharded_parameters(mesh, name):
    module, config, params = made(name)
    spec = sd.SpecDef(alpha=8.0)
    plan = sd.plan(params, spec, where=("*_proj.weight", "*router.weight"), key=KEY)
    want = sd.apply_plan(params, plan)
    laid = sharding.shard(params, mesh, TENSOR_PARALLEL | FSDP)
    found = sd.apply_plan(laid, plan)
    for (path, a), (_, b) in zip(named_leaves(found), named_leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13, err_msg=path)
    for path, leaf in found.items():
        if isinstance(leaf, Deformed):
            assert leaf.weight.sharding == laid[path].sharding, path
    found = sharding.shard(found, mesh, TENSOR_PARALLEL | FSDP)
    pairs = [x for x in jax.tree.leaves(found, is_leaf=is_structured) if isinstance(x, Deformed)]
    assert pairs
    assert not any(pair.comp.sharding.is_fully_replicated for pair in pairs if pair.comp.shape[0] > 4)
    logits = logits_of(module, config, params, tokens())
    np.testing.assert_allclose(logits_of(module, config, found, tokens()), logits, rtol=0, atol=1e-11)
    step = jax.jit(jax.grad(module.loss(config)))
    for (path, a), (_, b) in zip(
        named_leaves(step(found, tokens())), named_leaves(step(want, tokens())), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11, err_msg=path)


def test_planning_on_sharded_parameters_preserves_the_function(mesh):
    module, config, params = made("llama")
    laid = sharding.shard(params, mesh, TENSOR_PARALLEL | FSDP)
    deformed = sd.deform(laid, sd.SpecDef(alpha=8.0), where="*_proj.weight", key=KEY)
    want = logits_of(module, config, params, tokens())
    np.testing.assert_allclose(logits_of(module, config, deformed, tokens()), want, rtol=0, atol=1e-11)
    for path, leaf in deformed.items():
        if isinstance(leaf, Deformed):
            assert leaf.weight.sharding.is_equivalent_to(laid[path].sharding, 2), path


def test_curvature_on_a_mesh(mesh):
    module, config, params = small("llama", vocab_size=64, num_hidden_layers=1)
    top = functools.partial(sd.curvature.eigsh, k=1, tol=1e-6, key=KEY)
    loss = module.loss(config)
    kept = "*up_proj.weight"
    values = []
    for given in (params, sharding.shard(params, mesh, TENSOR_PARALLEL)):
        op = sd.curvature.restricted(sd.curvature.hessian(loss, given, tokens()), kept)
        values.append(float(top(op).values[0]))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_a_race_on_a_mesh(mesh):
    module, config, params = small("llama", vocab_size=64, num_hidden_layers=1)
    plan = sd.plan(params, sd.SpecDef(alpha=4.0), where="*up_proj.weight", key=KEY)
    laid = sharding.shard(params, mesh, TENSOR_PARALLEL)
    loss = module.loss(config)
    start = float(loss(params, tokens()))
    found = []
    for given in (params, laid):
        deformed = [problem(loss, sd.apply_plan(given, plan), tokens())]
        found.append(
            race.run_problems(
                deformed, {n: race.FIRST_ORDER[n] for n in ("sgd", "adam")}, orders=2, steps=20, key=KEY,
                sample=race.minibatches(2, tokens()), eval_args=(tokens(),), target=0.9 * start,
                step_sizes=(1e-3, 1e-2, 0.1),
            )
        )  # fmt: skip
    stacked = inputs.stack(deformed).params["model.layers.0.mlp.up_proj.weight"]
    assert stacked.weight.sharding.num_devices == 8
    assert not stacked.weight.sharding.is_fully_replicated
    alone, spread = found
    assert np.isfinite(alone.crossings).sum() > 4
    np.testing.assert_allclose(spread.crossings, alone.crossings, rtol=1e-8)
    np.testing.assert_array_equal(spread.outcome, alone.outcome)


def test_text_on_a_mesh(mesh):
    module, config, params = made("llama")
    laid = sharding.shard(params, mesh, TENSOR_PARALLEL)
    want = module.generate(config, params, tokens(2, 4), 5)
    np.testing.assert_array_equal(module.generate(config, laid, tokens(2, 4), 5), want)


def test_every_rule_names_a_leaf_and_an_axis_is_used_once(mesh):
    names = set(made("llama")[2]) | set(made("gpt_oss")[2])
    for pattern, _ in RULES:
        assert any(re.search(rf"(?:^|\.){pattern}$", name) for name in names), pattern
    place = sharding.placement(mesh, EXPERT_PARALLEL | {"mlp": "model", "embed": "data"})
    spec = place("model.layers.0.mlp.experts.gate_up_proj", (4, 16, 16)).spec
    assert tuple(spec) == ("model", "data", None)


def test_what_cannot_be_split(mesh):
    place = sharding.placement(mesh, TENSOR_PARALLEL)
    with pytest.raises(StructureError, match="its 30 vocab cannot be split over the 4 devices of 'model'"):
        place("lm_head.weight", (16, 30))
    with pytest.raises(StructureError, match="the rule for it"):
        place("lm_head.weight", (30,))
    assert place("anything", (3, 5)).is_fully_replicated
