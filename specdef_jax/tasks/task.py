"""What a certification needs to know about a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, PyTree


@dataclass(frozen=True)
class Task:
    """Pretrained networks of one architecture and an attack on them by fine-tuning.

    Attributes:
      name: as reports call it.
      description: one paragraph for the report: model, data, attack.
      networks: one pretrained tree per seed.
      apply: apply(params, inputs) -> outputs.
      loss: loss(params, *args), the attacker's loss on the plain network.
      args: the attacker's data, all of it in every step.
      inputs: example inputs for preservation.
      where: glob of the layers to deform.
      control: name of the leaf whose first entry the scalar control rescales.
      target: attacker's loss at which the attack has succeeded.
      facts: name -> function of plain parameters, reported for every network (accuracies).
    """

    name: str
    description: str
    networks: tuple[PyTree, ...]
    apply: Callable[..., Array]
    loss: Callable[..., Array]
    args: tuple[Any, ...]
    inputs: tuple[Any, ...]
    where: str
    control: str
    target: float
    facts: dict[str, Callable[[PyTree], Array]]
