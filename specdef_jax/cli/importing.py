"""The user's own functions, parameters and data, named on the command line as module:name."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from specdef_jax import hub
from specdef_jax.errors import ProblemError


def imported(reference: str) -> Any:
    """Return the attribute that "module:attribute" names; the working directory is searched too.

    Raises:
      ProblemError: the reference is malformed, the module cannot be imported, or has no such attribute.
    """
    module, colon, attribute = reference.partition(":")
    if not (module and colon and attribute):
        raise ProblemError(f"{reference!r} is no module:function; write for example mylosses:loss.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise ProblemError(f"the module of {reference!r} cannot be imported: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ProblemError(f"{module} has no {attribute!r}; look at its spelling.")
        found = getattr(found, part)
    return found


def arguments(reference: str | None) -> tuple[Any, ...]:
    """Return the data of "module:name", a tuple of arrays or a function that returns one; () for None.

    Raises:
      ProblemError: as imported.
    """
    if reference is None:
        return ()
    found = imported(reference)
    given: Any = found() if callable(found) else found
    return tuple(given)


def tree_of(source: str) -> PyTree:
    """Return the parameters of a checkpoint, or of module:name."""
    if ":" in source and not Path(source).exists():
        found = imported(source)
        return found() if callable(found) else found
    return hub.read_tree(Path(source)).params
