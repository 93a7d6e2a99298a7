"""A capability that is withheld, an attack that teaches it, and what the model is good for besides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from specdef_jax.layout import AxesLike
from specdef_jax.select import Selector


@dataclass(frozen=True)
class Experiment:
    """Networks of one architecture, several seeds each, and fine-tuning towards what they shall not do.

    Attributes:
      name: as tables call it.
      description: one paragraph: model, data, attack.
      networks: variant -> one tree per seed. "known" has the capability and is never attacked, all others
        lack it: "ignorant" never learned it, others unlearned it.
      defended: the variant that defences are put on.
      apply: apply(params, inputs) -> outputs.
      loss: loss(params, *args), the attacker's, on the plain network.
      sample: sample(key) -> args of one step of the attack.
      judged_on: fixed args on which the attacker's loss is held against the target; held out.
      targets: loss at which the attack has succeeded, one per seed.
      capability: capability(plain params) -> 0 to 1, on held-out data.
      capability_name: as tables call it.
      retained: retained(plain params) -> loss on what the model is good for, in nats, held out.
      inputs: a benign batch, for directions that need activations.
      where: which layers to deform.
      control: leaf whose first entry the scalar control rescales.
      axes: of kernels that are not (in, out) or HWIO.
      samples: samples(plain params) -> what the report shows, lines of text, or grey images as
        {"width", "grey": a byte per pixel as hex}; None if nothing.
    """

    name: str
    description: str
    networks: Mapping[str, tuple[PyTree, ...]]
    defended: str
    apply: Callable[..., Array]
    loss: Callable[..., Array]
    sample: Partial
    judged_on: tuple[Any, ...]
    targets: tuple[float, ...]
    capability: Callable[[PyTree], Array]
    capability_name: str
    retained: Callable[[PyTree], Array]
    inputs: tuple[Any, ...]
    where: str | Selector
    control: str
    axes: Mapping[str, AxesLike] | None = None
    samples: Callable[[PyTree], list[Any]] | None = None

    @property
    def seeds(self) -> int:
        """How many pretrained networks there are."""
        return len(self.targets)
