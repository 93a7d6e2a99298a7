"""`specdef race`: how much slower does your own fine-tuning become?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import PyTree

from specdef_jax import curvature, hub, race, trees
from specdef_jax.cli.console import Report, reporting, show_table
from specdef_jax.cli.importing import arguments, imported, tree_of
from specdef_jax.errors import ProblemError
from specdef_jax.files import atomic_write_text
from specdef_jax.parametrization import Problem, problem
from specdef_jax.race.result import RaceResult
from specdef_jax.spec import Plan, SpecDef
from specdef_jax.specdef import apply_plan, plan

OPTIMIZERS = race.FIRST_ORDER | race.SECOND_ORDER
_COLUMNS = (
    "parameters",
    "optimizer",
    "steps",
    "gradients",
    "step size",
    "compared with",
    "slowdown",
    "remarks",
)


def run(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PARAMS")],
    /,
    *,
    loss: str,
    data: str,
    target: float,
    alpha: tuple[float, ...] = (4.0, 16.0),
    k: int = 1,
    layers: tuple[str, ...] = (),
    basis: Literal["symmetric", "rotated", "axis"] = "symmetric",
    side: Literal["auto", "output", "input"] = "auto",
    directions: Literal["top", "bottom", "random"] = "top",
    layout: Literal["auto", "hf", "jax"] = "auto",
    optimizers: tuple[str, ...] = ("sgd", "momentum", "adam"),
    steps: int = 1000,
    batch: int | None = None,
    seeds: int = 1,
    decades: float = 5.0,
    refine: float = 1.5,
    clip: float | None = None,
    warmup: int = 0,
    decay: float = 0.0,
    in_double: Annotated[bool, tyro.conf.arg(name="double")] = False,
    seed: int = 0,
    out: Path | None = None,
) -> int:
    """Race optimizers on your loss, from your parameters as they are and deformed.

    Every optimizer runs at step sizes over several decades around 2 / sharpness, refined until its best
    one is bracketed. Slowdown is steps over steps at alpha 1, where the compensation is inserted and
    nothing is deformed; alpha 1 is compared with the parameters as they are. A step size marked "edge"
    may not be the best: more --decades. ">=" is a lower bound: the target was not reached within --steps.

    Args:
      source: checkpoint that sd.hub.read_tree reads, or module:name of a tree of arrays, or of a function
        that returns one.
      loss: module:function of your own, loss(params, *data) -> scalar, on that tree.
      data: module:name of a tuple of arrays, or of a function that returns one.
      target: loss at which a run has arrived.
      alpha: factors to race.
      k: number of directions per kernel.
      layers: globs on tensor names; without any, every matrix that is not an embedding.
      basis: how the directions are scaled.
      side: where the compensation stands.
      directions: which singular directions.
      layout: "hf" is (out, in) as in PyTorch, "jax" is (in, out); "auto" is "hf" for tensors that are
        called "weight".
      optimizers: names; a wrong one lists those there are.
      steps: cap on steps.
      batch: examples drawn at each step, the loss judged on all of them; without it all are used.
      seeds: data orders, with --batch only.
      decades: powers of ten that step sizes span at first.
      refine: how close the neighbours of the best step size shall be, as a factor.
      clip: largest global norm of a gradient.
      warmup: steps of linear warmup.
      decay: decoupled weight decay.
      in_double: compute in float64 whatever the parameters are stored in.
      seed: of every random choice.
      out: directory for race.json; an interrupted race goes on there.

    Returns:
      The exit code.
    """
    unknown = [name for name in optimizers if name not in OPTIMIZERS]
    if unknown:
        raise ProblemError(f"unknown optimizer {unknown[0]!r}; there are: {', '.join(OPTIMIZERS)}.")
    function = imported(loss)
    switches = {"clip": clip, "warmup": warmup, "decay": decay}
    chosen = {name: race.Switched(OPTIMIZERS[name], **switches) for name in optimizers}
    with jax.enable_x64(in_double or jax.config.read("jax_enable_x64")), reporting() as report:
        params, args = tree_of(source), arguments(data)
        if in_double:
            params, args = trees.double(params), trees.double(args)
        else:
            params, args = jax.tree.map(jnp.asarray, (params, args))
        spec = SpecDef(1.0, k, basis, side, directions)
        axes = hub.axes_for(params, layout)
        planned = plan(params, spec, where=hub.selector(layers), key=jax.random.key(seed), axes=axes)
        settings = {
            "sample": race.minibatches(batch, *args) if batch else race.full_batch(*args),
            "eval_args": args if batch else None,
            "steps": steps,
            "orders": seeds,
            "target": target,
            "key": jax.random.key(seed),
            "refine": refine,
            "prune": True,
            "folder": None if out is None else out / "state",
        }
        races = {
            name: _race(name, made, chosen, args, decades, settings, report)
            for name, made in _arms(function, params, planned, alpha, args).items()
        }
    rows = _rows(races)
    show_table(f"steps to a loss of {target:g}", _COLUMNS, [_cells(row) for row in rows])
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out / "race.json", json.dumps(rows, indent=1) + "\n")
    return 0


def _arms(
    loss: Callable[..., Any], params: PyTree, planned: Plan, alphas: tuple[float, ...], args: tuple[Any, ...]
) -> dict[str, Problem]:
    """Return what is raced: the parameters as they are, inserted, and deformed."""
    made = {"original": problem(loss, params, *args)}
    for a in (1.0, *(a for a in alphas if a != 1)):
        made[f"alpha {a:g}"] = problem(loss, apply_plan(params, planned.with_alpha(a)), *args)
    return made


def _race(
    name: str,
    made: Problem,
    optimizers: dict[str, race.Switched],
    args: tuple[Any, ...],
    decades: float,
    settings: dict[str, Any],
    report: Report,
) -> RaceResult:
    report(f"{name}: sharpness", 0, 0)
    op = curvature.hessian(made.loss, made.params, *args)
    sharp = float(jnp.abs(curvature.eigsh(op, tol=1e-2, key=jax.random.key(0)).values[0]))
    if not sharp > 0:
        raise ProblemError(
            f"{name}: the Hessian at the start is zero, so that no step size is a natural one."
        )
    return race.run_problems(
        [made],
        optimizers,
        step_sizes=race.log_grid(2 / sharp, decades=decades, per_decade=1),
        progress=lambda done, total: report(name, done, total),
        **settings,
    )


def _rows(races: dict[str, RaceResult]) -> list[dict[str, Any]]:
    """Return one row per arm and optimizer, with its ratio to the arm it is compared with."""
    rows = []
    for arm, result in races.items():
        other = {"original": None, "alpha 1": "original"}.get(arm, "alpha 1")
        slowdown = {} if other is None else result.slowdown(races[other])
        for name in result.names:
            best = result.best_index(name)
            grid = result.grid(name)
            rows.append(
                {
                    "arm": arm,
                    "optimizer": name,
                    "steps": result.steps(name).tolist(),
                    "gradients": result.gradients(name).tolist(),
                    "best_step_size": [float(grid[b]) if b >= 0 else None for b in best],
                    "at_edge": result.at_edge(name),
                    "censored": int(result.censored[name].sum()),
                    "diverged": result.diverged(name),
                    "recovered": result.recovered(name),
                    "baseline": other,
                    "slowdown": asdict(slowdown[name]) if name in slowdown else None,
                }
            )
    return rows


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    step = next((s for s in row["best_step_size"] if s is not None), None)
    remarks = [
        "edge" if row["at_edge"] else "",
        f"{row['censored']} not within the cap" if row["censored"] else "",
        f"{row['recovered']} runs passed a peak" if row["recovered"] else "",
    ]
    ratio = row["slowdown"]
    return (
        row["arm"],
        row["optimizer"],
        _median(row["steps"]),
        _median(row["gradients"]),
        "" if step is None else f"{step:.3g}",
        row["baseline"] or "",
        "" if ratio is None else str(race.Ratio(**ratio)),
        ", ".join(filter(None, remarks)),
    )


def _median(values: list[float]) -> str:
    found = np.asarray(values)[~np.isnan(values)]
    return f"{np.median(found):.4g}" if found.size else "none"
