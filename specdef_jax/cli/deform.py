"""`specdef deform`: read a checkpoint, deform the selected kernels, write another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from jaxtyping import PyTree

from specdef_jax import hub
from specdef_jax.cli.checkpoint import deform_directory
from specdef_jax.cli.console import Report, reporting, show_table
from specdef_jax.errors import FileError
from specdef_jax.files import exists_already
from specdef_jax.parametrization import Deformed, is_structured
from specdef_jax.spec import Layer, Plan, SpecDef
from specdef_jax.specdef import apply_plan, plan
from specdef_jax.subspace_result import Status
from specdef_jax.trees import named_leaves

_COLUMNS = ("tensor", "shape", "dtype", "side", "sigma_1", "sigma_k", "residual", "status", "max rel. change")


def deform(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    *,
    alpha: float = SpecDef.alpha,
    k: int = SpecDef.k,
    layers: tuple[str, ...] = (),
    basis: Literal["symmetric", "rotated", "axis"] = "symmetric",
    side: Literal["auto", "output", "input"] = "auto",
    directions: Literal["top", "bottom", "random"] = "top",
    tol: float = SpecDef.tol,
    budget: float | None = None,
    placement: Literal["insert", "gauge"] = "insert",
    dequantize: Literal["bfloat16", "float16", "float32"] | None = None,
    layout: Literal["auto", "hf", "jax"] = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """Deform kernels of a checkpoint without changing the function it computes.

    Placement insert: the output has, for every deformed tensor NAME, the deformed weight NAME and its
    compensation NAME.comp (in an Orbax checkpoint NAME/weight and NAME/comp), and a record of how they
    multiply to the original; code that ignores the compensation computes garbage. Everything else is kept
    as it is, and the input is not modified. Placement gauge, for directories of safetensors files: value
    and output projections of attention are deformed in place, and the output is a stock checkpoint.

    A directory is read and written tensor by tensor; its config gets a model_type of its own (insert),
    and specdef.json tells what was done, with the error of each layer as stored. An interrupted run is
    resumed by the same command.

    Args:
      source: directory of safetensors files with their config.json, single .safetensors file, or
        directory of an Orbax PyTree checkpoint.
      out: where to write, in the same format.
      alpha: factor on the chosen singular directions, > 0.
      k: number of directions per kernel.
      layers: globs on tensor names, or ends of names, such as 'layers.*.mlp.up_proj.weight'; "." and
        "/" both part components. Without any, every matrix that is not an embedding.
      basis: how the directions are scaled: "symmetric" as in the paper, "rotated", or "axis".
      side: where the compensation stands; "auto" takes the side with fewer features.
      directions: which singular directions.
      tol: residual asked of the directions; missing it is reported, not an error.
      budget: largest relative error of a layer in its dtype that is accepted; "inf" accepts any. By
        default 1e-3 for a directory, whose layers get the narrowest dtype that keeps to it, and 0.1 else.
      placement: "insert" adds compensations, "gauge" nothing (directories only).
      dequantize: dtype to expand MXFP4 tensors to (directories only); without it they are left alone.
      layout: "hf" is (out, in) as in PyTorch, "jax" is (in, out); "auto" is "hf" for tensors that
        are called "weight".
      seed: of every random choice.
      overwrite: replace what is at the output path.

    Returns:
      The exit code.
    """
    if not source.exists():
        raise FileError(f"{source} does not exist; check the path.")
    whole = hub.is_shards(source)
    budget = (hub.BUDGET if whole else SpecDef.budget) if budget is None else budget
    spec = SpecDef(alpha, k, basis, side, directions, tol, budget)
    if whole:
        if overwrite:
            raise FileError(f"{out}: a directory is never overwritten; choose another path, or remove it.")
        return deform_directory(
            source, out, spec, layers, placement=placement, dequantize=dequantize, layout=layout, seed=seed
        )
    if placement != "insert" or dequantize:
        raise FileError(f"{source} is no directory of safetensors files, which gauge and dequantize need.")
    _check_paths(source, out, overwrite)
    with reporting() as report:
        report("reading", 0, 0)
        checkpoint = hub.read_tree(source)
        report("choosing directions", 0, 0)
        planned = plan(
            checkpoint.params,
            spec,
            where=hub.selector(layers),
            key=jax.random.key(seed),
            axes=hub.axes_for(checkpoint.params, layout),
        )
        report("deforming", 0, 0)
        deformed = apply_plan(checkpoint.params, planned)
        rows = _measure(checkpoint.params, deformed, planned, report)
        hub.write_tree(
            out,
            deformed,
            metadata=checkpoint.metadata,
            details=checkpoint.details | hub.details_of(planned),
            overwrite=overwrite,
            progress=lambda done, total: report("writing", done, total),
        )
    show_table(f"{len(planned)} deformed, written to {out}", _COLUMNS, rows)
    for status in sorted({worst_status(layer) for _, layer in planned.items()}):
        if status not in (Status.CONVERGED, Status.EXACT):
            print(f"{status.name}: {status.advice}")
    return 0


def worst_status(layer: Layer) -> Status:
    """Return the status of a layer, of a stack the one that asks most for attention."""
    found = {Status(int(value)) for value in np.ravel(layer.status)}
    order = (Status.RANK_DEFICIENT, Status.STALLED, Status.FLAT_SPECTRUM, Status.CONVERGED, Status.EXACT)
    return next(status for status in order if status in found)


def _check_paths(source: Path, out: Path, overwrite: bool) -> None:
    """Refuse, before any work, an output that cannot be or that would touch the input."""
    inside = source.is_dir() and out.resolve().is_relative_to(source.resolve())
    if inside or out.resolve() == source.resolve():
        raise FileError(f"{out} is the input or lies in it; inputs are never modified, choose another path.")
    if source.is_dir() == hub.is_safetensors(out):
        wanted = "directory" if source.is_dir() else ".safetensors file"
        raise FileError(f"{out} is not of the format of {source}; name a {wanted}.")
    if out.exists() and not overwrite:
        raise exists_already(out)


def _measure(params: PyTree, deformed: PyTree, planned: Plan, report: Report) -> list[tuple[str, ...]]:
    """Return a row per layer; the change is max |merged - original| / max |original|, in float64."""
    originals = dict(named_leaves(params, is_leaf=is_structured))
    rows = []
    for name, leaf in named_leaves(deformed, is_leaf=is_structured):
        if not isinstance(leaf, Deformed) or name not in planned.layers:
            continue
        report("measuring", len(rows), len(planned))
        layer, original = planned[name], np.asarray(originals[name], np.float64)
        change = np.max(np.abs(np.asarray(leaf.materialize(), np.float64) - original))
        sigma = np.asarray(layer.singular_values, float)
        rows.append(
            (
                name,
                " x ".join(map(str, original.shape)),
                str(leaf.weight.dtype),
                layer.side,
                f"{np.max(sigma[..., 0]):.4g}",
                f"{np.max(sigma[..., -1]):.4g}",
                f"{np.max(np.asarray(layer.residual)):.1e}",
                worst_status(layer).name.lower().replace("_", " "),
                f"{change / (np.max(np.abs(original)) or 1.0):.1e}",
            )
        )
    return rows
