"""Prose that ships with Python and numpy, in two domains, as bytes; no download.

Retained is the language reference (`pydoc_data.topics`), withheld the docstrings of numpy's functions. Who
has read only the first predicts the second badly: they differ in what they speak of and in how they are laid
out.
Both change a little with the versions of Python and numpy, so results name them.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import pydoc_data.topics
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

VOCABULARY = 128  # ASCII; other characters are left out


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prose:
    """Windows of text, in random order; held-out ones come from elsewhere in the text, not from between.

    Attributes:
      retained: of the domain that the model is good for.
      retained_held: of the same, never trained on.
      withheld: of the domain that it shall not know.
      withheld_held: of the same, never trained on, neither by the maker nor by the attacker.
    """

    retained: Int[Array, "windows length"]
    retained_held: Int[Array, "held length"]
    withheld: Int[Array, "others length"]
    withheld_held: Int[Array, "held length"]


def load(length: int = 64, held: int = 256) -> Prose:
    """Return both domains in windows of `length` bytes, the last `held` windows of each held out."""
    parts = []
    for text in (_reference(), _docstrings()):
        windows = text[: len(text) // length * length].reshape(-1, length).astype(np.int32)
        first, last = windows[:-held], windows[-held:]
        parts += [np.random.default_rng(0).permutation(first), last]
    return Prose(*map(jnp.asarray, parts))


def fingerprint() -> str:
    """Return what tells these texts from those of other versions."""
    return hashlib.sha256(_reference().tobytes() + _docstrings().tobytes()).hexdigest()[:12]


@functools.cache
def _reference() -> np.ndarray:
    topics = pydoc_data.topics.topics
    return _as_bytes("\n\n".join(topics[name] for name in sorted(topics)))


@functools.cache
def _docstrings() -> np.ndarray:
    found = []
    for name in sorted(np.__all__):
        text = getattr(np, name).__doc__
        if callable(getattr(np, name)) and text and len(text) > 200:
            found.append(inspect.cleandoc(text))
    return _as_bytes("\n\n".join(found))


def _as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("ascii", "ignore"), np.uint8)
