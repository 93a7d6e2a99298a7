"""One safetensors file as a flat tree {name: array}, deformed weights as pairs of tensors.

Tensors are read by memory map: nothing is copied until it is used, and a tensor that is not
touched is written back byte by byte. The names are those of the file, dots and slashes included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from specdef_jax.errors import FileError
from specdef_jax.files import atomic_write, exists_already
from specdef_jax.hub.record import (
    Checkpoint,
    details_in,
    dump_record,
    load_record,
    to_deformed,
    warn_unrecorded,
)
from specdef_jax.hub.safetensors_header import NAMES, bytes_of, header_of, read_header
from specdef_jax.parametrization import Deformed, is_structured
from specdef_jax.trees import named_leaves

COMP = ".comp"
RECORD = "specdef"  # key in the file's metadata
_CHUNK = 1 << 26  # bytes written between two reports of progress, so that Ctrl-C is heard

Progress = Callable[[int, int], None]


def read_safetensors(path: Path) -> Checkpoint:
    """Read a file; params is {name: array}, with Deformed leaves where the file records them.

    Arrays are read-only views of the file, of its dtypes (bfloat16 and float8 through ml_dtypes).

    Raises:
      FileError: the file is missing, truncated, corrupt, or its record does not fit its tensors.
    """
    path = Path(path)
    tensors, metadata = read_header(path)
    data = np.memmap(path, np.uint8, mode="r")
    arrays: dict[str, Any] = {
        name: data[info.start : info.stop].view(info.dtype).reshape(info.shape)
        for name, info in tensors.items()
    }
    text = metadata.pop(RECORD, None)
    record = {} if text is None else load_record(text, str(path))
    for name, entry in record.items():
        weight, comp = arrays.get(name), arrays.pop(name + COMP, None)
        arrays[name] = to_deformed(name, weight, comp, entry, str(path))
    warn_unrecorded([n for n in arrays if n.endswith(COMP) and n.removesuffix(COMP) in arrays], str(path))
    return Checkpoint(arrays, metadata, details_in(record))


def write_safetensors(
    path: Path,
    params: PyTree,
    *,
    metadata: Mapping[str, str] | None = None,
    details: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a tree, nested keys joined by "/"; a Deformed leaf NAME becomes NAME and NAME.comp.

    Args:
      path: where to; renamed there when whole.
      params: tree of arrays and Deformed leaves.
      metadata: texts to keep in the header.
      details: per deformed kernel, what to record about it (see record.details_of).
      overwrite: replace an existing file.
      progress: progress(bytes written, bytes in all).

    Raises:
      FileError: the file exists or cannot be written, a leaf has a dtype that the format lacks, or
        two tensors would have one name.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise exists_already(path)
    tensors: dict[str, Any] = {}
    for name, leaf in _stored(params):
        if name in tensors:
            raise FileError(f"{path}: two tensors would be named '{name}'; rename one of them.")
        if not hasattr(leaf, "dtype") or leaf.dtype not in NAMES:
            found = getattr(leaf, "dtype", type(leaf).__name__)
            raise FileError(f"{path}: '{name}' is {found}, which safetensors cannot hold; cast or remove it.")
        tensors[name] = leaf
    record = dump_record(params, details or {})
    texts = dict(metadata or {}) | ({} if record is None else {RECORD: record})
    header, total = header_of({n: (np.dtype(x.dtype), x.shape) for n, x in tensors.items()}, texts)
    tell = progress or (lambda done, total: None)

    def write(temporary: Path) -> None:
        done = 0
        with temporary.open("xb") as file:
            file.write(header)
            for leaf in tensors.values():
                for part in bytes_of(leaf, _CHUNK):
                    file.write(part)
                    done += len(part)
                    tell(done, total)

    atomic_write(path, write)


def _stored(params: PyTree) -> Iterator[tuple[str, Any]]:
    for name, leaf in named_leaves(params, is_leaf=is_structured):
        if isinstance(leaf, Deformed):
            yield name, leaf.weight
            yield name + COMP, leaf.comp
        else:
            yield name, leaf
