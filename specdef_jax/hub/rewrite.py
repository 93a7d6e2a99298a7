"""Write a checkpoint directory again with some tensors replaced or added, shard by shard, resumable.

The output is built in a hidden sibling, ".OUT.specdef-partial", and renamed when it is whole: a
directory at OUT is complete at any moment. A killed run leaves the sibling with a journal of the files
that are finished and on the disk; the same run started again goes on after them, any other run starts
afresh. Tensors that are not replaced are copied byte by byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specdef_jax.errors import FileError, SpecDefError
from specdef_jax.files import atomic_write_text, exists_already, explained, flush, unreadable
from specdef_jax.hub.copying import PART, HashedFile, parts_of
from specdef_jax.hub.safetensors_header import bytes_of, header_of
from specdef_jax.hub.shards import Shard, Shards
from specdef_jax.hub.working import threads

JOURNAL = ".specdef-journal.json"
SPARE = 1 << 26  # bytes that must stay free beside what is written

Stored = tuple[np.dtype, tuple[int, ...]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Group:
    """Tensors that are computed together.

    Attributes:
      stored: name -> dtype and shape, for tensors that replace one of the source or follow one.
      after: name of an added tensor -> tensor of the source that it follows, in the same file.
      make: computes the arrays of `stored`, named as there.
    """

    stored: dict[str, Stored]
    after: dict[str, str]
    make: Callable[[], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Written:
    """A finished file: its sha256 and size."""

    sha256: str
    size: int


def rewrite(
    source: Shards,
    out: Path,
    groups: Sequence[Group],
    *,
    texts: Mapping[str, str],
    finish: Callable[[Path, dict[str, Written]], Mapping[str, str]],
    key: str,
    headers: Mapping[str, dict[str, str]] | None = None,
    dropped: frozenset[str] = frozenset(),
    workers: int = 1,
    progress: Progress | None = None,
) -> None:
    """Write `out` from `source`.

    Args:
      source: the directory to read.
      out: the directory to make; must not exist.
      groups: what is replaced or added.
      texts: contents of files other than shards and index, by name, instead of those of the source.
      finish: called with the partial directory and every file in it, before the rename; the texts that it
        returns are written too. It may raise, and then nothing is left at `out`.
      key: what the run was asked for; a partial output with another key is started afresh.
      headers: metadata of shards, by file name, instead of those of the source.
      dropped: tensors of the source that the output lacks.
      workers: groups computed at the same time.
      progress: progress(bytes written, bytes in all).

    Raises:
      FileError: `out` exists, lies in the source, is being written by another process, or the disk is
        full or fails.
    """
    check_output(source.path, out)
    for name in (name for group in groups for name in group.after):
        if name in source and name not in dropped:
            raise FileError(f"{source.path} has a tensor '{name}' already; rename it first.")
    headers = headers or {}
    plans = {s.name: _plan(s, groups, dropped, headers.get(s.name, s.metadata)) for s in source.shards}
    index = _index(source, plans)
    texts = {**texts, **({source.index: index} if source.index else {})}
    copied = [name for name in source.others if name not in texts]
    sizes = {name: plan.size for name, plan in plans.items()} | _sizes(source.path, copied)
    with explained(out), _partial(out, key, sum(sizes.values())) as (partial, journal):
        done = sum(sizes[name] for name in journal if name in sizes)
        tell = _Counter(progress, done, sum(sizes.values()))
        with threads(workers) as pool:
            for shard in source.shards:
                plan = plans[shard.name]
                if shard.name not in journal:
                    journal[shard.name] = _write_shard(source, shard, plan, partial, pool, workers, tell)
                    _save(partial, key, journal)
        for name in copied:
            if name not in journal:
                journal[name] = _copy(source.path / name, partial / name, tell)
        _write_texts(partial, texts, journal)
        _write_texts(partial, finish(partial, dict(journal)), journal)
        _remove_all_but(partial, journal)
        for entry in (partial, *(p for p in partial.rglob("*") if p.is_dir())):
            flush(entry)
        if os.path.lexists(out):
            raise exists_already(out)
        os.rename(partial, out)
        flush(out.parent)


def _sizes(path: Path, names: Sequence[str]) -> dict[str, int]:
    try:
        return {name: (path / name).stat().st_size for name in names}
    except OSError as error:
        raise unreadable(Path(error.filename), error) from error


def _remove_all_but(partial: Path, journal: Mapping[str, Written]) -> None:
    """Remove what is no part of the output: the journal, and what a killed run left half-written."""
    for entry in sorted(partial.rglob("*"), reverse=True):  # the content of a directory before it
        if entry.is_dir():
            if not any(entry.iterdir()):
                entry.rmdir()
        elif entry.relative_to(partial).as_posix() not in journal:
            entry.unlink()


def check_output(source: Path, out: Path) -> None:
    """Refuse an output that exists, or that would touch the input.

    Raises:
      FileError: it does.
    """
    if os.path.islink(out):
        raise exists_already(out)
    if out.resolve().is_relative_to(source.resolve()):
        raise FileError(f"{out} is the input or lies in it; inputs are never modified, choose another path.")
    if os.path.lexists(out):
        raise exists_already(out)


def partial_path(out: Path) -> Path:
    """Return the hidden sibling in which an output is built."""
    name = out.name.encode()[:200].decode(errors="ignore")
    return out.with_name(f".{name}.specdef-partial")


@dataclass(frozen=True)
class _ShardPlan:
    header: bytes
    order: tuple[str, ...]
    stored: dict[str, Stored]
    groups: dict[str, Group]
    size: int


def _plan(
    shard: Shard, groups: Sequence[Group], dropped: frozenset[str], metadata: dict[str, str]
) -> _ShardPlan:
    """Lay out one file: the tensors of the source in their order, each followed by what comes after it."""
    owner = {name: group for group in groups for name in group.stored}
    followers: dict[str, list[str]] = {}
    for group in groups:
        for name, leader in group.after.items():
            followers.setdefault(leader, []).append(name)
    order: list[str] = []
    for name in shard.tensors:
        order += [*([] if name in dropped else [name]), *followers.get(name, [])]
    stored = {
        name: owner[name].stored[name]
        if name in owner
        else (shard.tensors[name].dtype, shard.tensors[name].shape)
        for name in order
    }
    header, size = header_of(stored, metadata)
    found = {name: owner[name] for name in order if name in owner}
    return _ShardPlan(header, tuple(order), stored, found, len(header) + size)


def _write_shard(
    source: Shards,
    shard: Shard,
    plan: _ShardPlan,
    partial: Path,
    pool: ThreadPoolExecutor,
    workers: int,
    tell: Callable[[int], None],
) -> Written:
    """Write one file; groups are computed ahead, a few at a time, in the order they are needed."""
    path = partial / shard.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # left by a run that was killed in the middle of it
    queue = list({id(group): group for group in plan.groups.values()}.values())
    ahead: dict[int, Future[dict[str, np.ndarray]]] = {}
    left = {id(group): sum(g is group for g in plan.groups.values()) for group in queue}

    def started(group: Group) -> Future[dict[str, np.ndarray]]:
        while queue and (id(group) not in ahead or len(ahead) < workers):
            following = queue.pop(0)
            ahead[id(following)] = pool.submit(following.make)
        return ahead[id(group)]

    with HashedFile(path, tell) as file:
        file.write(plan.header)
        for name in plan.order:
            group = plan.groups.get(name)
            if group is None:
                info = shard.tensors[name]
                for part in parts_of(source.path / shard.name, info.start, info.stop):
                    file.write(part)
                continue
            array = started(group).result()[name]
            if (array.dtype, array.shape) != plan.stored[name]:
                raise FileError(f"'{name}' was computed as {array.dtype}{array.shape}, not as announced.")
            for part in bytes_of(array, PART):
                file.write(part)
            left[id(group)] -= 1
            if not left[id(group)]:
                del ahead[id(group)]
        return Written(file.digest(), file.size)


def _copy(source: Path, target: Path, tell: Callable[[int], None]) -> Written:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    with HashedFile(target, tell) as file:
        for part in parts_of(source):
            file.write(part)
        return Written(file.digest(), file.size)


def _write_texts(partial: Path, texts: Mapping[str, str], journal: dict[str, Written]) -> None:
    for name, text in texts.items():
        target = partial / name
        target.unlink(missing_ok=True)
        with HashedFile(target, lambda count: None) as file:
            file.write(text.encode())
            journal[name] = Written(file.digest(), file.size)


def _index(source: Shards, plans: Mapping[str, _ShardPlan]) -> str:
    """Return the index of the output: the source's metadata with the sizes brought up to date."""
    weight_map = {name: shard for shard, plan in plans.items() for name in plan.order}
    counts = [(d, int(np.prod(s, dtype=np.int64))) for p in plans.values() for d, s in p.stored.values()]
    metadata = dict(source.index_metadata)
    if "total_size" in metadata or not metadata:
        metadata["total_size"] = sum(dtype.itemsize * n for dtype, n in counts)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(n for _, n in counts)
    body = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(body, indent=2, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _partial(out: Path, key: str, total: int) -> Iterator[tuple[Path, dict[str, Written]]]:
    """Give the partial directory, held by this process alone, and the files that are finished in it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(out)
    with _held(partial.with_suffix(".lock"), out):
        journal = _load(partial, key)
        _check_space(out, total - sum(written.size for written in (journal or {}).values()))
        if journal is None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _save(partial, key, journal := {})
        try:
            yield partial, journal
        except SpecDefError as error:  # bad input: the same run would end the same way
            if not isinstance(error.__cause__, OSError):  # a full disk would not
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _held(lock: Path, out: Path) -> Iterator[None]:
    """Hold a lock file, which the system releases if the process dies."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system: two runs into one output are the user's to avoid
        yield
        return
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino != os.stat(lock).st_ino:
                raise FileNotFoundError("the lock was given back just now")
        except OSError as error:
            raise FileError(f"{out} is being written by another process; wait for it, or end it.") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _load(partial: Path, key: str) -> dict[str, Written] | None:
    """Return the finished files of a partial output with this key, None if there is none."""
    try:
        found = json.loads((partial / JOURNAL).read_text())
        if found["key"] != key:
            return None
        files = {name: Written(**entry) for name, entry in found["files"].items()}
        whole = {n: w for n, w in files.items() if (partial / n).stat().st_size == w.size}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return whole


def _save(partial: Path, key: str, journal: Mapping[str, Written]) -> None:
    files = {name: {"sha256": w.sha256, "size": w.size} for name, w in journal.items()}
    atomic_write_text(partial / JOURNAL, json.dumps({"key": key, "files": files}))


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed + SPARE:
        raise FileError(
            f"{out} needs {needed / 1e9:.2f} GB, {out.parent} has {free / 1e9:.2f} GB free; free some "
            "space or write to another disk."
        )


class _Counter:
    """Turn bytes just written into bytes written so far."""

    def __init__(self, progress: Progress | None, done: int, total: int) -> None:
        self.progress, self.done, self.total = progress, done, total

    def __call__(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)
