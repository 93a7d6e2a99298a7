"""What a certification needs to know about a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, PRNGKeyArray, PyTree

from specdef_jax.layout import AxesLike
from specdef_jax.select import Selector
from specdef_jax.spec import Plan, SpecDef
from specdef_jax.specdef import plan


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
      where: which layers to deform, a glob or a selector.
      control: name of the leaf whose first entry the scalar control rescales.
      target: attacker's loss at which the attack has succeeded.
      facts: name -> function of plain parameters, reported for every network (accuracies).
      axes: of kernels that are not (in, out) or HWIO, as sd.plan takes them.
      released: released(plan) -> what deforming the first network in the format it is stored in changes; None
        where it is not stored.
    """

    name: str
    description: str
    networks: tuple[PyTree, ...]
    apply: Callable[..., Array]
    loss: Callable[..., Array]
    args: tuple[Any, ...]
    inputs: tuple[Any, ...]
    where: str | Selector
    control: str
    target: float
    facts: dict[str, Callable[[PyTree], Array]]
    axes: Mapping[str, AxesLike] | None = None
    released: Callable[[Plan], dict[str, Any]] | None = None

    def plan(self, spec: SpecDef, key: PRNGKeyArray, network: int = 0) -> Plan:
        """Return how to deform one of the networks."""
        return plan(self.networks[network], spec, where=self.where, key=key, axes=self.axes)
