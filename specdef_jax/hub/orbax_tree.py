"""A PyTree checkpoint of Orbax as a nested tree on the host, deformed weights as {weight, comp}.

Orbax stores a Deformed node as it stores any dataclass, as nested keys; a sidecar specdef.json in
the checkpoint directory says which nodes those are (see record). Orbax ignores it, so the
checkpoint stays one that Orbax restores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from specdef_jax.errors import FileError
from specdef_jax.files import atomic_directory, unreadable
from specdef_jax.hub.record import (
    Checkpoint,
    details_in,
    dump_record,
    load_record,
    to_deformed,
    warn_unrecorded,
)
from specdef_jax.trees import check_same_structure, path_name

SIDECAR = "specdef.json"


def read_orbax(path: Path) -> Checkpoint:
    """Restore a checkpoint into dicts and lists of numpy arrays, whatever devices it was saved from.

    Raises:
      FileError: the directory is no PyTree checkpoint, is damaged, or its sidecar does not fit it.
    """
    path = Path(path)
    _check_is_checkpoint(path)
    tree, metadata = _restore(path)
    try:
        text = (path / SIDECAR).read_text()
    except FileNotFoundError:
        return Checkpoint(_pair_up(tree, {}, str(path)), metadata)
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path / SIDECAR} cannot be read: {error}; get the checkpoint again.") from error
    record = load_record(text, str(path / SIDECAR))
    return Checkpoint(_pair_up(tree, record, str(path)), metadata, details_in(record))


def write_orbax(
    path: Path,
    params: PyTree,
    *,
    metadata: Mapping[str, Any] | None = None,
    details: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> None:
    """Save a tree as a PyTree checkpoint, which appears under `path` when it is whole.

    Args:
      path: the directory to make.
      params: tree of arrays and Deformed leaves.
      metadata: kept as Orbax's custom metadata.
      details: per deformed kernel, what to record about it (see record.details_of).
      overwrite: replace an existing directory.

    Raises:
      FileError: the directory exists or cannot be written, or Orbax cannot hold a leaf.
    """
    import orbax.checkpoint as ocp

    path = Path(path)
    record = dump_record(params, details or {})
    with jax.enable_x64(True):  # so that a float64 leaf stays float64
        arrays = jax.tree.map(
            lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, params
        )
        with atomic_directory(path, overwrite=overwrite) as temporary:
            args = ocp.args.PyTreeSave(arrays, custom_metadata=dict(metadata or {}) or None)
            try:
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                    checkpointer.save(temporary.absolute(), args=args, force=True)
            except OSError:
                raise
            except Exception as error:  # Orbax and its store have no common base for their errors
                raise FileError(f"{path} cannot be saved by Orbax: {error}") from error
            if record is not None:
                (temporary / SIDECAR).write_text(record)


def restore_orbax(path: Path, like: PyTree) -> PyTree:
    """Restore a checkpoint into the structure and onto the devices of `like`: weights, training state, all.

    Args:
      path: what write_orbax, or Orbax itself, saved.
      like: tree of arrays or jax.ShapeDtypeStruct, Deformed leaves and optimizer states included; a leaf
        with a sharding is restored to it, wherever it was saved from.

    Raises:
      FileError: the directory is no checkpoint, is damaged, or its leaves are not those of `like`.

    Example:
      >>> state = restore_orbax(path, jax.eval_shape(init, key))  # doctest: +SKIP
    """
    import orbax.checkpoint as ocp

    path = Path(path)
    _check_is_checkpoint(path)
    with jax.enable_x64(True):  # so that a float64 leaf stays float64
        wanted = jax.tree.map(_struct, like)
        placed = ocp.checkpoint_utils.construct_restore_args(wanted)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                # Before anything is read: Orbax leaves the reads under way behind when one of them fails.
                check_same_structure(_stored_structs(checkpointer, path), wanted, "the tree asked for")
                args = ocp.args.PyTreeRestore(item=wanted, restore_args=placed)
                return checkpointer.restore(path.absolute(), args=args)
        except Exception as error:  # Orbax and its store have no common base for their errors
            raise _unrestorable(path, error) from error


def _stored_structs(checkpointer: Any, path: Path) -> PyTree:
    """Return the shapes of a checkpoint's leaves, as its metadata tell them; the dtype is no part of it."""
    found = _metadata(checkpointer, path).tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), found)


def _metadata(checkpointer: Any, path: Path) -> Any:
    found = checkpointer.metadata(path.absolute()).item_metadata
    if found is None:
        raise ValueError("the metadata or the store is damaged")
    return found


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    array = np.asarray(leaf)
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _unrestorable(path: Path, error: Exception) -> FileError:
    reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    return FileError(f"{path} cannot be restored: {reason}. Get the checkpoint again.")


def _restore(path: Path) -> tuple[PyTree, dict[str, Any]]:
    import orbax.checkpoint as ocp

    def on_host(leaf: Any) -> ocp.RestoreArgs:
        is_array = isinstance(leaf, ocp.metadata.ArrayMetadata) and not _is_scalar(leaf)
        return ocp.RestoreArgs(restore_type=np.ndarray) if is_array else ocp.RestoreArgs()

    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = _metadata(checkpointer, path)
            args = jax.tree.map(on_host, found.tree, is_leaf=lambda leaf: leaf is None)
            tree = checkpointer.restore(path.absolute(), args=ocp.args.PyTreeRestore(restore_args=args))
    except Exception as error:  # Orbax and its store have no common base for their errors
        raise _unrestorable(path, error) from error
    return tree, dict(found.custom_metadata or {})


def _is_scalar(leaf: Any) -> bool:
    import orbax.checkpoint as ocp

    return isinstance(leaf, ocp.metadata.ScalarMetadata)


def _check_is_checkpoint(path: Path) -> None:
    try:
        if (path / "_METADATA").is_file():
            return
        nested = sorted(path.glob("*/_METADATA")) + sorted(path.glob("*/*/_METADATA"))
    except OSError as error:
        raise unreadable(path, error) from error
    hint = f"give one inside it: {nested[-1].parent}" if nested else "give the directory that holds _METADATA"
    raise FileError(f"{path} is not a PyTree checkpoint of Orbax; {hint}.")


def _pair_up(tree: PyTree, record: Mapping[str, Mapping[str, Any]], source: str) -> PyTree:
    """Replace each recorded {weight, comp} by a Deformed leaf."""
    missing, unrecorded = set(record), []

    def is_pair(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == {"weight", "comp"}

    def visit(path: tuple[Any, ...], node: Any) -> Any:
        name = path_name(path)
        if name in record:
            missing.discard(name)
            pair = node if is_pair(node) else {"weight": node, "comp": None}
            return to_deformed(name, pair["weight"], pair["comp"], record[name], source)
        if is_pair(node):
            unrecorded.append(f"{name}/comp")
        return node

    paired = jax.tree_util.tree_map_with_path(visit, tree, is_leaf=is_pair)
    if missing:
        raise FileError(
            f"{source}: the record names {sorted(missing)}, which the checkpoint lacks; "
            "get the checkpoint again."
        )
    warn_unrecorded(unrecorded, source)
    return paired
