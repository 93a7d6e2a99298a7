"""Resistance against the price of the cheapest attack, over the ways to deform: is any of them worth more?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Array, PRNGKeyArray, PyTree

from specdef_jax.campaign.auto import Told, Verdict, auto
from specdef_jax.campaign.defence import of_tree
from specdef_jax.campaign.setting import Setting
from specdef_jax.spec import SpecDef
from specdef_jax.specdef import apply_plan, plan


@dataclass(frozen=True)
class Point:
    """One way to deform.

    Attributes:
      name: as given.
      verdict: of the automatic attack: its resistance, and the cheapest that works.
    """

    name: str
    verdict: Verdict

    @property
    def price(self) -> float:
        """Seconds of conversion of the cheapest attack that works; infinite if none does."""
        found = self.verdict.cheapest
        return float("inf") if found is None else found.conversion_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"price": self.price}


def frontier(
    loss: Callable[..., Array],
    params: PyTree,
    specs: Mapping[str, tuple[SpecDef, str]],
    setting: Setting,
    *,
    key: PRNGKeyArray,
    activations: Mapping[str, Mapping[str, Array]] | None = None,
    progress: Told | None = None,
) -> list[Point]:
    """Attack one network deformed in many ways.

    Args:
      loss: of the plain network.
      params: the plain network.
      specs: name -> (how to deform, glob of the layers).
      setting: of the races.
      key: for the directions.
      activations: name -> activations, for specs with directions "resistant" (see sd.plan).
      progress: progress(name, done, total).
    """
    points = []
    for i, (name, (spec, where)) in enumerate(specs.items()):
        if progress is not None:
            progress(name, i, len(specs))
        acts = (activations or {}).get(name)
        deformed = apply_plan(params, plan(params, spec, where=where, key=key, activations=acts))
        points.append(Point(name, auto(of_tree(loss, deformed, name), setting)))
    return points
