"""The header of a safetensors file, checked before a byte of it is trusted.

A file is 8 bytes of little-endian length N, N bytes of JSON, and the tensors. The JSON maps each
name to dtype, shape and data_offsets, which must cover the rest of the file without gap or overlap.
Source: the format described by the safetensors project, whose library has the last word here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from specdef_jax.errors import FileError
from specdef_jax.files import unreadable

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # the library's own limit
_AGAIN = "the file is truncated or corrupt; get it again"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: dtype, shape, and bytes [start, stop) of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return where each tensor lies, in the order of the file's data, and the file's metadata.

    Raises:
      FileError: the file is missing, truncated or corrupt, or holds a dtype that numpy has no
        element for.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise _corrupt(path, f"{size} bytes cannot hold the header that the first 8 announce")
            text = file.read(length)
    except FileError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    entries = _parse(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(path, "its metadata is not a mapping from text to text")
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_cover(path, tensors, 8 + length, size)
    _ask_library(path)
    return tensors, metadata


def header_of(
    stored: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """Return the length, the JSON padded to 8 bytes, and the number of bytes of data that follow."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in stored.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def bytes_of(array: Any, part: int) -> Iterator[memoryview]:
    """Yield the data of an array, at most `part` bytes at a time."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, part):
        yield flat[start : start + part].data


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        entries = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header is no JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _corrupt(path, "its header is no mapping")
    return entries


def _tensor(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    try:
        code, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(i) is int and i >= 0 for i in (*shape, start, stop)):
            raise TypeError
        dtype = DTYPES.get(code)
    except (TypeError, KeyError, ValueError) as error:
        raise _corrupt(path, f"the header's entry for '{name}' makes no sense") from error
    if dtype is None:
        raise FileError(
            f"{path}: '{name}' has dtype {code!r}, which is not read here; "
            f"convert it to one of {', '.join(DTYPES)}."
        )
    if stop - start != math.prod(shape) * dtype.itemsize:
        found = f"{stop - start} bytes"
        raise _corrupt(path, f"'{name}' of shape {tuple(shape)} and dtype {code} is given {found}")
    empty = 0 in shape and math.prod(n or 1 for n in shape) * dtype.itemsize >= 1 << 63
    if len(shape) > 32 or empty:  # others are measured by the file
        raise _corrupt(path, f"'{name}' has shape {shape}, larger than any array")
    return TensorInfo(dtype, tuple(shape), data + start, data + stop)


def _check_cover(path: Path, tensors: dict[str, TensorInfo], data: int, size: int) -> None:
    end = data
    for name, info in tensors.items():
        if info.start != end:
            kind = "overlaps the tensor before it" if info.start < end else "follows a gap"
            raise _corrupt(path, f"'{name}' {kind}")
        end = info.stop
    if end != size:
        raise _corrupt(path, f"it has {size} bytes, its header announces {end}")


def _ask_library(path: Path) -> None:
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise _corrupt(path, f"the safetensors library refuses it ({error})") from error


def _corrupt(path: Path, reason: str) -> FileError:
    return FileError(f"{path}: {reason}; {_AGAIN}.")
