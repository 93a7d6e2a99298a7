"""Hessian spectra of every bundled network, as trained and deformed, on a logarithmic axis.

Each pretrained network of specdef_jax.tasks is deformed in its hidden kernel at alpha 100; its whole spectrum
is computed twice: by a dense eigensolver, and by stochastic Lanczos quadrature with the outliers taken out.
The figure shows both, and the JSON how far they are apart: outliers of alpha^2 and a tail of 1 / alpha^2.

    python -m benchmarks.spectra [--quick]
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

import specdef_jax as sd
from benchmarks._harness import RESULTS, save
from benchmarks.directions import NETWORKS
from specdef_jax import curvature
from specdef_jax.tasks import digits

ALPHA, K = 100.0, 1
PROBES, STEPS, OUTLIERS = 12, 150, 3
KEY = jax.random.key(0)
BLUE, ORANGE, GREY = "#3b6ea8", "#c2542d", "#8a8f98"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="the smallest network, few steps; not saved")
    quick = parser.parse_args().quick
    jax.config.update("jax_enable_x64", True)
    names = ["cnn"] if quick else list(NETWORKS)
    rows, drawn = [], []
    for name in names:
        task = digits.task(1, network=NETWORKS[name])
        params = task.networks[0]
        spec = sd.SpecDef(alpha=ALPHA, k=K)
        plan = sd.plan(params, spec, where=task.where, key=KEY)
        for label, alpha in (("inserted, alpha 1", 1.0), (f"deformed, alpha {ALPHA:g}", ALPHA)):
            tree = sd.apply_plan(params, plan.with_alpha(alpha))
            op = curvature.hessian(task.loss, tree, *task.args)
            row, curves = measure(op, 40 if quick else STEPS)
            rows.append({"network": name, "label": label, "alpha": alpha} | row)
            drawn.append((name, label, curves))
            print(rows[-1], flush=True)
    if not quick:
        save("spectra", {"alpha": ALPHA, "k": K, "probes": PROBES, "steps": STEPS}, rows, {})
        draw(drawn)


def measure(
    op: curvature.Operator, steps: int
) -> tuple[dict[str, Any], tuple[curvature.Density, np.ndarray]]:
    """Return how far the sampled density is from the exact spectrum, and both."""
    exact = np.asarray(curvature.eigvals(op))
    top = curvature.eigsh(op, OUTLIERS, "LM", 1e-10, key=KEY, max_matvecs=4000)
    sampled = curvature.density(op, key=KEY, probes=PROBES, steps=steps, axis="log", outliers=top)
    largest = np.abs(exact).max()
    floor = 10 * np.finfo(np.float64).eps * largest
    shares = {}
    for low in range(math.floor(math.log10(floor)), math.ceil(math.log10(largest)) + 1):
        bounds = 10.0**low, 10.0 ** (low + 1)
        mine, stderr = sampled.share(*bounds)
        shares[f"1e{low}"] = [float(np.mean((exact >= bounds[0]) & (exact < bounds[1]))), mine, stderr]
    row = {
        "parameters": op.size,
        "largest": float(exact[-1]),
        "smallest": float(exact[0]),
        "lanczos_largest": float(top.values[0]),
        "below_rounding": float(np.mean(np.abs(exact) <= floor)),
        "positive_share_by_decade_exact_sampled_stderr": shares,
    }
    return row, (sampled, exact)


def draw(drawn: list[tuple[str, str, tuple[curvature.Density, np.ndarray]]]) -> None:
    """Draw a row for each network, a column for each form."""
    count = len(drawn) // 2
    figure, grid = plt.subplots(
        count, 2, figsize=(10, 2.6 * count), layout="constrained", sharex=True, sharey=True
    )
    for (name, label, (sampled, exact)), axes in zip(drawn, np.ravel(grid), strict=True):
        bins = np.arange(-18, 8, 0.25)
        for sign, colour in ((1, BLUE), (-1, ORANGE)):
            side = exact[np.sign(exact) == sign]
            counts, _ = np.histogram(np.log10(np.abs(side)), bins)
            axes.stairs(counts / 0.25 / exact.size, 10**bins, fill=True, color=colour, alpha=0.25)
            curve = sampled.density[0 if sign > 0 else 1]
            word = "positive" if sign > 0 else "negative"
            axes.plot(sampled.grid, curve, color=colour, linewidth=1, label=word)
        axes.axvspan(1e-18, 10 * np.finfo(np.float64).eps * np.abs(exact).max(), color=GREY, alpha=0.15, lw=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(0.5 / exact.size, 3)
        axes.set_xlim(1e-18, 1e7)
        axes.set_title(f"{name}, {label}", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in np.atleast_2d(grid)[-1]:
        axes.set_xlabel("|eigenvalue|; grey: below rounding")
    for axes in np.atleast_2d(grid)[:, 0]:
        axes.set_ylabel("share per decade")
    np.ravel(grid)[0].legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "spectra.svg")


if __name__ == "__main__":
    main()
