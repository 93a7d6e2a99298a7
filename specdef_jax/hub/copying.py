"""Write a file part by part, its sha256 computed beside the writing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from specdef_jax.errors import FileError
from specdef_jax.files import unreadable

PART = 1 << 24  # bytes; what is in flight between disk, hash and disk

Tell = Callable[[int], None]  # tell(bytes just written)


class HashedFile:
    """A new file that knows its sha256 once it is closed.

    The hash runs in a thread of its own, one part behind: hashlib lets the interpreter go meanwhile.
    """

    def __init__(self, path: Path, tell: Tell) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._tell = tell
        self.size = 0

    def write(self, part: bytes | memoryview) -> None:
        """Append one part; it must not change before the next call."""
        if self._pending is not None:
            self._pending.result()
        self._pending = self._pool.submit(self._hash.update, part)
        view = memoryview(part)
        while view:  # a raw file may take less than it is given
            view = view[self._file.write(view) :]
        self.size += len(part)
        self._tell(len(part))

    def digest(self) -> str:
        """Return the sha256 of what was written, in hexadecimal."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
        return self._hash.hexdigest()

    def __enter__(self) -> HashedFile:
        """Return the open file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Bring the file to the disk and close it."""
        try:
            if kind is None:
                self.digest()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
            self._pool.shutdown()


def parts_of(path: Path, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
    """Yield the bytes [start, stop) of a file in parts, two buffers in turn.

    A part may be kept until the one after the next is asked for.

    Raises:
      FileError: the file ends before `stop`.
    """
    try:
        left = path.stat().st_size - start if stop is None else stop - start
        opened = path.open("rb", buffering=0)
    except OSError as error:
        raise unreadable(path, error) from error
    buffers = [memoryview(bytearray(min(PART, max(left, 1)))) for _ in range(2)]
    with opened as file:
        file.seek(start)
        while left:
            buffers.reverse()
            count = file.readinto(buffers[0][: min(PART, left)])
            if not count:
                raise FileError(f"{path} is shorter than when it was opened; start again.")
            yield buffers[0][:count]
            left -= count


def sha256_of(path: Path, tell: Tell | None = None) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts_of(path):
        digest.update(part)
        if tell is not None:
            tell(len(part))
    return digest.hexdigest()
