"""Certificates: what was claimed, on which instances, both sides, and how strongly it is known.

A certificate that rests on an assumption which fails on the instance neither holds nor fails: it says
which assumption is violated. A NaN on either side never holds.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from specdef_jax.programs import free_when_many
from specdef_jax.words import Word

Kind = Literal["equality", "inequality", "tight", "refuted", "fit", "seen"]
EQUALITY = 1e-10  # relative; what float64 leaves of an identity after a few hundred operations


class Verdict(enum.StrEnum):
    """What became of a claim on its instances."""

    HOLDS = "holds"
    FAILS = "fails"
    VIOLATED = "assumption violated"


class AssumptionViolated(Exception):
    """An instance does not meet an assumption of the statement; the message says which."""


@dataclass(frozen=True)
class Search:
    """Evidence of a falsifier: surviving it proves nothing, and is kept apart from the verdict.

    Attributes:
      tried: random instances looked at.
      climbed: starts from which the slack was minimised by gradient descent.
      steps: descent steps from each.
      worst: smallest normalised slack met; negative if the claim was refuted.
    """

    tried: int
    climbed: int
    steps: int
    worst: float


@dataclass(frozen=True)
class Certificate:
    """One claim on one family of instances.

    Attributes:
      claim: in mathematics.
      instance: what it was evaluated on.
      kind: "equality" lhs = rhs; "inequality" lhs <= rhs; "tight" an inequality whose sides agree to
        the factor `bar`; "refuted" lhs > rhs was found, as claimed; "fit" a fitted number lhs with the
        predicted rhs inside its interval; "seen" a measurement, no theorem behind it.
      word: how strongly it is known, should it hold.
      verdict: holds, fails, or assumption violated.
      lhs, rhs: both sides on the worst instance.
      slack: rhs - lhs (relative error for an equality) on it, in units of `scale`.
      allowance: rounding allowance, in units of `scale`.
      scale: what slack and allowance are relative to.
      count: number of instances.
      bar: the factor or tolerance stated, NaN where there is none.
      violated: which assumption failed.
      search: what a falsifier tried.
      note: a counterexample, or what the reader should know.
    """

    claim: str
    instance: str
    kind: Kind
    word: Word
    verdict: Verdict
    lhs: float = math.nan
    rhs: float = math.nan
    slack: float = math.nan
    allowance: float = math.nan
    scale: float = 1.0
    count: int = 1
    bar: float = math.nan
    violated: str = ""
    search: Search | None = None
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the claim held; false also where an assumption is violated."""
        return self.verdict is Verdict.HOLDS

    @property
    def fails(self) -> bool:
        """Whether the claim was evaluated and is wrong."""
        return self.verdict is Verdict.FAILS

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, a non-finite number as a string."""
        return {k: _plain(v) for k, v in asdict(self).items()}


Certificates = tuple[Certificate, ...]


def equality(
    claim: str,
    instance: str,
    found: Any,
    expected: Any,
    *,
    allowance: float = EQUALITY,
    scale: Any = None,
    word: Word = Word.CHECKED,
    count: int | None = None,
    note: str = "",
) -> Certificate:
    """Certify found = expected on each instance, relative to its largest expected entry.

    Args:
      claim: in mathematics.
      instance: what it was evaluated on.
      found: (instances, ...) or any shape for a single instance (count = 1).
      expected: same shape.
      allowance: largest relative error.
      scale: per instance, instead of the largest |expected|.
      word: how strongly an equality within the allowance is known.
      count: number of instances, when the leading axis does not tell it.
      note: for the reader.
    """
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    found, expected = np.broadcast_arrays(found, expected)
    rows = (1 if found.ndim == 0 else len(found)) if count is None else 1
    difference = np.abs(found - expected).reshape(rows, -1).max(axis=1)
    size = np.abs(expected).reshape(rows, -1).max(axis=1) if scale is None else np.asarray(scale, float)
    size = np.broadcast_to(size, difference.shape)
    error = np.where(difference == 0, 0.0, difference / np.where(size > 0, size, 1.0))
    worst = _worst(-error)
    return Certificate(
        claim, instance, "equality", word,
        _verdict(bool(np.all(error <= allowance))),
        lhs=float(found.reshape(rows, -1)[worst].flat[0]),
        rhs=float(expected.reshape(rows, -1)[worst].flat[0]),
        slack=float(error[worst]), allowance=float(allowance), scale=float(size[worst]),
        count=rows if count is None else count, note=note,
    )  # fmt: skip


def inequality(
    claim: str,
    instance: str,
    lhs: Any,
    rhs: Any,
    *,
    allowance: Any = 0.0,
    scale: Any = 1.0,
    word: Word = Word.PROVED,
    search: Search | None = None,
    note: str = "",
) -> Certificate:
    """Certify lhs <= rhs + allowance on every instance.

    Args:
      claim: in mathematics.
      instance: what it was evaluated on.
      lhs: per instance.
      rhs: per instance.
      allowance: per instance or one for all, in the units of lhs.
      scale: per instance; slack and allowance are reported relative to it.
      word: how strongly it is known, should it hold.
      search: what a falsifier tried; its worst slack must not be negative.
      note: for the reader.
    """
    lhs, rhs, allowance, scale = _instances(lhs, rhs, allowance, scale)
    slack = (rhs - lhs) / scale
    worst = _worst(slack + allowance / scale)
    survived = search is None or search.worst >= 0
    return Certificate(
        claim, instance, "inequality", word,
        _verdict(bool(np.all(lhs <= rhs + allowance)) and survived),
        lhs=float(lhs[worst]), rhs=float(rhs[worst]), slack=float(slack[worst]),
        allowance=float(allowance[worst] / scale[worst]), scale=float(scale[worst]), count=lhs.size,
        search=search, note=note,
    )  # fmt: skip


def tight(
    claim: str,
    instance: str,
    lhs: Any,
    rhs: Any,
    *,
    factor: float,
    allowance: Any = 0.0,
    word: Word = Word.PROVED,
    note: str = "",
) -> Certificate:
    """Certify that lhs <= rhs holds and rhs <= factor lhs: no bound is better by more than the factor."""
    lhs, rhs, allowance = _instances(lhs, rhs, allowance)
    holds = (lhs <= rhs + allowance) & (rhs <= factor * lhs + allowance)
    worst = _worst(np.where(lhs != 0, -rhs / np.where(lhs == 0, 1, lhs), -np.inf))
    scale = abs(rhs[worst]) or 1.0
    return Certificate(
        claim, instance, "tight", word, _verdict(bool(np.all(holds))),
        lhs=float(lhs[worst]), rhs=float(rhs[worst]), slack=float((rhs - lhs)[worst] / scale),
        allowance=float(allowance[worst] / scale), scale=float(scale), count=lhs.size, bar=float(factor),
        note=note,
    )  # fmt: skip


def refuted(
    claim: str,
    instance: str,
    lhs: Any,
    rhs: Any,
    *,
    allowance: Any = 0.0,
    word: Word = Word.PROVED,
    search: Search | None = None,
    note: str = "",
) -> Certificate:
    """Certify that a claim lhs <= rhs is false: it holds as a certificate where some lhs > rhs + allowance.

    The sides shown are those of the strongest counterexample.
    """
    lhs, rhs, allowance = _instances(lhs, rhs, allowance)
    gap = lhs - rhs - allowance
    worst = int(np.argmax(np.where(np.isnan(gap), -np.inf, gap)))
    share = float(np.mean(gap > 0))
    told = f"{share:.1%} of the instances violate it" if lhs.size > 1 else ""
    return Certificate(
        claim, instance, "refuted", word, _verdict(bool(gap[worst] > 0)),
        lhs=float(lhs[worst]), rhs=float(rhs[worst]), slack=float(rhs[worst] - lhs[worst]),
        allowance=float(allowance[worst]), count=lhs.size, search=search,
        note="; ".join(x for x in (note, told) if x),
    )  # fmt: skip


def fit(
    claim: str,
    instance: str,
    found: float,
    predicted: float,
    *,
    tolerance: float,
    count: int,
    word: Word = Word.ESTIMATED,
    note: str = "",
) -> Certificate:
    """Certify that a fitted number lies within a stated tolerance of the predicted one."""
    error = abs(found - predicted)
    return Certificate(
        claim, instance, "fit", word, _verdict(bool(error <= tolerance)),
        lhs=float(found), rhs=float(predicted), slack=float(tolerance - error), allowance=0.0, count=count,
        bar=float(tolerance), note=note,
    )  # fmt: skip


def seen(
    claim: str, instance: str, found: float, expected: bool, *, against: float = math.nan, note: str = ""
) -> Certificate:
    """Record a measurement that no theorem stands behind; `expected` tells whether it came out as stated."""
    return Certificate(
        claim, instance, "seen", Word.ESTIMATED, _verdict(bool(expected)),
        lhs=float(found), rhs=float(against), note=note,
    )  # fmt: skip


def under_assumptions(
    claim: str, instance: str, evaluate: Callable[[], Certificate | Iterable[Certificate]]
) -> Certificates:
    """Return what `evaluate` certifies, or one certificate naming the assumption that is violated."""
    free_when_many()
    try:
        found = evaluate()
    except AssumptionViolated as violated:
        return (violation(claim, instance, str(violated)),)
    return (found,) if isinstance(found, Certificate) else tuple(found)


def violation(claim: str, instance: str, which: str) -> Certificate:
    """Return the certificate of a claim that does not apply to the instance."""
    return Certificate(claim, instance, "seen", Word.ESTIMATED, Verdict.VIOLATED, violated=which)


def refuses(claim: str, instance: str, certificates: Iterable[Certificate], which: str) -> Certificate:
    """Certify that an instance outside the assumptions was refused, by naming the assumption.

    Args:
      claim: what was refused.
      instance: the instance outside the assumptions.
      certificates: what its evaluation returned.
      which: a part of the name of the assumption.
    """
    certificates = tuple(certificates)
    named = bool(certificates) and all(
        c.verdict is Verdict.VIOLATED and which in c.violated for c in certificates
    )
    told = "; ".join(c.violated or f"{c.claim}: {c.verdict}" for c in certificates)
    return replace(
        violation(claim, instance, told),
        kind="refuted",
        verdict=_verdict(named),
        word=Word.CHECKED,
        note=f"assumption violated: {told}",
        violated="",
    )


def _instances(*sides: Any) -> tuple[np.ndarray, ...]:
    return tuple(
        np.atleast_1d(x).ravel() for x in np.broadcast_arrays(*(np.asarray(s, float) for s in sides))
    )


def _worst(slack: np.ndarray) -> int:
    """Return the index of the smallest slack; a NaN is worse than any number."""
    return int(np.argmin(np.where(np.isnan(slack), -np.inf, slack)))


def _verdict(holds: bool) -> Verdict:
    return Verdict.HOLDS if holds else Verdict.FAILS


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value
