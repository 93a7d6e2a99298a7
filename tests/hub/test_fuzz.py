"""Whatever a checkpoint holds, it is rewritten or refused by an error of ours; nothing else is touched."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import specdef_jax as sd
from specdef_jax import hub
from specdef_jax.errors import SpecDefError
from specdef_jax.hub.deforming import config_text
from specdef_jax.hub.fusing import stock_config
from specdef_jax.hub.insertion import own_config
from specdef_jax.hub.manifest import MANIFEST, load_manifest
from specdef_jax.hub.rewrite import partial_path, rewrite
from specdef_jax.hub.safetensors_header import DTYPES
from specdef_jax.hub.shards import CONFIG

SHARD, OTHER, INDEX = "model-1.safetensors", "sub/model-2.safetensors", "model.safetensors.index.json"
many = settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
NAMES = [
    "",
    "a",
    "w",
    "w.comp",
    "__metadata__",
    "specdef",
    "config.json",
    INDEX,
    "sub",
    "\ud800",
    "\udcff",
    "é" * 300,
]
FILES = [
    SHARD,
    OTHER,
    f"../{SHARD}",
    f"./{SHARD}",
    f"sub/../{SHARD}",
    f"/{SHARD}",
    "x" * 5000 + ".safetensors",
]
PATHS = ["..", "../x", "/etc/passwd", "a\\b", "a\0b"]
DTYPE_TEXTS = ["F32", "BF16", "float32", "bfloat16", "complex128", "(2,", "O", "V9", "f4,f4"]
odd_texts = st.sampled_from(NAMES + FILES + PATHS + DTYPE_TEXTS)
odd_numbers = st.sampled_from(
    [0, 1, 2, 3, 4, 8, -1, 2**31, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, 0.5, float("nan"), float("inf")]
)
leaves = odd_texts | odd_numbers | st.sampled_from([None, True, False]) | st.text(max_size=3)
values = leaves | st.recursive(
    leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(odd_texts, v, max_size=3), max_leaves=8
)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deformed checkpoint of two shards with all that may be damaged."""
    path = tmp_path_factory.mktemp("valid")
    rng = np.random.default_rng(0)
    first = {"w": rng.normal(size=(6, 4)).astype(np.float32), "up.weight": rng.normal(size=(4, 4))}
    plain = path / "plain"
    (plain / "sub").mkdir(parents=True)
    hub.write_tree(plain / SHARD, first | {"flag": np.array(True)})
    hub.write_tree(plain / OTHER, {"ids": np.arange(3), "empty": np.zeros((0, 2), np.float32)})
    weight_map = dict.fromkeys(["w", "up.weight", "flag"], SHARD) | dict.fromkeys(["ids", "empty"], OTHER)
    (plain / INDEX).write_text(json.dumps({"metadata": {"total_size": 251}, "weight_map": weight_map}))
    (plain / CONFIG).write_text(json.dumps({"model_type": "x", "architectures": ["X"], "deep": {"a": [1]}}))
    (plain / "notes.txt").write_text("notes")
    spec = sd.SpecDef(alpha=4.0, k=1, directions="random", budget=np.inf)
    with jax.enable_x64(True):
        hub.deform(plain, path / "deformed", spec, ["w", "up.weight"])
    return path / "deformed"


@pytest.fixture(autouse=True, scope="module")
def unsynced() -> Iterator[None]:
    """Do without the disk, which hundreds of examples would wait for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("room")


def files(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def damaged(room: Path, valid: Path, name: str, body: bytes) -> Path:
    """Return a copy of the valid checkpoint, one file replaced; what the last example left is removed."""
    source = room / "source"
    if not source.exists():
        shutil.copytree(valid, source)
    for left in set(room.iterdir()) - {source}:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    found = files(source)
    for file, wanted in (files(valid) | {name: body}).items():
        if found[file] != wanted:
            (source / file).write_bytes(wanted)
    return source


def message(call: Callable[[], Any]) -> str:
    """Return the message of an error of ours, "" if there is none."""
    try:
        call()
    except SpecDefError as error:
        return str(error)
    return ""


def rewritten(source: Path) -> bool:
    """Read and rewrite all of a directory as `deform` does; tell whether it was possible."""
    out, before = source.parent / "out", files(source)

    def run() -> None:
        shards = hub.open_shards(source)
        for name in shards:
            assert shards.read(name).shape == shards.info(name).shape
        config = shards.config | own_config(shards.config)
        stock_config(config)
        texts = {CONFIG: config_text(shards, config)}
        rewrite(shards, out, [], texts=texts, finish=lambda partial, files: {}, key="k")

    refused = message(run)
    assert files(source) == before
    beside = {p.name for p in source.parent.iterdir()}
    if refused:
        assert beside <= {"source", partial_path(out).name}
        assert str(source) in refused
        return False
    assert beside == {"source", "out"}
    found = hub.open_shards(out)
    assert set(found) == set(hub.open_shards(source))
    for shard in found.shards:
        safetensors.deserialize((out / shard.name).read_bytes())
    return True


def dumped(value: Any) -> bytes:
    """Return JSON; half a surrogate pair becomes an escape."""
    return json.dumps(value).encode()


def bytes_of(name: str) -> Callable[[st.DrawFn, bytes], bytes]:
    """Return how a file is damaged byte by byte: mostly where its structure is."""

    def damage(draw: st.DrawFn, body: bytes) -> bytes:
        changed = bytearray(body)
        first = 8 + int.from_bytes(body[:8], "little") if name.endswith(".safetensors") else len(body)
        places = st.one_of(st.integers(0, first - 1), st.integers(0, len(body) - 1))
        for place, value in draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)):
            changed[place] = value
        cut = draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))
        return bytes(changed[:cut]) + draw(st.sampled_from([b"", b"\0", b"}", b"{}"]))

    return damage


@many
@given(data=st.data())
@pytest.mark.parametrize("name", [SHARD, INDEX, CONFIG])
def test_damaged_bytes(room: Path, valid: Path, name: str, data: st.DataObject):
    body = data.draw(st.composite(bytes_of(name))((valid / name).read_bytes()))
    rewritten(damaged(room, valid, name, body))


@st.composite
def edited(draw: st.DrawFn, value: Any) -> Any:
    """Return JSON with something in it replaced, renamed, added or removed."""
    inner = isinstance(value, dict | list) and value and draw(st.integers(0, 2))
    if not inner:
        return draw(values)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    changed = value.copy()
    action = draw(st.sampled_from(["edit", "edit", "edit", "remove", "rename", "add"]))
    if action == "edit":
        changed[key] = draw(edited(value[key]))
    elif action == "remove":
        del changed[key]
    elif action == "rename" and isinstance(changed, dict):
        changed[draw(odd_texts)] = changed.pop(key)
    elif isinstance(changed, dict):
        changed[draw(odd_texts)] = draw(values)
    else:
        changed.append(draw(values))
    return changed


@st.composite
def edited_at(draw: st.DrawFn, value: Any, place: list[str]) -> Any:
    """Return JSON edited at one place, so that the rest of it is reached."""
    if not place:
        return draw(edited(value))
    return value | {place[0]: draw(edited_at(value[place[0]], place[1:]))}


@many
@given(data=st.data())
@pytest.mark.parametrize("name", [INDEX, CONFIG])
def test_edited_json(room: Path, valid: Path, name: str, data: st.DataObject):
    value = json.loads((valid / name).read_text())
    place = data.draw(st.sampled_from([[], *([key] for key in value)]))
    rewritten(damaged(room, valid, name, dumped(data.draw(edited_at(value, place)))))


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Return a header whose offsets fit, and the bytes of data that it announces."""
    entries: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(odd_texts | st.text(max_size=2), unique=True, max_size=4)):
        code = draw(st.sampled_from(list(DTYPES)))
        shape = draw(
            st.one_of(
                st.lists(st.integers(0, 3), max_size=4),
                st.builds(
                    lambda n, i: [*n[:i], 0, *n[i:]], st.lists(odd_numbers, max_size=2), st.integers(0, 2)
                ),
                st.integers(60, 70).map(lambda n: [1] * n),
            )
        )
        count = int(np.prod([n for n in shape if isinstance(n, int)], dtype=object)) if 0 not in shape else 0
        start, end = end, end + count * DTYPES[code].itemsize
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    return entries, end


@many
@given(data=st.data())
def test_headers_of_all_sorts(room: Path, valid: Path, data: st.DataObject):
    entries, size = data.draw(headers())
    weight_map = dict.fromkeys(entries, SHARD) | {"ids": OTHER, "empty": OTHER}
    if data.draw(st.booleans()):
        place = data.draw(st.sampled_from([[], *([name] for name in entries)]))
        entries = data.draw(edited_at(entries, place))
    text = dumped(entries)
    body = len(text).to_bytes(8, "little") + text + b"\1" * min(max(size, 0), 1 << 20)
    path = damaged(room, valid, SHARD, body)
    (path / INDEX).write_bytes(dumped({"weight_map": weight_map}))
    rewritten(path)


@many
@given(data=st.data())
def test_edited_records(room: Path, valid: Path, data: st.DataObject):
    """The record by which `inserted` pairs tensors, in a file that is whole otherwise."""
    content = (valid / SHARD).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    record = json.loads(header["__metadata__"]["specdef"])
    places = [[], ["tensors"], ["tensors", "w"], ["tensors", "w", "axes"]]
    record = data.draw(edited_at(record, data.draw(st.sampled_from(places))))
    text = json.dumps(header | {"__metadata__": {"specdef": json.dumps(record)}}).encode()
    path = damaged(room, valid, SHARD, len(text).to_bytes(8, "little") + text + content[8 + length :])
    refused = message(lambda: hub.inserted(hub.open_shards(path)))
    assert not refused or str(path) in refused


def loaded(path: Path) -> None:
    refused = message(lambda: load_manifest(path))
    if refused:
        assert str(path / MANIFEST) in refused
    else:
        found = load_manifest(path)
        named = [d for layer in found.layers.values() for d in (layer.dtype, layer.source_dtype)]
        assert {np.dtype(name) for name in [*named, *found.dequantized.values()]} <= set(DTYPES.values())


@many
@given(data=st.data())
def test_edited_manifests(room: Path, valid: Path, data: st.DataObject):
    manifest = json.loads((valid / MANIFEST).read_text())
    layer = ["layers", "w"]
    places = [[], ["files"], layer, [*layer, "entry"], [*layer, "entry", "axes"], [*layer, "measured"]]
    manifest = data.draw(edited_at(manifest, data.draw(st.sampled_from(places))))
    (room / MANIFEST).write_bytes(dumped(manifest))
    loaded(room)


@pytest.mark.parametrize("field", ["dtype", "source_dtype"])
@pytest.mark.parametrize("name", ["O", "complex128", "V9", "f4,f4", "M8[s]", "(2,", "", 3])
def test_a_manifest_names_dtypes_of_the_format(room: Path, valid: Path, field: str, name: object):
    manifest = json.loads((valid / MANIFEST).read_text())
    manifest["layers"]["w"][field] = name
    (room / MANIFEST).write_bytes(dumped(manifest))
    assert str(room / MANIFEST) in message(lambda: load_manifest(room))


@many
@given(data=st.data())
def test_damaged_manifests(room: Path, valid: Path, data: st.DataObject):
    body = data.draw(st.composite(bytes_of(MANIFEST))((valid / MANIFEST).read_bytes()))
    (room / MANIFEST).write_bytes(body)
    loaded(room)


def test_what_is_damaged_above_is_whole_without_damage(room: Path, valid: Path):
    assert rewritten(damaged(room, valid, "notes.txt", b"notes"))
    assert set(hub.inserted(hub.open_shards(valid))) == {"w", "up.weight"}
    assert set(load_manifest(valid).layers) == {"w", "up.weight"}
