"""An ensemble of attacks without parameters to set, cheapest first, that stops at the first that works.

What AutoAttack is to adversarial examples: a defence that has not been through it has not been measured. It
takes any defence that keeps the function, SpecDef or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax

from specdef_jax.attacks import ATTACKS, Attack, Bill, Knowledge
from specdef_jax.campaign.defence import Defence
from specdef_jax.campaign.relative import relative
from specdef_jax.campaign.setting import Setting
from specdef_jax.errors import SpecDefError
from specdef_jax.parametrization import Problem, is_structured, merge, problem
from specdef_jax.race.statistics import Ratio

Told = Callable[[str, int, int], None]
RELEASED = "as released"
Tried = tuple[str, Knowledge, float, Problem, Callable[[Any], Any], Bill | None]


@dataclass(frozen=True)
class Trial:
    """One attack that was tried.

    Attributes:
      attack: its name.
      knowledge: lowest rung on which it is possible.
      optimizer: with which it needed fewest steps; empty if it never arrived or does not apply.
      ratio: its steps over those of fine-tuning the undefended network.
      steps: to the target, NaN where it never arrived.
      conversion_seconds: to turn the released tree into what is trained.
      race_seconds: of wall-clock time that trying it took.
      bill: of the attack; None for those that convert nothing.
      refused: why it does not apply, else empty.
    """

    attack: str
    knowledge: Knowledge
    optimizer: str
    ratio: float
    steps: float
    conversion_seconds: float
    race_seconds: float
    bill: Bill | None = None
    refused: str = ""


@dataclass(frozen=True)
class Verdict:
    """What was tried, in that order, and the cheapest that worked.

    Attributes:
      defence: its name.
      trials: the last one worked, if any did.
      cheapest: the trial that worked, or None.
      resistance: steps of the best optimizer on the released tree, over those undefended; a lower bound if
        `resistance_is_bound`.
      resistance_is_bound: the released tree did not reach the target within the cap.
    """

    defence: str
    trials: tuple[Trial, ...]
    cheapest: Trial | None
    resistance: float
    resistance_is_bound: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Say it in a sentence."""
        bound = "at least " if self.resistance_is_bound else ""
        start = f"{self.defence}: {bound}{self.resistance:.3g} times the steps, trained as released"
        if self.cheapest is None:
            return f"{start}; none of {len(self.trials)} attacks undoes it."
        one = self.cheapest
        if one.attack == RELEASED:
            return f"{start}; no attack is needed."
        return (
            f"{start}; {one.attack} (knows: {one.knowledge.label}) brings that to {one.ratio:.3g}, after "
            f"{one.conversion_seconds:.2g} seconds of conversion."
        )


def auto(
    defence: Defence,
    setting: Setting,
    *,
    within: float = 2.0,
    attacks: Mapping[str, Callable[..., Attack]] = ATTACKS,
    progress: Told | None = None,
) -> Verdict:
    """Attack a defence until something works.

    Args:
      defence: what was released.
      setting: of the races.
      within: an attack works if it needs at most so many times the steps of the undefended network.
      attacks: those on Deformed leaves, tried where there are such.
      progress: progress(attack, done, total).

    Raises:
      ProblemError: the defence changes the function, or the undefended network never reaches the target.
    """
    direct = defence.problem(*setting.args)
    base = setting.run([problem(defence.loss, defence.undefended, *setting.args)])
    reached = [float(base.steps(n)[0]) for n in base.names if not math.isnan(base.steps(n)[0])]
    trials: list[Trial] = []
    found = None
    total = 3 + len(attacks)
    for name, knowledge, seconds, task, wrap, bill in _ensemble(defence, direct, setting, attacks, trials):
        if progress is not None:
            progress(name, len(trials), total)
        begin = time.perf_counter()
        raced = setting.run([task], {n: wrap(f) for n, f in setting.optimizers.items()})
        ratios = raced.slowdown(base)
        best = min(ratios, key=lambda n: _order(ratios[n]))
        one = ratios[best]
        arrived = not one.censored and not math.isnan(one.value)
        trial = Trial(
            name, knowledge, best if arrived else "", float(raced.steps(best)[0] / min(reached)),
            float(raced.steps(best)[0]), seconds, time.perf_counter() - begin, bill,
        )  # fmt: skip
        trials.append(trial)
        if trial.ratio <= within:
            found = trial
            break
    first = next(t for t in trials if not t.refused)
    bound = math.isnan(first.ratio)
    resistance = setting.steps / min(reached) if bound else first.ratio
    return Verdict(defence.name, tuple(trials), found, resistance, bound)


def _ensemble(
    defence: Defence,
    direct: Problem,
    setting: Setting,
    attacks: Mapping[str, Callable[..., Attack]],
    trials: list[Trial],
) -> Iterator[Tried]:
    """Give what to try, cheapest first; what does not apply is written into the trials."""
    yield RELEASED, Knowledge.BLACK_BOX, 0.0, direct, _same, None
    if defence.change is None:
        yield "relative steps", Knowledge.WEIGHTS, 0.0, direct, relative, None
    made: list[Attack] = []
    for name, make in attacks.items():
        try:
            made.append(make(defence.loss, defence.params, *setting.args))
        except SpecDefError as error:
            refusal = str(error)
            trials.append(Trial(name, Knowledge.EVERYTHING, "", math.nan, math.nan, 0.0, 0.0, None, refusal))
    for one in sorted(made, key=_price):
        yield one.name, one.bill.knowledge, one.bill.conversion_seconds, one.problem, one.optimizer, one.bill
    structured = any(map(is_structured, jax.tree.leaves(defence.params, is_leaf=is_structured)))
    if structured or defence.change is not None:
        begin = time.perf_counter()
        plain = merge(defence.params) if defence.change is None else defence.change(defence.params)
        seconds = time.perf_counter() - begin
        rung = Knowledge.WHICH_LAYERS if structured else Knowledge.EVERYTHING
        yield "read back", rung, seconds, problem(defence.loss, plain, *setting.args), _same, None


def _price(attack: Attack) -> tuple[int, float, float]:
    bill = attack.bill
    flops = 0.0 if math.isnan(bill.added_flops_share) else bill.added_flops_share
    return int(bill.knowledge), max(bill.added_share, 0.0) + max(flops, 0.0), bill.conversion_seconds


def _order(ratio: Ratio) -> float:
    return math.inf if ratio.censored or math.isnan(ratio.value) else ratio.value


def _same(factory: Any) -> Any:
    return factory
