"""Where finished stages wait for a rerun: one JSON file each, in the output directory only."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from specdef_jax import trees
from specdef_jax.certification.config import Config
from specdef_jax.environment import commit
from specdef_jax.errors import FileError
from specdef_jax.files import atomic_write_text
from specdef_jax.select import as_selector
from specdef_jax.tasks.task import Task

log = logging.getLogger(__name__)

SCHEMA = 1

Progress = Callable[[str, int, int], None]  # progress(stage, done, total)
Keep = Callable[[str, Callable[[], Any]], Any]  # keep(name, compute) -> stored or computed result


def fingerprint(config: Config, task: Task) -> str:
    """Return what a stored stage must have been computed with: config, task, code version, schema."""
    told = [task.name, task.description, as_selector(task.where).description, task.control, task.target]
    return digest_of([asdict(config), told], (task.networks, task.args, task.inputs))


def digest_of(told: Any, arrays: PyTree = ()) -> str:
    """Return a short name of plain values and arrays, of this code and this JAX."""
    text = json.dumps([told, commit(), SCHEMA, jax.__version__], sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for name, leaf in trees.named_leaves(arrays):
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def staged(out: Path | None, key: str, name: str, compute: Callable[[], Any], *, fresh: bool) -> Any:
    """Return a stage's result from the output directory, or compute and store it.

    Args:
      out: the directory; None stores nothing.
      key: what the result must have been computed with (fingerprint).
      name: of the stage.
      compute: gives the result.
      fresh: whether to compute it in any case.
    """
    if out is None:
        return plain(compute())
    path = out / "state" / f"{name}.json"
    if not fresh and path.exists():
        try:
            stored = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError):
            stored = {}
        if stored.get("fingerprint") == key:
            log.info("%s: taken from %s", name, path)
            return restore(stored["result"])
    result = plain(compute())
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, dumps({"fingerprint": key, "result": result}))
    return result


def plain(value: Any) -> Any:
    """Turn arrays, numpy scalars, tuples and enums into what JSON can say."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    return value


def dumps(value: Any) -> str:
    """Write strict JSON: non-finite numbers become the strings "nan", "inf" and "-inf"."""
    return json.dumps(_encode(value), indent=1, allow_nan=False) + "\n"


def loads(text: str, source: str) -> Any:
    """Read what dumps wrote; FileError if it is no JSON."""
    try:
        return restore(json.loads(text))
    except json.JSONDecodeError as error:
        raise FileError(f"{source} is not JSON: {error}. Run the certification again.") from error


def restore(value: Any) -> Any:
    """Undo the encoding of non-finite numbers."""
    if isinstance(value, dict):
        return {k: restore(v) for k, v in value.items()}
    if isinstance(value, list):
        return [restore(v) for v in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value
