"""`specdef certify`: certify the embedded default, or a checkpoint of yours, and write its report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from specdef_jax.cli.console import reporting, show_table
from specdef_jax.cli.importing import arguments, imported
from specdef_jax.errors import ProblemError


def certify(
    *,
    out: Path = Path("runs/certify"),
    size: Literal["smoke", "small", "default", "full"] = "default",
    task: str | None = None,
    model: Path | None = None,
    loss: str | None = None,
    data: str | None = None,
    held: str | None = None,
    target: float | None = None,
    layers: tuple[str, ...] = (),
    alpha: tuple[float, ...] = (4.0, 16.0),
    k: int = 1,
    steps: int = 400,
    fresh: bool = False,
) -> int:
    """Certify a network: preservation, curvature, races and attacks; or replicate an experiment of the paper.

    By default an MLP on handwritten digits. With --model a checkpoint (Llama, GPT-OSS, Stable Diffusion UNet)
    and your fine-tuning of it, in float64, so of a size that this machine can train; what deforming changes
    in the format it is stored in (divergence of the outputs, perplexity), and every attack with its bill,
    come with it. With --task one of the paper's experiments in miniature: text/llama, text/gpt_oss,
    diffusion, style, vision/cnn, vision/vit; defences by step sizes, utility, optimizers, LoRA, every attack.

    Args:
      out: directory for results.json and report.html; a rerun resumes from what is finished there.
      size: "smoke" takes seconds, "default" minutes, "full" an hour; of a task "small" (the default) takes 5
        to 30 minutes on two cores, "full" hours.
      task: name of an experiment.
      model: directory of config.json and safetensors files, like all that follows but the last.
      loss: module:function of your own, loss(params, *data) -> scalar, kernels (in, out); for a text model
        the cross-entropy of next tokens by default.
      data: module:name of a tuple of arrays that the attacker fine-tunes on, or of a function that returns
        one; tokens (batch, length) for a text model.
      held: module:name of inputs on which outputs are compared; by default the data of a text model.
      target: loss at which the attack has succeeded; by default three quarters of where it starts.
      layers: globs on tensor names; by default every value projection.
      alpha: factors to certify, beside 1.
      k: number of directions per kernel.
      steps: cap on the steps of a run.
      fresh: ignore finished stages.

    Returns:
      The exit code: 1 if a certificate failed.
    """
    from specdef_jax.certification import Config, model_task
    from specdef_jax.certification import certify as run

    if task is not None:
        if model is not None:
            raise ProblemError("--task and --model are two things to certify; give one of them.")
        return _replicate(task, "small" if size == "default" else size, out, fresh)
    if size == "small":
        raise ProblemError("size small is for --task NAME; name it.")
    config, mine = Config.preset(size), None
    if model is not None:
        if data is None:
            raise ProblemError("--model needs --data module:name, what the attacker fine-tunes on.")
        mine = model_task(
            model,
            arguments(data),
            None if loss is None else imported(loss),
            held=None if held is None else arguments(held),
            target=target,
            layers=layers,
        )
        alphas = tuple(sorted({1.0, *alpha}))
        config = replace(Config.preset("model"), alphas=alphas, matched=alphas[-1], k=k, steps=steps)
    elif loss or data or held or target or layers:
        raise ProblemError("--loss, --data, --held, --target and --layers are for --model DIR; name it.")
    with reporting() as report:
        certification = run(
            out,
            config,
            task=mine,
            fresh=fresh,
            progress=lambda stage, done, total: report(stage, done, total),
        )
    rows = certification.summary_rows()
    columns = list(rows[0]) if rows else []
    show_table("certificates", columns, [[str(row[column]) for column in columns] for row in rows])
    print(f"report: {out / 'report.html'}")
    return 0 if certification.holds else 1


def _replicate(task: str, size: str, out: Path, fresh: bool) -> int:
    from specdef_jax.replication import replicate
    from specdef_jax.replication.tables import matrix
    from specdef_jax.replication.words import headline

    with reporting() as report:
        results = replicate(task, size, out, fresh=fresh, progress=report)
    table = matrix(results)
    show_table(table.caption, table.head, [[str(cell) for cell in row] for row in table.rows])
    print(f"{headline(results)}.")
    print(f"report: {out / 'report.html'}")
    return 0
