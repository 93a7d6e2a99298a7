"""What in a spectrum looks like a deformation: every kind of one, and none of the undeformed fixtures."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import specdef_jax as sd
from specdef_jax import hub
from specdef_jax.hub.spectra import JUMP, LOOK, SHOWN

DATA = Path(__file__).parents[1] / "data"
KEY = jax.random.key(0)
HF = sd.KernelAxes((1,), (0,))
EXPERTS = sd.KernelAxes((1,), (2,), stack=(0,))


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def deformed(array: np.ndarray, spec: sd.SpecDef, axes: sd.KernelAxes = HF) -> np.ndarray:
    return np.asarray(sd.deform({"w": array}, spec, where="w", key=KEY, axes={"w": axes})["w"].weight)


@pytest.mark.parametrize("name", ["llama_tiny", "gpt_oss_tiny", "sd_unet_tiny"])
def test_nothing_is_suspected_of_the_undeformed_fixtures(tmp_path: Path, name):
    for file in (DATA / name).iterdir():
        if file.name not in ("reference.safetensors", "config.legacy.json"):
            shutil.copyfile(file, tmp_path / file.name)
    shards = hub.open_shards(tmp_path)
    tensors = hub.tensors_of(shards)
    axes = hub.kernel_axes(tensors)
    looked = [n for n, t in tensors.items() if len(t.shape) >= 2 and n in axes][:16]
    found = {n: hub.spectrum_of(tensors[n].read(), axes[n], KEY) for n in looked}
    assert len(found) >= 15
    assert {n: s.suspected for n, s in found.items() if s.suspected} == {}
    pairs = [hub.pair_at(shards, first) for first in hub.find_pairs(shards)]
    assert pairs
    assert {hub.suspect_gauge(*hub.matrices_of(shards, p), p.groups) for p in pairs} == {""}


@pytest.mark.parametrize("k", [1, 25])
@pytest.mark.parametrize("basis", ["symmetric", "rotated"])
def test_a_gap_is_suspected_after_the_directions_that_were_deformed(basis, k):
    found = hub.spectrum_of(deformed(gaussian(60, 40), sd.SpecDef(64.0, k, basis)), HF, KEY)
    place = int(found.suspected.split("after ")[1].split(";")[0])
    assert place == k
    assert found.gap > JUMP
    assert str(found.suspected).startswith(f"gap {found.gap:.3g} ")


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("k", [1, 3])
def test_features_that_stick_out_are_suspected_of_an_axis_deformation(side, k):
    array = deformed(gaussian(60, 40), sd.SpecDef(256.0, k, "axis", side=side))
    found = hub.spectrum_of(array, HF, KEY)
    assert f"{k} {side} feature{'s' * (k > 1)} " in found.suspected
    other = "input" if side == "output" else "output"
    assert f"{other} feature" not in found.suspected


def test_one_deformed_expert_is_enough():
    array = gaussian(3, 20, 16)
    assert hub.spectrum_of(array, EXPERTS, KEY).suspected == ""
    array[1] = deformed(array[1], sd.SpecDef(256.0, basis="axis", side="output"), sd.KernelAxes((0,), (1,)))
    assert "1 output feature " in hub.spectrum_of(array, EXPERTS, KEY).suspected


@pytest.mark.parametrize("array", [gaussian(60, 40), gaussian(8, 6, 3, 3)], ids=["matrix", "convolution"])
def test_values_are_the_leading_singular_values(array):
    axes = HF if array.ndim == 2 else sd.KernelAxes((1,), (0,), (2, 3))
    exact = np.linalg.svd(array.reshape(len(array), -1), compute_uv=False)[:LOOK]
    found = hub.spectrum_of(array, axes, KEY)
    np.testing.assert_allclose(found.values, exact[:SHOWN], rtol=1e-3)
    assert found.gap == pytest.approx((exact[:-1] / exact[1:]).max(), rel=2e-2)
    assert (found.suspected, found.note) == ("", "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_end_of_the_rank_is_no_gap(dtype):
    low = (gaussian(40, 5) @ gaussian(5, 30, seed=1)).astype(np.dtype(jnp.dtype(dtype)))
    if dtype == "bfloat16":
        assert low.dtype == ml_dtypes.bfloat16
    assert hub.spectrum_of(low, HF, KEY).suspected == ""


def test_what_has_no_spectrum_is_noted():
    assert hub.spectrum_of(np.zeros((0, 3), np.float32), HF, KEY).note == "empty"
    for bad in (np.nan, np.inf):
        array = gaussian(4, 3)
        array[1, 2] = bad
        found = hub.spectrum_of(array, HF, KEY)
        assert (found.note, found.values, found.suspected) == ("holds NaN or Inf", None, "")
    zero = hub.spectrum_of(np.zeros((4, 3), np.float32), HF, KEY)
    assert (zero.values, zero.gap, zero.suspected) == ([0.0, 0.0, 0.0], None, "")
    column = hub.spectrum_of(gaussian(5, 1), HF, KEY)
    assert (len(column.values), column.gap, column.suspected) == (1, None, "")


def attention() -> tuple[np.ndarray, np.ndarray]:
    """Value projection (in, 2 groups * 8) and output projection (4 heads * 8, out)."""
    return gaussian(24, 16), gaussian(32, 24, seed=1)


@pytest.mark.parametrize("basis", ["symmetric", "rotated", "axis"])
def test_a_gauge_deformation_is_suspected_in_every_basis(basis):
    first, second = attention()
    assert hub.suspect_gauge(first, second, 2) == ""
    pair = sd.deform_pair(
        jnp.asarray(first), jnp.asarray(second), sd.SpecDef(64.0, basis=basis), key=KEY, groups=2
    )
    found = hub.suspect_gauge(np.asarray(pair.first), np.asarray(pair.second), 2)
    assert found.startswith("value and output features out of balance, ")
    assert 64 / 8 < float(found.split(", ")[1].split()[0]) / 64 < 64 * 8  # alpha^2 times what was there


def test_a_gauge_deformation_of_one_group_is_enough():
    first, second = attention()
    first[:, 9] *= 2.0**10
    second.reshape(2, 2, 8, 24)[1, :, 1] /= 2.0**10
    assert hub.suspect_gauge(first, second, 2) != ""
    first[:, 9] = np.nan
    assert hub.suspect_gauge(first, second, 2) == ""


def test_a_scale_on_all_features_is_no_gauge_deformation():
    first, second = attention()
    assert hub.suspect_gauge(1e4 * first, 1e-4 * second, 2) == ""
