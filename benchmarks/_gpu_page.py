"""What the README says of an accelerator, from the results beside those of the CPU."""

from __future__ import annotations

import json
from typing import Any

from benchmarks._harness import RESULTS

WHATS = ("forward", "training step", "decoding")


def gpu() -> str:
    """Return the paragraph and the table."""
    record = _read("throughput")
    config, summary = record["config"], record["summary"]
    layers = config["layout"]["num_hidden_layers"]
    lines = [
        f"On one {record['environment']['devices'][0].removeprefix('gpu: ')}: the layout of Llama 3.2 1B "
        f"with {summary['parameters'] / 1e9:.2f} billion random {config['dtype']} weights, batch "
        f"{config['batch']} of {config['length']} tokens, decoding {config['new']} after {config['prompt']}, "
        f"attention fused. All {7 * layers} projections are deformed, their compensations C dense or as "
        f"directions and factors, or {2 * layers} by gauge. Thousands of tokens per second, the share that "
        "the plain network's products are of the largest matrix product "
        f"({summary['matmul_peak_flops'] / 1e12:.0f} TFLOP/s here), and seconds over those of the plain "
        "network, run in turn [lowest, highest]:",
        "",
        "| | parameters | " + " | ".join(WHATS) + " |",
        "|---|---|" + "---|" * len(WHATS),
    ]
    rows = record["rows"]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    last = [row for row in rows if row["variant"] == variants[-1]]  # each measured the plain network, too
    cells = [f"{row['plain_tokens_per_second'] / 1e3:.1f}, {row['plain_share']:.0%}" for row in last]
    lines.append(f"| plain | {summary['parameters'] / 1e9:.2f}e9 | {' | '.join(cells)} |")
    for variant in variants:
        mine = [row for row in rows if row["variant"] == variant]
        cells = [
            f"{r['tokens_per_second'] / 1e3:.1f}, {r['share']:.0%}, {r['over_plain']:.2f} "
            f"[{r['over_plain_low']:.2f}, {r['over_plain_high']:.2f}]"
            for r in mine
        ]
        lines.append(f"| {variant} | {mine[0]['parameters'] / 1e9:.2f}e9 | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_others(), ""])


def _others() -> list[str]:
    """Say what else was measured there."""
    deformation, curvature, models = _read("deform_subspace"), _read("curvature"), _read("models")
    s, (m, n) = deformation["summary"], deformation["config"]["shape"]
    warm = deformation["rows"][0]["warm_seconds"]
    told = [
        f"The {m} x {n} kernel is deformed in {1000 * warm:.0f} ms there, {s['ratio_to_bare']:.1f} times a "
        "bare script."
    ]
    told += [
        f"The largest Hessian eigenvalue of the {row['network']}: ours {row['ours']['seconds']:.3f} s, "
        f"ARPACK through the same product {row['scipy']['seconds']:.2f}."
        for row in curvature["rows"]
    ]
    ratios = ", ".join(
        f"{row['model']}'s {row['what']} {row['ratio']:.1f} times as fast [{row['ratio_low']:.1f}, "
        f"{row['ratio_high']:.1f}]"
        for row in models["rows"]
    )
    return [" ".join([*told, f"Beside PyTorch on the same GPU, small models: {ratios}."])]


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / "gpu" / f"{name}.json").read_text())
