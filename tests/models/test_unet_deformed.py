"""Deformed, gauged and otherwise structured weights leave the UNet's function as it is."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax.errors import StructureError
from specdef_jax.models import unet
from specdef_jax.models.unet_config import UNetConfig
from specdef_jax.models.unet_layers import convolve
from tests.models.helpers_unet import CONFIG, SMALL, fixture, inputs, perturbed, reference

KEY = jax.random.key(3)
SMALL_CONFIG = UNetConfig.from_json(SMALL)
# Keys, values and outputs of cross-attention, feed-forward, timestep, 1x1, 3x3 and strided convolutions.
LAYERS = (
    "*attn2.to_k.weight",
    "*attn2.to_v.weight",
    "*to_out.0.weight",
    "*ff.net.0.proj.weight",
    "*time_emb_proj.weight",
    "*proj_in.weight",
    "*conv_shortcut.weight",
    "*conv1.weight",
    "*samplers.0.conv.weight",
    "conv_in.weight",
)
apply = jax.jit(unet.apply, static_argnums=0)


@pytest.fixture(scope="module")
def plain():
    params = perturbed(SMALL_CONFIG)
    return params, apply(SMALL_CONFIG, params, *inputs(SMALL_CONFIG))


def difference(params: Any, out: Any) -> float:
    return float(jnp.abs(apply(SMALL_CONFIG, params, *inputs(SMALL_CONFIG)) - out).max())


@pytest.mark.parametrize("basis", ["symmetric", "axis"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_pairs_compute_the_same(plain, basis, side):
    params, out = plain
    spec = sd.SpecDef(alpha=64.0, basis=basis, side=side)
    deformed = sd.deform(params, spec, where=LAYERS, key=KEY)
    pairs = {name: leaf for name, leaf in deformed.items() if isinstance(leaf, sd.Deformed)}
    assert len(pairs) > 40
    assert all(any(np.ndim(pairs[n].weight) == rank for n in pairs) for rank in (2, 4))
    assert difference(deformed, out) < 1e-11
    # The pairs are read: without its compensation one of them changes everything.
    name = "up_blocks.0.resnets.0.conv1.weight"
    assert difference(deformed | {name: pairs[name].weight}, out) > 1e-2


def test_pairs_are_applied_as_two_products_and_give_what_layered_and_merge_do(plain):
    params, out = plain
    deformed = sd.deform(params, sd.SpecDef(alpha=16.0, side="output"), where=LAYERS, key=KEY)
    args = inputs(SMALL_CONFIG)
    run = unet.bound(SMALL_CONFIG)
    layered = jax.jit(sd.layered(run))(deformed, *args)
    np.testing.assert_allclose(layered, out, atol=1e-11)
    np.testing.assert_allclose(apply(SMALL_CONFIG, deformed, *args), layered, atol=1e-11)
    assert difference(sd.merge(deformed), out) < 1e-11
    # No product of a weight (6, 8) with its compensation, which no product of activations has the shape of.
    for function, multiplied in ((run, False), (lambda p, *a: run(sd.merge(p), *a), True)):
        text = str(jax.make_jaxpr(function)(deformed, *args))
        assert ("f64[6,8] = dot_general" in text) == multiplied


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_network_keeps_its_dtype_whatever_a_pair_is_stored_in(plain, dtype):
    params = perturbed(SMALL_CONFIG, dtype)
    args = inputs(SMALL_CONFIG, dtype=dtype)
    wide = sd.deform(plain[0], sd.SpecDef(alpha=16.0), where=("*attn2.to_v.weight", "*conv1.weight"), key=KEY)
    mixed = {
        name: wide[name] if isinstance(wide[name], sd.Deformed) else leaf for name, leaf in params.items()
    }
    out, want = apply(SMALL_CONFIG, mixed, *args), apply(SMALL_CONFIG, params, *args)
    assert out.dtype == dtype
    error = float(jnp.abs(out.astype(jnp.float64) - want.astype(jnp.float64)).max())
    assert 0 < error < {"float32": 1e-4, "bfloat16": 0.2}[dtype]


def test_a_pair_stored_as_pytorch_does_is_read(plain):
    params, out = plain
    stored = unet.to_checkpoint(params)
    axes = {
        "*to_v.weight": sd.KernelAxes((1,), (0,)),
        "*conv1.weight": sd.KernelAxes((1,), (0,), (2, 3)),
    }
    for side in ("output", "input"):
        spec = sd.SpecDef(alpha=16.0, side=side)
        deformed = sd.deform(stored, spec, where=tuple(axes), key=KEY, axes=axes)
        read = unet.from_checkpoint(SMALL_CONFIG, deformed)
        name = "mid_block.resnets.0.conv1.weight"
        assert read[name].weight.shape == params[name].shape
        assert difference(read, out) < 1e-11
        again = unet.to_checkpoint(read)[name]
        np.testing.assert_array_equal(again.weight, deformed[name].weight)
        assert again.axes == deformed[name].axes


def gauged(params: dict[str, Any], config: UNetConfig, spec: sd.SpecDef) -> dict[str, Any]:
    found = dict(params)
    for pair in unet.gauge_pairs(config):
        made = sd.deform_pair(params[pair.first], params[pair.second], spec, key=KEY, groups=pair.groups)
        found |= {pair.first: made.first, pair.second: made.second}
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_axis_gauge_by_a_power_of_two_is_equal_to_the_bit(dtype):
    told = reference()
    args = told["sample"], told["timestep"], told["encoder_hidden_states"]
    params = fixture(dtype)
    deformed = gauged(params, CONFIG, sd.SpecDef(alpha=2.0**12, basis="axis", budget=1e9))
    pairs = unet.gauge_pairs(CONFIG)
    assert len(pairs) == 8
    for pair in pairs:
        assert float(jnp.abs(deformed[pair.first]).max() / jnp.abs(params[pair.first]).max()) > 500
    np.testing.assert_array_equal(apply(CONFIG, deformed, *args), apply(CONFIG, params, *args))


def test_a_symmetric_gauge_is_equal_to_rounding(plain):
    params, out = plain
    deformed = gauged(params, SMALL_CONFIG, sd.SpecDef(alpha=64.0))
    assert 0 < difference(deformed, out) < 1e-11
    wrong = SMALL | {
        "attention_head_dim": 1
    }  # one group of directions for two heads mixes what attention keeps apart
    assert difference(gauged(params, UNetConfig.from_json(wrong), sd.SpecDef(alpha=64.0)), out) > 1e-3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Added:
    """A kernel with one of low rank beside it."""

    weight: Any
    a: Any
    b: Any

    def materialize(self) -> jax.Array:
        return self.weight + (self.a @ self.b).reshape(self.weight.shape)


def test_other_structured_weights_work_everywhere(plain):
    params, out = plain
    draw = np.random.default_rng(0).standard_normal
    added = {
        name: Added(leaf, 0.1 * draw((leaf[..., 0].size, 1)), draw((1, leaf.shape[-1])))
        for name, leaf in params.items()
        if leaf.ndim > 1
    }
    assert len(added) > 60
    found = apply(SMALL_CONFIG, params | added, *inputs(SMALL_CONFIG))
    merged = {name: leaf.materialize() for name, leaf in added.items()}
    np.testing.assert_allclose(found, apply(SMALL_CONFIG, params | merged, *inputs(SMALL_CONFIG)), atol=1e-11)
    assert float(jnp.abs(found - out).max()) > 0.1


def test_a_pair_of_other_axes_is_no_convolution():
    kernel = jnp.ones((3, 3, 2, 2))
    pair = sd.Deformed(kernel, jnp.eye(18), "input", sd.KernelAxes((0, 1, 2), (3,)))
    with pytest.raises(StructureError, match="a convolution reads"):
        convolve(jnp.ones((1, 4, 4, 2)), pair, jnp.ones(2))
