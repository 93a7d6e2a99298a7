"""The UNet trains: exact gradients, remat, bfloat16, a mesh of devices, and the example of the module."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax.curvature.narrow import narrow_floats
from specdef_jax.models import unet
from specdef_jax.models.unet_config import UNetConfig
from tests.models.helpers_unet import CONFIG, CONFIGS, DATA, SMALL, inputs, perturbed


def loss_arguments(config, dtype):
    sample, timestep, states = inputs(config, dtype=dtype)
    return sample, sample[:, :, ::-1], timestep, states


def test_gradients_are_exact_and_a_step_of_descent_moves_every_leaf():
    config = UNetConfig.from_json(CONFIGS["other depths on the way up"] | {"use_linear_projection": True})
    params, args = perturbed(config), loss_arguments(config, "float64")
    evaluate = jax.jit(jax.value_and_grad(unet.loss(config)))
    before, gradient = evaluate(params, *args)
    draw = np.random.default_rng(3).standard_normal
    direction = {name: draw(leaf.shape) for name, leaf in params.items()}
    h = 2e-7
    ends = [evaluate({n: x + s * direction[n] for n, x in params.items()}, *args)[0] for s in (h, -h)]
    slope = sum(float(jnp.vdot(gradient[name], direction[name])) for name in params)
    assert slope == pytest.approx(float(ends[0] - ends[1]) / (2 * h), rel=1e-6)
    after = {name: x - 1e-3 * gradient[name] for name, x in params.items()}
    assert [name for name in params if not bool(jnp.any(after[name] != params[name]))] == []
    assert evaluate(after, *args)[0] < before
    assert narrow_floats(unet.loss(config), params, *args) == []


def test_remat_keeps_less_and_changes_nothing():
    config = UNetConfig.from_json(SMALL)
    params, args = perturbed(config, jnp.float32), loss_arguments(config, jnp.float32)
    found, kept = [], []
    for remat in (False, True):
        loss = unet.loss(config, remat=remat)
        found.append(jax.jit(jax.value_and_grad(loss))(params, *args))
        _, back = jax.eval_shape(lambda p, loss=loss: jax.vjp(lambda q: loss(q, *args), p), params)
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(back)))
    assert kept[1] < 0.7 * kept[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), *found)


def test_a_network_on_a_mesh_is_that_on_one_device():
    config = UNetConfig.from_json(SMALL)
    params, args = perturbed(config, "float32"), loss_arguments(config, "float32")
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = {"heads": "model", "mlp": "model", "embed": "data"}
    placed, used = {}, set()
    for name, leaf in params.items():
        rule = next((r for r in unet.RULES if re.search(rf"(?:^|\.){r[0]}$", name)), None)
        spec = [split.get(count) for count in rule[1]] if rule else []
        assert len(spec) in (0, leaf.ndim)
        used.add(rule)
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        placed[name] = jax.device_put(leaf, sharding)
    assert used == {*unet.RULES, None}
    loss = jax.jit(jax.value_and_grad(unet.loss(config)))
    found, expected = loss(placed, *args), loss(params, *args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)
    name = "up_blocks.1.resnets.0.conv1.weight"
    assert found[1][name].sharding.is_equivalent_to(placed[name].sharding, 4)


def test_training_in_bfloat16():
    config = UNetConfig.from_json(SMALL)
    params = perturbed(config, jnp.bfloat16)
    value, gradient = jax.jit(jax.value_and_grad(unet.loss(config)))(
        params, *loss_arguments(config, jnp.bfloat16)
    )
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    expected = jax.jit(unet.loss(config))(wide, *loss_arguments(config, jnp.float64))
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(float(expected), rel=0.02)
    assert all(g.dtype == jnp.bfloat16 for g in gradient.values())
    assert all(bool(jnp.any(g != 0)) for g in gradient.values())


def test_the_example_of_the_module_runs(monkeypatch, capsys):
    monkeypatch.chdir(DATA.parents[2])
    code = [line[4:] for line in unet.__doc__.splitlines() if line.startswith("    ")]
    names = {}
    exec("\n".join(code), names)
    assert 0 < float(capsys.readouterr().out) < 1e-4
    assert names["image"].shape == names["latents"].shape
    assert sum(isinstance(leaf, sd.Deformed) for leaf in names["gradient"].values()) == 4
    assert unet.bound(CONFIG) is names["unet"].bound(names["config"])
