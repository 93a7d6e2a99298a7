"""A run that is killed (SIGKILL) at any moment leaves no output or the whole one; the next finishes it."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import specdef_jax

ROOT = Path(specdef_jax.__file__).parents[1]
SHARDS = [f"model-{i}.safetensors" for i in range(6)]

# Rewrites SOURCE into OUT. The packages are stubs, as their __init__ would import JAX. With STOP > 0 the
# process kills itself at that many operations on files. Prints what it computes.
RUN = """
import os, signal, sys, time, types
root, source, out, sleep, stop = sys.argv[1:]
for name in ("specdef_jax", "specdef_jax.hub"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [os.path.join(root, *name.split("."))]
from pathlib import Path
import numpy as np
from specdef_jax.errors import FileError
from specdef_jax.hub.rewrite import Group, rewrite
from specdef_jax.hub.shards import open_shards

shards = open_shards(source)
name_of = {name: name + ".comp" for name in shards if name.endswith("w")}

def group(name):
    def make():
        print(name, flush=True)
        time.sleep(float(sleep))
        return {name: -shards.read(name), name_of[name]: np.eye(8)}
    info = shards.info(name)
    stored = {name: (info.dtype, info.shape), name_of[name]: (np.dtype(np.float64), (8, 8))}
    return Group(stored, {name_of[name]: name}, make)

def finish(partial, files):
    return {"files.txt": "\\n".join(f"{name} {files[name].sha256}" for name in sorted(files))}

def counted(event, args, left=[int(stop)]):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
        if any(str(out) in str(a) or "specdef-partial" in str(a) for a in args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

if int(stop):
    sys.addaudithook(counted)
try:
    rewrite(shards, Path(out), [group(name) for name in name_of], texts={"config.json": "{}"},
            finish=finish, key="k", workers=2)
except FileError as error:
    sys.exit(str(error))
"""


def start(source: Path, out: Path, *, sleep: float = 0.0, stop: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(ROOT), str(source), str(out), str(sleep), str(stop)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> tuple[int, list[str], str]:
    """Return the exit code, the names of what was computed, and the error."""
    computed, error = process.communicate(timeout=120)
    return process.returncode, computed.split(), error


def checkpoint(path: Path, size: int, shards: int = len(SHARDS)) -> Path:
    """Write a model whose shards have so many entries each."""
    rng = np.random.default_rng(0)
    path.mkdir()
    weight_map = {}
    for i, shard in enumerate(SHARDS[:shards]):
        tensors = {f"{i}.{part}": rng.normal(size=size // 4).astype(np.float32) for part in "abvw"}
        safetensors.numpy.save_file(tensors, path / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("t" * 1000)
    return path


def hashes(path: Path) -> dict[str, str]:
    files = (p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def begun(source: Path, out: Path, sleep: float, line: str) -> subprocess.Popen:
    """Start a run and wait until it computes what is named by `line`."""
    process = start(source, out, sleep=sleep)
    assert process.stdout is not None
    while (found := process.stdout.readline()) != f"{line}\n":
        assert found, finished(process)
    return process


@pytest.fixture
def model(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str], float]]:
    """A model of 2 MB per shard, what becomes of it, and how many seconds that takes."""
    source, expected = checkpoint(tmp_path / "source", 500_000), tmp_path / "expected"
    before = hashes(source)
    process, first = begun(source, expected, 0.03, "0.w"), time.monotonic()
    assert finished(process)[0] == 0
    duration = time.monotonic() - first
    found = hashes(expected)
    shutil.rmtree(expected)
    assert set(SHARDS) < set(found)
    yield source, found, duration
    assert hashes(source) == before


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(model, tmp_path: Path, kills: int):
    source, expected, duration = model
    out, moments, codes = tmp_path / "out", random.Random(0), []
    for _ in range(kills):
        process = start(source, out, sleep=0.03)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, duration))
        process.kill()
        code, _, error = finished(process)
        assert code in (0, -signal.SIGKILL), error
        codes.append(code)
        if os.path.lexists(out):
            assert hashes(out) == expected
            shutil.rmtree(out)
    assert -signal.SIGKILL in codes
    assert finished(start(source, out))[0] == 0
    assert hashes(out) == expected
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out"}


def test_what_a_killed_run_finished_is_not_computed_again(model, tmp_path: Path):
    source, expected, _ = model
    process = begun(source, tmp_path / "out", 0.3, "4.w")
    process.kill()
    finished(process)
    assert not (tmp_path / "out").exists()
    code, computed, error = finished(start(source, tmp_path / "out"))
    assert code == 0, error
    assert set(computed) <= {"4.w", "5.w"}
    assert hashes(tmp_path / "out") == expected


def test_the_second_of_two_processes_is_refused(model, tmp_path: Path):
    source, expected, _ = model
    out = tmp_path / "out"
    first = begun(source, out, 0.1, "1.w")
    first.send_signal(signal.SIGSTOP)
    code, computed, error = finished(start(source, out))
    assert (code, computed) == (1, [])
    assert f"{out} is being written by another process" in error
    first.send_signal(signal.SIGCONT)
    assert finished(first)[0] == 0
    assert hashes(out) == expected


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_operation_on_files(tmp_path: Path, step: int):
    source, out = checkpoint(tmp_path / "source", 4000, shards=2), tmp_path / "out"
    assert finished(start(source, out))[0] == 0
    expected = hashes(out)
    shutil.rmtree(out)
    stop, code, whole = step, -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        code, _, error = finished(start(source, out, stop=stop))
        assert code in (0, -signal.SIGKILL), error
        whole += os.path.lexists(out)
        if not os.path.lexists(out):
            assert code != 0
            assert finished(start(source, out))[0] == 0
        assert hashes(out) == expected
        shutil.rmtree(out)
        assert {p.name for p in tmp_path.iterdir()} <= {"source", ".out.lock"}
        stop += step
    assert stop > 5 * step
    assert whole >= 1
