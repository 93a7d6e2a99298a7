"""What `specdef inspect --loss` adds: the curvature of each tensor's Hessian block, and a picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from specdef_jax import curvature, trees
from specdef_jax.cli.console import Report
from specdef_jax.cli.importing import arguments, imported
from specdef_jax.curvature.blocks import chosen
from specdef_jax.errors import ProblemError

COLUMNS = ("curvature", "residual", "products")
PROBES, STEPS = 8, 80


def measure(
    params: PyTree, loss: str, data: str | None, where: Sequence[str], key: PRNGKeyArray, report: Report
) -> tuple[dict[str, dict[str, Any]], curvature.Density]:
    """Return, by leaf, the largest magnitude of its block; and the density of the whole Hessian. In float64.

    Args:
      params: tree as read from the checkpoint.
      loss: module:function, loss(params, *args) -> real scalar.
      data: module:name of a tuple of arrays, or of a function that returns one; None for no data.
      where: globs of the leaves; empty for all.
      key: seeds the start vectors.
      report: told of the progress.

    Raises:
      ProblemError: a reference leads nowhere, or the loss does not give a real scalar on these parameters.
      SelectionError: a glob matches no leaf.
    """
    function = imported(loss)
    with jax.enable_x64(True):
        params = trees.double(params)
        args = arguments(data)
        floats = [
            name for name, leaf in trees.named_leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        names = chosen(params, where or floats)
        rows = {}
        for name, eigen in curvature.by_leaf(function, params, *args, key=key, where=names):
            report("curvature", len(rows), len(names))
            rows[name] = {
                "sigma_1": float(np.abs(eigen.values[0])),
                "lower_bound": float(eigen.lower_bound),
                "residual": float(eigen.residuals[0]),
                "status": eigen.status.name,
                "products": int(eigen.matvecs),
                "narrowest": eigen.narrowest,
            }
        report("density", 0, 0)
        op = curvature.block(function, params, floats, None, *args)
        spectrum = curvature.density(op, key=key, probes=PROBES, steps=STEPS, axis="log")
    return rows, spectrum


def cells(row: dict[str, Any] | None) -> tuple[str, str, str]:
    """Return the cells of COLUMNS."""
    if row is None:
        return "", "", ""
    marked = "" if row["status"] == "CONVERGED" else f" ({row['status'].lower().replace('_', ' ')})"
    return f"{row['sigma_1']:.6g}{marked}", f"{row['residual']:.1e}", str(row["products"])


def of_entry(rows: dict[str, dict[str, Any]], name: str) -> dict[str, Any] | None:
    """Return the row of a tensor; that of a deformed kernel's weight, with its compensation's as "comp"."""
    if f"{name}/weight" in rows and f"{name}/comp" in rows:
        return rows[f"{name}/weight"] | {"comp": rows[f"{name}/comp"]}
    return rows.get(name)


def draw(rows: dict[str, dict[str, Any]], spectrum: curvature.Density, path: Path) -> None:
    """Write a figure: the curvature of each block, and the density of the whole Hessian, both in decades.

    Raises:
      ProblemError: the suffix names no format that matplotlib writes.
    """
    from matplotlib.figure import Figure  # here, as it takes a second to load

    figure = Figure(figsize=(10, max(3.2, 1.2 + 0.22 * len(rows))), layout="constrained")
    if path.suffix.removeprefix(".") not in figure.canvas.get_supported_filetypes():
        raise ProblemError(f"{path}: the suffix names no picture; write .svg, .png or .pdf.")
    left, right = figure.subplots(1, 2)
    names = list(rows)[::-1]
    sizes = [rows[name]["sigma_1"] for name in names]
    left.barh(names, sizes, color="#3b6ea8", height=0.65)
    if max(sizes, default=0) > 0:
        left.set_xscale("log")
    left.set_xlabel("largest |eigenvalue| of the tensor's Hessian block")
    left.tick_params(axis="y", labelsize=7, length=0)
    positive, negative = spectrum.density
    for curve, error, colour, label in (
        (positive, spectrum.stderr[0], "#3b6ea8", "positive"),
        (negative, spectrum.stderr[1], "#c2542d", "negative"),
    ):
        right.fill_between(
            spectrum.grid, np.maximum(curve - error, 1e-9), curve + error, color=colour, alpha=0.25
        )
        right.plot(spectrum.grid, curve, color=colour, label=label, linewidth=1.2)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_ylim(0.3 / spectrum.size, None)
    right.set_xlabel("|eigenvalue| of the whole Hessian")
    right.set_ylabel("share per decade")
    right.legend(frameon=False, title=f"below rounding: {spectrum.null:.1%}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
