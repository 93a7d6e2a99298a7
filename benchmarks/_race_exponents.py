"""Exponents in alpha: what the statements predict, and what is fitted, with an interval.

Three quantities: the largest step size that is linearly stable at the start (an eigenvalue, for the gradient
methods that it decides), the best step size of a race, and its steps. Each seed gives a slope of log quantity
over log alpha by least squares; the interval is over seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import _race_arms as arms
from specdef_jax import curvature, race
from specdef_jax.tasks.task import Task

GRADIENT = ("sgd", "momentum", "nesterov")
COORDINATEWISE = ("adam", "rmsprop", "lion", "sign")
WITHIN = 0.1
STABLE, BEST, STEPS = "largest stable step at the start", "best step size", "steps to the target"


def prediction(optimizer: str, basis: str, quantity: str) -> tuple[float, str] | None:
    """Return the exponent that a statement gives, and its number; None where no statement does."""
    if optimizer in GRADIENT:
        return (2.0, "3.3 (ii)") if quantity == STEPS else (-2.0, "3.1")
    if optimizer in COORDINATEWISE and basis == "axis":
        return (1.0, "3.7") if quantity == STEPS else (-1.0, "3.7")
    return None


def fits(config: dict[str, Any], rows: list[dict[str, Any]], task: Task) -> list[dict[str, Any]]:
    """Return one fit per basis, optimizer and quantity."""
    found = []
    for basis in dict.fromkeys(arm["basis"] for arm in config["arms"]):
        mine = [arm for arm in config["arms"] if arm["basis"] == basis]
        alphas = np.array([arm["alpha"] for arm in mine])
        stable = _stable(task, mine)
        for name in config["optimizers"]:
            told = [next(r for r in rows if r["arm"] == a["name"] and r["optimizer"] == name) for a in mine]
            quantities = {
                BEST: np.array([row["best_step_size"] for row in told], float),
                STEPS: np.array([row["steps"] for row in told], float),
            }
            if name in GRADIENT:  # their thresholds are fixed multiples of one another
                quantities[STABLE] = stable
            for quantity, values in quantities.items():
                found.append(_fit(alphas, values, basis, name, quantity))
    return found


def _fit(alphas: np.ndarray, values: np.ndarray, basis: str, optimizer: str, quantity: str) -> dict[str, Any]:
    """Fit (alphas, seeds) by a power; a seed with a missing value has no slope."""
    whole = np.isfinite(values).all(axis=0)
    x = np.log(alphas) - np.log(alphas).mean()
    slopes = x @ np.log(values[:, whole]) / (x @ x)
    low, high = race.bootstrap_interval(slopes) if slopes.size else (np.nan, np.nan)
    fit = float(slopes.mean()) if slopes.size else np.nan
    told = prediction(optimizer, basis, quantity)
    row = {"basis": basis, "optimizer": optimizer, "quantity": quantity, "alphas": len(alphas)}
    row |= {"fit": fit, "low": low, "high": high, "seeds": int(whole.sum()), "dropped": int((~whole).sum())}
    row |= {"prediction": None, "statement": None, "agrees": None}
    if told is not None:
        close = bool(abs(fit - told[0]) <= WITHIN and low - 1e-9 <= told[0] <= high + 1e-9)
        row |= {"prediction": told[0], "statement": told[1], "agrees": close}
    # the exponent between the two largest alphas: where a law is only approached, it shows the direction
    last = np.log(values[-1, whole] / values[-2, whole]) / np.log(alphas[-1] / alphas[-2])
    return row | {"last": float(last.mean()) if last.size else np.nan}


def _stable(task: Task, mine: list[arms.Arm]) -> np.ndarray:
    """Return 2 / lambda_max of the Hessian at the start: (alphas, seeds)."""
    found = []
    for arm in mine:
        for one in arms.problems_of(task, arm)[0]:
            op = curvature.hessian(one.loss, one.params, *task.args)
            top = curvature.eigsh(op, which="LA", tol=1e-6, key=jax.random.key(0)).values[0]
            found.append(2 / float(top))
    return np.reshape(found, (len(mine), -1))


def draw(fitted: list[dict[str, Any]], path: Path) -> None:
    """Draw every fit with its interval, and the prediction as a bar beside it."""
    quantities = (STABLE, BEST, STEPS)
    labels = list(dict.fromkeys((r["basis"], r["optimizer"]) for r in fitted))
    figure, axes = plt.subplots(
        1, 3, figsize=(11, 1.2 + 0.28 * len(labels)), sharey=True, layout="constrained"
    )
    for ax, quantity in zip(axes, quantities, strict=True):
        for y, label in enumerate(reversed(labels)):
            for row in fitted:
                if (row["basis"], row["optimizer"]) != label or row["quantity"] != quantity:
                    continue
                ax.plot([row["low"], row["high"]], [y, y], color="#3b6ea8", alpha=0.5)
                ax.plot(row["fit"], y, "o", color="#3b6ea8", markersize=4.5)
                if row["prediction"] is not None:
                    ax.plot(row["prediction"], y, "|", color="#c2542d", markersize=13, markeredgewidth=2)
        ax.set_title(quantity, fontsize=9, loc="left")
        ax.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(labels)), [f"{o}, {b}" for b, o in reversed(labels)], fontsize=8)
    figure.supxlabel("exponent of alpha: fitted (dot, 95% interval) and predicted (bar)", fontsize=9)
    figure.savefig(path)
    plt.close(figure)
