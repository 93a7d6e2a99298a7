"""What an attack costs and what its author must know."""

from __future__ import annotations

import enum
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, PyTree

from specdef_jax import trees
from specdef_jax.attacks.released import plain_problem
from specdef_jax.parametrization import Problem

Factory = Callable[..., optax.GradientTransformation]  # of a step size
Wrap = Callable[[Factory], Factory]


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

    A step is one loss gradient and the update of SGD, wrapped as the attack has it.

    Attributes:
      knowledge: the lowest rung of the ladder on which the attack is possible.
      added_parameters: scalars held in memory beyond those of the plain network.
      added_share: the same as a share of the plain network.
      injected_parameters: scalars held beyond those of the released network; negative if fewer.
      added_flops: FLOPs of one step beyond those of the plain network, by XLA's cost analysis; NaN where
        the backend gives none.
      added_flops_share: the same as a share of the plain step.
      peak_bytes: arguments and temporaries of one compiled step, by XLA; NaN where it gives none.
      plain_peak_bytes: the same of the plain network.
      conversion_seconds: wall-clock time to turn the deformed tree into the problem.
      step_seconds: median wall-clock time of one step; NaN until measured (`timed`).
      plain_step_seconds: the same of the plain network.
      examples: how many the attack itself reads, before training.
    """

    knowledge: Knowledge
    added_parameters: int
    added_share: float
    injected_parameters: int
    added_flops: float
    added_flops_share: float
    peak_bytes: float
    plain_peak_bytes: float
    conversion_seconds: float
    step_seconds: float = math.nan
    plain_step_seconds: float = math.nan
    examples: int = 0


@dataclass(frozen=True)
class Attack:
    """A trainable problem and its price.

    Attributes:
      name: of the attack.
      problem: what the attacker trains.
      bill: its price.
      wrap: what the attacker changes about the optimizer, factory -> factory, where a factory takes a step
        size to an optax transformation; None if nothing. What it returns is hashable and equal for equal
        factories, so that a race compiles it once, and reads all numbers from the parameters it is started
        on, so that one factory serves problems that differ in them.
    """

    name: str
    problem: Problem
    bill: Bill
    wrap: Wrap | None = None

    def optimizer(self, factory: Factory) -> Factory:
        """Return the optimizer to train the problem with, in the place of another one."""
        return factory if self.wrap is None else self.wrap(factory)


def carry_out(
    name: str,
    convert: Callable[[], Problem],
    loss: Callable[..., Array],
    deformed: PyTree,
    *args: Any,
    knowledge: Knowledge = Knowledge.WHICH_LAYERS,
    wrap: Wrap | None = None,
    examples: int = 0,
) -> Attack:
    """Convert a deformed network into what the attacker trains, timed, and write the bill.

    Args:
      name: of the attack.
      convert: builds the attacker's problem.
      loss: of the plain network.
      deformed: the released tree.
      args: data of one step, for the FLOPs and the memory.
      knowledge: what the attacker must know.
      wrap: what he changes about the optimizer.
      examples: how many the conversion reads.
    """
    begin = time.perf_counter()
    task = jax.block_until_ready(convert())
    seconds = time.perf_counter() - begin
    plain = plain_problem(loss, deformed)
    # Arrays that the loss holds frozen count; read_back holds the same ones.
    held, others = trees.size((task.params, task.loss)), trees.size(plain.loss)
    added = held - others - trees.size(plain.params)
    (flops, peak), (plain_flops, plain_peak) = (
        _analysis(_compiled(t, w, args)[0]) for t, w in ((task, wrap), (plain, None))
    )
    return Attack(
        name,
        task,
        Bill(
            knowledge=knowledge,
            added_parameters=added,
            added_share=added / trees.size(plain.params),
            injected_parameters=held - others - trees.size(deformed),
            added_flops=flops - plain_flops,
            added_flops_share=(flops - plain_flops) / plain_flops,
            peak_bytes=peak,
            plain_peak_bytes=plain_peak,
            conversion_seconds=seconds,
            examples=examples,
        ),
        wrap,
    )


def timed(
    attack: Attack, loss: Callable[..., Array], deformed: PyTree, *args: Any, repeats: int = 20
) -> Attack:
    """Return the attack with the seconds of a step on its bill, and those of the plain network.

    The two are timed in turn, so that what else the machine does falls on both.

    Args:
      attack: made from the same loss, tree and data.
      loss: of the plain network.
      deformed: the released tree.
      args: data of one step.
      repeats: steps timed of each; the bill holds the medians.
    """
    pair = (attack.problem, attack.wrap), (plain_problem(loss, deformed), None)
    steps = [_compiled(task, wrap, args) for task, wrap in pair]
    seconds = np.median([[_seconds(*step) for step in steps] for _ in range(repeats + 1)][1:], axis=0)
    bill = replace(attack.bill, step_seconds=float(seconds[0]), plain_step_seconds=float(seconds[1]))
    return replace(attack, bill=bill)


def _compiled(task: Problem, wrap: Wrap | None, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Return one step, compiled, and what it is called with."""
    factory = optax.sgd if wrap is None else wrap(optax.sgd)
    inputs = task, _begin(factory, task.params), args
    return _step.lower(factory, *inputs).compile(), inputs


# Jitted once for all, so that attacks of one shape share their compiled steps, and all of them the plain one.
@functools.partial(jax.jit, static_argnames="factory")
def _begin(factory: Factory, params: PyTree) -> PyTree:
    return factory(1.0).init(params)


@functools.partial(jax.jit, static_argnames="factory")
def _step(factory: Factory, task: Problem, state: PyTree, args: tuple[Any, ...]) -> tuple[PyTree, ...]:
    def value_fn(params: PyTree) -> Array:
        return task.loss(params, *args)

    value, grad = jax.value_and_grad(value_fn)(task.params)
    optimizer = optax.with_extra_args_support(factory(1.0))
    given = {"value": value, "grad": grad, "value_fn": value_fn}
    updates, state = optimizer.update(grad, state, task.params, **given)
    return optax.apply_updates(task.params, updates), state, value


def _analysis(compiled: Any) -> tuple[float, float]:
    """Return FLOPs and bytes of a compiled step, NaN where XLA gives none."""
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    found = costs[0] if isinstance(costs, list) else costs
    bytes_ = math.nan if memory is None else memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return float((found or {}).get("flops", math.nan)), float(bytes_)


def _seconds(step: Any, inputs: tuple[Any, ...]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(step(*inputs))
    return time.perf_counter() - begin
