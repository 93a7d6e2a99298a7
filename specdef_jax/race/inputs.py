"""What a race is given, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray

from specdef_jax import trees
from specdef_jax.errors import ProblemError, SpecError, StructureError
from specdef_jax.parametrization import Problem
from specdef_jax.race.grid import check_grid
from specdef_jax.race.runs import Factory

Optimizers = Mapping[str, Factory]
Grids = Sequence[float] | np.ndarray | Mapping[str, Sequence[float] | np.ndarray]


def stack(problems: Sequence[Problem]) -> Problem:
    """Return the problems stacked along a new leading axis; they must agree in structure and shapes."""
    if not problems:
        raise SpecError("no problem given; pass at least one.")
    first = jax.tree.structure(problems[0])
    for i, other in enumerate(problems):
        if jax.tree.structure(other) != first:
            raise StructureError(f"problem {i} has another structure than problem 0; race them apart.")
        for (name, a), b in zip(trees.named_leaves(problems[0]), jax.tree.leaves(other), strict=True):
            if (jnp.shape(a), jnp.result_type(a)) != (jnp.shape(b), jnp.result_type(b)):
                raise StructureError(
                    f"'{name}' is {jnp.result_type(b)}{jnp.shape(b)} in problem {i}, but "
                    f"{jnp.result_type(a)}{jnp.shape(a)} in problem 0; race them apart."
                )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)


def targets(target: float | Sequence[float], milestones: Sequence[float], count: int) -> np.ndarray:
    """Return (problems, targets): the milestones, and the target of each problem at last.

    Raises:
      SpecError: one target per problem was given for another number of problems, or the milestones do not
        descend to the target.
    """
    last = np.asarray(target, float)
    if last.shape not in ((), (count,)):
        raise SpecError(
            f"targets have shape {last.shape} for {count} problems; give one, or one per problem."
        )
    above = np.broadcast_to(np.asarray(milestones, float), (count, len(milestones)))
    found = np.concatenate([above, np.broadcast_to(last, (count,))[:, None]], axis=1)
    if (np.diff(found, axis=1) >= 0).any():
        raise SpecError(f"milestones {list(milestones)} must descend and end above the target {target}.")
    return found


def grids(step_sizes: Grids, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the grid of each optimizer, ascending."""
    found = {}
    for name in names:
        if isinstance(step_sizes, Mapping) and name not in step_sizes:
            raise SpecError(f"optimizer {name!r} has no grid of step sizes; grids: {', '.join(step_sizes)}.")
        found[name] = check_grid(name, step_sizes[name] if isinstance(step_sizes, Mapping) else step_sizes)
    return found


def check_orders(sample: Partial, key: PRNGKeyArray, orders: int) -> None:
    """Raise SpecError when several data orders are asked of a sample that ignores its key."""
    if orders == 1:
        return
    keys = jax.random.split(key, orders)
    draws = (jax.tree.leaves(sample(jax.random.fold_in(k, t))) for k in keys[:4] for t in range(4))
    first = next(draws)
    if all(  # most samples differ at once, and the rest is not drawn
        np.array_equal(a, b, equal_nan=True) for other in draws for a, b in zip(first, other, strict=True)
    ):
        raise SpecError(
            f"{orders} data orders of a sample that is the same whatever its key: the problem is "
            "deterministic, and copies of one run are no seeds. Race one order, or sample minibatches."
        )


@jax.jit  # one problem at a time, so that races of more or fewer share a program
def start_loss(problem: Problem, args: tuple[Any, ...]) -> Float[Array, ""]:
    """Return the loss at the start of a problem."""
    return problem.loss(problem.params, *args)


def check_start(problems: Sequence[Problem], args: Sequence[Any], targets: np.ndarray) -> None:
    """Raise ProblemError for a start that is not finite or meets its target already."""
    losses = [start_loss(one, tuple(args)) for one in problems]
    for i, (loss, target) in enumerate(zip(map(float, losses), targets, strict=True)):
        if not np.isfinite(loss):
            raise ProblemError(f"problem {i} starts at loss {loss}; repair its parameters or data.")
        if not np.isfinite(target):
            raise ProblemError(f"problem {i} has target {target}; give a finite loss.")
        if loss <= target:
            raise ProblemError(
                f"problem {i} starts at loss {loss:.4g}, which meets the target {target:.4g} already; "
                "choose a lower target."
            )


def check_ends(problems: Problem) -> None:
    """Raise SpecError for parameters whose ends no single process could hold."""
    for name, leaf in trees.named_leaves(problems.params):
        if not leaf.is_fully_addressable:
            raise SpecError(
                f"ends=True, but '{name}' lies on devices of several processes; race without, and have "
                "single runs again with race.replay, which leaves parameters where they are."
            )


def check_count(name: str, n: int) -> None:
    """Raise SpecError unless n is a positive integer."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise SpecError(f"{name} = {n!r}: must be a positive integer.")
