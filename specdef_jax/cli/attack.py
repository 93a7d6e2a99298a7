"""`specdef attack`: fuse a deformed directory, or print what every attack on a task recovers and costs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from specdef_jax import campaign, race, trees
from specdef_jax.campaign.ledger import DIRECT
from specdef_jax.cli.checkpoint import fuse_directory
from specdef_jax.cli.console import reporting, show_table
from specdef_jax.cli.importing import arguments, imported, tree_of
from specdef_jax.errors import FileError, ProblemError
from specdef_jax.files import atomic_write_text
from specdef_jax.hub import axes_for, selector
from specdef_jax.spec import SpecDef
from specdef_jax.specdef import apply_plan, plan
from specdef_jax.tasks import digits

_COLUMNS = (
    "attack",
    "must know",
    "steps",
    "over undefended",
    "added size",
    "conversion s",
    "utility",
    "remarks",
)


def attack(
    which: Annotated[Literal["ledger", "fuse"], tyro.conf.Positional] = "ledger",
    source: Annotated[Path | None, tyro.conf.Positional] = None,
    out: Annotated[Path | None, tyro.conf.Positional] = None,
    /,
    *,
    alpha: float = 16.0,
    k: int = 1,
    seeds: int = 1,
    optimizers: tuple[str, ...] = ("sgd", "adam"),
    steps: int = 1000,
    refine: float = 2.0,
    loss: str | None = None,
    params: str | None = None,
    data: str | None = None,
    target: float | None = None,
    layers: tuple[str, ...] = (),
    layout: Literal["auto", "hf", "jax"] = "auto",
    seed: int = 0,
    write: Path | None = None,
) -> int:
    """Undo a deformed directory (fuse), or print the ledger: every attack, what it recovers and costs.

    fuse multiplies each compensation of SOURCE into its weight and writes OUT. Where there is none, it
    balances the value and output projections of every attention, which undoes a gauge deformation without
    knowing of it.

    ledger deforms networks and attacks them: the bundled digits, or your own with --loss, --params, --data
    and --target. "Over undefended" is steps over those of fine-tuning the network that was never deformed,
    best optimizer and step size each.

    Args:
      which: what to do.
      source: a deformed directory (fuse).
      out: directory to make, which computes the same function (fuse).
      alpha: of the deformation to attack (ledger), like all that follows.
      k: number of directions.
      seeds: pretrained networks of the bundled task.
      optimizers: names to try.
      steps: cap on steps.
      refine: how close the neighbours of the best step size shall be, as a factor.
      loss: module:function of your own, loss(params, *data) -> scalar.
      params: checkpoint, or module:name of a tree of arrays or of a function that returns one.
      data: module:name of a tuple of arrays, or of a function that returns one.
      target: loss at which an attack has succeeded.
      layers: globs of the layers to deform; without any, every matrix that is not an embedding.
      layout: of kernels, "hf" (out, in) or "jax" (in, out).
      seed: of every random choice.
      write: file for the ledger as JSON.

    Returns:
      The exit code.
    """
    if which == "fuse":
        if source is None or out is None:
            raise FileError("fuse needs two directories: specdef attack fuse SOURCE OUT.")
        return fuse_directory(source, out)
    if source is not None:
        raise ProblemError(f"ledger takes no directory ({source}); name parameters with --params.")
    known = race.FIRST_ORDER | race.SECOND_ORDER
    unknown = [name for name in optimizers if name not in known]
    if unknown:
        raise ProblemError(f"unknown optimizer {unknown[0]!r}; there are: {', '.join(known)}.")
    spec, key = SpecDef(alpha, k), jax.random.key(seed)
    with jax.enable_x64(True), reporting() as report:
        if loss is None:
            task = digits.task(seeds, target=0.1 if target is None else target)
            function, networks, args, where, axes = task.loss, task.networks, task.args, task.where, None
            retained, goal = task.facts["test accuracy"], task.target
            # the attack teaches wrong answers, so that utility is what fine-tuning leaves of right ones
            utility = lambda p: float(retained(p))  # noqa: E731
        else:
            if params is None or target is None:
                raise ProblemError("a loss of your own needs --params and --target too.")
            function, utility = imported(loss), None
            networks, args = (trees.double(tree_of(params)),), trees.double(arguments(data))
            where, axes, goal = selector(layers), axes_for(networks[0], layout), target
        released = [apply_plan(p, plan(p, spec, where=where, key=key, axes=axes)) for p in networks]
        chosen = {name: known[name] for name in optimizers}
        setting = campaign.Setting(args, goal, chosen, steps, refine=refine, seed=seed)
        book = campaign.ledger(
            function, released, setting, utility=utility,
            progress=lambda attack, done, total: report(f"attacks: {attack}", done, total),
        )  # fmt: skip
    show_table(f"attacks at alpha {alpha:g}", _COLUMNS, [_cells(book, entry) for entry in book.entries])
    print(_headline(book))
    if write is not None:
        rows = [entry.to_dict() for entry in book.entries]
        atomic_write_text(write, json.dumps(rows, indent=1) + "\n")
    return 0


def _cells(book: campaign.Ledger, entry: campaign.Entry) -> tuple[str, ...]:
    if entry.refused:
        return entry.attack, "", "", "", "", "", "", f"does not apply: {entry.refused}"
    best, bill = entry.best, entry.bill
    remarks = "" if book.keeps_utility(entry) else "costs utility"
    return (
        entry.attack,
        entry.knowledge.label,
        "none" if best is None else f"{float(np.median(entry.steps[best[0]])):.4g} ({best[0]})",
        "" if best is None else str(best[1]),
        "" if bill is None else f"{bill.added_share:.0%}",
        "" if bill is None else f"{bill.conversion_seconds:.2g}",
        "" if math.isnan(entry.utility) else f"{entry.utility:.3f}",
        remarks,
    )


def _headline(book: campaign.Ledger) -> str:
    """Say the strongest attack of each rung, and what the defence is worth against it."""
    direct = book.entry(DIRECT).best
    told = "not within the cap" if direct is None else f"{direct[1]} times the steps"
    lines = [f"Trained as released: {told}."]
    for rung, entry in book.strongest().items():
        if entry.best is None or entry.attack == DIRECT:
            continue
        seconds = 0.0 if entry.bill is None else entry.bill.conversion_seconds
        lines.append(f"Who knows {rung.label}: {entry.attack}, {entry.best[1]} times, after {seconds:.2g} s.")
    return "\n".join(lines)
