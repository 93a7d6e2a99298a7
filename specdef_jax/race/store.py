"""Finished chunks of a race on disk, so that a killed race goes on where it was."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from specdef_jax.files import atomic_write_bytes
from specdef_jax.race import runner
from specdef_jax.race.execution import Finished
from specdef_jax.race.runs import Factory, Results, Runs

log = logging.getLogger(__name__)

NUMBERS = ("steps", "compile_seconds", "seconds")
FIELDS = [field.name for field in fields(Results) if field.name != "ends"]  # of one array each


@dataclass(frozen=True)
class Store:
    """A folder with one file per chunk, named by the optimizer and by everything its results depend on.

    Attributes:
      folder: made when the first chunk is written. Files of other races in it are left alone.
    """

    folder: Path

    def keep(
        self,
        name: str,
        factory: Factory,
        runs: Runs,
        eval_every: int,
        lanes: int,
        race: Callable[[], Finished],
    ) -> Finished:
        """Return what an earlier race left of these runs, or race them and leave it for the next."""
        path = self.folder / f"{name}-{fingerprint(factory, runs, eval_every, lanes)}.npz"
        if path.exists():
            found = _read(path, runs)
            if found is not None:
                log.info("%s: taken from %s", name, path)
                return found
        finished = race()
        buffer = io.BytesIO()
        results = {name: getattr(finished.results, name) for name in FIELDS}
        ends = {f"end_{i}": leaf for i, leaf in enumerate(jax.tree.leaves(finished.results.ends))}
        np.savez(buffer, **results, **ends, **{f"told_{n}": getattr(finished, n) for n in NUMBERS})
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, buffer.getvalue())
        return finished


def fingerprint(factory: Factory, runs: Runs, eval_every: int, lanes: int) -> str:
    """Return a hash of the compiled program and of every number it is given: all that results depend on."""
    leaves, structure = jax.tree.flatten(runs)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    digest = hashlib.sha256(_program(factory, structure, shapes, eval_every, lanes))
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:24]


@functools.cache  # lowering a program takes longer than many a race
def _program(
    factory: Factory,
    structure: Any,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    eval_every: int,
    lanes: int,
) -> bytes:
    """Return a hash of the program itself, constants that functions close over included."""
    runs = jax.tree.unflatten(structure, shapes)
    begin = runner.start.lower(runs, factory=factory, lanes=lanes)
    state = jax.eval_shape(lambda runs: runner.start(runs, factory=factory, lanes=lanes), runs)
    move = runner.advance.lower(
        state, runs, jax.ShapeDtypeStruct((), int), factory=factory, lanes=lanes, eval_every=eval_every
    )
    digest = hashlib.sha256(jax.__version__.encode())
    for text in (jax.default_backend(), begin.as_text(), move.as_text()):
        digest.update(text.encode())
    return digest.digest()


def _read(path: Path, runs: Runs) -> Finished | None:
    """Return a stored chunk, or None for a file that is no such thing: it is raced and written again."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            ends = _ends(file, runs.problems.params) if runs.ends else None
            results = Results(**{name: file[name] for name in FIELDS}, ends=ends)
            return Finished(results, **{name: float(file[f"told_{name}"]) for name in NUMBERS})
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        log.warning("%s cannot be read; its runs are raced again", path)
        return None


def _ends(file: Any, params: PyTree) -> PyTree:
    """Return the stored parameters, in their dtypes: numpy forgets the name of the narrow ones."""
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(file[f"end_{i}"].view(leaf.dtype) for i, leaf in enumerate(leaves))
