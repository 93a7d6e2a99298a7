"""Trained networks wait for a rerun in the output directory: one safetensors file per variant."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from specdef_jax import hub
from specdef_jax.errors import FileError

log = logging.getLogger(__name__)


def kept(
    out: Path | None, key: str, name: str, make: Callable[[], tuple[PyTree, ...]], *, fresh: bool
) -> tuple[PyTree, ...]:
    """Return networks, trees of nested dictionaries, from an earlier run or made and kept.

    Args:
      out: the output directory; None keeps nothing.
      key: what they must have been made with.
      name: of the variant.
      make: makes them.
      fresh: whether to make them in any case.
    """
    if out is None:
        return make()
    path = out / "state" / f"networks_{name}.safetensors"
    if not fresh and path.exists():
        try:
            found = hub.read_safetensors(path)
        except FileError as error:
            log.warning("%s; the networks are trained again.", error)
        else:
            if found.metadata.get("fingerprint") == key:
                log.info("%s: taken from %s", name, path)
                return _nested(found.params)
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = {str(i): network for i, network in enumerate(made)}
    hub.write_safetensors(path, tree, metadata={"fingerprint": key}, overwrite=True)
    return made


def _nested(arrays: dict[str, Any]) -> tuple[PyTree, ...]:
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        *above, last = name.split("/")
        at = found
        for part in above:
            at = at.setdefault(part, {})
        at[last] = jnp.asarray(array)
    return tuple(found[str(i)] for i in range(len(found)))
