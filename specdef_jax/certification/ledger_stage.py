"""The ledger of a certification: every attack on the strongest deformation, and its bill (THEORY.md 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdef_jax import campaign, race
from specdef_jax.attacks import ATTACKS
from specdef_jax.certification import arms as arm
from specdef_jax.certification.config import Config
from specdef_jax.certification.store import Progress
from specdef_jax.specdef import apply_plan
from specdef_jax.tasks.task import Task


def accounted(task: Task, config: Config, progress: Progress, folder: Path | None) -> dict[str, Any]:
    """Race every attack, strongest of each rung told apart.

    Args:
      task: the networks.
      config: settings.
      progress: told before each attack.
      folder: where finished races are kept.
    """
    alpha = config.alphas[-1]
    plans = arm.plans_for(task, config, "top")
    released = [apply_plan(p, q.with_alpha(alpha)) for p, q in zip(task.networks, plans, strict=True)]
    setting = campaign.Setting(
        task.args,
        task.target,
        {name: race.DEFAULT[name] for name in ("sgd", "adam")},
        steps=config.steps,
        decades=config.decades,
        refine=config.refine,
        seed=config.seed,
        folder=folder,
    )
    book = campaign.ledger(
        task.loss, released, setting, attacks=ATTACKS,
        progress=lambda attack, done, total: progress(f"attacks: {attack}", done, total),
    )  # fmt: skip
    strongest = {rung.label: entry.attack for rung, entry in book.strongest().items()}
    return {"alpha": alpha, "entries": [e.to_dict() for e in book.entries], "strongest": strongest}
