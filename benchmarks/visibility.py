"""From which alpha on do the weights give a deformation away?

Trained networks, every kernel deformed or none; scores of attacks.detect, nothing fitted. For each score, the
chance that a deformed layer scores above one that was not (the area under the ROC curve; 0.5 is guessing), as
released and after fine-tuning. An inserted pair is held against pairs with an identity inserted, a kernel or
a gauge pair against those of networks that were never touched, and of networks whose kernels have low rank by
nature.

    python -m benchmarks.visibility [--quick]
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jaxtyping import PyTree

import specdef_jax as sd
from benchmarks import _race_arms as arms
from benchmarks._harness import RESULTS, save
from specdef_jax import attacks, trees
from specdef_jax.attacks import AdjacentPair, Scores
from specdef_jax.models.pairing import deform_pairs
from specdef_jax.parametrization import problem
from specdef_jax.tasks.task import Task

CONFIG: dict[str, Any] = {
    "networks": ["mlp", "cnn", "transformer"],
    "seeds": 5,
    "alphas": [1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0, 1024.0, 1e4, 1e6],
    "ways": [["symmetric", "top"], ["symmetric", "bottom"], ["axis", "top"], ["axis", "bottom"]],
    "training": {"optimizer": "adam", "step_size": 1e-3, "steps": 100},
    "rank": {"share": 0.25, "noise": 1e-3},
    "seen": 0.95,
}
PAIR, KERNEL = ("imbalance", "pencil_gap", "ratio_jump"), ("gap", "norm_jump")
GAUGE = AdjacentPair("block_0_v/w", "block_0_o/w", "block_0_v/b", groups=2)
KEY = jax.random.key(0)


def main() -> None:
    """Print a line per row, save JSON and a figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one network, few alphas; not saved")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    small = {"networks": ["transformer"], "seeds": 2, "alphas": [1.0, 8.0, 1e4], "ways": [["axis", "top"]]}
    config = CONFIG | (small if options.quick else {})
    begin = time.perf_counter()
    rows = [row for name in config["networks"] for row in rows_of(name, config)]
    summary = {"seconds": time.perf_counter() - begin, "seen_from": seen_from(rows, config["seen"])}
    for found in summary["seen_from"]:
        print("  ".join(str(value) for value in found.values()))
    if not options.quick:
        draw(rows)
        save("visibility", config, rows, summary)


def rows_of(name: str, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give one row per placement, way, alpha and state of training."""
    task = arms.task_of({"network": name, "seeds": config["seeds"]}, 0)
    trained = functools.partial(_trained, task, config["training"])
    kernels = _kernels(task)
    for placement in ("insert", "gauge") if name == "transformer" else ("insert",):
        for basis, directions in config["ways"]:
            release = _releases(task, kernels, placement, basis, directions)
            for state, after in (("released", lambda tree: tree), ("trained", trained)):
                scored = {a: _scores(kernels, map(after, release(a)), placement) for a in config["alphas"]}
                natural = _natural(task, kernels, placement, config["rank"], scored[1.0], after)
                for alpha in config["alphas"]:
                    row = {
                        "network": name, "placement": placement, "basis": basis, "directions": directions,
                        "state": state, "alpha": alpha,
                    }  # fmt: skip
                    yield row | _row(scored[alpha], natural, placement)


def _releases(
    task: Task, kernels: tuple[str, ...], placement: str, basis: str, directions: str
) -> Callable[[float], list[PyTree]]:
    """Return release(alpha): every network with every kernel, or the gauge pair, deformed."""
    spec = sd.SpecDef(2.0, 1, basis, directions=directions)  # type: ignore[arg-type]
    if placement == "gauge":

        def gauged(alpha: float) -> list[PyTree]:
            with_alpha = sd.SpecDef(alpha, 1, basis, directions=directions)  # type: ignore[arg-type]
            flat = [dict(trees.named_leaves(p)) for p in task.networks]
            made = [deform_pairs(leaves, [GAUGE], with_alpha, key=KEY) for leaves in flat]
            return [
                trees.map_named(lambda name, _, m=m: m[name], p)
                for p, m in zip(task.networks, made, strict=True)
            ]

        return gauged
    plans = [sd.plan(p, spec, where=kernels, key=KEY) for p in task.networks]
    return lambda alpha: [
        sd.apply_plan(p, q.with_alpha(alpha)) for p, q in zip(task.networks, plans, strict=True)
    ]


def _kernels(task: Task) -> tuple[str, ...]:
    """Return the kernels that can be deformed in one direction of several: a lone channel is only scaled."""
    planned = sd.plan(task.networks[0], sd.SpecDef(1.0, 1), where="*/w", key=KEY)
    return tuple(name for name, layer in planned.items() if layer.U.shape[-2] > 1)


@functools.cache
def _training(steps: int, step_size: float) -> Callable[..., PyTree]:
    @jax.jit
    def run(one: Any, args: tuple) -> PyTree:
        optimizer = optax.adam(step_size)

        def step(_: Any, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(one.loss)(params, *args), state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, step, (one.params, optimizer.init(one.params)))[0]

    return run


def _trained(task: Task, training: dict[str, Any], released: PyTree) -> PyTree:
    run = _training(training["steps"], training["step_size"])
    return run(problem(task.loss, released, *task.args), task.args)


def _scores(kernels: tuple[str, ...], networks: Any, placement: str) -> list[Scores]:
    if placement == "gauge":
        return [attacks.detect(p, [GAUGE])[GAUGE.name] for p in networks]
    return [scores[name] for scores in map(attacks.detect, networks) for name in kernels]


def _natural(
    task: Task,
    kernels: tuple[str, ...],
    placement: str,
    rank: dict[str, float],
    neutral: list[Scores],
    after: Callable[[PyTree], PyTree],
) -> dict[str, dict[str, list[Scores]]]:
    """Return what pairs and kernels are held against: untouched ones, and those of low rank."""
    low = [trees.map_named(functools.partial(_low_rank, rank), p) for p in task.networks]
    found = {}
    for kind, networks in (("ordinary", list(task.networks)), ("low rank", low)):
        alone = _scores(kernels, map(after, networks), "insert")
        if placement == "gauge":
            pairs = _scores(kernels, map(after, networks), "gauge")
        elif kind == "ordinary":
            pairs = neutral
        else:
            inserted = [sd.deform(p, sd.SpecDef(1.0, 1), where=kernels, key=KEY) for p in networks]
            pairs = _scores(kernels, map(after, inserted), "insert")
        found[kind] = {"pair": pairs, "kernel": alone}
    return found


def _low_rank(rank: dict[str, float], name: str, leaf: jax.Array) -> jax.Array:
    """Return a kernel cut to a share of its rank, with a little noise, as distillation leaves it."""
    if not name.endswith("/w"):
        return leaf
    matrix = leaf.reshape(-1, leaf.shape[-1])
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    kept = max(1, math.ceil(rank["share"] * s.size))
    noise = jax.random.normal(KEY, matrix.shape) * rank["noise"] * s[0] / math.sqrt(matrix.size)
    return ((u[:, :kept] * s[:kept]) @ vt[:kept] + noise).reshape(leaf.shape)


def _row(scores: list[Scores], natural: dict[str, Any], placement: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "certain": float(np.mean([s.certain for s in scores])),
        "falsely certain": float(np.mean([s.certain for s in natural["ordinary"]["pair"]])),
    }
    # A gauge pair's kernels are not scored one by one: each is the undeformed kernel of another network.
    for name in (*PAIR, *(() if placement == "gauge" else KERNEL)):
        ours = [getattr(s, name) for s in scores]
        for kind, by in natural.items():
            theirs = [getattr(s, name) for s in by["pair" if name in PAIR else "kernel"]]
            labels = np.arange(len(ours) + len(theirs)) < len(ours)
            area = attacks.roc(np.array(ours + theirs), labels).area
            row[name if kind == "ordinary" else f"{name}, low rank"] = area
    return row


def seen_from(rows: list[dict[str, Any]], area: float) -> list[dict[str, Any]]:
    """Return, for each way and state, from which alpha on each score tells it, None if from none here."""
    found: dict[tuple, dict[str, Any]] = {}
    fields = ("network", "placement", "basis", "directions", "state")
    for row in rows:
        told = found.setdefault(tuple(row[f] for f in fields), {f: row[f] for f in fields})
        for name in (*PAIR, *KERNEL, "certain"):
            if name not in row:
                continue
            if row[name] < area:
                told[name] = None
            elif told.get(name) is None:
                told[name] = row["alpha"]
    return list(found.values())


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw areas over alpha: a column per network and placement, released above, trained below."""
    columns = list(dict.fromkeys((row["network"], row["placement"]) for row in rows))
    figure, axes = plt.subplots(
        2, len(columns), figsize=(3 * len(columns), 5), sharex=True, sharey=True, layout="constrained"
    )
    colors = {
        "imbalance": "#3b6ea8", "pencil_gap": "#6b9a4b", "ratio_jump": "#8a63a8", "gap": "#d9a441",
        "norm_jump": "#b5482a", "certain": "#222222",
    }  # fmt: skip
    for column, (network, placement) in enumerate(columns):
        for line, state in enumerate(("released", "trained")):
            ax = axes[line, column]
            kept = [
                r for r in rows
                if (r["network"], r["placement"], r["state"]) == (network, placement, state)
                and (r["basis"], r["directions"]) == ("symmetric", "top")
            ]  # fmt: skip
            for name, color in colors.items():
                if all(name in r for r in kept):
                    style = "--" if name == "certain" else "-"
                    label = "compensation recognised" if name == "certain" else name.replace("_", " ")
                    ax.plot(
                        [r["alpha"] for r in kept], [r[name] for r in kept], style, color=color, label=label
                    )
            ax.axhline(0.5, color="#bbbbbb", linewidth=0.8, zorder=0)
            ax.set_xscale("log")
            ax.set_title(f"{network}, {placement}, {state}", fontsize=9, loc="left")
            ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=7, loc="center right")
    figure.supxlabel(r"$\alpha$")
    figure.supylabel("area under ROC, or share recognised", fontsize=9)
    figure.savefig(RESULTS / "visibility.svg")
    plt.close(figure)


if __name__ == "__main__":
    main()
