"""Output is whole or not there, whatever happens while it is written."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specdef_jax.errors import FileError, SpecDefError
from specdef_jax.files import atomic_directory, atomic_write, atomic_write_bytes, atomic_write_text


def test_text_and_bytes_arrive_and_leave_no_sibling(tmp_path: Path):
    atomic_write_text(tmp_path / "a.txt", "α\n")
    atomic_write_bytes(tmp_path / "b", b"\x00\x01")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "α\n"
    assert (tmp_path / "b").read_bytes() == b"\x00\x01"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b"]


def test_an_existing_file_is_replaced_and_modes_follow_the_umask(tmp_path: Path):
    path = tmp_path / "a"
    path.write_text("old")
    atomic_write_text(path, "new")
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.read_text() == "new"
    assert path.stat().st_mode == plain.stat().st_mode


def test_the_longest_name_allowed_can_be_written(tmp_path: Path):
    atomic_write_text(tmp_path / ("n" * 255), "x")
    with pytest.raises(FileError, match="choose a shorter name"):
        atomic_write_text(tmp_path / ("n" * 256), "x")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError, MemoryError])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path, stop: type[BaseException]):
    path = tmp_path / "a"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("ha")
        raise stop

    with pytest.raises(stop):
        atomic_write(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "quota"), (errno.EACCES, "you may write to")],
)
def test_a_full_or_forbidden_disk_is_named_with_its_remedy(tmp_path: Path, number: int, remedy: str):
    def write(temporary: Path) -> None:
        temporary.write_text("ha")
        raise OSError(number, os.strerror(number))

    with pytest.raises(FileError, match=f"out.*{os.strerror(number)}.*{remedy}"):
        atomic_write(tmp_path / "out", write)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(FileError, match="create the directory"):
        atomic_write_text(tmp_path / "missing" / "a", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="a part of the path is a file"):
        atomic_write_text(tmp_path / "file" / "a", "x")
    with pytest.raises(FileError, match="is a directory"):
        atomic_write_text(tmp_path, "x")


def test_a_directory_appears_whole_and_takes_its_siblings_along(tmp_path: Path):
    with atomic_directory(tmp_path / "d") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("x")
        (temporary.parent / "scratch").write_text("beside")
        assert not (tmp_path / "d").exists()
    assert (tmp_path / "d" / "sub" / "a").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_an_existing_directory_is_refused_unless_asked(tmp_path: Path):
    target = tmp_path / "d"
    target.mkdir()
    (target / "old").write_text("")
    with pytest.raises(FileError, match="exists already"), atomic_directory(target):
        raise AssertionError("the block must not run")
    with atomic_directory(target, overwrite=True) as temporary:
        (temporary / "new").write_text("")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupted_directory_leaves_the_old_one(tmp_path: Path):
    target = tmp_path / "d"
    target.mkdir()
    (target / "old").write_text("")

    def interrupted() -> None:
        with atomic_directory(target, overwrite=True) as temporary:
            (temporary / "new").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "d"
    target.mkdir()
    rename = os.rename

    def failing(source: Path, to: Path) -> None:
        if Path(source).name == "new":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, to)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(SpecDefError, match="Input/output"), atomic_directory(target, overwrite=True):
        pass
    assert list(tmp_path.iterdir()) == [target]


_SLOW_WRITER = """
import signal, sys, time, pathlib
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
from specdef_jax.files import atomic_write
def write(temporary):
    temporary.write_text("half")
    print("half", flush=True)
    time.sleep(60)
atomic_write(pathlib.Path(sys.argv[1]), write)
"""


@pytest.mark.parametrize(("number", "left"), [(signal.SIGKILL, 1), (signal.SIGINT, 0)])
def test_a_killed_writer_leaves_no_output(tmp_path: Path, number: signal.Signals, left: int):
    command = [sys.executable, "-c", _SLOW_WRITER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        time.sleep(0.05)
        process.send_signal(number)
        process.wait(10)
    assert not (tmp_path / "out").exists()
    leftovers = list(tmp_path.iterdir())
    assert len(leftovers) == left
    assert all(p.name.startswith(".out.tmp-") for p in leftovers)
