"""Write the README's measured section, and docs/optimizers.md, from the JSON in benchmarks/results/.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from benchmarks import _story
from benchmarks._attacks_page import attacks
from benchmarks._gpu_page import gpu
from benchmarks._harness import machine
from benchmarks._race_page import page, races
from benchmarks._replication_page import page as replication_page
from benchmarks._replications import kept
from specdef_jax.certification import load_results
from specdef_jax.race import Ratio

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- measured: benchmarks/readme.py -->", "<!-- /measured -->"
STORY, STORY_END = "<!-- story: benchmarks/readme.py -->", "<!-- /story -->"
DIRECTIONS = (
    "top", "random", "bottom", "resistant", "informed", "output bias", "hidden bias", "dense bias",
    "inserted", "original",
)  # fmt: skip
OPTIMIZERS = {"sgd": "SGD", "momentum": "momentum .9", "adam": "Adam"}


def main() -> None:
    """Replace the sections between their markers, and write the pages and the figure."""
    path = ROOT / "README.md"
    text = path.read_text()
    for start, end, section in ((START, END, measured()), (STORY, STORY_END, story())):
        before, rest = text.split(start)
        text = f"{before}{start}\n{section}{end}{rest.split(end)[1]}"
    path.write_text(text)
    (RESULTS / "story.svg").write_bytes(_story.figure(kept()))
    (ROOT / "docs" / "optimizers.md").write_text(page())
    (ROOT / "docs" / "replication.md").write_text(replication_page())


def story() -> str:
    """Return what the first figure shows, and the figure."""
    told = f"{_story.told(kept())} Tables, and the paper's claims beside them:"
    return (
        f"{textwrap.fill(told, 120)}\n[docs/replication.md](docs/replication.md).\n\n"
        "![Steps and capability: no defence, SpecDef, SpecDef undone](benchmarks/results/story.svg)\n"
    )


def measured() -> str:
    """Return the section as Markdown."""
    return "\n".join(
        [
            certified(),
            races(),
            directions(),
            attacks(),
            theory(),
            deformation(),
            checkpoints(),
            curvature(),
            race_speed(),
            model_speed(),
            gpu(),
            "",
        ]
    )


def certified() -> str:
    """Tell what certification found."""
    results = load_results(RESULTS / "certify.json").results
    config, task, curvature = results["config"], results["task"], results["curvature"]["rows"]
    first, last = curvature[0], curvature[-1]
    preserved = {
        row["format"]: row["error"]
        for row in results["preservation"]["formats"]
        if row["alpha"] == last["alpha"]
    }
    errors = ", ".join(f"{name} {error:.1e}" for name, error in preserved.items())
    worst = max(row["congruence_error"] for row in curvature)
    lines = [
        f"`make certify` ({task['seeds']} pretraining seeds, {task['parameters']} parameters, target "
        f"{config['target']:g} nats, cap {config['steps']} steps; {machine(results)}; "
        f"{results['wall_seconds']:.0f} s after installation):",
        "",
        f"* Function at alpha {last['alpha']:g}: relative change of the logits {errors}.",
        f"* Sharpness {first['sharpness']:.3g} at alpha 1, {last['sharpness']:.4g} at alpha "
        f"{last['alpha']:g}; bounds {last['lower']:.4g} and {last['upper']:.4g}. Congruence to {worst:.0e}.",
        "",
        "| steps to the target, ratio to | " + " | ".join(OPTIMIZERS.values()) + " |",
        "|---|" + "---|" * len(OPTIMIZERS),
    ]
    matched = config["matched"]
    rows = [(f"top_{a:g}", f"top direction, alpha {a:g} / alpha 1") for a in config["alphas"] if a > 1]
    rows += [
        ("bottom", f"bottom direction, sharpness of alpha {matched:g} / alpha 1"),
        ("scalar", f"one bias rescaled, sharpness of alpha {matched:g} / original"),
        ("top_1", "inserting the identity (alpha 1) / original"),
        ("freeze", f"freeze at alpha {config['alphas'][-1]:g} / original"),
        ("fuse", f"fuse at alpha {config['alphas'][-1]:g} / original"),
        ("inject", "null control: inject / original"),
        ("original_other_seeds", "null control: original, other seeds / original"),
    ]
    ratios = {(r["arm"], r["optimizer"]): r for r in results["race"]["ratios"]}
    for arm, label in rows:
        cells = [_ratio(ratios[arm, optimizer]) for optimizer in OPTIMIZERS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", _equal_sharpness(results), ""]
    return "\n".join(lines)


def _equal_sharpness(results: dict[str, Any]) -> str:
    arms, cap = results["race"]["arms"], results["config"]["steps"]
    top = f"top_{results['config']['matched']:g}"
    parts = []
    for optimizer, label in OPTIMIZERS.items():
        told = []
        for arm, name in (
            (top, "top"),
            ("bottom", "bottom"),
            ("scalar", "one bias"),
        ):
            steps = sorted(cap if s != s else s for s in arms[arm]["optimizers"][optimizer]["steps"])
            median = steps[len(steps) // 2]
            told.append(f"{name} {'≥ ' if median >= cap else ''}{median:.0f}")
        parts.append(f"{label}: " + ", ".join(told))
    return "Median steps at equal sharpness. " + ". ".join(parts) + "."


def directions() -> str:
    """Tell what the choice of directions buys on three networks."""
    record = json.loads((RESULTS / "directions.json").read_text())
    config, summary = record["config"], record["summary"]
    arms = [arm for arm in DIRECTIONS if f"{config['networks'][0]}/{arm}" in summary]
    lines = [
        f"At equal sharpness (that of the top direction at alpha {config['matched_alpha']:g}), steps to the "
        f"target as a ratio to the top direction, SGD and Adam ({config['seeds']} seeds, cap "
        f"{config['steps']} steps, {machine(record)}):",
        "",
        "| | "
        + " | ".join(f"{network}, {o}" for network in config["networks"] for o in ("SGD", "Adam"))
        + " |",
        "|---|" + "---|" * (2 * len(config["networks"])),
    ]
    for arm in arms:
        found = [summary[f"{network}/{arm}"]["to_top"] for network in config["networks"]]
        cells = [_ratio(ratios[o]) for ratios in found for o in ("sgd", "adam")]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    floors = [
        f"{network} "
        + ", ".join(
            f"{arm} {floor:.2f}"
            for arm in arms
            if (floor := summary[f"{network}/{arm}"]["median_floor"]) is not None
        )
        for network in config["networks"]
    ]
    told = "The floor, below which the sharp directions alone cannot bring the loss (median, nats): "
    return "\n".join([*lines, "", told + "; ".join(floors) + ".", ""])


def theory() -> str:
    """Tell what the machine made of the theorems."""
    record, whole = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("theory", "theory_full"))
    mutants = json.loads((RESULTS / "mutants.json").read_text())["summary"]
    refuted = next(
        c
        for s in record["statements"]
        for c in s["certificates"]
        if s["statement"] == "2.4" and c["kind"] == "refuted" and "violate" in c["note"]
    )
    return (
        f"`python -m theory` ({machine(record)}): {_claims(record)}. "
        f"`--full` ({_work(whole):.0f} s of work): {_claims(whole)}. The "
        f"published bound on an off-diagonal "
        f"block, as literally read, is refuted: of {refuted['count']} matrices ({refuted['instance']}) "
        f"{refuted['note'].split('; ')[-1].replace(' of the instances', '')}; three corrected ones hold on "
        f"all. Of {mutants['mutants']} deliberate errors in `specdef_jax/bounds`, statements and tests miss "
        f"{mutants['survivors']}, apart from {mutants['equivalent']} that provably change nothing.\n"
    )


def _work(record: dict[str, Any]) -> float:
    return sum(statement["seconds"] for statement in record["statements"])


def _claims(record: dict[str, Any]) -> str:
    certificates = [c for s in record["statements"] for c in s["certificates"]]
    fail = sum(c["verdict"] == "fails" for c in certificates)
    count = sum(c["count"] for c in certificates)
    return (
        f"{len(record['statements'])} statements, {len(certificates)} certificates on {count:,} instances, "
        f"{fail} fail"
    )


def deformation() -> str:
    """Tell how fast the deformation is."""
    record = json.loads((RESULTS / "deform_subspace.json").read_text())
    s, (m, n) = record["summary"], record["config"]["shape"]
    return (
        f"Deforming one {m} x {n} float32 kernel, k = {record['config']['k']}: "
        f"{s['speedup_power_law']:.0f} times faster than the paper's algorithm by a full float64 SVD "
        f"(power-law spectrum with a gap; Gaussian: {s['speedup_gaussian']:.0f} times), "
        f"residual {s['residual']:.1e}, {100 * s['energy']:.2f}% of the energy, "
        f"{s['ratio_to_bare']:.2f} times a bare script; ten such layers {s['ten_layers_seconds']:.1f} s "
        f"({machine(record)}).\n"
    )


def checkpoints() -> str:
    """Tell what deforming whole checkpoints takes."""
    record = json.loads((RESULTS / "checkpoint.json").read_text())
    lines = [
        f"Checkpoints of random weights in real shapes ({machine(record)}); the peer is `cp -r` and "
        "sync, plus `sha256sum` of the output:",
        "",
        "| layout, placement | size | layers | stored | choosing, measuring | writing / peer | verify | "
        "fuse | peak memory (bound) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        made, stages = row["deform"], row["deform"]["stages"]
        cells = (
            f"{row['layout']}, {row['placement']}",
            f"{row['bytes'] / 1e9:.1f} GB",
            f"{made['layers']}",
            ", ".join(made["dtypes"]) + (", exact" if made["exact"] == made["layers"] else ""),
            f"{stages['choosing directions']:.0f} s, {stages['measuring']:.0f} s",
            f"{stages['writing']:.0f} s / {row['cp_seconds'] + row['sha256sum_seconds']:.0f} s",
            f"{row['verify']['seconds']:.0f} s",
            f"{row['fuse']['seconds']:.0f} s",
            f"{row['peak_bytes'] / 1e9:.2f} GB ({row['memory_bound_bytes'] / 1e9:.2f})",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def curvature() -> str:
    """Tell what an eigenvalue costs, and how far sampled spectra are from exact ones."""
    record = json.loads((RESULTS / "curvature.json").read_text())
    peers = [row["peer"] for row in record["rows"][0].get("torch", {}).get("rows", [])]
    lines = [
        f"Largest Hessian eigenvalue to a true relative residual of {record['config']['tol']:g}, seconds "
        f"(products); float32, {machine(record)}. A row's peers ran in turn with ours; those of PyTorch "
        "after it, on the same numbers:",
        "",
        "| network, parameters | ours | scipy | matfree | " + " | ".join(peers) + " | product / model |",
        "|---|---|---|---|" + "---|" * (len(peers) + 1),
    ]
    for row in record["rows"]:
        cells = [f"{row['network']}, {row['parameters']:,}"]
        cells += [_timing(row[tool], record["config"]["tol"]) for tool in ("ours", "scipy", "matfree")]
        cells += [_timing(peer, record["config"]["tol"]) for peer in row.get("torch", {}).get("rows", [])]
        lines.append("| " + " | ".join([*cells, f"{row['cost_ratio']:.2f}"]) + " |")
    pairs = record["rows"][0]["memory"]["pairs"]
    memory = "; ".join(
        f"{row['network']}: ours {v['ours']:.0f}, ARPACK {v['scipy']:.0f}, matfree {v['matfree']:.0f}"
        for row in record["rows"]
        for v in [row["memory"]["vectors"]]
    )
    lines += [
        "",
        f"In brackets a residual that missed the goal. Model: a bare product and the traffic of "
        f"orthogonalizing. Memory for {pairs} pairs, in vectors, product included, {memory}: inside one "
        "compiled loop the activations of the product stay allocated, which ARPACK, calling from outside, "
        "does not pay.",
        *_peers_ahead(record),
        "",
        "![Time to an eigenvalue, and the cost of a product by size](benchmarks/results/curvature.svg)",
        "",
        "![Hessian spectra of the bundled networks](benchmarks/results/spectra.svg)",
        "",
        _sampled(),
        "",
    ]
    return "\n".join(lines)


def _peers_ahead(record: dict[str, Any]) -> list[str]:
    """Say which peer reached the goal sooner, and after how many products."""
    told = []
    for row in record["rows"]:
        ours, tol = row["ours"], record["config"]["tol"]
        peers = {"scipy": row["scipy"], "matfree": row["matfree"]}
        peers |= {peer["peer"]: peer for peer in row.get("torch", {}).get("rows", []) if "seconds" in peer}
        for name, peer in peers.items():
            if peer["residual"] <= tol and peer["seconds"] < ours["seconds"]:
                taken = f"{peer['seconds']:.1f} s and {peer['products']} products"
                against = f"{ours['seconds']:.1f} and {ours['products']}"
                told.append(f"{name} on the {row['network']} ({taken} against {against})")
    if not told:
        return []
    return [
        "",
        f"Ahead of ours: {'; '.join(told)}. Ours looks at the true residual before it stops; where float32 "
        "rounding makes that look miss the goal by little, another round of products follows, which a tool "
        "that believes its recurrence does not make.",
    ]


def _sampled() -> str:
    record = json.loads((RESULTS / "spectra.json").read_text())
    config, rows = record["config"], record["rows"]
    lost = max(row["below_rounding"] for row in rows)
    return (
        f"Bars: every eigenvalue of the Hessian, deformed with alpha {config['alpha']:g} on the right. "
        f"Curves: stochastic Lanczos quadrature, {config['steps']} steps from {config['probes']} draws. It "
        "finds the outliers of alpha squared; the small end it lumps together, and its standard errors do "
        "not say so: so few nodes cannot tell small eigenvalues apart beside large ones. Up to "
        f"{lost:.0%} of the spectrum lies below rounding."
    )


def _timing(row: dict[str, Any], tol: float) -> str:
    if "seconds" not in row:
        return "failed"
    missed = "" if row["residual"] <= tol else f" [{row['residual']:.0e}]"
    return f"{row['seconds']:.2f} ({row['products']}){missed}"


def race_speed() -> str:
    """Tell how fast races are."""
    record = json.loads((RESULTS / "race_runner.json").read_text())
    told = ", ".join(
        f"batch {row['batch']}{' with early stop' if row['early_stop'] else ''} {row['ratio']:.1f} times"
        for row in record["rows"]
    )
    return f"A race against a Python loop with a jitted step over the same pairs, equal results: {told}.\n"


def _ratio(row: dict[str, Any]) -> str:
    fields = ("value", "low", "high", "censored", "seeds")
    return str(Ratio(**{f: row[f] for f in fields})).replace(">=", "≥ ").replace("inf", "∞")


def model_speed() -> str:
    """Tell how fast the models are beside PyTorch's."""
    record = json.loads((RESULTS / "models.json").read_text())
    rows, peers = record["rows"], record["config"]["peers"]
    lines = [
        f"Models beside their PyTorch implementations ({', '.join(f'{n} {v}' for n, v in peers.items())}; "
        f"float32, {machine(record)}, threads: {record['config']['threads']}): milliseconds of "
        "ours, and how many times faster, above 1, or slower; and ours deformed, every value projection a "
        "pair, over plain. XLA asks for its scratch memory anew at each call, which costs a training step a "
        "fault per page: with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, set for both, pages are of 2 MiB "
        "instead of 4 KiB.",
        "",
        "| model, parameters | pages | forward | training step | deformed / plain |",
        "|---|---|---|---|---|",
    ]
    for name, huge in sorted({(row["model"], row["huge_pages"]) for row in rows}):
        forward, step = (row for row in rows if (row["model"], row["huge_pages"]) == (name, huge))
        pages = "2 MiB" if huge else "4 KiB"
        cells = [
            f"{1000 * r['seconds']:.0f}, {r['ratio']:.2f} [{r['ratio_low']:.2f}, {r['ratio_high']:.2f}]"
            for r in (forward, step)
        ]
        cost = f"{forward['deformed_over_plain']:.2f}, {step['deformed_over_plain']:.2f}"
        lines.append(f"| {name}, {forward['parameters']:,} | {pages} | {' | '.join(cells)} | {cost} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
