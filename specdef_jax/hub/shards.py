"""A directory of safetensors files as one read-only mapping from names to tensors.

Hugging Face's layout: config.json, and either one .safetensors file or several with an index
NAME.safetensors.index.json, {"metadata": {...}, "weight_map": {tensor: file}}. Headers are checked
when the directory is opened (see safetensors_header); of the data nothing is read until it is asked
for, and then one tensor at a time. No file outside of the directory is ever opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specdef_jax.errors import FileError
from specdef_jax.files import unreadable
from specdef_jax.hub.safetensors_header import TensorInfo, read_header

CONFIG = "config.json"
INDEX = ".safetensors.index.json"
MAY_HOLD_CODE = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".npz",
    ".npy",
    ".h5",
    ".msgpack",
    ".gguf",
    ".joblib",
    ".dill",
    ".hdf5",
    ".tar",
    ".ot",
    ".onnx",
    ".onnx_data",
    ".tflite",
)
CACHES = (".git", ".cache")  # directories that hold the original weights again
_STOCK = {
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
}  # what stock loaders read without an index
_AGAIN = "get the checkpoint again"


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes:
      name: of the file, within the directory.
      tensors: where each tensor lies, in the order of the data.
      metadata: texts of the header.
      data: offset of the first byte of data.
    """

    name: str
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Shards:
    """A checkpoint directory.

    Attributes:
      path: the directory.
      config: config.json.
      shards: the files, in the order of their names.
      index: name of the index file, None for a single file.
      index_metadata: "metadata" of the index.
      others: names of the other files, which are copied as they are.
      left_out: names of files that are never copied, as they may hold weights or code of another format.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    index: str | None
    index_metadata: dict[str, Any]
    others: tuple[str, ...]
    left_out: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_where", {n: s for s in self.shards for n in s.tensors})

    def __contains__(self, name: str) -> bool:
        """Tell whether there is a tensor of this name."""
        return name in self._where  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all tensors, file by file."""
        return (name for shard in self.shards for name in shard.tensors)

    def shard_of(self, name: str) -> Shard:
        """Return the file that holds a tensor."""
        return self._where[name]  # type: ignore[attr-defined]

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and place of a tensor."""
        return self.shard_of(name).tensors[name]

    def read(self, name: str) -> np.ndarray:
        """Read one tensor into memory.

        Raises:
          FileError: the file cannot be read, or is shorter than when it was opened.
        """
        info, path = self.info(name), self.path / self.shard_of(name).name
        try:
            with path.open("rb") as file:
                file.seek(info.start)
                data = file.read(info.stop - info.start)
        except OSError as error:
            raise unreadable(path, error) from error
        if len(data) != info.stop - info.start:
            raise FileError(f"{path}: '{name}' is cut off; the file changed while it was read. Start again.")
        return np.frombuffer(data, np.uint8).view(info.dtype).reshape(info.shape)

    def view(self, name: str) -> np.ndarray:
        """Map one tensor into memory, read-only: of it only what is used is read.

        Raises:
          FileError: the file cannot be opened.
        """
        info, path = self.info(name), self.path / self.shard_of(name).name
        try:
            data = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise FileError(f"{path} cannot be mapped into memory ({error}); {_AGAIN}.") from error
        return data[info.start : info.stop].view(info.dtype).reshape(info.shape)


def is_shards(path: Path | str) -> bool:
    """Tell whether a path is a directory as Hugging Face lays it out, of safetensors files or not."""
    path = Path(path)
    if not path.is_dir() or (path / "_METADATA").exists():
        return False
    found = {file.name.lower() for file in path.iterdir()}
    return CONFIG in found or any(".safetensors" in n or n.endswith(MAY_HOLD_CODE) for n in found)


def open_shards(path: Path | str) -> Shards:
    """Open a directory of safetensors files and check it without reading its data.

    Raises:
      FileError: no such directory, no config.json, no safetensors file (and what to do instead), a shard that
        is missing, truncated or corrupt, a name outside of the directory, or an index that does not fit.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileError(f"{path} is no directory; give the directory that holds config.json.")
    names = _names(path)
    config = _json(path / CONFIG) if CONFIG in names else None
    weights = [n for n in names if n.endswith(".safetensors") and "/" not in n]
    indexes = [n for n in names if n.endswith(INDEX) and "/" not in n]
    if not weights and not indexes:
        raise _nothing_to_read(path, names)
    if config is None:
        raise FileError(f"{path} has no {CONFIG}; copy the whole checkpoint, not its weights alone.")
    if len(indexes) > 1:
        raise FileError(
            f"{path} has {len(indexes)} indexes ({', '.join(indexes)}); keep one model per directory."
        )
    if indexes:
        index, metadata, shards = indexes[0], *_indexed(path, indexes[0])
    elif len(weights) == 1 or len(_STOCK & set(weights)) == 1:
        name = weights[0] if len(weights) == 1 else next(iter(_STOCK & set(weights)))
        index, metadata, shards = None, {}, [_shard(path, name)]
    else:
        raise FileError(
            f"{path} has {len(weights)} safetensors files and no index that says which belong together; "
            "get the *.safetensors.index.json too."
        )
    taken = {CONFIG, *(s.name for s in shards), *([index] if index else [])}
    rest = [n for n in names if n not in taken]
    unused = {n for n in rest if _is_left_out(n)}
    return Shards(
        path, config, tuple(shards), index, metadata,
        others=tuple(n for n in rest if n not in unused), left_out=tuple(sorted(unused)),
    )  # fmt: skip


def _is_left_out(name: str) -> bool:
    """Tell whether a file that is no part of the model may hold weights, or code."""
    return name.lower().endswith((".safetensors", INDEX, ".bin.index.json", *MAY_HOLD_CODE)) or (
        name.split("/")[0] in CACHES
    )


def _names(path: Path) -> list[str]:
    """Return the names of the regular files of the directory, subdirectories included."""
    try:
        found = sorted(p for p in path.rglob("*") if not p.is_dir())
    except OSError as error:
        raise unreadable(path, error) from error
    for file in found:
        _check_inside(path, file.relative_to(path).as_posix())
        if not file.is_file():
            raise FileError(f"{file} is no regular file, or a link to nothing; remove it.")
    return [file.relative_to(path).as_posix() for file in found]


def _check_inside(path: Path, name: str) -> None:
    """Refuse a file that is reached through a name or a link that leads out of the directory."""
    parts = Path(name).parts
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise FileError(f"{path}: the name {name!r} is no text; {_AGAIN}.") from error
    if not name or "\\" in name or "\0" in name or Path(name).is_absolute() or ".." in parts:
        raise FileError(f"{path}: the name {name!r} leads out of the directory; {_AGAIN}.")
    try:
        inside = (path / name).resolve().is_relative_to(path.resolve())
    except (OSError, RuntimeError) as error:
        raise FileError(f"{path / name} cannot be resolved ({error}); {_AGAIN}.") from error
    if not inside:
        raise FileError(
            f"{path / name} is a link that leads out of the directory; copy the checkpoint with its links "
            "resolved first (cp -rL)."
        )


def _json(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # what could not be written again
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is no JSON ({error}); {_AGAIN}.") from error
    if not isinstance(found, dict):
        raise FileError(f"{path} is no JSON object; {_AGAIN}.")
    return found


def _indexed(path: Path, index: str) -> tuple[dict[str, Any], list[Shard]]:
    """Return the metadata of an index and the shards it names, which must hold just what it says."""
    found = _json(path / index)
    weight_map, metadata = found.get("weight_map"), found.get("metadata", {})
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict) or not weight_map:
        raise FileError(f"{path / index} has no weight_map from tensors to files; {_AGAIN}.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise FileError(f"{path / index}: the file of '{tensor}' is {name!r}, not a name; {_AGAIN}.")
        _check_inside(path, name)
        if not name.endswith(".safetensors"):
            raise FileError(
                f"{path / index}: '{tensor}' lies in {name!r}, which is no safetensors file; {_AGAIN}."
            )
    shards = [_shard(path, name) for name in sorted(set(weight_map.values()))]
    held: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor in held:
                raise FileError(f"{path}: '{tensor}' is in {held[tensor]} and in {shard.name}; {_AGAIN}.")
            held[tensor] = shard.name
    for tensor in [*weight_map, *held]:
        if weight_map.get(tensor) != held.get(tensor):
            raise FileError(
                f"{path / index} puts '{tensor}' into {weight_map.get(tensor)}, but it is in "
                f"{held.get(tensor)}; {_AGAIN}."
            )
    return metadata, shards


def _shard(path: Path, name: str) -> Shard:
    if not os.path.isfile(path / name):  # a name too long is not there either
        raise FileError(f"{path / name} is missing; {_AGAIN}, all of its shards.")
    tensors, metadata = read_header(path / name)
    return Shard(name, tensors, metadata)


def _nothing_to_read(path: Path, names: list[str]) -> FileError:
    coded = [n for n in names if n.lower().endswith(MAY_HOLD_CODE)]
    if coded:
        return FileError(
            f"{path} holds {coded[0]} and no safetensors file. Files that may hold a pickle run code when "
            "they are loaded, so they never are: convert the checkpoint to safetensors first."
        )
    nested = sorted({n.rsplit("/", 1)[0] for n in names if "/" in n and n.endswith(".safetensors")})
    if nested:
        return FileError(f"{path} holds models in {', '.join(nested)}; give one of these directories.")
    return FileError(f"{path} holds no safetensors file; give the directory of a checkpoint.")
