"""MXFP4 tensors are found, checked and expanded exactly, against the format's own arithmetic."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from specdef_jax.errors import FileError, LeafError
from specdef_jax.hub.quantized import dequantize, find_quantized, plain_shape
from specdef_jax.hub.shards import Shards, open_shards
from specdef_jax.hub.tensors import tensors_of

DATA = Path(__file__).parents[1] / "data"
# The values of E2M1 by code in the OCP Microscaling Formats 1.0; codes 8 to 15 are their negatives.
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def opened(path: Path, tensors: dict[str, np.ndarray]) -> Shards:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({}))
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return open_shards(path)


def fixture(path: Path, name: str) -> Shards:
    """Open a model of tests/data without the reference activations beside it."""
    path.mkdir()
    for file in ("config.json", "model.safetensors"):
        (path / file).write_bytes((DATA / name / file).read_bytes())
    return open_shards(path)


def packed(codes: np.ndarray) -> np.ndarray:
    """Pack 4-bit codes (experts, out, in) into blocks (experts, out, in / 32, 16), the low one first."""
    low, high = codes[..., 0::2], codes[..., 1::2]
    return (low | high << 4).astype(np.uint8).reshape(*codes.shape[:2], -1, 16)


def mxfp4(path: Path, codes: np.ndarray, scales: np.ndarray) -> Shards:
    return opened(path, {"w_blocks": packed(codes), "w_scales": scales.astype(np.uint8)})


def expanded(shards: Shards, dtype: type = np.float32) -> np.ndarray:
    return dequantize(shards, "w_blocks", "w_scales", np.dtype(dtype))


def test_the_quantized_fixture_holds_the_plain_one(tmp_path: Path):
    quantized = fixture(tmp_path / "mxfp4", "gpt_oss_tiny_mxfp4")
    plain = fixture(tmp_path / "plain", "gpt_oss_tiny")
    found = find_quantized(quantized)
    assert len(found) == 8  # two projections of four layers
    for name, pair in found.items():
        assert name not in quantized
        assert plain_shape(quantized, *pair) == plain.info(name).shape
        expected = plain.read(name)
        assert np.abs(expected).max() > 0
        value = dequantize(quantized, *pair, expected.dtype)
        np.testing.assert_array_equal(value, expected, strict=True)
    rest = set(quantized) - {part for pair in found.values() for part in pair}
    assert rest | set(found) == set(plain)
    for name in rest:
        assert quantized.read(name).tobytes() == plain.read(name).tobytes()


def test_tensors_of_a_checkpoint_are_plain_on_request_only(tmp_path: Path):
    shards = fixture(tmp_path / "mxfp4", "gpt_oss_tiny_mxfp4")
    assert set(tensors_of(shards)) == set(shards)
    name, pair = next(iter(find_quantized(shards).items()))
    tensor = tensors_of(shards, np.dtype(np.float32))[name]
    assert tensor.parts == pair
    assert tensor.read().shape == tensor.shape
    assert tensor.size == np.prod(tensor.shape)


def test_every_code_and_scale_has_the_value_of_the_format(tmp_path: Path):
    scales = np.arange(253)  # beyond, 6 times the scale is beyond float32
    codes = np.broadcast_to(np.arange(32) % 16, (1, 253, 32))
    found = expanded(mxfp4(tmp_path, codes, scales.reshape(1, 253, 1)), np.float64)
    values = np.array([*E2M1, *(-x for x in E2M1)] * 2)
    np.testing.assert_array_equal(found[0], values[:, None] * 2.0 ** (scales - 127.0))
    assert np.signbit(found[0, 8]).all()  # minus zero


def test_codes_and_scales_belong_to_their_place(tmp_path: Path):
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 16, (3, 5, 64)), rng.integers(120, 134, (3, 5, 2))
    found = expanded(mxfp4(tmp_path, codes, scales))
    assert found.shape == (3, 64, 5)
    for expert, row, column in [(0, 0, 0), (1, 33, 2), (2, 63, 4), (0, 31, 3), (2, 32, 1)]:
        code = codes[expert, column, row]
        value = E2M1[code % 8] * (-1) ** (code // 8) * 2.0 ** (scales[expert, column, row // 32] - 127.0)
        assert found[expert, row, column] == value


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_values_that_fit_are_exact_in_every_dtype(tmp_path: Path, dtype: type):
    rng = np.random.default_rng(0)
    shards = mxfp4(tmp_path, rng.integers(0, 16, (2, 4, 32)), rng.integers(120, 130, (2, 4, 1)))
    found = expanded(shards, dtype)
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found.astype(np.float64), expanded(shards, np.float64))


@pytest.mark.parametrize("scale", [100, 142])
def test_a_dtype_that_cannot_hold_a_value_is_refused(tmp_path: Path, scale: int):
    """float16 reaches from 2^-24 to 2^16."""
    shards = mxfp4(tmp_path, np.full((1, 2, 32), 7), np.array([[[127], [scale]]]))
    assert expanded(shards, np.float32).max() == 6 * 2.0 ** max(scale - 127, 0)
    with pytest.raises(LeafError, match=r"'w_blocks' holds values that float16 cannot.*float32"):
        expanded(shards, np.float16)


def test_a_value_beyond_float32_is_refused(tmp_path: Path):
    with pytest.raises(LeafError, match="'w_blocks' holds values"):
        expanded(mxfp4(tmp_path, np.full((1, 1, 32), 7), np.array([[[254]]])))


@pytest.mark.parametrize("code", [0, 1, 7])
def test_the_scale_that_is_no_number_is_refused(tmp_path: Path, code: int):
    """255 is NaN in E8M0 (OCP Microscaling Formats 1.0), and so is the whole block."""
    with pytest.raises(LeafError, match="'w_blocks' holds values"):
        expanded(mxfp4(tmp_path, np.full((1, 1, 32), code), np.array([[[255]]])))


def test_only_blocks_with_scales_are_quantized(tmp_path: Path):
    one = np.zeros((1, 1, 1, 16), np.uint8)
    names = (
        "a_blocks",
        "b_scales",
        "c_blocks",
        "c_scales",
        "c",
        "_blocks",
        "d_blocks.weight",
        "e",
        "e_scales",
    )
    shards = opened(tmp_path, dict.fromkeys(names, one))
    assert find_quantized(shards) == {"c": ("c_blocks", "c_scales")}


@pytest.mark.parametrize(
    ("blocks", "scales", "reason"),
    [
        (np.zeros((1, 2, 3, 16), np.int8), np.zeros((1, 2, 3), np.uint8), "'w_blocks' int8"),
        (np.zeros((1, 2, 3, 16), np.uint8), np.zeros((1, 2, 3), np.float32), "'w_blocks' uint8"),
        (np.zeros((1, 2, 48), np.uint8), np.zeros((1, 2, 3), np.uint8), "no MXFP4 tensor"),
        (np.zeros((1, 2, 3, 8), np.uint8), np.zeros((1, 2, 3), np.uint8), "no MXFP4 tensor"),
        (np.zeros((1, 2, 3, 16), np.uint8), np.zeros((1, 2, 4), np.uint8), "'w_scales' has shape"),
    ],
)
def test_damaged_quantized_tensors_are_refused(
    tmp_path: Path, blocks: np.ndarray, scales: np.ndarray, reason: str
):
    shards = opened(tmp_path, {"w_blocks": blocks, "w_scales": scales})
    with pytest.raises(FileError, match=reason):
        plain_shape(shards, "w_blocks", "w_scales")
    with pytest.raises(FileError, match=reason):
        tensors_of(shards, np.dtype(np.float32))
