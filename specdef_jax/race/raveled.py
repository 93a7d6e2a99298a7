"""A problem with its parameters in vectors: a smaller program for the same steps.

A step of a network with many small leaves is compiled leaf by leaf: gradient, moments and update, what a race
writes down and what it starts the next run with. In one vector the rest of a UNet's program compiles in half
the time, and its steps are faster too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from specdef_jax import trees
from specdef_jax.errors import ProblemError
from specdef_jax.parametrization import Problem
from specdef_jax.sharding import sharding_of


def raveled(problem: Problem) -> Problem:
    """Return the problem with params {dtype: vector (n,)}, the leaves of that dtype one after the other.

    Optimizers that treat every entry alike (SGD, Adam, Lion) take the steps they take on the tree, to
    rounding. Those that read shapes or names (Muon, Adafactor, K-FAC) or draw leaf by leaf (Sophia) do not:
    give them the tree. `read_back` gives the plain parameters, as before.

    Raises:
      ProblemError: a leaf lies on several devices, which one vector would gather.
    """
    for name, leaf in trees.named_leaves(problem.params):
        if sharding_of(leaf) is not None:
            raise ProblemError(f"'{name}' lies on several devices; race the tree as it is.")
    leaves, structure = jax.tree.flatten(problem.params)
    shapes, dtypes = tuple(leaf.shape for leaf in leaves), tuple(leaf.dtype.name for leaf in leaves)
    read = _OnVectors(structure, shapes, dtypes)
    vectors = {
        dtype: jnp.concatenate([leaf.ravel() for leaf in leaves if leaf.dtype.name == dtype])
        for dtype in sorted(set(dtypes))
    }
    return Problem(vectors, Partial(read, problem.loss), Partial(read, problem.read_back))


@dataclass(frozen=True)
class _OnVectors:
    """A function of a tree as a function of vectors; equal for equal layouts, so that problems stack."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    def __call__(self, fn: Callable[..., Any], vectors: dict[str, Array], *args: Any) -> Any:
        return fn(self._tree(vectors), *args)

    def _tree(self, vectors: dict[str, Array]) -> PyTree:
        parts = {}
        for dtype, vector in vectors.items():
            sizes = [math.prod(s) for s, d in zip(self.shapes, self.dtypes, strict=True) if d == dtype]
            # split, whose transpose is one concatenation: slices would be added up, each padded to the whole
            parts[dtype] = iter(jnp.split(vector, list(itertools.accumulate(sizes))[:-1]))
        leaves = [
            next(parts[dtype]).reshape(shape) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]
        return self.structure.unflatten(leaves)
