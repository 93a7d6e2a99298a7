"""At equal sharpness, which directions resist longer, and does a rescaled scalar do as well? (THEORY.md 3.3)

Three small networks on the handwritten digits (MLP, CNN, transformer), attacked by a shifted labelling, full
batch, float64. Each arm is matched to the sharpness, at the start, of the top singular direction at alpha
16, then raced at that alpha and at a quarter of it. Recorded: steps of SGD and Adam to the target at the
best of a grid of step sizes, the floor of the fast set, and, for the best SGD run, its flow time (steps
times step size) and the largest curvature it met: sharpness at one point turns out to be a poor yardstick.

    python -m benchmarks.directions [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

import specdef_jax as sd
from benchmarks._harness import RESULTS, save
from specdef_jax import bounds, curvature, race
from specdef_jax.certification.arms import match_alphas, sharpness
from specdef_jax.parametrization import Problem, problem
from specdef_jax.tasks import digits, networks
from specdef_jax.tasks.task import Task

KEY = jax.random.key(0)
NETWORKS = {
    "mlp": digits.MLP,
    "cnn": networks.cnn(channels=(4, 8)),
    "transformer": networks.transformer(dim=16, heads=2, hidden=32),
}
DEFORMED = ("top", "random", "bottom", "resistant", "informed")
SCALARS = ("output bias", "hidden bias", "dense bias")
OPTIMIZERS = {"sgd": race.sgd, "adam": race.adam}
Make = Callable[[int, float], Problem]


def main() -> None:
    """Race every arm on every network, print a table, save JSON and a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one network, one seed, few steps; not saved")
    quick = parser.parse_args().quick
    jax.config.update("jax_enable_x64", True)
    config = {
        "networks": ["mlp"] if quick else list(NETWORKS),
        "seeds": 1 if quick else 5,
        "matched_alpha": 16.0,
        "shares": [1.0] if quick else [1.0, 0.25],
        "steps": 200 if quick else 4000,
        "step_sizes": np.logspace(-6, 0.5, 8 if quick else 21).tolist(),
        "target": 1.0 if quick else 0.1,
        "proxy_tasks": 20,
    }
    rows = [row for name in config["networks"] for row in race_network(name, config)]
    if not quick:
        summary = summarize(rows, config)
        save("directions", config, rows, summary)
        draw(rows, config)


def race_network(name: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Race the arms of one network."""
    task = digits.task(config["seeds"], network=NETWORKS[name], target=config["target"])
    arms = {"original": _original(task), "inserted": _deformed(task, "top", config)}
    arms |= {d: _deformed(task, d, config) for d in DEFORMED}
    arms |= {s: _scalar(task, s) for s in SCALARS}
    goal = [
        sharpness(arms["top"](i, config["matched_alpha"]), task.args, KEY) for i in range(config["seeds"])
    ]
    rows = []
    for arm, make in arms.items():
        plain = arm in ("original", "inserted")
        matched = [1.0] * config["seeds"] if plain else match_alphas(make, goal, task.args, KEY)
        for share in [1.0] if plain else config["shares"]:
            alphas = [max(1.0, a * share) for a in matched]
            row = {"network": name, "arm": arm, "share": share, "alphas": alphas}
            row |= _raced([make(i, a) for i, a in enumerate(alphas)], task, config)
            row["floor"] = _floors(task, arm, config) if share == 1 and arm in DEFORMED else None
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def _raced(problems: list[Problem], task: Task, config: dict[str, Any]) -> dict[str, Any]:
    """Race all seeds of one arm, and look along the best SGD run of each."""
    grid = np.asarray(config["step_sizes"])
    result = race.run_problems(
        problems, OPTIMIZERS, sample=race.full_batch(*task.args), steps=config["steps"], step_sizes=grid,
        target=config["target"], prune=True, lanes=1,
    )  # fmt: skip
    best = result.best_index("sgd")
    runs = [
        _along_the_run(p, float(grid[b]), float(s), task.args) if b >= 0 else dict.fromkeys(("peak", "end"))
        for p, b, s in zip(problems, best, result.steps("sgd"), strict=True)
    ]
    return {
        "sharpness": [sharpness(p, task.args, KEY) for p in problems],
        "steps": {name: result.steps(name).tolist() for name in result.names},
        "step_size": {
            name: [float(grid[b]) if b >= 0 else None for b in result.best_index(name)]
            for name in result.names
        },
        "at_edge": {name: result.at_edge(name) for name in result.names},
        "peak_curvature": [r["peak"] for r in runs],
        "end_curvature": [r["end"] for r in runs],
        "seconds": result.seconds,
    }


def _along_the_run(task: Problem, step_size: float, steps: float, args: tuple[Any, ...]) -> dict[str, float]:
    """Return the largest curvature that a run of SGD met, at nine points, and that at its end."""
    times = np.unique(np.round(np.linspace(0, np.ceil(steps), 9)).astype(int))
    found, params, t = [], task.params, 0
    for time in times:
        params = _descend(task, params, args, step_size, int(time - t))
        t = time
        op = curvature.hessian(task.loss, params, *args)
        found.append(float(curvature.eigsh(op, which="LA", tol=1e-3, key=KEY).values[0]))
    return {"peak": max(found), "end": found[-1]}


@jax.jit
def _descend(task: Problem, params: PyTree, args: tuple[Any, ...], step_size: float, steps: int) -> PyTree:
    def step(_: int, at: PyTree) -> PyTree:
        return jax.tree.map(lambda p, g: p - step_size * g, at, jax.grad(task.loss)(at, *args))

    return jax.lax.fori_loop(0, steps, step, params)


def _original(task: Task) -> Make:
    return lambda i, alpha: problem(task.loss, task.networks[i], *task.args)


def _plans(task: Task, directions: str, config: dict[str, Any]) -> list[sd.Plan]:
    """Plan every network on the output side at alpha = 1."""
    batch = digits.load().x[:1000]  # what a defender has: benign inputs, none of the attacker's labels
    plans = []
    for params in task.networks:
        chosen: Any = directions
        acts = sd.activations(task.apply, params, batch, where=task.where)
        if directions == "informed":
            chosen = _informed(task, params, acts[task.where], batch, config["proxy_tasks"])
        spec = sd.SpecDef(alpha=1.0, k=1, side="output", directions=chosen)
        plans.append(sd.plan(params, spec, where=task.where, key=KEY, activations=acts))
    return plans


def _informed(task: Task, params: PyTree, acts: Array, batch: Array, tasks: int) -> Array:
    """Return the direction least informative about random relabellings: the kind of attack is guessed.

    The residual in the layer's outputs is the gradient with respect to a shift of them, one per position.
    """
    labels = digits.load().y[:1000]
    layer = task.where.removesuffix("/w")
    positions = acts.shape[0] // len(batch)

    def loss(shift: Array, relabelled: Array) -> Array:
        moved = {**params, layer: {**params[layer], "b": params[layer]["b"] + shift}}
        return task.loss(moved, batch, relabelled) * len(batch)

    shape = _shift_shape(task, params, batch, positions, acts.shape[-1])
    residuals = []
    for seed in range(tasks):
        relabelled = jax.random.permutation(jax.random.key(seed), 10)[labels]
        residuals.append(jax.grad(loss)(jnp.zeros(shape), relabelled).reshape(acts.shape))
    return sd.resistant_directions(acts, 1, residuals=jnp.concatenate(residuals, axis=1))


def _shift_shape(task: Task, params: PyTree, batch: Array, positions: int, features: int) -> tuple[int, ...]:
    """Return the shape of the layer's outputs, to which its bias broadcasts."""
    if positions == 1:
        return (len(batch), features)
    side = int(np.sqrt(positions))
    kernel = params[task.where.removesuffix("/w")]["w"]
    return (len(batch), side, side, features) if kernel.ndim == 4 else (len(batch), positions, features)


def _deformed(task: Task, directions: str, config: dict[str, Any]) -> Make:
    plans = _plans(task, directions, config)

    def make(i: int, alpha: float) -> Problem:
        deformed = sd.apply_plan(task.networks[i], plans[i].with_alpha(alpha))
        return problem(task.loss, deformed, *task.args)

    return make


def _scalar(task: Task, kind: str) -> Make:
    """Return one rescaled scalar: an output bias, a hidden bias, or a dense direction of hidden biases."""
    if kind == "output bias":
        return lambda i, a: race.scalar_control(task.loss, task.networks[i], task.control, a, *task.args)
    hidden = f"{task.where.removesuffix('/w')}/b"
    if kind == "hidden bias":
        return lambda i, a: race.scalar_control(task.loss, task.networks[i], hidden, a, *task.args)
    layer = hidden.removesuffix("/b")

    def make(i: int, alpha: float) -> Problem:
        params = task.networks[i]
        bias = params[layer]["b"]
        d = jax.random.normal(jax.random.key(i), bias.shape)
        d = d / jnp.linalg.norm(d)
        start = {**params, layer: {**params[layer], "b": bias + (1 / alpha - 1) * d * (d @ bias)}}
        loss = Partial(_rank_one_loss, Partial(task.loss), {layer: d}, alpha)
        return Problem(start, loss, Partial(_rank_one, {layer: d}, alpha))

    return make


def _rank_one(directions: dict[str, Array], alpha: float, params: PyTree) -> PyTree:
    """Return the plain tree: b = (I + (alpha - 1) d d^T) b~."""
    moved = dict(params)
    for layer, d in directions.items():
        bias = params[layer]["b"]
        moved[layer] = {**params[layer], "b": bias + (alpha - 1) * d * (d @ bias)}
    return moved


def _rank_one_loss(
    loss: Partial, directions: dict[str, Array], alpha: float, params: PyTree, *args: Any
) -> Array:
    return loss(_rank_one(directions, alpha, params), *args)


def _floors(task: Task, directions: str, config: dict[str, Any]) -> list[float]:
    plans = _plans(task, directions, config)
    return [
        float(bounds.fast_subspace_loss(task.loss, params, plan, *task.args, steps=1000))
        for params, plan in zip(task.networks, plans, strict=True)
    ]


def summarize(rows: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """Return steps relative to the top direction at equal sharpness at the start, paired by seed."""
    summary: dict[str, Any] = {}
    matched = {(r["network"], r["arm"]): r for r in rows if r["share"] == 1}
    for (network, arm), row in matched.items():
        top = matched[network, "top"]
        ratios = {}
        for name in OPTIMIZERS:
            steps, baseline = (np.asarray(r["steps"][name], float) for r in (row, top))
            ratios[name] = asdict(race.ratio_of_means(steps, baseline, config["steps"]))
        flow = [
            s * e for s, e in zip(row["steps"]["sgd"], row["step_size"]["sgd"], strict=True) if e is not None
        ]
        summary[f"{network}/{arm}"] = {
            "to_top": ratios,
            "median_steps": {
                n: float(np.median(_capped(row["steps"][n], config["steps"]))) for n in OPTIMIZERS
            },
            "median_alpha": float(np.median(row["alphas"])),
            "median_floor": None if row["floor"] is None else float(np.median(row["floor"])),
            "median_flow_time": float(np.median(flow)) if flow else None,
        }
    return summary


def draw(rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
    """Plot SGD steps against the sharpness at the start, and against the peak of the run itself."""
    names = config["networks"]
    fig, axes = plt.subplots(2, len(names), figsize=(3.6 * len(names), 6.2), sharey=True, squeeze=False)
    arms = (*DEFORMED, *SCALARS)
    colours = dict(zip(arms, plt.get_cmap("tab10").colors, strict=False))
    for column, network in enumerate(names):
        for row in rows:
            if row["network"] != network or row["arm"] not in arms:
                continue
            steps = np.asarray(row["steps"]["sgd"], float)
            mark = "s" if row["arm"] in SCALARS else "o"
            for axis, x in ((axes[0, column], row["sharpness"]), (axes[1, column], row["peak_curvature"])):
                x = np.asarray([np.nan if v is None else v for v in x], float)
                axis.loglog(x, steps, mark, ms=4, color=colours[row["arm"]], label=row["arm"], alpha=0.8)
            censored = np.isnan(steps)
            at = np.asarray(row["sharpness"], float)[censored]
            axes[0, column].plot(
                at, np.full(at.shape, config["steps"]), "^", ms=5, mfc="none", color=colours[row["arm"]]
            )
        axes[0, column].set(title=network, xlabel="sharpness at the start")
        axes[1, column].set(xlabel="largest curvature the best run met")
    for axis in axes[:, 0]:
        axis.set_ylabel("SGD steps to the target")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    fig.legend(unique.values(), unique.keys(), loc="lower center", ncol=4, frameon=False, fontsize=8)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    fig.tight_layout(rect=(0, 0.08, 1, 1))
    fig.savefig(RESULTS / "directions.svg")


def _capped(steps: list[float], cap: int) -> np.ndarray:
    values = np.asarray(steps, float)
    return np.where(np.isnan(values), cap, values)


def _line(row: dict[str, Any]) -> str:
    told = "  ".join(f"{n} {np.round(row['steps'][n]).tolist()}" for n in OPTIMIZERS)
    return (
        f"{row['network']:12} {row['arm']:12} share {row['share']:<5} alpha {np.median(row['alphas']):8.1f}  "
        f"sharpness {np.median(row['sharpness']):9.3g}  {told}  ({row['seconds']:.0f} s)"
    )


if __name__ == "__main__":
    main()
