"""The ledger: every attack on a task, what it recovers and its bill, strongest of each rung first.

An attack recovers the speed of fine-tuning the network that was never deformed. The headline of a rung is the
attack that needs fewest steps there among those that keep the utility: an attack that breaks what the network
is good for is no success.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Array, PyTree

from specdef_jax.attacks import ATTACKS, Attack, Bill, Knowledge
from specdef_jax.campaign.setting import Setting
from specdef_jax.errors import SpecDefError
from specdef_jax.parametrization import Problem, merge, problem
from specdef_jax.race.result import RaceResult
from specdef_jax.race.statistics import Ratio

UNDEFENDED, DIRECT = "undefended", "fine-tune as released"
Make = Callable[..., Attack]
Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Entry:
    """One line.

    Attributes:
      attack: its name.
      knowledge: lowest rung on which it is possible.
      steps: optimizer -> steps per network at the best step size, NaN where the target was not reached.
      evaluations: the same in gradients.
      recovered: optimizer -> steps over those of fine-tuning the undefended network; 1 is everything.
      seconds: wall-clock throughput seconds to the target, median over networks, best optimizer.
      utility: of the plain networks at the end, mean over networks; NaN where it was not asked for.
      bill: of the first network; None where nothing was converted.
      refused: why the attack does not apply, else empty.
    """

    attack: str
    knowledge: Knowledge
    steps: Mapping[str, np.ndarray]
    evaluations: Mapping[str, np.ndarray]
    recovered: Mapping[str, Ratio]
    seconds: float
    utility: float
    bill: Bill | None
    refused: str = ""

    @property
    def best(self) -> tuple[str, Ratio] | None:
        """The optimizer that recovers most, and what; None if none arrives in every network."""
        arrived = {n: r for n, r in self.recovered.items() if not r.censored and not math.isnan(r.value)}
        return min(arrived.items(), key=lambda item: item[1].value) if arrived else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "attack": self.attack,
            "knowledge": self.knowledge.label,
            "steps": {n: s.tolist() for n, s in self.steps.items()},
            "evaluations": {n: s.tolist() for n, s in self.evaluations.items()},
            "recovered": {n: asdict(r) for n, r in self.recovered.items()},
            "seconds": self.seconds,
            "utility": self.utility,
            "bill": None if self.bill is None else asdict(self.bill) | {"knowledge": self.knowledge.label},
            "refused": self.refused,
        }


@dataclass(frozen=True)
class Ledger:
    """All entries; the first is the undefended network, the second the released one trained directly."""

    entries: tuple[Entry, ...]
    utility_budget: float

    def entry(self, name: str) -> Entry:
        """Return the entry of an attack."""
        return next(e for e in self.entries if e.attack == name)

    def keeps_utility(self, entry: Entry) -> bool:
        """Tell whether an entry's utility is within the budget of the undefended one's; if unknown, yes."""
        before = self.entry(UNDEFENDED).utility
        return (
            math.isnan(before) or math.isnan(entry.utility) or entry.utility >= before - self.utility_budget
        )

    def strongest(self) -> dict[Knowledge, Entry]:
        """Return, per rung that has one, the attack that recovers most within the utility budget."""
        found: dict[Knowledge, Entry] = {}
        for entry in self.entries[1:]:
            if entry.best is None or not self.keeps_utility(entry):
                continue
            held = found.get(entry.knowledge)
            if held is None or held.best is None or entry.best[1].value < held.best[1].value:
                found[entry.knowledge] = entry
        return dict(sorted(found.items()))


def ledger(
    loss: Callable[..., Array],
    released: Sequence[PyTree],
    setting: Setting,
    *,
    attacks: Mapping[str, Make] = ATTACKS,
    utility: Callable[[PyTree], float] | None = None,
    utility_budget: float = 0.05,
    progress: Told | None = None,
) -> Ledger:
    """Race every attack on deformed networks, and the undefended networks beside.

    Args:
      loss: loss(params, *args) of the plain network.
      released: deformed trees, one per network, alike in structure.
      setting: of the races.
      attacks: name -> attack(loss, deformed, *args). One that refuses is listed with its reason.
      utility: utility(plain params) -> number, the larger the better, of what shall be retained.
      utility_budget: how much of it an attack may cost beyond fine-tuning the undefended network.
      progress: progress(attack, done, total).
    """
    total = len(attacks) + 2
    plain = [problem(loss, merge(tree), *setting.args) for tree in released]
    base = setting.run(plain)
    entries = [_entry(UNDEFENDED, Knowledge.BLACK_BOX, plain, base, base, setting, utility)]
    direct = [problem(loss, tree, *setting.args) for tree in released]
    entries.append(_entry(DIRECT, Knowledge.BLACK_BOX, direct, setting.run(direct), base, setting, utility))
    for i, (name, make) in enumerate(attacks.items()):
        if progress is not None:
            progress(name, i + 2, total)
        try:
            made = [make(loss, tree, *setting.args) for tree in released]
            optimizers = {n: made[0].optimizer(f) for n, f in setting.optimizers.items()}
            raced = setting.run([m.problem for m in made], optimizers)
        except SpecDefError as error:
            entries.append(
                Entry(name, Knowledge.EVERYTHING, {}, {}, {}, math.nan, math.nan, None, str(error))
            )
            continue
        bill = made[0].bill
        entries.append(
            _entry(
                name,
                bill.knowledge,
                [m.problem for m in made],
                raced,
                base,
                setting,
                utility,
                bill,
                optimizers,
            )
        )
    return Ledger(tuple(entries), utility_budget)


def _entry(
    name: str,
    knowledge: Knowledge,
    problems: Sequence[Problem],
    raced: RaceResult,
    base: RaceResult,
    setting: Setting,
    utility: Callable[[PyTree], float] | None,
    bill: Bill | None = None,
    optimizers: Mapping[str, Any] | None = None,
) -> Entry:
    recovered = raced.slowdown(base)
    entry = Entry(
        attack=name,
        knowledge=knowledge,
        steps={n: raced.steps(n) for n in raced.names},
        evaluations={n: raced.gradients(n) for n in raced.names},
        recovered=recovered,
        seconds=min((float(np.median(raced.seconds_to_target(n))) for n in raced.names), key=_finite_first),
        utility=math.nan,
        bill=bill,
    )
    if utility is None or entry.best is None:
        return entry
    best = entry.best[0]
    factory = (optimizers or setting.optimizers)[best]
    at, grid, steps = raced.best_index(best), raced.grid(best), raced.steps(best)
    found = [
        utility(setting.trained(one, factory, float(grid[b]), float(s)))
        for one, b, s in zip(problems, at, steps, strict=True)
    ]
    return replace(entry, utility=float(np.mean(found)))


def _finite_first(seconds: float) -> float:
    return math.inf if math.isnan(seconds) else seconds
