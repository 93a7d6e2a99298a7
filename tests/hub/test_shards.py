"""A directory of safetensors files is read as the library reads it; a bad one is refused by name."""

import errno
import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from specdef_jax import hub
from specdef_jax.errors import FileError, SpecDefError
from specdef_jax.hub import copying
from specdef_jax.hub.copying import HashedFile, parts_of, sha256_of
from specdef_jax.hub.safetensors_header import DTYPES
from specdef_jax.hub.shards import MAY_HOLD_CODE

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
A, B, C = np.arange(6.0).reshape(2, 3), np.arange(4, dtype=np.int8), np.array([], np.float32)
CODES = {dtype: code for code, dtype in DTYPES.items()}
DEEP = "[" * 100_000
FOREIGN = (".BIN", ".Pt", ".pth.tar", ".joblib", ".dill", ".hdf5", ".ot", ".onnx", ".onnx_data", ".tflite")


def content(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """Return a safetensors file, its data in the order of `tensors`."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        entries[name] = {"dtype": CODES[array.dtype], "shape": array.shape, "data_offsets": [start, end]}
    return crafted(entries, b"".join(array.tobytes() for array in tensors.values()))


def crafted(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def directory(path: Path, files: dict[str, Any]) -> Path:
    """Write files from bytes, texts, or what is to be JSON; None leaves one out."""
    for name, body in files.items():
        if body is None:
            continue
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        text = body if isinstance(body, bytes | str) else json.dumps(body)
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def single(path: Path, header: object = None, data: bytes = b"", **files: Any) -> Path:
    body = content({"a": A}) if header is None else crafted(header, data)
    return directory(path, {"config.json": {}, "model.safetensors": body} | files)


def double(path: Path, **changes: Any) -> Path:
    """Write two shards and an index; `changes` replace files, by the names below."""
    files = {
        "config": {"model_type": "x", "nested": {"deep": [1, None, {"β": True}]}},
        "first": content({"b": B, "a": A}, {"format": "pt"}),
        "second": content({"c": C}),
        "index": {"metadata": {"total_size": 52}, "weight_map": {"a": FIRST, "b": FIRST, "c": SECOND}},
    } | changes
    names = {"config": "config.json", "first": FIRST, "second": SECOND, "index": INDEX}
    return directory(path, {names.get(key, key): body for key, body in files.items()})


def refused(path: Path) -> str:
    with pytest.raises(FileError) as caught:
        hub.open_shards(path)
    assert isinstance(caught.value, SpecDefError)
    return str(caught.value)


def test_a_directory_is_what_its_files_say(tmp_path: Path):
    extra = {"tokenizer.json": "{}", "docs/notes.md": "n", "old.bin": b"\x80", "spare.safetensors": b"?"}
    shards = hub.open_shards(double(tmp_path, **extra))
    assert [(s.name, list(s.tensors), s.metadata) for s in shards.shards] == [
        (FIRST, ["b", "a"], {"format": "pt"}),
        (SECOND, ["c"], {}),
    ]
    assert list(shards) == ["b", "a", "c"]
    assert "a" in shards
    assert "d" not in shards
    assert shards.config == {"model_type": "x", "nested": {"deep": [1, None, {"β": True}]}}
    assert (shards.index, shards.index_metadata) == (INDEX, {"total_size": 52})
    assert shards.others == ("docs/notes.md", "tokenizer.json")
    assert shards.left_out == ("old.bin", "spare.safetensors")
    assert [shards.shard_of(name).name for name in "abc"] == [FIRST, FIRST, SECOND]
    for name, array in {"a": A, "b": B, "c": C}.items():
        assert (shards.info(name).dtype, shards.info(name).shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(shards.read(name), array, strict=True)


def test_a_single_file_needs_no_index(tmp_path: Path):
    shards = hub.open_shards(single(tmp_path))
    assert (shards.index, [s.name for s in shards.shards]) == (None, ["model.safetensors"])
    np.testing.assert_array_equal(shards.read("a"), A, strict=True)


def test_the_data_may_lie_in_another_order_than_the_header(tmp_path: Path):
    entries = {
        "late": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
        "early": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]},
    }
    shards = hub.open_shards(single(tmp_path, entries, b"\1\2\3"))
    assert list(shards) == ["early", "late"]
    assert shards.read("early") == 1
    assert shards.read("late").tolist() == [2, 3]


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_is_read_to_the_bit(tmp_path: Path, code: str):
    rng, dtype = np.random.default_rng(0), DTYPES[code]
    shapes = {"matrix": (3, 2), "scalar": (), "empty": (0, 4), "last": (5,)}
    arrays = {}
    for name, shape in shapes.items():
        raw = rng.integers(0, 2 if code == "BOOL" else 256, np.prod(shape, dtype=int) * dtype.itemsize)
        arrays[name] = raw.astype(np.uint8).view(dtype).reshape(shape)
    body = content(arrays)
    try:
        expected = dict(safetensors.deserialize(body))
    except safetensors.SafetensorError:
        pytest.skip(f"this version of the library does not know {code}")
    shards = hub.open_shards(directory(tmp_path, {"config.json": {}, "model.safetensors": body}))
    for name, entry in expected.items():
        found = shards.read(name)
        assert (found.dtype, list(found.shape)) == (DTYPES[entry["dtype"]], entry["shape"])
        assert found.tobytes() == bytes(entry["data"])


def test_opening_reads_no_data(tmp_path: Path):
    size = 1 << 40  # no machine holds this; the file has a hole instead
    entries = {
        "huge": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
        "small": {"dtype": "U8", "shape": [3], "data_offsets": [size, size + 3]},
    }
    path = single(tmp_path, entries)
    os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size + size + 3)
    shards = hub.open_shards(path)
    assert shards.info("huge").shape == (size,)
    assert shards.read("small").tolist() == [0, 0, 0]


def test_a_file_that_changes_after_opening_is_an_error(tmp_path: Path):
    shards = hub.open_shards(single(tmp_path))
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(FileError, match="'a' is cut off") as caught:
        shards.read("a")
    assert str(file) in str(caught.value)
    file.unlink()
    with pytest.raises(FileError, match="cannot be read: No such file"):
        shards.read("a")


def test_which_directories_hold_safetensors(tmp_path: Path):
    assert hub.is_shards(single(tmp_path / "single"))
    assert hub.is_shards(directory(tmp_path / "index", {INDEX: "{}"}))
    assert hub.is_shards(directory(tmp_path / "other", {"config.json": {}, "model.bin": b""}))  # says why not
    assert not hub.is_shards(directory(tmp_path / "orbax", {"_METADATA": {}, "config.json": {}}))
    assert not hub.is_shards(tmp_path / "single" / "model.safetensors")
    assert not hub.is_shards(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../out.safetensors", "leads out"),
        ("sub/../../out.safetensors", "leads out"),
        ("sub/../model-00001-of-00002.safetensors", "leads out"),
        ("..", "leads out"),
        ("", "leads out"),
        ("/etc/passwd.safetensors", "leads out"),
        ("..\\out.safetensors", "leads out"),
        ("C:\\out.safetensors", "leads out"),
        ("a\0.safetensors", "leads out"),
        ("config.json", "no safetensors file"),
        ("model.bin", "no safetensors file"),
        ("none.safetensors", "is missing"),
        ("sub", "no safetensors file"),
        ("folder.safetensors", "is missing"),
        (None, "not a name"),
        (3, "not a name"),
        ([FIRST], "not a name"),
    ],
)
def test_a_weight_map_names_files_of_the_directory(tmp_path: Path, name: object, reason: str):
    directory(tmp_path, {"out.safetensors": content({"c": C})})
    path = double(tmp_path / "model", index={"weight_map": {"a": FIRST, "b": FIRST, "c": name}})
    (path / "sub").mkdir()
    (path / "folder.safetensors").mkdir()
    message = refused(path)
    assert reason in message
    assert str(path) in message


@pytest.mark.parametrize("name", ["\ud800.safetensors", "x" * 5000 + ".safetensors"])
def test_a_weight_map_with_a_name_that_no_system_has(tmp_path: Path, name: str):
    assert str(tmp_path) in refused(double(tmp_path, index={"weight_map": {"a": name}}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"second": None}, f"{SECOND} is missing"),
        ({"index": None}, "no index that says which belong together"),
        ({"other.safetensors.index.json": "{}"}, "2 indexes"),
        ({"second": content({"a": A, "c": C})}, f"'a' is in {FIRST} and in {SECOND}"),
        ({"second": content({"c": C, "d": A})}, f"puts 'd' into None, but it is in {SECOND}"),
        ({"second": content({})}, f"puts 'c' into {SECOND}, but it is in None"),
        ({"index": {"weight_map": {"a": SECOND, "b": FIRST, "c": SECOND}}}, f"puts 'a' into {SECOND}"),
        ({"index": {"weight_map": {"b": FIRST, "c": SECOND}}}, "puts 'a' into None"),
        ({"index": {}}, "no weight_map"),
        ({"index": {"weight_map": {}}}, "no weight_map"),
        ({"index": {"weight_map": ["a"]}}, "no weight_map"),
        ({"index": {"weight_map": {"a": FIRST}, "metadata": []}}, "no weight_map"),
        ({"index": "[]"}, f"{INDEX} is no JSON object"),
        ({"index": "{"}, f"{INDEX} is no JSON"),
        ({"index": b"\xff"}, f"{INDEX} is no JSON"),
        ({"index": DEEP}, f"{INDEX} is no JSON"),
        ({"index": '{"weight_map":{"a":"x","a":"y"}}'}, "a key occurs twice"),
        ({"config": None}, "no config.json"),
        ({"config": "[]"}, "config.json is no JSON object"),
        ({"config": "null"}, "config.json is no JSON object"),
        ({"config": "{"}, "config.json is no JSON"),
        ({"config": ""}, "config.json is no JSON"),
        ({"config": b'{"\xff": 1}'}, "config.json is no JSON"),
        ({"config": DEEP}, "config.json is no JSON"),
        ({"config": '{"a": ' + "9" * 5000 + "}"}, "config.json is no JSON"),
        ({"config": '{"a":1,"a":2}'}, "a key occurs twice"),
    ],
)
def test_a_damaged_directory_is_explained(tmp_path: Path, changes: dict[str, Any], reason: str):
    message = refused(double(tmp_path, **changes))
    assert reason in message
    assert str(tmp_path) in message


def entry(start: int, stop: int, **changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]} | changes


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": entry(0, 3), "b": entry(2, 4)}, "'b' overlaps"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, "'b' overlaps"),
        ({"a": entry(0, 2), "b": entry(3, 4)}, "'b' follows a gap"),
        ({"a": entry(0, 5)}, "its header announces"),
        ({"a": entry(0, 3)}, "its header announces"),
        ({"a": entry(-4, 0, shape=[4])}, "'a' makes no sense"),
        ({"a": entry(4, 0, shape=[-4])}, "'a' makes no sense"),
        ({"a": entry(0, 4, shape=[2])}, "is given 4 bytes"),
        ({"a": entry(0, 4, dtype="F4")}, "dtype 'F4'"),
        (DEEP.encode(), "its header is no JSON"),
        (b'{"a":{},"a":{}}', "occurs twice"),
        (b'{"\xff":1}', "its header is no JSON"),
        (b"[]", "its header is no mapping"),
    ],
)
def test_a_damaged_shard_is_explained(tmp_path: Path, header: object, reason: str):
    message = refused(single(tmp_path, header, b"0000"))
    assert reason in message
    assert str(tmp_path / "model.safetensors") in message


@pytest.mark.parametrize("shape", [[0, 1 << 62], [0, 1 << 63], [0, (1 << 64) - 1], [1] * 65])
def test_a_shape_that_numpy_cannot_hold_is_refused(tmp_path: Path, shape: list[int]):
    size = 0 if 0 in shape else 4
    header = {"a": entry(0, size, dtype="F32", shape=shape)}
    safetensors.deserialize(crafted(header, b"0" * size))  # the format allows it
    assert str(tmp_path / "model.safetensors") in refused(single(tmp_path, header, b"0" * size))


@pytest.mark.parametrize("length", [5, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int):
    path = single(tmp_path)
    (path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}  ")
    assert "cannot hold the header" in refused(path)


def test_no_directory_is_refused(tmp_path: Path):
    assert "is no directory" in refused(tmp_path / "none")
    assert "is no directory" in refused(single(tmp_path) / "config.json")
    assert "holds no safetensors file" in refused(directory(tmp_path / "bare", {"config.json": {}}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.npz", "sub/a.ckpt"])
def test_formats_that_may_hold_code_are_refused_with_the_reason(tmp_path: Path, name: str):
    message = refused(directory(tmp_path, {"config.json": {}, name: b"\x80\x04."}))
    assert name in message
    assert "run code when they are loaded" in message
    assert "convert the checkpoint to safetensors first" in message


def test_a_pipeline_is_told_apart_into_its_models(tmp_path: Path):
    for part in ("unet", "vae"):
        single(tmp_path / part)
    message = refused(directory(tmp_path, {"model_index.json": {}}))
    assert "holds models in unet, vae" in message


@pytest.mark.parametrize("suffix", [*MAY_HOLD_CODE, *FOREIGN])
def test_files_that_may_hold_code_or_the_original_weights_are_left_out(tmp_path: Path, suffix: str):
    path = single(tmp_path)
    (path / f"weights{suffix}").write_bytes(b"\x80\x04.")
    shards = hub.open_shards(path)
    assert (shards.others, shards.left_out) == ((), (f"weights{suffix}",))


@pytest.mark.parametrize("name", [".git/lfs/objects/ab/cd/abcd", ".cache/huggingface/x.incomplete"])
def test_caches_that_hold_the_original_weights_are_left_out(tmp_path: Path, name: str):
    single(directory(tmp_path, {name: content({"a": A})}))
    assert hub.open_shards(tmp_path).others == ()


def test_links_within_the_directory_are_followed(tmp_path: Path):
    path = single(tmp_path / "real")
    (path / "model.safetensors").rename(path / "blob")
    (path / "model.safetensors").symlink_to("blob")
    (tmp_path / "alias").symlink_to("real")
    np.testing.assert_array_equal(hub.open_shards(tmp_path / "alias").read("a"), A)


@pytest.mark.parametrize("linked", ["model.safetensors", "config.json", "notes.txt"])
def test_a_cache_of_links_to_blobs_is_refused_with_the_remedy(tmp_path: Path, linked: str):
    path = single(tmp_path / "snapshots" / "main", **{"notes.txt": "n"})
    (tmp_path / "blobs").mkdir()
    (path / linked).rename(tmp_path / "blobs" / "0123")
    (path / linked).symlink_to("../../blobs/0123")
    message = refused(path)
    assert str(path / linked) in message
    assert "cp -rL" in message
    shutil.copytree(path, tmp_path / "copy")
    np.testing.assert_array_equal(hub.open_shards(tmp_path / "copy").read("a"), A)


def test_a_shard_behind_a_directory_link_that_leads_out_is_refused(tmp_path: Path):
    directory(tmp_path, {"outside/c.safetensors": content({"c": C})})
    weight_map = {"a": FIRST, "b": FIRST, "c": "link/c.safetensors"}
    path = double(tmp_path / "model", index={"weight_map": weight_map}, second=None)
    (path / "link").symlink_to("../outside")
    message = refused(path)
    assert "link that leads out" in message
    assert str(path / "link/c.safetensors") in message


def test_a_link_that_turns_in_a_circle_is_refused(tmp_path: Path):
    (single(tmp_path) / "circle").symlink_to("circle")
    assert str(tmp_path / "circle") in refused(tmp_path)


def test_a_link_to_nothing_is_refused(tmp_path: Path):
    (single(tmp_path) / "gone").symlink_to("nothing")
    assert str(tmp_path / "gone") in refused(tmp_path)


def test_a_pipe_is_refused_for_reading_it_would_wait_forever(tmp_path: Path):
    os.mkfifo(single(tmp_path) / "pipe")
    assert str(tmp_path / "pipe") in refused(tmp_path)


@pytest.mark.parametrize("file", ["config.json", INDEX, FIRST])
def test_a_file_that_the_system_will_not_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
):
    path, real = double(tmp_path), io.open

    def failing(name: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(name).name == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))
        return real(name, *args, **kwargs)

    monkeypatch.setattr(io, "open", failing)  # what pathlib calls; a mode of 0 would not stop root
    message = refused(path)
    assert f"{path / file} cannot be read: Permission denied" in message


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 32, 33, 100])
def test_parts_join_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int):
    monkeypatch.setattr(copying, "PART", 16)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(size)))
    parts = [bytes(part) for part in parts_of(path)]
    assert [len(part) for part in parts] == [16] * (size // 16) + [size % 16] * (size % 16 > 0)
    assert b"".join(parts) == path.read_bytes()
    middle = b"".join(bytes(part) for part in parts_of(path, size // 3, size // 2))
    assert middle == path.read_bytes()[size // 3 : size // 2]


def test_a_part_stays_as_it_is_while_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(copying, "PART", 4)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(16)))
    kept, found = None, []
    for part in parts_of(path):
        if kept is not None:
            found.append(bytes(kept))
        kept = part
    assert b"".join(found) == bytes(range(12))


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(copying, "PART", 4)
    path = tmp_path / "file"
    path.write_bytes(bytes(16))
    parts = parts_of(path)
    next(parts)
    os.truncate(path, 8)
    with pytest.raises(FileError, match="shorter than when it was opened") as caught:
        list(parts)
    assert str(path) in str(caught.value)


# Published test vectors of FIPS 180-2.
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(("parts", "digest"), [([], EMPTY), ([b"abc"], ABC), ([b"a", b"", b"bc"], ABC)])
def test_a_written_file_knows_its_sha256(tmp_path: Path, parts: list[bytes], digest: str):
    path, told = tmp_path / "file", []
    with HashedFile(path, told.append) as file:
        for part in parts:
            file.write(memoryview(part))
    assert (file.digest(), file.size) == (digest, sum(map(len, parts)))
    assert path.read_bytes() == b"".join(parts)
    assert told == [len(part) for part in parts]
    assert sha256_of(path) == digest


def test_a_file_is_never_written_over(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        HashedFile(tmp_path / "file", lambda count: None)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_write_that_takes_less_than_it_is_given_goes_on(tmp_path: Path):
    class Slow:
        def __init__(self, raw: Any) -> None:
            self.raw = raw

        def write(self, view: memoryview) -> int:
            return self.raw.write(view[:3])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.raw, name)

    with HashedFile(tmp_path / "file", lambda count: None) as file:
        file._file = Slow(file._file)
        file.write(bytes(range(10)))
    assert (tmp_path / "file").read_bytes() == bytes(range(10))


def test_a_hash_that_lags_behind_hashes_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Late:
        def __init__(self, hash_: Any) -> None:
            self.hash = hash_

        def update(self, part: memoryview) -> None:
            time.sleep(0.005)
            self.hash.update(part)

        def hexdigest(self) -> str:
            return self.hash.hexdigest()

    monkeypatch.setattr(copying, "PART", 4)
    source = tmp_path / "source"
    source.write_bytes(bytes(range(32)))
    with HashedFile(tmp_path / "file", lambda count: None) as file:
        file._hash = Late(file._hash)
        for part in parts_of(source):
            file.write(part)
    assert file.digest() == sha256_of(source)
