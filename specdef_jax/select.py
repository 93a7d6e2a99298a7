"""Which leaves to deform: selectors over named leaves, composable with & and |.

    where = match("mlp/*/kernel") & largest(3)
    where = match("head/kernel") | random(2)

`a & b` lets b choose among what a chose; `a | b` is the union.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from specdef_jax.errors import SelectionError


@dataclass(frozen=True)
class Candidate:
    """A leaf that could be selected: its name, shape and dtype, no values."""

    name: str
    shape: tuple[int, ...]
    dtype: jnp.dtype

    @property
    def is_matrix(self) -> bool:
        """Whether the leaf can be the kernel of a linear map, going by name, rank and dtype."""
        kernel = len(self.shape) >= 2 and jnp.issubdtype(self.dtype, jnp.floating)
        return kernel and not self.is_embedding and not self.is_bias

    @property
    def is_embedding(self) -> bool:
        """Whether the name says that the leaf is looked up, not multiplied."""
        *_, parent, leaf = "", *re.split(r"[/.]", self.name)
        return "embed" in leaf.lower() or ("embed" in parent.lower() and leaf != "kernel")

    @property
    def is_bias(self) -> bool:
        """Whether the name says that the leaf is added, as the matrix of biases of a stack of experts is."""
        return self.name.lower().endswith("bias")


Choice = Callable[[Sequence[Candidate], PRNGKeyArray], Sequence[Candidate]]


@dataclass(frozen=True)
class Selector:
    """A choice among candidates.

    Attributes:
      choose: maps candidates and a key to the chosen candidates.
      description: what error messages call it.
    """

    choose: Choice
    description: str

    def __and__(self, other: Selector) -> Selector:
        """Let `other` choose among what this selector chose."""

        def choose(candidates: Sequence[Candidate], key: PRNGKeyArray) -> Sequence[Candidate]:
            first, second = jax.random.split(key)
            return other.choose(self.choose(candidates, first), second)

        return Selector(choose, f"{self.description} & {other.description}")

    def __or__(self, other: Selector) -> Selector:
        """Choose what either selector chooses, in the order of the candidates."""

        def choose(candidates: Sequence[Candidate], key: PRNGKeyArray) -> Sequence[Candidate]:
            first, second = jax.random.split(key)
            chosen = {c.name for c in self.choose(candidates, first)}
            chosen |= {c.name for c in other.choose(candidates, second)}
            return [c for c in candidates if c.name in chosen]

        return Selector(choose, f"({self.description} | {other.description})")


def match(*globs: str) -> Selector:
    """Select leaves whose name matches one of the globs.

    Names join tree keys by "/"; NNX's ".value" is dropped. "*" and "?" stay within one component,
    "**" crosses components, and a leading "**/" is implied. "[ab]" and "[!ab]" are one character.

    Example:
      >>> match("dense_*/kernel").description
      "match('dense_*/kernel')"
    """
    if not globs or not all(isinstance(glob, str) and glob for glob in globs):
        raise SelectionError(f"match{globs!r}: give at least one glob, each a non-empty string.")
    patterns = [_pattern(glob) for glob in globs]

    def choose(candidates: Sequence[Candidate], _: PRNGKeyArray) -> Sequence[Candidate]:
        return [c for c in candidates if any(p.fullmatch(c.name) for p in patterns)]

    return Selector(choose, f"match({', '.join(map(repr, globs))})")


def matrices() -> Selector:
    """Select every floating leaf of rank two or more that is not named as an embedding or a bias."""
    return Selector(lambda candidates, _: [c for c in candidates if c.is_matrix], "matrices()")


def largest(n: int) -> Selector:
    """Select the n matrices with the most entries (ties in tree order)."""
    _check_count("largest", n)

    def choose(candidates: Sequence[Candidate], _: PRNGKeyArray) -> Sequence[Candidate]:
        ranked = sorted((c for c in candidates if c.is_matrix), key=lambda c: -math.prod(c.shape))
        chosen = {c.name for c in ranked[:n]}
        return [c for c in candidates if c.name in chosen]

    return Selector(choose, f"largest({n})")


def random(n: int) -> Selector:
    """Select n matrices uniformly without replacement, or all when there are fewer."""
    _check_count("random", n)

    def choose(candidates: Sequence[Candidate], key: PRNGKeyArray) -> Sequence[Candidate]:
        pool = [c for c in candidates if c.is_matrix]
        order = jax.random.permutation(key, len(pool)).tolist()[:n] if pool else []
        return [pool[i] for i in sorted(order)]

    return Selector(choose, f"random({n})")


def as_selector(where: Selector | str | Sequence[str] | None) -> Selector:
    """Accept a selector, one glob, several globs, or None for every matrix."""
    if where is None:
        return matrices()
    if isinstance(where, Selector):
        return where
    return match(where) if isinstance(where, str) else match(*where)


def matches(glob: str, name: str) -> bool:
    """Tell whether a name matches one glob, in the grammar of `match`.

    Raises:
      SelectionError: a [...] of the glob is malformed.
    """
    return _pattern(glob).fullmatch(name) is not None


def _check_count(name: str, n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise SelectionError(f"{name}({n!r}): the number of leaves must be a positive integer.")


def _pattern(glob: str) -> re.Pattern[str]:
    translated = []
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", glob, flags=re.DOTALL):
        special = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        if token.startswith("[") and len(token) > 1:
            translated.append(token.replace("[!", "[^", 1))
        else:
            translated.append(special.get(token, re.escape(token)))
    try:
        return re.compile("(?:[^/]+/)*" + "".join(translated))
    except re.error as error:
        raise SelectionError(f"match({glob!r}): not a glob ({error}); mend its [...].") from error
