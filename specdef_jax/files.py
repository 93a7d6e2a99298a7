"""Output that is whole or not there: written to a temporary sibling, flushed to disk, renamed.

An exception or Ctrl-C removes the sibling. A killed process leaves it behind under a hidden name
with ".tmp-" in it, which nothing reads and which may be deleted; the target is never half-written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from specdef_jax.errors import FileError

_REMEDIES = {
    errno.ENOSPC: "free some space or write to another disk",
    errno.EDQUOT: "free some of your quota or write to another disk",
    errno.EFBIG: "write to a file system that takes files of this size",
    errno.ENOENT: "create the directory first",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.EISDIR: "the path is a directory; choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
}
_NOT_ALLOWED = "choose a place that you may write to"


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file through `write(temporary path)`, then rename it to `path`.

    The temporary path is in the same directory and does not exist yet. An existing file is replaced.

    Raises:
      FileError: the file cannot be written; nothing was left behind and `path` is as it was.

    Example:
      >>> atomic_write(Path("notes.txt"), lambda temporary: temporary.write_text("done"))
    """
    path = Path(path)
    temporary = _sibling(path)
    with explained(path):
        try:
            write(temporary)
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        flush(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Write text in UTF-8; errors are those of atomic_write."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write bytes; errors are those of atomic_write."""
    atomic_write(path, lambda temporary: _write_new(temporary, data))


@contextlib.contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty temporary directory to fill, and rename it to `path` when the block ends.

    Siblings that the block makes beside the given directory are removed with it. With `overwrite`
    a directory at `path` is replaced, in two renames: a process killed between them leaves the old
    one whole in the temporary sibling.

    Raises:
      FileError: `path` exists (and not `overwrite`), or cannot be written.
    """
    path = Path(path)
    if os.path.lexists(path) and not overwrite:
        raise exists_already(path)
    holder = _sibling(path)
    with explained(path):
        try:
            filled = holder / "new"
            holder.mkdir()
            filled.mkdir()
            yield filled
            for entry in (filled, *filled.rglob("*")):
                flush(entry)
            _swap(filled, path, holder / "old")
            flush(path.parent)
        finally:
            shutil.rmtree(holder, ignore_errors=True)


def exists_already(path: Path) -> FileError:
    """Return the error for an output that would replace something."""
    return FileError(f"{path} exists already; choose another path, or ask for it to be overwritten.")


def unreadable(path: Path, error: OSError) -> FileError:
    """Return the error for an input that the system will not read."""
    remedy = (
        "check the path" if isinstance(error, FileNotFoundError) else "check the file and its permissions"
    )
    return FileError(f"{path} cannot be read: {error.strerror or error}; {remedy}.")


def _swap(new: Path, path: Path, old: Path) -> None:
    """Put `new` at `path`, moving what is there to `old` and back if that fails."""
    if not os.path.lexists(path):
        os.rename(new, path)
        return
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise


def _sibling(path: Path) -> Path:
    # The name is cut so that a target with the longest name allowed still has a sibling.
    return path.with_name(f".{path.name[:40]}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _write_new(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)


def flush(path: Path) -> None:
    """Ask the disk for a file or a directory; where a system cannot flush directories, go on."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a FileError that says what to do about `path`."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, _NOT_ALLOWED)
        raise FileError(f"{path} cannot be written: {error.strerror or error}; {remedy}.") from error
