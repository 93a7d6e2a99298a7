"""Steps to target over seeds: ratios paired and bootstrapped, survival, recovery; honest about censoring."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass

import numpy as np
import scipy.stats
from jaxtyping import Float

from specdef_jax.errors import ProblemError

ENUMERATED_SEEDS = 6  # 6**6 resamples are enumerated, so small samples carry no Monte Carlo error
RESAMPLES = 20_000


@dataclass(frozen=True)
class Ratio:
    """A geometric mean of paired ratios.

    Attributes:
      value: the geometric mean; a lower bound if `censored`, NaN if nothing can be said.
      low, high: 95% bootstrap interval over seeds, of the log ratios; NaN for a single seed; high is
        infinite when `censored`.
      censored: some numerator did not reach the target within the cap, so the ratio is at least
        `value`.
      seeds: how many pairs.
    """

    value: float
    low: float
    high: float
    censored: bool
    seeds: int

    def __str__(self) -> str:
        """Return the ratio as a table prints it."""
        if math.isnan(self.value):
            return "n/a"
        sign = ">=" if self.censored else ""
        if math.isnan(self.low):
            return f"{sign}{self.value:.3g}"
        high = "inf" if math.isinf(self.high) else f"{self.high:.3g}"
        return f"{sign}{self.value:.3g} [{self.low:.3g}, {high}]"


@dataclass(frozen=True)
class Survival:
    """The share of runs still above their target, by steps (Kaplan and Meier 1958).

    Attributes:
      steps: at which a run arrives, ascending.
      share: of runs that are later than each of them.
      low, high: 95% confidence limits of the share (log-log transformed, NaN where there are none).
      median: steps after which half of the runs have arrived; NaN if fewer ever do within the cap.
      censored: how many never did.
    """

    steps: Float[np.ndarray, "events"]
    share: Float[np.ndarray, "events"]
    low: Float[np.ndarray, "events"]
    high: Float[np.ndarray, "events"]
    median: float
    censored: int


def survival(steps: Float[np.ndarray, "seeds"], cap: float) -> Survival:
    """Return the Kaplan-Meier estimate of steps to target; a NaN is a run censored at `cap`."""
    steps = np.asarray(steps, float)
    if np.isnan(steps).all():
        nothing = np.array([])
        return Survival(nothing, nothing, nothing, nothing, math.nan, steps.size)
    sf = scipy.stats.ecdf(_censored(steps, cap)).sf
    with warnings.catch_warnings():  # limits of a share of 0 or 1 are NaN, with a warning
        warnings.simplefilter("ignore", RuntimeWarning)
        limits = sf.confidence_interval(0.95, method="log-log")
    events = np.diff(sf.probabilities, prepend=1.0) < 0  # scipy lists the times of censoring too
    half = np.flatnonzero(sf.probabilities <= 0.5 + 1e-12)
    return Survival(
        steps=sf.quantiles[events],
        share=sf.probabilities[events],
        low=limits.low.probabilities[events],
        high=limits.high.probabilities[events],
        median=float(sf.quantiles[half[0]]) if half.size else math.nan,
        censored=int(np.isnan(steps).sum()),
    )


def logrank(a: Float[np.ndarray, "a"], b: Float[np.ndarray, "b"], cap: float) -> float:
    """Return the two-sided p-value of equal survival of two sets of runs; NaN is censored at `cap`.

    The two are not paired: use it for arms of different seeds, and `ratio_of_means` for the same ones.
    """
    return float(scipy.stats.logrank(_censored(a, cap), _censored(b, cap)).pvalue)


def _censored(steps: Float[np.ndarray, "seeds"], cap: float) -> scipy.stats.CensoredData:
    steps = np.asarray(steps, float)
    return scipy.stats.CensoredData.right_censored(np.where(np.isnan(steps), cap, steps), np.isnan(steps))


def recovery(trace: Float[np.ndarray, "records"], factor: float = 2.0) -> bool:
    """Tell whether losses rise above `factor` times the first and come back below it; NaN ends a trace.

    A loss that ends high has not recovered, one that turned infinite and came back has.
    """
    trace = np.asarray(trace, float)
    trace = trace[: int(np.argmax(np.isnan(trace)))] if np.isnan(trace).any() else trace
    high = np.flatnonzero(trace > factor * trace[0]) if trace.size else np.array([], int)
    return bool(high.size and (trace[high[0] :] <= factor * trace[0]).any())


def ratio_of_means(
    steps: Float[np.ndarray, "seeds"],
    baseline: Float[np.ndarray, "seeds"],
    cap: float | Float[np.ndarray, "seeds"],
) -> Ratio:
    """Return the geometric mean of steps / baseline over seeds, with its interval.

    A NaN in `steps` is a run censored at `cap` (one, or one per seed); it counts as the cap and makes
    the result a lower bound. A NaN in `baseline` leaves nothing to compare with: the value is NaN.

    Raises:
      ProblemError: the two have different numbers of seeds, so they cannot be paired.
    """
    steps, baseline = np.asarray(steps, float), np.asarray(baseline, float)
    if steps.shape != baseline.shape:
        raise ProblemError(
            f"steps of {steps.size} seeds cannot be paired with a baseline of {baseline.size}; "
            "race both with the same seeds."
        )
    censored = bool(np.isnan(steps).any())
    if np.isnan(baseline).any():
        return Ratio(math.nan, math.nan, math.nan, censored, steps.size)
    # A target met before the first step would give log 0; half a step is the resolution.
    logs = np.log(np.maximum(np.where(np.isnan(steps), cap, steps), 0.5))
    logs -= np.log(np.maximum(baseline, 0.5))
    low, high = bootstrap_interval(logs)
    return Ratio(
        value=float(np.exp(logs.mean())),
        low=float(np.exp(low)),
        high=math.inf if censored and steps.size > 1 else float(np.exp(high)),
        censored=censored,
        seeds=steps.size,
    )


def bootstrap_interval(
    values: Float[np.ndarray, "n"], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the expanded percentile bootstrap interval of the mean, NaN for fewer than two values.

    The plain percentile interval is too narrow for few values (at n = 5 by a third); the expanded one
    (Hesterberg, The American Statistician 69 (2015) 371, section 4.3) widens the percentiles to what a
    t interval would have. All n**n resamples are enumerated for up to six values; beyond, 20,000 are drawn.
    """
    n = values.size
    if n < 2:
        return math.nan, math.nan
    if n <= ENUMERATED_SEEDS:
        draws = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        draws = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    means = values[draws].mean(axis=1)
    t = scipy.stats.t.ppf((1 + level) / 2, n - 1)
    tail = scipy.stats.norm.cdf(-math.sqrt(n / (n - 1)) * t)
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))
