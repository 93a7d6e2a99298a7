"""The measurements of a certification, each a function of task and config to plain JSON values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import PRNGKeyArray

from specdef_jax import attacks, bounds, curvature, race, trees
from specdef_jax.certification import arms as arm
from specdef_jax.certification.config import Config
from specdef_jax.parametrization import Problem, loss_on, problem
from specdef_jax.precision import FORMATS, alpha_max
from specdef_jax.preservation import bit_identical, preservation
from specdef_jax.race.control import scalar_control
from specdef_jax.spec import Plan, SpecDef
from specdef_jax.specdef import apply_plan, plan
from specdef_jax.subspace import Status
from specdef_jax.tasks.task import Task
from specdef_jax.words import Word

CONGRUENCE_TOLERANCE = 1e-10
BIT_ALPHA = 2.0**12


Progress = Callable[[str, int, int], None]  # progress(stage, done, total)
Keep = Callable[[str, Callable[[], Any]], Any]  # keep(name, compute) -> stored or computed result


def task_facts(task: Task, config: Config) -> dict[str, Any]:
    """Describe the networks: sizes, accuracies before the attack, and the planned layers."""
    facts = {name: [float(fact(p)) for p in task.networks] for name, fact in task.facts.items()}
    layers = []
    for directions in ("top", "bottom"):
        for path, layer in arm.plans_for(task, config, directions)[0].items():
            layers.append(
                {
                    "path": path,
                    "directions": directions,
                    "side": layer.side,
                    "features": layer.U.shape[-2],
                    "k": layer.U.shape[-1],
                    "singular_values": layer.singular_values,
                    "residual": float(jnp.max(layer.residual)),
                    "status": Status(int(jnp.max(layer.status))).name.lower(),
                }
            )
    return {
        "name": task.name,
        "description": task.description,
        "parameters": trees.size(task.networks[0]),
        "seeds": len(task.networks),
        "facts": facts,
        "layers": layers,
        "target": task.target,
        "start_loss": [float(task.loss(p, *task.args)) for p in task.networks],
    }


def preserved(task: Task, config: Config, progress: Progress) -> dict[str, Any]:
    """Measure preservation by alpha and number format, and bit identity (THEORY.md 1)."""
    params = task.networks[0]
    key = jax.random.key(config.seed)
    rows = []
    for i, alpha in enumerate(config.error_alphas):
        progress("preservation", i, len(config.error_alphas) + 1)
        spec = SpecDef(alpha=alpha, k=config.k, budget=math.inf)
        deformed = apply_plan(params, plan(params, spec, where=task.where, key=key))
        certificate = preservation(task.apply, params, deformed, *task.inputs)
        rows += [asdict(f) | {"alpha": alpha} for f in certificate.formats]
    progress("preservation", len(config.error_alphas), len(config.error_alphas) + 1)
    bits = []
    for basis in ("axis", "rotated"):
        spec = SpecDef(alpha=BIT_ALPHA, k=config.k, basis=basis, budget=math.inf)
        layers = plan(params, spec, where=task.where, key=key)
        reference = params if basis == "axis" else apply_plan(params, layers.with_alpha(1.0))
        for dtype in ("float64", "float32", "bfloat16"):
            same = bit_identical(task.apply, reference, apply_plan(params, layers), *task.inputs, dtype=dtype)
            bits.append({"basis": basis, "dtype": dtype, "alpha": BIT_ALPHA, "identical": same})
    share = _energy(task, config)
    limits = [
        {
            "dtype": name,
            "basis": basis,
            "budget": 0.01,
            "alpha_max": alpha_max(form, basis, 0.01, energy=share),
        }
        for name, form in FORMATS.items()
        for basis in ("symmetric", "axis")
    ]
    progress("preservation", len(config.error_alphas) + 1, len(config.error_alphas) + 1)
    return {
        "formats": rows,
        "bit_identity": bits,
        "alpha_max": limits,
        "energy_share": share,
        "word": Word.PROVED,
        "holds": all(r["holds"] for r in rows) and all(b["identical"] for b in bits),
    }


def curved(task: Task, config: Config, progress: Progress) -> dict[str, Any]:
    """Measure spectra and check congruence and sandwich on the first network (THEORY.md 2)."""
    key = jax.random.key(config.seed)
    layers = arm.plans_for(task, config, "top")[0]
    params = task.networks[0]
    rows = []
    for i, alpha in enumerate(config.alphas):
        progress("curvature", i, len(config.alphas))
        at_alpha = layers.with_alpha(alpha)
        deformed = problem(task.loss, apply_plan(params, at_alpha), *task.args)
        op = curvature.hessian(deformed.loss, deformed.params, *task.args)
        eigen = curvature.eigsh(op, k=config.eigenvalues, tol=1e-9, key=key)
        top = curvature.eigsh(op, which="LA", tol=1e-9, key=key)
        sandwich = bounds.sandwich(task.loss, params, at_alpha, *task.args, key=key)
        measured = jnp.abs(eigen.values[0])
        congruence = _congruence_error(task, layers.with_alpha(1.0), at_alpha, deformed, key)
        rows.append(
            {
                "alpha": alpha,
                "eigenvalues": eigen.values,
                "residuals": eigen.residuals,
                "floor": eigen.floor,
                "status": eigen.status.name.lower(),
                "sharpness": measured,
                "lower": sandwich.lower,
                "upper": sandwich.upper,
                "allowance": sandwich.allowance,
                "sandwich_holds": bool(sandwich.holds(measured)),
                "congruence_error": congruence,
                "congruence_holds": congruence <= CONGRUENCE_TOLERANCE,
                "lambda_max": top.values[0],
                "max_stable_step": bounds.max_stable_step("gd", top.values[0]),
                "narrowest": eigen.narrowest,
            }
        )
    progress("curvature", len(config.alphas), len(config.alphas))
    wide = all(r["narrowest"] == "float64" for r in rows)
    return {
        "rows": rows,
        "tolerance": CONGRUENCE_TOLERANCE,
        "word": Word.CHECKED if wide else Word.ESTIMATED,
        "holds": all(r["sandwich_holds"] and r["congruence_holds"] for r in rows),
    }


def raced(task: Task, others: Task, config: Config, progress: Progress, keep: Keep) -> dict[str, Any]:
    """Race every arm and compare (THEORY.md 3.3, 5.1 to 5.3).

    Args:
      task: the networks.
      others: the same task from disjoint pretraining seeds, for the null control.
      config: settings.
      progress: told after each arm.
      keep: keep(name, compute) -> result, stored so that an interrupted race resumes.
    """
    key = jax.random.key(config.seed)
    made = _arms(task, others, config, key, progress, keep)
    rows: dict[str, Any] = {}
    for i, (name, build) in enumerate(made.items()):
        progress("race", i, len(made))
        rows[name] = keep(f"arm_{name}", functools.partial(_race_arm, build, task, config, key))
    progress("race", len(made), len(made))
    return {"arms": rows, "ratios": _ratios(rows, config), "steps_cap": config.steps}


def _race_arm(build: Callable[[], arm.Arm], task: Task, config: Config, key: PRNGKeyArray) -> dict[str, Any]:
    one = build()
    sharp = [arm.sharpness(p, task.args, key) for p in one.problems]
    center = float(np.median([2 / s for s in sharp]))
    result = race.run_problems(
        one.problems,
        race.FIRST_ORDER,
        sample=Partial(_all_of_it, *task.args),
        steps=config.steps,
        step_sizes=race.log_grid(center, decades=config.decades, per_decade=config.per_decade),
        target=config.target,
        key=key,
        prune=True,
        lanes=1,
    )
    return _arm_row(one, sharp, result)


def _arms(
    task: Task, others: Task, config: Config, key: PRNGKeyArray, progress: Progress, keep: Keep
) -> dict[str, Callable[[], arm.Arm]]:
    """Say how to build each arm; bottom directions and the scalar control at the sharpness of top."""
    top, bottom = (arm.plans_for(task, config, d) for d in ("top", "bottom"))
    seeds = len(task.networks)
    strongest = (config.alphas[-1],) * seeds

    def make_bottom(i: int, alpha: float) -> Problem:
        return problem(task.loss, apply_plan(task.networks[i], bottom[i].with_alpha(alpha)), *task.args)

    def make_scalar(i: int, alpha: float) -> Problem:
        return scalar_control(task.loss, task.networks[i], task.control, alpha, *task.args)

    def match(make: Callable[[int, float], Problem]) -> list[float]:
        model = arm.deformed_arm("", "", task, top, (config.matched,) * seeds)
        targets = [arm.sharpness(p, task.args, key) for p in model.problems]
        return arm.match_alphas(make, targets, task.args, key)

    progress("matching sharpness", 0, 2)
    bottom_alphas = tuple(keep("match_bottom", lambda: match(make_bottom)))
    progress("matching sharpness", 1, 2)
    scalar_alphas = tuple(keep("match_scalar", lambda: match(make_scalar)))
    progress("matching sharpness", 2, 2)

    def deformed(a: float) -> Callable[[], arm.Arm]:
        return lambda: arm.deformed_arm(f"top_{a:g}", f"top, alpha {a:g}", task, top, (a,) * seeds)

    def attacked(name: str, label: str, plans: list[Plan], alphas: tuple[float, ...]) -> arm.Arm:
        attack = getattr(attacks, name.split("_")[0])
        return arm.attack_arm(name, label, task, plans, alphas, attack)

    return {
        "original": lambda: arm.original_arm("original", "original", task),
        "original_other_seeds": lambda: arm.original_arm(
            "original_other_seeds", "original, other seeds", others
        ),
        **{f"top_{a:g}": deformed(a) for a in config.alphas},
        "bottom": lambda: arm.deformed_arm("bottom", "bottom, same sharpness", task, bottom, bottom_alphas),
        "scalar": lambda: arm.Arm(
            "scalar",
            "one bias rescaled, same sharpness",
            tuple(make_scalar(i, a) for i, a in enumerate(scalar_alphas)),
            scalar_alphas,
        ),
        "fuse": lambda: attacked("fuse", "fuse", top, strongest),
        "freeze": lambda: attacked("freeze", "freeze", top, strongest),
        "freeze_bottom": lambda: attacked("freeze_bottom", "freeze (bottom)", bottom, bottom_alphas),
        "inject": lambda: attacked("inject", "inject", top, strongest),
    }


def _arm_row(one: arm.Arm, sharp: list[float], result: race.RaceResult) -> dict[str, Any]:
    """Say what one arm did, with the loss curve of the best step size of each seed."""
    optimizers = {}
    for i, name in enumerate(result.names):
        best = result.best_index(name)
        shown = np.where(best < 0, result.last[i].argmin(axis=0), best)
        optimizers[name] = {
            "steps": result.steps(name),
            "best_step_size": np.where(best < 0, np.nan, result.step_sizes[i][best]),
            "at_edge": result.at_edge(name),
            "censored": int(np.isnan(result.steps(name)).sum()),
            "diverged": result.diverged(name),
            "recovered": result.recovered(name),
            "curves": [result.trace[i, shown[s], s] for s in range(len(sharp))],
        }
    return {
        "label": one.label,
        "alphas": one.alphas,
        "sharpness": sharp,
        "step_sizes": result.step_sizes[0],
        "record_at": result.record_at,
        "optimizers": optimizers,
        "bill": None if one.bill is None else asdict(one.bill) | {"knowledge": one.bill.knowledge.label},
        "seconds": result.seconds,
    }


def _ratios(rows: dict[str, Any], config: Config) -> list[dict[str, Any]]:
    """Compare arms: slowdown, insertion, controls, and what the attacks recovered."""
    comparisons = [(f"top_{a:g}", "top_1", "slowdown") for a in config.alphas[1:]]
    comparisons += [("bottom", "top_1", "slowdown"), ("scalar", "original", "positive control")]
    comparisons += [("top_1", "original", "insertion"), ("original_other_seeds", "original", "null control")]
    comparisons += [("inject", "original", "null control"), ("fuse", "original", "attack")]
    comparisons += [("freeze", "original", "attack"), ("freeze_bottom", "original", "attack")]
    return [
        {"arm": a, "baseline": b, "kind": kind, "optimizer": name}
        | asdict(race.ratio_of_means(_steps(rows[a], name), _steps(rows[b], name), config.steps))
        for a, b, kind in comparisons
        for name in race.FIRST_ORDER
    ]


def _steps(row: dict[str, Any], optimizer: str) -> np.ndarray:
    return np.asarray(row["optimizers"][optimizer]["steps"], float)


def _congruence_error(
    task: Task, at_one: Any, at_alpha: Any, deformed: Problem, key: PRNGKeyArray, vectors: int = 8
) -> float:
    """Return the largest relative difference of H_a v and phi^-T H_1 phi^-1 v over random v."""
    inserted = apply_plan(task.networks[0], at_one)
    loss = loss_on(task.loss, inserted, *task.args)
    worst = 0.0
    for i in range(vectors):
        v = trees.normal_like(jax.random.fold_in(key, i), inserted)
        worst = max(worst, float(_relative_error(loss, inserted, deformed, at_alpha, v, task.args)))
    return worst


@jax.jit
def _relative_error(
    loss: Partial, inserted: Any, deformed: Problem, plan: Any, v: Any, args: tuple[Any, ...]
) -> jax.Array:
    direct = curvature.hessian(deformed.loss, deformed.params, *args).mv(v)
    mapped = bounds.congruent_product(curvature.hessian(loss, inserted, *args).mv, v, plan)
    return trees.norm(trees.axpy(-1.0, direct, mapped)) / trees.norm(direct)


def _energy(task: Task, config: Config) -> float:
    """Return the largest ||S_k|| / ||S|| over the planned layers of the first network."""
    leaves = dict(trees.named_leaves(task.networks[0]))
    return max(
        float(jnp.linalg.norm(layer.singular_values) / jnp.linalg.norm(leaves[path]))
        for path, layer in arm.plans_for(task, config, "top")[0].items()
    )


def _all_of_it(*args_and_key: Any) -> tuple[Any, ...]:
    return args_and_key[:-1]
