"""How the tensors of a checkpoint are selected by name, and which axes they have by convention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from specdef_jax import select
from specdef_jax.parametrization import KernelAxes, is_structured
from specdef_jax.trees import named_leaves

Layout = Literal["auto", "hf", "jax"]

_TRAINING_STATE = "opt_state"


def selector(globs: Sequence[str] = ()) -> select.Selector:
    """Select by globs in which "." and "/" both part components, or every matrix without globs.

    "model.layers.0.mlp.up_proj.weight" is matched by "layers/*/mlp/up_proj/weight" and by
    "layers.*.mlp.up_proj.weight". Leaves under a component "opt_state" are never selected: they are
    the optimizer's, named like the weights, and deforming them would break a resumed training.
    """
    inner = select.match(*(glob.replace(".", "/") for glob in globs)) if globs else select.matrices()

    def choose(candidates: Sequence[select.Candidate], key: PRNGKeyArray) -> Sequence[select.Candidate]:
        renamed = [replace(c, name=c.name.replace(".", "/")) for c in candidates]
        weights = [c for c in renamed if _TRAINING_STATE not in c.name.split("/")]
        chosen = {c.name for c in inner.choose(weights, key)}
        return [c for c, new in zip(candidates, renamed, strict=True) if new.name in chosen]

    description = f"match({', '.join(map(repr, globs))})" if globs else inner.description
    return select.Selector(choose, description)


def axes_for(params: PyTree, layout: Layout = "auto") -> dict[str, KernelAxes]:
    """Return the axes of the tensors that are not laid out as JAX does, as sd.plan takes them.

    "hf" is PyTorch's convention: Linear (out, in), convolutions (out, in, *window). "auto" takes it
    for tensors called "weight", which is what PyTorch and Equinox call them, and JAX's convention
    for others. A wrong guess changes which side is deformed, never the function.
    """
    found = {}
    for name, leaf in named_leaves(params, is_leaf=is_structured):
        called_weight = name.replace(".", "/").rsplit("/", 1)[-1] == "weight"
        if layout == "hf" or (layout == "auto" and called_weight):
            axes = _hf_axes(leaf)
            if axes is not None:
                found[literal(name)] = axes
    # sd.plan takes the first glob that matches, and "w" matches "a/w" too: the longest name goes first.
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _hf_axes(leaf: Any) -> KernelAxes | None:
    rank = 0 if is_structured(leaf) else np.ndim(leaf)
    if rank not in (2, 4):  # rank 3 may be experts (in, out) or a 1-D convolution: sd.plan says so
        return None
    return KernelAxes(inputs=(1,), outputs=(0,), window=tuple(range(2, rank)))


def literal(name: str) -> str:
    """Return a glob that matches a name which may hold the signs of a glob."""
    return "".join("?" if sign in "*?[" else sign for sign in name)
