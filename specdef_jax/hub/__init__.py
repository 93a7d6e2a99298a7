"""Checkpoints on disk: read a tree, write a tree, deform, verify and undo whole directories.

A file is a safetensors file, a directory an Orbax PyTree checkpoint or config.json with safetensors
files. None of these formats can hold code, and no pickle is ever loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from specdef_jax.errors import FileError
from specdef_jax.hub.attention import AttentionPair, find_pairs, pair_at
from specdef_jax.hub.deforming import BUDGET
from specdef_jax.hub.deforming import deform_directory as deform
from specdef_jax.hub.fusing import Fused, inserted
from specdef_jax.hub.fusing import fuse_directory as fuse
from specdef_jax.hub.gauging import matrices_of
from specdef_jax.hub.loading import Model, load
from specdef_jax.hub.manifest import Manifest, Placement, StoredLayer, load_manifest
from specdef_jax.hub.naming import Layout, axes_for, selector
from specdef_jax.hub.orbax_tree import read_orbax, restore_orbax, write_orbax
from specdef_jax.hub.record import Checkpoint, details_of
from specdef_jax.hub.safetensors_file import read_safetensors, write_safetensors
from specdef_jax.hub.shards import Shards, is_shards, open_shards
from specdef_jax.hub.spectra import Spectrum, spectrum_of, suspect_gauge
from specdef_jax.hub.tensors import Tensor, kernel_axes, tensors_of
from specdef_jax.hub.verifying import Verification
from specdef_jax.hub.verifying import verify_directory as verify

__all__ = [
    "BUDGET",
    "AttentionPair",
    "Checkpoint",
    "Fused",
    "Layout",
    "Manifest",
    "Model",
    "Placement",
    "Shards",
    "Spectrum",
    "StoredLayer",
    "Tensor",
    "Verification",
    "axes_for",
    "deform",
    "details_of",
    "find_pairs",
    "fuse",
    "inserted",
    "is_safetensors",
    "is_shards",
    "kernel_axes",
    "load",
    "load_manifest",
    "matrices_of",
    "open_shards",
    "pair_at",
    "read_orbax",
    "read_safetensors",
    "read_tree",
    "restore_orbax",
    "selector",
    "spectrum_of",
    "suspect_gauge",
    "tensors_of",
    "verify",
    "write_orbax",
    "write_safetensors",
    "write_tree",
]


def is_safetensors(path: Path | str) -> bool:
    """Tell whether a path is, or would be, a safetensors file; other paths are Orbax directories."""
    return Path(path).suffix == ".safetensors"


def read_tree(path: Path | str) -> Checkpoint:
    """Read a safetensors file, a directory of them, or an Orbax checkpoint.

    Deformed kernels come back as Deformed leaves; arrays of files are read-only views.

    Raises:
      FileError: the path is missing, of neither format, truncated or corrupt.

    Example:
      >>> from specdef_jax import merge
      >>> plain = merge(read_tree("deformed.safetensors").params)  # doctest: +SKIP
    """
    path = Path(path)
    if not path.exists():
        raise FileError(f"{path} does not exist; check the path.")
    if is_shards(path):
        return _merged([read_safetensors(path / shard.name) for shard in open_shards(path).shards])
    if path.is_dir():
        return read_orbax(path)
    if not is_safetensors(path):
        raise FileError(
            f"{path} is neither a directory nor a .safetensors file; convert the checkpoint first "
            "(files that may hold a pickle, such as .bin, .pt and .npz, are never loaded)."
        )
    return read_safetensors(path)


def write_tree(
    path: Path | str,
    params: PyTree,
    *,
    metadata: Mapping[str, Any] | None = None,
    details: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a tree as a safetensors file if `path` ends so, as an Orbax checkpoint otherwise.

    Args:
      path: where to; it appears when it is whole.
      params: tree of arrays and Deformed leaves.
      metadata: what to keep beside the tensors (texts, in a safetensors file).
      details: per deformed kernel, what to record about it (see details_of).
      overwrite: replace what is there.
      progress: progress(bytes written, bytes in all); Orbax reports none.

    Raises:
      FileError: the path exists or cannot be written, or the format cannot hold a leaf.
    """
    path = Path(path)
    if is_safetensors(path):
        write_safetensors(
            path, params, metadata=metadata, details=details, overwrite=overwrite, progress=progress
        )
    else:
        write_orbax(path, params, metadata=metadata, details=details, overwrite=overwrite)


def _merged(files: list[Checkpoint]) -> Checkpoint:
    """Return the files of a directory, which open_shards has checked to be disjoint, as one."""
    params, metadata, details = {}, {}, {}
    for file in files:
        params |= file.params
        metadata |= file.metadata
        details |= file.details
    return Checkpoint(params, metadata, details)
