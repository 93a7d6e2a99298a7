"""A checkpoint written again: what is not replaced stays to the byte, and `out` is whole or not there."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors

from specdef_jax import files
from specdef_jax.errors import BudgetError, FileError, SpecDefError
from specdef_jax.hub import copying
from specdef_jax.hub import rewrite as module
from specdef_jax.hub.copying import HashedFile
from specdef_jax.hub.rewrite import Group, check_output, partial_path, rewrite
from specdef_jax.hub.safetensors_header import DTYPES
from specdef_jax.hub.shards import open_shards

Arrays = dict[str, np.ndarray]
Stored = dict[str, tuple[str, list[int], bytes]]

CODES = {dtype: code for code, dtype in DTYPES.items()}
ONE, TWO, THREE = "model-1.safetensors", "model-2.safetensors", "sub/model-3.safetensors"
INDEX, CONFIG = "model.safetensors.index.json", '{"model_type": "x", "nested": {"β": [1, {}]}}'
TEXTS = {"config.json": CONFIG, "tokenizer.json": "{}", "docs/notes.md": "notes", "sub/readme": "é"}
PICKLES = ("pytorch_model.bin", "a.pt", "b.pth", "c.npz", "d.ckpt", "sub/e.pkl", "model.safetensors.pt")


def shard(path: Path, tensors: Arrays, metadata: dict[str, str] | None = None) -> None:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        entries[name] = {"dtype": CODES[array.dtype], "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in tensors.values()))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three shards, one in a subdirectory, with tensors of all sorts, texts and pickles."""
    rng = np.random.default_rng(0)
    path = tmp_path / "source"
    shards = {
        ONE: {"z": rng.normal(size=(8, 4)).astype(np.float32), "a": np.array(True), "e": np.zeros((0, 3))},
        TWO: {"w": rng.normal(size=(4, 4)).astype(ml_dtypes.bfloat16), "ids": np.arange(5)},
        THREE: {"v": rng.normal(size=(3, 5)).astype(ml_dtypes.float8_e4m3fn), "s": np.array(2.5, np.float16)},
    }
    for name, tensors in shards.items():
        shard(path / name, tensors, {"format": "pt", "shard": name})
    total = sum(array.nbytes for tensors in shards.values() for array in tensors.values())
    parameters = sum(array.size for tensors in shards.values() for array in tensors.values())
    metadata = {"total_size": total, "total_parameters": parameters, "by": "β"}
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    write(path, {INDEX: json.dumps({"metadata": metadata, "weight_map": weight_map}), **TEXTS})
    write(path, dict.fromkeys(PICKLES, b"\x80\x04."))
    return path


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """One file without an index."""
    path = tmp_path / "source"
    shard(path / "model.safetensors", {"a": np.arange(6.0), "b": np.arange(3)})
    write(path, {"config.json": CONFIG})
    return path


def write(path: Path, bodies: Mapping[str, str | bytes]) -> None:
    for name, body in bodies.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(body if isinstance(body, bytes) else body.encode())


def again(source: Path, out: Path, groups: list[Group] | None = None, **options: Any) -> None:
    """Rewrite a directory with the config it has, unless told otherwise."""
    defaults = {"texts": {"config.json": CONFIG}, "finish": lambda partial, files: {}, "key": "k"}
    rewrite(open_shards(source), out, groups or [], **(defaults | options))


def group(tensors: Arrays, after: dict[str, str] | None = None, make: Callable | None = None) -> Group:
    stored = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    return Group(stored, after or {}, make or (lambda: tensors))


def held(path: Path) -> Stored:
    """Return what a file holds, in the order of its data, as the library reads it."""
    content = path.read_bytes()
    entries = dict(safetensors.deserialize(content))
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__", None)
    order = sorted(header, key=lambda name: header[name]["data_offsets"])
    assert set(order) == set(entries)
    return {n: (entries[n]["dtype"], entries[n]["shape"], bytes(entries[n]["data"])) for n in order}


def stored(array: np.ndarray) -> tuple[str, list[int], bytes]:
    return CODES[array.dtype], list(array.shape), array.tobytes()


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def everything(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def beside(path: Path) -> set[str]:
    return {p.name for p in path.parent.iterdir()}


def replaced() -> list[Group]:
    """A wider "z" with a tensor behind it, "w" likewise."""
    z, comp = np.arange(32.0).reshape(8, 4), np.eye(4)
    w = np.ones((4, 4), np.float32)
    return [group({"z": z, "z.comp": comp}, {"z.comp": "z"}), group({"w.comp": w}, {"w.comp": "w"})]


def test_nothing_replaced_is_the_same_checkpoint(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    again(source, out)
    expected, found = everything(source), everything(out)
    assert set(found) == set(expected) - set(PICKLES)
    for name in found:
        if name.endswith(".safetensors"):
            assert list(held(out / name).items()) == list(held(source / name).items())
            assert metadata(out / name) == metadata(source / name) != {}
        elif name == INDEX:
            assert json.loads(found[name]) == json.loads(expected[name])
        else:
            assert found[name] == expected[name]
    assert beside(out) == {"source", "out"}


def test_replaced_and_added_tensors_stand_where_they_belong(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    before = everything(source)
    again(source, out, replaced())
    z, comp, w = np.arange(32.0).reshape(8, 4), np.eye(4), np.ones((4, 4), np.float32)
    old = {name: held(source / name) for name in (ONE, TWO, THREE)}
    assert list(held(out / ONE)) == ["z", "z.comp", "a", "e"]
    assert held(out / ONE) == old[ONE] | {"z": stored(z), "z.comp": stored(comp)}
    assert list(held(out / TWO)) == ["w", "w.comp", "ids"]
    assert held(out / TWO) == old[TWO] | {"w.comp": stored(w)}
    assert held(out / THREE) == old[THREE]
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == {n: file for file in (ONE, TWO, THREE) for n in held(out / file)}
    sizes = [len(data) for file in (ONE, TWO, THREE) for _, _, data in held(out / file).values()]
    assert index["metadata"] == {
        "total_size": sum(sizes),
        "total_parameters": 32 + 16 + 1 + 16 + 16 + 5 + 15 + 1,
        "by": "β",
    }
    assert everything(source) == before


def test_dropped_tensors_are_gone_and_their_followers_stay(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    plain = np.arange(4.0)
    again(source, out, [group({"plain": plain}, {"plain": "ids"})], dropped=frozenset({"ids", "s"}))
    assert held(out / TWO) == {"w": held(source / TWO)["w"], "plain": stored(plain)}
    assert list(held(out / THREE)) == ["v"]
    assert set(json.loads((out / INDEX).read_text())["weight_map"]) == {"z", "a", "e", "w", "plain", "v"}


def test_a_single_file_stays_a_single_file(single: Path, tmp_path: Path):
    out = tmp_path / "out"
    again(single, out, [group({"b": np.zeros(2, np.float16)})])
    assert set(everything(out)) == {"config.json", "model.safetensors"}
    expected = held(single / "model.safetensors") | {"b": stored(np.zeros(2, np.float16))}
    assert held(out / "model.safetensors") == expected
    assert metadata(out / "model.safetensors") == {}


def test_the_result_opens_again_with_the_same_config(source: Path, tmp_path: Path):
    again(source, tmp_path / "out", replaced())
    found = open_shards(tmp_path / "out")
    assert found.config == json.loads(CONFIG)
    assert found.left_out == ()
    again(tmp_path / "out", tmp_path / "twice")
    assert everything(tmp_path / "twice") == everything(tmp_path / "out")


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_is_kept_and_written(tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(copying, "PART", 16)
    monkeypatch.setattr(module, "PART", 16)
    rng, dtype = np.random.default_rng(0), DTYPES[code]

    def random(*shape: int) -> np.ndarray:
        size = int(np.prod(shape)) * dtype.itemsize
        return rng.integers(0, 2 if code == "BOOL" else 256, size).astype(np.uint8).view(dtype).reshape(shape)

    kept = {"matrix": random(7, 5), "scalar": random(), "empty": random(0, 4), "last": random(3)}
    new = {f"{name}.new": random(*array.shape) for name, array in kept.items()}
    shard(tmp_path / "source" / "model.safetensors", kept)
    write(tmp_path / "source", {"config.json": CONFIG})
    try:
        safetensors.deserialize((tmp_path / "source" / "model.safetensors").read_bytes())
    except safetensors.SafetensorError:
        pytest.skip(f"this version of the library does not know {code}")
    again(tmp_path / "source", tmp_path / "out", [group(new, {f"{name}.new": name for name in kept})])
    found = held(tmp_path / "out" / "model.safetensors")
    assert found == {name: stored(array) for name, array in (kept | new).items()}
    assert list(found) == [n for name in kept for n in (name, f"{name}.new")]


def test_arrays_are_written_in_c_order(single: Path, tmp_path: Path):
    array = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    again(single, tmp_path / "out", [group({"a": array})])
    assert held(tmp_path / "out" / "model.safetensors")["a"] == stored(np.arange(12.0).reshape(3, 4))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, {"total_size": 72}),
        ({}, {"total_size": 72}),
        ({"total_size": 1}, {"total_size": 72}),
        ({"by": "x"}, {"by": "x"}),
        ({"total_size": 1, "total_parameters": 1}, {"total_size": 72, "total_parameters": 9}),
    ],
)
def test_sizes_in_the_index_are_brought_up_to_date(single: Path, tmp_path: Path, before: Any, after: Any):
    body: dict[str, Any] = {"weight_map": dict.fromkeys("ab", "model.safetensors")}
    write(single, {INDEX: json.dumps(body | ({} if before is None else {"metadata": before}))})
    again(single, tmp_path / "out")
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == body | {"metadata": after}


def test_headers_and_texts_are_taken_instead_of_those_of_the_source(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    texts = {"config.json": "{}", "tokenizer.json": "β"}
    again(source, out, texts=texts, headers={TWO: {"specdef": "é\n"}})
    assert [metadata(out / name) for name in (ONE, TWO)] == [
        {"format": "pt", "shard": ONE},
        {"specdef": "é\n"},
    ]
    assert {name: (out / name).read_text(encoding="utf-8") for name in texts} == texts


def test_hashes_are_those_of_every_file(source: Path, tmp_path: Path):
    told: dict[str, Any] = {}

    def finish(partial: Path, files: dict[str, Any]) -> dict[str, str]:
        assert set(everything(partial)) - {module.JOURNAL} == set(files)
        told.update(files)
        return {"specdef.json": "last"}

    again(source, tmp_path / "out", replaced(), finish=finish)
    found = everything(tmp_path / "out")
    assert found.pop("specdef.json") == b"last"
    assert {n: (w.sha256, w.size) for n, w in told.items()} == {
        name: (hashlib.sha256(body).hexdigest(), len(body)) for name, body in found.items()
    }


def test_progress_ends_at_the_bytes_written(source: Path, tmp_path: Path):
    calls: list[tuple[int, int]] = []
    again(source, tmp_path / "out", replaced(), progress=lambda *call: calls.append(call))
    written = {n: len(b) for n, b in everything(tmp_path / "out").items() if n not in ("config.json", INDEX)}
    assert calls[-1] == (sum(written.values()),) * 2
    assert calls == sorted(calls)


def test_groups_are_computed_side_by_side_a_few_at_a_time(tmp_path: Path):
    size, count, workers = 800, 9, 3
    names = [f"t{i}" for i in range(count)]
    shard(tmp_path / "source" / "model.safetensors", {name: np.zeros(size // 8) for name in names})
    write(tmp_path / "source", {"config.json": CONFIG})
    written, ahead = [0], []

    def computed(i: int) -> Group:
        def make() -> Arrays:
            ahead.append(i - written[0] // size)
            return {names[i]: np.full(size // 8, float(i))}

        return group({names[i]: np.zeros(size // 8)}, make=make)

    def progress(done: int, total: int) -> None:
        written[0] = max(done - (total - count * size), 0)  # without the header

    out, groups = tmp_path / "out", [computed(i) for i in range(count)]
    again(tmp_path / "source", out, groups, workers=workers, progress=progress)
    assert max(ahead) < workers
    data = [np.frombuffer(data)[0] for _, _, data in held(out / "model.safetensors").values()]
    assert data == list(range(count))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_group_that_spans_shards_is_written_into_each(source: Path, tmp_path: Path, workers: int):
    new = {"z": np.zeros((8, 4)), "ids": np.ones(3), "s": np.array(7.0)}
    again(source, tmp_path / "out", [group(new)], workers=workers)
    found = {**held(tmp_path / "out" / ONE), **held(tmp_path / "out" / TWO), **held(tmp_path / "out" / THREE)}
    assert {name: found[name] for name in new} == {name: stored(array) for name, array in new.items()}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files are told by Linux only")
def test_every_file_is_on_the_disk_before_the_output_appears(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noting_rename(old: Path, new: Path) -> None:
        events.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    out = tmp_path / "out"
    again(source, out, finish=lambda partial, files: {"specdef.json": "last"})
    last = {name: i for i, name in enumerate(events)}
    partial = partial_path(out)
    for entry in (out, *out.rglob("*")):
        name = partial / entry.relative_to(out)
        assert last[str(name)] < last["rename"]
        assert entry.is_dir() or last[str(name)] < last[str(name.parent)]
    assert last[str(tmp_path)] > last["rename"]


def refused(source: Path, out: Path, groups: list[Group] | None = None, **options: Any) -> str:
    """Return the message of a refusal that leaves everything as it was."""
    before = {p: p.lstat().st_mtime_ns for p in source.parent.rglob("*")}
    with pytest.raises(FileError) as caught:
        again(source, out, groups, **options)
    assert isinstance(caught.value, SpecDefError)
    assert {p: p.lstat().st_mtime_ns for p in source.parent.rglob("*")} == before
    return str(caught.value)


@pytest.mark.parametrize("out", ["source", "source/out", "source/sub/../out", "other/../source", "alias/out"])
def test_an_output_in_the_input_is_refused(source: Path, tmp_path: Path, out: str):
    (tmp_path / "other").mkdir()
    (tmp_path / "alias").symlink_to("source")
    message = refused(source, tmp_path / out)
    assert "inputs are never modified" in message
    assert str(tmp_path / out) in message


def test_an_output_that_exists_is_refused(source: Path, tmp_path: Path):
    write(tmp_path, {"file": "mine", "full/mine": "mine"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("file", "full", "empty", "dangling"):
        message = refused(source, tmp_path / name)
        assert f"{tmp_path / name} exists already" in message
        with pytest.raises(FileError, match="exists already"):
            check_output(source, tmp_path / name)


def test_an_output_that_is_a_link_in_a_circle_is_refused(source: Path, tmp_path: Path):
    (tmp_path / "circle").symlink_to("circle")
    assert str(tmp_path / "circle") in refused(source, tmp_path / "circle")


def test_an_output_that_appears_meanwhile_is_not_replaced(single: Path, tmp_path: Path):
    out = tmp_path / "out"

    def finish(partial: Path, files: dict[str, Any]) -> dict[str, str]:
        write(out, {"mine": "mine"})
        return {}

    with pytest.raises(FileError, match="exists already"):
        again(single, out, finish=finish)
    assert everything(out) == {"mine": b"mine"}
    assert beside(out) == {"source", "out"}


def test_missing_parents_are_made(single: Path, tmp_path: Path):
    again(single, tmp_path / "new" / "er" / "out")
    assert beside(tmp_path / "new" / "er" / "out") == {"out"}


def test_a_parent_that_is_a_file_is_refused(single: Path, tmp_path: Path):
    write(tmp_path, {"file": "mine"})
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        assert f"{out} cannot be written" in refused(single, out)


@pytest.mark.parametrize("name", ["o" * 255, "é" * 127, "v1.5", "a b\n"])
def test_any_name_that_the_system_takes_will_do(single: Path, tmp_path: Path, name: str):
    again(single, tmp_path / name)
    assert beside(tmp_path / name) == {"source", name}


def test_a_name_that_is_too_long_is_refused(single: Path, tmp_path: Path):
    with pytest.raises(FileError, match="choose a shorter name"):
        again(single, tmp_path / ("o" * 256))


def test_too_little_space_is_told_before_anything_is_written(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def usage(path: Path) -> Any:
        return SimpleNamespace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(FileError, match=r"needs 0\.00 GB.*0\.00 GB free; free some space") as caught:
        again(single, tmp_path / "out", [group({"a": np.zeros(6)}, make=lambda: pytest.fail("computed"))])
    assert str(tmp_path / "out") in str(caught.value)
    assert beside(tmp_path / "out") == {"source"}


def full_at(call: int) -> Callable[[HashedFile, Any], None]:
    """Return a HashedFile.write that finds the disk full at one of its calls."""
    real, calls = HashedFile.write, [0]

    def write(self: HashedFile, part: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, part)

    return write


@pytest.mark.parametrize("call", [1, 3, 7, 12, 15])
def test_a_disk_that_fills_up_leaves_no_output_and_what_is_finished_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(HashedFile, "write", full_at(call))
        with pytest.raises(FileError, match="No space left on device; free some space") as caught:
            again(source, out, replaced())
    assert str(out) in str(caught.value)
    assert not out.exists()
    again(source, out, replaced())
    again(source, tmp_path / "expected", replaced())
    assert everything(out) == everything(tmp_path / "expected")
    assert beside(out) == {"source", "out", "expected"}


def counted(calls: list[str], failing: str | None = None, error: BaseException | None = None) -> list[Group]:
    """Replace a tensor in each shard of `source`, noting which are computed."""

    def one(name: str) -> Group:
        array = np.full((2, 2), float(len(name)))

        def make() -> Arrays:
            calls.append(name)
            if name == failing and error is not None:
                raise error
            return {name: array}

        return group({name: array}, make=make)

    return [one(name) for name in ("z", "w", "v")]


def interrupted(source: Path, out: Path, failing: str = "v", **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        again(source, out, counted([], failing, KeyboardInterrupt()), **options)
    assert not os.path.lexists(out)
    assert beside(out) == {"source", partial_path(out).name}


@pytest.mark.parametrize(("failing", "left"), [("z", "zwv"), ("w", "wv"), ("v", "v")])
def test_an_interrupted_run_goes_on_after_the_finished_shards(
    source: Path, tmp_path: Path, failing: str, left: str
):
    def hashed(partial: Path, files: dict[str, Any]) -> dict[str, str]:
        return {"files.json": json.dumps({name: [w.sha256, w.size] for name, w in sorted(files.items())})}

    out, calls = tmp_path / "out", []
    interrupted(source, out, failing)
    again(source, out, counted(calls), finish=hashed)
    assert calls == list(left)
    again(source, tmp_path / "expected", counted([]), finish=hashed)
    assert everything(out) == everything(tmp_path / "expected")
    assert beside(out) == {"source", "out", "expected"}


def test_progress_goes_on_where_it_stopped(source: Path, tmp_path: Path):
    calls: list[tuple[int, int]] = []
    interrupted(source, tmp_path / "out", "w")
    again(source, tmp_path / "out", counted([]), progress=lambda *call: calls.append(call))
    assert calls[0][0] > (tmp_path / "out" / ONE).stat().st_size
    written = {n: len(b) for n, b in everything(tmp_path / "out").items() if n not in ("config.json", INDEX)}
    assert calls[-1] == (sum(written.values()),) * 2


def test_an_interruption_in_the_end_costs_no_shard(source: Path, tmp_path: Path):
    def finish(partial: Path, files: dict[str, Any]) -> dict[str, str]:
        raise KeyboardInterrupt

    out, calls = tmp_path / "out", []
    with pytest.raises(KeyboardInterrupt):
        again(source, out, counted([]), finish=finish)
    again(source, out, counted(calls))
    assert calls == []
    again(source, tmp_path / "expected", counted([]))
    assert everything(out) == everything(tmp_path / "expected")


def test_another_key_starts_afresh(source: Path, tmp_path: Path):
    out, calls = tmp_path / "out", []
    interrupted(source, out)
    (partial_path(out) / "left.txt").write_text("of another run")
    again(source, out, counted(calls), key="another")
    assert calls == list("zwv")
    assert "left.txt" not in everything(out)


def test_what_a_killed_run_left_half_written_is_no_part_of_the_output(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    interrupted(source, out)
    write(partial_path(out), {f".{module.JOURNAL}.tmp-1-ab": "{", "sub/left": "", "tokenizer.json": "{"})
    again(source, out, counted([]))
    again(source, tmp_path / "expected", counted([]))
    assert everything(out) == everything(tmp_path / "expected")


def test_a_finished_file_of_another_size_is_written_again(source: Path, tmp_path: Path):
    out, calls = tmp_path / "out", []
    interrupted(source, out)
    with (partial_path(out) / ONE).open("ab") as file:
        file.write(b"x")
    (partial_path(out) / TWO).unlink()
    again(source, out, counted(calls))
    assert calls == list("zwv")
    again(source, tmp_path / "expected", counted([]))
    assert everything(out) == everything(tmp_path / "expected")


@pytest.mark.parametrize(
    "journal",
    ["", "{", "[]", "null", '{"key":"k"}', '{"key":"k","files":3}', '{"key":"k","files":{"x":{}}}', "\xff"],
)
def test_a_damaged_journal_starts_afresh(source: Path, tmp_path: Path, journal: str):
    out, calls = tmp_path / "out", []
    interrupted(source, out)
    (partial_path(out) / module.JOURNAL).write_bytes(journal.encode("latin-1"))
    again(source, out, counted(calls))
    assert calls == list("zwv")


@pytest.mark.parametrize("error", [BudgetError("beyond the budget"), FileError("bad input")])
def test_an_error_of_ours_leaves_nothing(source: Path, tmp_path: Path, error: SpecDefError):
    def finish(partial: Path, files: dict[str, Any]) -> dict[str, str]:
        raise error

    for options in ({"groups": counted([], "v", error)}, {"finish": finish}):
        with pytest.raises(type(error), match=str(error)):
            again(source, tmp_path / "out", **options)
        assert beside(tmp_path / "out") == {"source"}


def test_an_array_that_is_not_as_announced_is_refused(single: Path, tmp_path: Path):
    for array in (np.zeros(6, np.float32), np.zeros((6, 1)), np.zeros(6, ">f8")):
        wrong = group({"a": np.zeros(6)}, make=lambda array=array: {"a": array})
        with pytest.raises(FileError, match=r"'a' was computed as .*not as announced"):
            again(single, tmp_path / "out", [wrong])
        assert beside(tmp_path / "out") == {"source"}


def test_an_added_tensor_that_the_source_has_already_is_refused(source: Path, tmp_path: Path):
    for follower in ("a", "ids"):  # in the same shard, in another
        added = group({follower: np.zeros(2)}, {follower: "z"})
        assert f"'{follower}'" in refused(source, tmp_path / "out", [added])


def test_two_runs_into_one_output_do_not_meet(source: Path, tmp_path: Path):
    out, calls = tmp_path / "out", []

    def make() -> Arrays:
        with pytest.raises(FileError, match="is being written by another process") as caught:
            again(source, out, counted(calls))
        assert str(out) in str(caught.value)
        return {"z": np.zeros(2)}

    again(source, out, [group({"z": np.zeros(2)}, make=make)])
    assert calls == []
    assert held(out / ONE)["z"] == stored(np.zeros(2))


def test_a_lock_left_by_a_killed_run_is_no_obstacle(single: Path, tmp_path: Path):
    partial_path(tmp_path / "out").with_suffix(".lock").touch()
    again(single, tmp_path / "out")
    assert beside(tmp_path / "out") == {"source", "out"}


def test_a_source_that_shrinks_meanwhile_is_an_error_that_names_it(source: Path, tmp_path: Path):
    shards = open_shards(source)
    os.truncate(source / TWO, 100)
    with pytest.raises(FileError, match="shorter than when it was opened") as caught:
        rewrite(shards, tmp_path / "out", [], texts={}, finish=lambda partial, files: {}, key="k")
    assert str(source / TWO) in str(caught.value)
    assert beside(tmp_path / "out") == {"source"}


@pytest.mark.parametrize("name", [TWO, "tokenizer.json"])
def test_a_source_file_that_is_gone_is_named(source: Path, tmp_path: Path, name: str):
    shards = open_shards(source)
    (source / name).unlink()
    with pytest.raises(FileError, match="cannot be read") as caught:
        rewrite(shards, tmp_path / "out", [], texts={}, finish=lambda partial, files: {}, key="k")
    assert str(source / name) in str(caught.value)


def test_too_little_space_for_the_rest_keeps_what_is_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, calls = tmp_path / "out", []
    interrupted(source, out)
    with monkeypatch.context() as patch:
        patch.setattr(module, "SPARE", 1 << 60)
        with pytest.raises(FileError, match="free some space"):
            again(source, out, counted([]))
    again(source, out, counted(calls))
    assert calls == ["v"]


def test_a_disk_full_at_the_journal_keeps_what_is_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, calls, saved = tmp_path / "out", [], [0]
    real = files._write_new

    def full(path: Path, data: bytes) -> None:
        saved[0] += 1
        if saved[0] == 3:  # the journal is empty, holds one shard, would hold two
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_new", full)
        with pytest.raises(FileError, match="free some space"):
            again(source, out, counted([]))
    again(source, out, counted(calls))
    assert calls == list("wv")


def test_a_file_named_as_our_journal_is_copied(single: Path, tmp_path: Path):
    write(single, {"journal.json": "mine"})
    again(single, tmp_path / "out")
    assert (tmp_path / "out" / "journal.json").read_text() == "mine"


def tried(source: Path, out: Path) -> str:
    """Return why a directory is refused, "" if it was written."""
    try:
        again(source, out)
    except FileError as error:
        return str(error)
    return ""


def test_an_index_in_a_subdirectory_does_no_harm(single: Path, tmp_path: Path):
    body = json.dumps({"weight_map": dict.fromkeys("ab", "model.safetensors")})
    write(single, {f"sub/{INDEX}": body})
    message = tried(single, tmp_path / "out")
    assert f"sub/{INDEX}" in message or list(open_shards(tmp_path / "out")) == ["a", "b"]


def indexed(source: Path, odd: str, file: str = "model.safetensors") -> None:
    weight_map = json.dumps(dict.fromkeys("ab", file))
    write(source, {INDEX: f'{{"metadata":{{"odd":{odd}}},"weight_map":{weight_map}}}'})


@pytest.mark.parametrize(
    "text", [r'"\ud800"', "1e999", "[" * 500 + "]" * 500], ids=["half", "infinite", "deep"]
)
def test_odd_metadata_of_an_index_are_written_or_refused(single: Path, tmp_path: Path, text: str):
    indexed(single, text)
    message = tried(single, tmp_path / "out")
    if message:
        assert INDEX in message
    else:  # as strict JSON
        found = json.loads((tmp_path / "out" / INDEX).read_text(), parse_constant=pytest.fail)
        assert found["metadata"]["odd"] == json.loads(text)


def test_the_deepest_index_that_is_read_is_written_or_refused(single: Path, tmp_path: Path):
    for depth in (900, 930, 950, 960, 970, 980, 1000, 3000):
        indexed(single, "[" * depth + "]" * depth)
        message = tried(single, tmp_path / f"out{depth}")
        assert not message or INDEX in message


def test_a_shard_whose_name_is_no_text_is_written_or_refused(single: Path, tmp_path: Path):
    name = os.fsdecode(b"\xff.safetensors")
    (single / "model.safetensors").rename(single / name)
    indexed(single, "1", name)
    message = tried(single, tmp_path / "out")
    assert str(single) in message or held(tmp_path / "out" / name) == held(single / name)
