"""Safetensors files: what is written is read back, by us and by the library; damage is named."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import specdef_jax as sd
from specdef_jax import hub
from specdef_jax.errors import FileError
from specdef_jax.hub import safetensors_file
from specdef_jax.hub.record import dump_record

DTYPES = ["float32", "float16", "float64", "bfloat16"]


def tensors(dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "layers.0.up.weight": rng.normal(size=(6, 4)).astype(np.dtype(dtype)),
        "layers.0.up.bias": rng.normal(size=6).astype(np.dtype(dtype)),
        "ids": np.arange(3),
        "empty": np.zeros((0, 2), np.float32),
        "flag": np.array(True),
    }


def deformed_file(path: Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    original = tensors(dtype)
    axes = hub.axes_for(original)
    spec = sd.SpecDef(alpha=4.0, k=2, budget=np.inf)
    plan = sd.plan(original, spec, where=hub.selector(["up.weight"]), key=jax.random.key(0), axes=axes)
    hub.write_tree(
        path, sd.apply_plan(original, plan), metadata={"format": "pt"}, details=hub.details_of(plan)
    )
    return original


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path, dtype: str):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    hub.write_tree(ours, tensors(dtype), metadata={"format": "pt", "note": "β"})
    safetensors.numpy.save_file(tensors(dtype), theirs, metadata={"format": "pt", "note": "β"})
    by_library, by_us = safetensors.numpy.load_file(ours), hub.read_tree(theirs)
    assert by_us.metadata == {"format": "pt", "note": "β"}
    with safetensors.safe_open(ours, framework="numpy") as file:
        assert file.metadata() == by_us.metadata
    for name, expected in tensors(dtype).items():
        for found in (by_library[name], by_us.params[name]):
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_deformed_tree_comes_back_and_merges_to_the_original(tmp_path: Path, dtype: str):
    path = tmp_path / "d.safetensors"
    original = deformed_file(path, dtype)
    with jax.enable_x64(False):  # as a user has it
        found = hub.read_tree(path)
    leaf = found.params["layers.0.up.weight"]
    assert isinstance(leaf, sd.Deformed)
    assert leaf.comp.dtype == leaf.weight.dtype == np.dtype(dtype)
    assert found.metadata == {"format": "pt"}
    assert found.details["layers.0.up.weight"] == {"basis": "symmetric", "alpha": 4.0, "k": 2}
    merged = sd.merge(found.params)
    assert merged.keys() == original.keys()
    for name, expected in original.items():
        assert merged[name].dtype == expected.dtype
        if name.endswith("up.weight"):
            tolerance = 32 * float(ml_dtypes.finfo(expected.dtype).eps)
            error = np.abs(np.asarray(merged[name], float) - expected.astype(float)).max()
            assert error <= tolerance * np.abs(expected.astype(float)).max()
            assert np.abs(np.asarray(leaf.weight, float) - expected.astype(float)).max() > 0.1
        else:
            assert merged[name].tobytes() == expected.tobytes()


def test_the_layout_in_the_file_is_the_documented_one(tmp_path: Path):
    """A reader that knows only the documentation of the record gets the original back."""
    path = tmp_path / "d.safetensors"
    original = deformed_file(path, "float64")["layers.0.up.weight"]
    stored = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        entry = json.loads(file.metadata()["specdef"])["tensors"]["layers.0.up.weight"]
    weight, comp = stored["layers.0.up.weight"], stored["layers.0.up.weight.comp"]
    assert entry["axes"]["inputs"] == [1]
    assert entry["side"] == "input"  # 4 inputs, 6 outputs: the smaller side
    np.testing.assert_allclose((comp @ weight.T).T, original, rtol=1e-12, atol=1e-12)


def test_nested_trees_are_flattened_by_slashes(tmp_path: Path):
    path = tmp_path / "n.safetensors"
    hub.write_tree(path, {"dense": {"kernel": np.eye(2)}})
    assert list(hub.read_tree(path).params) == ["dense/kernel"]


def test_progress_ends_at_the_number_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(safetensors_file, "_CHUNK", 16)
    calls: list[tuple[int, int]] = []
    hub.write_tree(tmp_path / "a.safetensors", tensors(), progress=lambda *call: calls.append(call))
    total = sum(a.nbytes for a in tensors().values())
    assert calls[-1] == (total, total)
    assert len(calls) > total // 16
    assert hub.read_tree(tmp_path / "a.safetensors").params["ids"].tolist() == [0, 1, 2]


def test_ctrl_c_in_the_writer_leaves_nothing(tmp_path: Path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.write_tree(tmp_path / "a.safetensors", tensors(), progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_the_format_cannot_hold(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileError, match=r"'key'.*cannot hold"):
        hub.write_tree(path, {"key": jax.random.key(0)})
    with pytest.raises(FileError, match=r"'step' is int"):
        hub.write_tree(path, {"step": 3})
    pair = sd.Deformed(np.eye(2), np.eye(2), "output", sd.KernelAxes((0,), (1,)))
    with pytest.raises(FileError, match=r"two tensors would be named 'w\.comp'"):
        hub.write_tree(path, {"w": pair, "w.comp": np.eye(2)})
    assert list(tmp_path.iterdir()) == []
    hub.write_tree(path, {"w": np.eye(2)})
    with pytest.raises(FileError, match="exists already"):
        hub.write_tree(path, {"w": np.eye(3)})
    hub.write_tree(path, {"w": np.eye(3)}, overwrite=True)
    assert hub.read_tree(path).params["w"].shape == (3, 3)


def crafted(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int = 0, stop: int = 4, **changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [start, stop]} | changes


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b"{", b"", "no JSON"),
        (b"\xff", b"", "no JSON"),
        (b"[" * 5000, b"", "no JSON"),
        (b'{"a":1,"a":2}', b"", "occurs twice"),
        ({"\ud800": entry()}, b"0000", "library refuses"),
        ([], b"", "no mapping"),
        ({"__metadata__": {"a": 1}}, b"", "metadata is not"),
        ({"a": 3}, b"", "'a' makes no sense"),
        ({"a": entry(shape=[1.0])}, b"0000", "'a' makes no sense"),
        ({"a": entry(shape=[True])}, b"0000", "'a' makes no sense"),
        ({"a": entry(shape=[-1])}, b"0000", "'a' makes no sense"),
        ({"a": entry(dtype=["F32"])}, b"0000", "'a' makes no sense"),
        ({"a": entry(dtype="F4")}, b"0000", "dtype 'F4'"),
        ({"a": entry(shape=[2])}, b"0000", "given 4 bytes"),
        ({"a": entry(4, 0, shape=[0])}, b"0000", "given -4 bytes"),
        ({"a": entry(), "b": entry()}, b"0000", "'b' overlaps"),
        ({"a": entry(4, 8)}, b"00000000", "'a' follows a gap"),
        ({"a": entry()}, b"000", "bytes, its header announces"),
        ({"a": entry()}, b"00000", "bytes, its header announces"),
        ({"a": entry(shape=[10**30], data_offsets=[0, 4 * 10**30])}, b"", "bytes, its header announces"),
    ],
)
def test_a_corrupt_header_is_explained(tmp_path: Path, header: object, data: bytes, reason: str):
    path = crafted(tmp_path / "a.safetensors", header, data)
    with pytest.raises(FileError, match=reason) as caught:
        hub.read_tree(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8, b"\xff" * 40])
def test_a_file_without_a_header_is_explained(tmp_path: Path, content: bytes):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=f"{len(content)} bytes cannot hold the header"):
        hub.read_tree(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: "{", "record is damaged"),
        (lambda r: r | {"format": 2}, "format 2, this version reads 1"),
        (lambda r: {"format": 1}, "record is damaged"),
        (lambda r: edited(r, side="left"), "side 'left'"),
        (lambda r: edited(r, side="output"), "do not fit"),
        (
            lambda r: edited(r, axes={"inputs": [0], "outputs": [0], "window": [], "stack": []}),
            "exactly once",
        ),
        (lambda r: edited(r, axes={"inputs": [0]}), "KeyError"),
        (lambda r: {"format": 1, "tensors": {"ids": r["tensors"]["layers.0.up.weight"]}}, "do not fit"),
        (lambda r: {"format": 1, "tensors": {"none": r["tensors"]["layers.0.up.weight"]}}, "do not fit"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(tmp_path: Path, change, reason: str):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    deformed_file(good)
    with safetensors.safe_open(good, framework="numpy") as file:
        record = json.loads(file.metadata()["specdef"])
    new = change(record)
    text = new if isinstance(new, str) else json.dumps(new)
    safetensors.numpy.save_file(safetensors.numpy.load_file(good), bad, metadata={"specdef": text})
    with pytest.raises(FileError, match=reason) as caught:
        hub.read_tree(bad)
    assert str(bad) in str(caught.value)


def edited(record: dict, **changes: object) -> dict:
    entries = {name: entry | changes for name, entry in record["tensors"].items()}
    return record | {"tensors": entries}


def test_stripped_metadata_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    good, bare = tmp_path / "good.safetensors", tmp_path / "bare.safetensors"
    deformed_file(good)
    hub.read_tree(good)
    assert not caplog.records
    safetensors.numpy.save_file(safetensors.numpy.load_file(good), bare)
    assert "layers.0.up.weight.comp" in hub.read_tree(bare).params
    assert "metadata stripped" in caplog.text


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("content") / "a.safetensors"
    deformed_file(path)
    return path.read_bytes()


@given(data=st.data())
def test_damage_is_an_error_of_ours_or_harmless(tmp_path_factory, content: bytes, data: st.DataObject):
    damaged = bytearray(content)
    # Half of the flips go to the length and the header, which are a small part of the file.
    header = 8 + int.from_bytes(content[:8], "little")
    places = st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)):
        damaged[place] = value
    kept = data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged) - 1)))
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    path.write_bytes(damaged[:kept])
    try:
        hub.read_tree(path)
        found = None
    except sd.SpecDefError as error:
        found = str(error)
    if found is None:
        assert kept == len(content)
    else:
        assert str(path) in found


def test_formats_that_may_hold_a_pickle_are_not_opened(tmp_path: Path):
    for name in ("a.bin", "a.pt", "a.npz"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(FileError, match="never loaded"):
            hub.read_tree(tmp_path / name)
    with pytest.raises(FileError, match="does not exist"):
        hub.read_tree(tmp_path / "none.safetensors")


def test_a_foreign_structured_weight_is_refused():
    class Foreign:
        def materialize(self) -> np.ndarray:
            return np.eye(2)

    with pytest.raises(FileError, match="'w' is a Foreign"):
        dump_record({"w": Foreign()}, {})
