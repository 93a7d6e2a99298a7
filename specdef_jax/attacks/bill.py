"""What an attack costs and what its author must know."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, PyTree

from specdef_jax import trees
from specdef_jax.parametrization import Problem


class Knowledge(enum.IntEnum):
    """The rungs of the threat ladder, each including the ones below."""

    BLACK_BOX = 0
    WEIGHTS = 1
    WHICH_LAYERS = 2
    EVERYTHING = 3

    @property
    def label(self) -> str:
        """The rung in words."""
        return ("black box", "weights", "which layers", "everything")[self]


@dataclass(frozen=True)
class Bill:
    """The static price of an attack; steps and what they recover are measured by a race.

    Attributes:
      knowledge: the lowest rung of the ladder on which the attack is possible.
      added_parameters: scalars held in memory beyond those of the plain network.
      added_share: the same as a share of the plain network.
      added_flops: FLOPs of one loss gradient beyond those of the plain network, by XLA's cost
        analysis; NaN where the backend gives none.
      added_flops_share: the same as a share of the plain gradient.
      conversion_seconds: wall-clock time to turn the deformed tree into the problem.
    """

    knowledge: Knowledge
    added_parameters: int
    added_share: float
    added_flops: float
    added_flops_share: float
    conversion_seconds: float


@dataclass(frozen=True)
class Attack:
    """A trainable problem and its price."""

    name: str
    problem: Problem
    bill: Bill


def carry_out(
    name: str,
    convert: Callable[[], Problem],
    plain: Problem,
    *args: Any,
    knowledge: Knowledge = Knowledge.WHICH_LAYERS,
) -> Attack:
    """Convert a deformed network into what the attacker trains, timed, and write the bill.

    Args:
      name: of the attack.
      convert: builds the attacker's problem.
      plain: the same network undeformed, on the same loss, to compare with.
      args: data of one step, for the FLOPs.
      knowledge: what the attacker must know.
    """
    begin = time.perf_counter()
    task = jax.block_until_ready(convert())
    seconds = time.perf_counter() - begin
    # Arrays that the loss holds frozen count; read_back holds the same ones.
    added = trees.size((task.params, task.loss)) - trees.size((plain.params, plain.loss))
    flops, plain_flops = gradient_flops(task, *args), gradient_flops(plain, *args)
    return Attack(
        name,
        task,
        Bill(
            knowledge=knowledge,
            added_parameters=added,
            added_share=added / trees.size(plain.params),
            added_flops=flops - plain_flops,
            added_flops_share=(flops - plain_flops) / plain_flops,
            conversion_seconds=seconds,
        ),
    )


def gradient_flops(task: Problem, *args: Any) -> float:
    """Return XLA's estimate of the FLOPs of one loss gradient, NaN where there is none."""
    analysis = jax.jit(_gradient).lower(task, args).compile().cost_analysis()
    found = analysis[0] if isinstance(analysis, list) else analysis
    return float((found or {}).get("flops", float("nan")))


def _gradient(task: Problem, args: tuple[Any, ...]) -> tuple[Array, PyTree]:
    return jax.value_and_grad(task.loss)(task.params, *args)
