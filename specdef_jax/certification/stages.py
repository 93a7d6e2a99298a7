"""The measurements of a certification, each a function of task and config to plain JSON values."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import PRNGKeyArray

from specdef_jax import bounds, curvature, trees
from specdef_jax.certification import arms as arm
from specdef_jax.certification.config import Config
from specdef_jax.certification.store import Progress
from specdef_jax.parametrization import Problem, loss_on, problem
from specdef_jax.precision import FORMATS, alpha_max
from specdef_jax.preservation import bit_identical, preservation
from specdef_jax.spec import SpecDef
from specdef_jax.specdef import apply_plan
from specdef_jax.subspace import Status
from specdef_jax.tasks.task import Task
from specdef_jax.words import Word

CONGRUENCE_TOLERANCE = 1e-10
BIT_ALPHA = 2.0**12


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
        deformed = apply_plan(params, task.plan(spec, key))
        certificate = preservation(task.apply, params, deformed, *task.inputs)
        rows += [asdict(f) | {"alpha": alpha} for f in certificate.formats]
    progress("preservation", len(config.error_alphas), len(config.error_alphas) + 1)
    bits = []
    for basis in ("axis", "rotated"):
        spec = SpecDef(alpha=BIT_ALPHA, k=config.k, basis=basis, budget=math.inf)
        layers = task.plan(spec, key)
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


def released(task: Task, config: Config) -> dict[str, Any] | None:
    """Measure what a deformation changes in the format the network is stored in, alpha by alpha."""
    if task.released is None:
        return None
    layers = arm.plans_for(task, config, "top")[0]
    return {"rows": [{"alpha": a} | task.released(layers.with_alpha(a)) for a in config.alphas]}


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
    wide = all(r["narrowest"] == "float64" and r["status"] == "converged" for r in rows)
    return {
        "rows": rows,
        "tolerance": CONGRUENCE_TOLERANCE,
        "word": Word.CHECKED if wide else Word.ESTIMATED,
        "holds": all(r["sandwich_holds"] and r["congruence_holds"] for r in rows),
    }


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
